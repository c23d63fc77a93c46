//! What was measured, for people and for machines.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::request::Outcome;
use crate::commands::say;

/// Bars of a plot, lowest first.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Columns of a plot.
const COLUMNS: usize = 48;

/// Times of many requests, sorted, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Times(Vec<f64>);

impl Times {
    fn new(times: impl Iterator<Item = Duration>) -> Self {
        let mut all: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
        all.sort_by(f64::total_cmp);
        Self(all)
    }

    /// The least time that `percent` of all do not exceed: the nearest rank.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil().max(1.0) as usize;
        self.0.get(rank - 1).copied()
    }

    fn mean(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.iter().sum::<f64>() / self.0.len() as f64)
    }

    fn columns(&self) -> [(&'static str, Option<f64>); 6] {
        let at = |percent| self.percentile(percent);
        [
            ("p50", at(50.0)),
            ("p90", at(90.0)),
            ("p95", at(95.0)),
            ("p99", at(99.0)),
            ("mean", self.mean()),
            ("max", self.0.last().copied()),
        ]
    }

    fn json(&self) -> Value {
        self.columns().into_iter().map(|(name, time)| (name.to_owned(), json!(time))).collect()
    }

    /// How many there are of each length, from 0 to the 99th percentile.
    fn plot(&self) -> Option<String> {
        let end = self.percentile(99.0).filter(|end| *end > 0.0)?;
        let mut counts = [0usize; COLUMNS];
        for time in &self.0 {
            counts[((time / end * COLUMNS as f64) as usize).min(COLUMNS - 1)] += 1;
        }
        let most = *counts.iter().max()?;
        let bar = |count: usize| if count == 0 { ' ' } else { BARS[(count * BARS.len()).div_ceil(most) - 1] };
        Some(format!("0 {} {end:.0} ms", counts.into_iter().map(bar).collect::<String>()))
    }
}

/// A run.
#[derive(Clone, Debug)]
pub struct Report {
    /// How long it took.
    pub duration: Duration,
    /// Most requests that were under way at once.
    pub concurrency: usize,
    /// How long after it was due a request was sent at most, if requests were due.
    pub latest: Option<Duration>,
    outcomes: Vec<Outcome>,
}

impl Report {
    /// The report of a run.
    #[must_use]
    pub const fn new(outcomes: Vec<Outcome>, duration: Duration, concurrency: usize, latest: Option<Duration>) -> Self {
        Self { duration, concurrency, latest, outcomes }
    }

    fn good(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|outcome| outcome.error.is_none())
    }

    /// Requests that failed, by kind.
    #[must_use]
    pub fn errors(&self) -> BTreeMap<&str, usize> {
        let mut errors = BTreeMap::new();
        for kind in self.outcomes.iter().filter_map(|outcome| outcome.error.as_deref()) {
            *errors.entry(kind).or_default() += 1;
        }
        errors
    }

    fn times(&self) -> [(&'static str, Times); 4] {
        [
            ("ttft", Times::new(self.good().filter_map(|outcome| outcome.ttft))),
            ("itl", Times::new(self.good().flat_map(|outcome| outcome.gaps.iter().copied()))),
            ("tpot", Times::new(self.good().filter_map(Outcome::tpot))),
            ("e2e", Times::new(self.good().map(|outcome| outcome.e2e))),
        ]
    }

    fn sum(&self, of: impl Fn(&Outcome) -> u64) -> u64 {
        self.good().map(of).sum()
    }

    /// For machines.
    #[must_use]
    pub fn json(&self) -> Value {
        let seconds = self.duration.as_secs_f64();
        let (prompt, completion) = (self.sum(|o| o.prompt_tokens), self.sum(|o| o.completion_tokens));
        let refused = self.outcomes.iter().filter_map(|outcome| outcome.retry_after_s).reduce(f64::max);
        let mut value = json!({
            "requests": self.outcomes.len(),
            "succeeded": self.good().count(),
            "errors": self.errors(),
            "retry_after_s_max": refused,
            "duration_s": seconds,
            "concurrency_max": self.concurrency,
            "late_ms_max": self.latest.map(|late| late.as_secs_f64() * 1e3),
            "prompt_tokens": prompt,
            "cached_prompt_tokens": self.sum(|o| o.cached_tokens),
            "completion_tokens": completion,
            "requests_per_s": self.good().count() as f64 / seconds,
            "output_tokens_per_s": completion as f64 / seconds,
            "total_tokens_per_s": (prompt + completion) as f64 / seconds,
        });
        for (name, times) in self.times() {
            value[format!("{name}_ms")] = times.json();
        }
        value
    }

    /// For people.
    ///
    /// # Errors
    /// The reader is gone.
    pub fn say(&self) -> Result<()> {
        let value = self.json();
        let number = |key: &str| value[key].as_f64().unwrap_or(0.0);
        say(format_args!(
            "{} requests in {:.1} s, {} failed, at most {} at once",
            value["requests"],
            number("duration_s"),
            self.outcomes.len() - self.good().count(),
            self.concurrency
        ))?;
        say(format_args!(
            "{:.2} requests/s, {:.1} output tokens/s, {:.1} tokens/s in all; {} prompt tokens ({} cached), {} generated",
            number("requests_per_s"),
            number("output_tokens_per_s"),
            number("total_tokens_per_s"),
            value["prompt_tokens"],
            value["cached_prompt_tokens"],
            value["completion_tokens"]
        ))?;
        if self.latest.is_some() {
            say(format_args!(
                "sent up to {:.1} ms after they were due: times count from when they were sent",
                number("late_ms_max")
            ))?;
        }
        let times = self.times();
        let names = times[0].1.columns().map(|(name, _)| format!("{name:>10}")).concat();
        say(format_args!("ms    {names}"))?;
        for (name, times) in &times {
            let cell = |(_, time): (&str, Option<f64>)| {
                time.map_or_else(|| format!("{:>10}", "-"), |ms| format!("{ms:>10.2}"))
            };
            say(format_args!("{name:<6}{}", times.columns().map(cell).concat()))?;
        }
        for (name, times) in &times[..2] {
            if let Some(plot) = times.plot() {
                say(format_args!("{name:<5} {plot}"))?;
            }
        }
        for (kind, count) in self.errors() {
            say(format_args!("failed: {count} x {kind}"))?;
        }
        Ok(())
    }
}

/// A request as one line of a file.
#[must_use]
pub fn line(number: u64, sent: Duration, outcome: &Outcome) -> Value {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    json!({
        "request": number, "sent_ms": ms(sent), "ttft_ms": outcome.ttft.map(ms), "e2e_ms": ms(outcome.e2e),
        "tpot_ms": outcome.tpot().map(ms), "prompt_tokens": outcome.prompt_tokens,
        "cached_prompt_tokens": outcome.cached_tokens, "completion_tokens": outcome.completion_tokens,
        "error": outcome.error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let times = |ms: &[u64]| Times::new(ms.iter().map(|&ms| Duration::from_millis(ms)));
        let ten = times(&[10, 9, 8, 7, 6, 5, 4, 3, 2, 1]);
        let at = [0.0, 10.0, 11.0, 50.0, 90.0, 99.0, 100.0].map(|percent| ten.percentile(percent).unwrap_or(0.0));
        assert_eq!(at, [1.0, 1.0, 2.0, 5.0, 9.0, 10.0, 10.0]);
        assert_eq!(times(&[]).percentile(50.0), None);
        assert_eq!(times(&[7]).percentile(99.0), Some(7.0));
    }

    #[test]
    fn time_a_token_leaves_out_the_first() {
        let ms = Duration::from_millis;
        let outcome = Outcome { ttft: Some(ms(100)), e2e: ms(500), completion_tokens: 5, ..Outcome::default() };
        assert_eq!(outcome.tpot(), Some(ms(100)));
        assert_eq!(Outcome { completion_tokens: 1, ..outcome }.tpot(), None);
    }
}
