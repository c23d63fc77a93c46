//! What is asked, and when: the same seed asks the same things at the same moments.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use phalanx_kernels::random::uniform;
use serde_json::{Value, json};

/// Longest line of a dataset, in bytes.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// Words of about one token each.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];

/// One request to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// The conversation.
    pub messages: Value,
    /// Tokens asked for at most.
    pub max_tokens: u32,
}

/// How prompts made of words come about.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Words of a prompt.
    pub input: u32,
    /// Tokens of an answer.
    pub output: u32,
    /// Both are spread evenly by this share to either side.
    pub spread: f64,
    /// Words that all prompts begin with.
    pub shared: u32,
    /// Decides all of it.
    pub seed: u64,
}

impl Shape {
    /// The request of this number.
    #[must_use]
    pub fn asked(&self, number: u64) -> Asked {
        let share = |of, which| {
            let factor = 1.0 + self.spread * (2.0 * self.draw(number, which) - 1.0);
            ((f64::from(of) * factor).round() as u32).max(1)
        };
        let (input, max_tokens) = (share(self.input, 0), share(self.output, 1));
        let shared = (0..self.shared.min(input)).map(|at| self.word(u64::MAX, at));
        let own = (self.shared..input).map(|at| self.word(number, at));
        let text = shared.chain(own).collect::<Vec<_>>().join(" ");
        Asked { messages: json!([{"role": "user", "content": text}]), max_tokens }
    }

    fn word(&self, number: u64, at: u32) -> &'static str {
        let index = (self.draw(number, 2 + at) * WORDS.len() as f64) as usize;
        WORDS[index.min(WORDS.len() - 1)]
    }

    fn draw(&self, number: u64, which: u32) -> f64 {
        uniform(self.seed ^ number.wrapping_mul(0x9e37_79b9), 0, which)
    }
}

/// When the request of this number comes, if requests come at random, so many a second.
pub fn arrivals(rate: f64, seed: u64) -> impl Iterator<Item = Duration> {
    let mut at = 0.0;
    (0u32..).map(move |number| {
        let gap = -(1.0 - uniform(seed, 1, number)).ln() / rate;
        at += gap;
        Duration::from_secs_f64(at.min(1e9))
    })
}

/// The requests of a file with one JSON object a line: `messages`, or a `prompt`, and perhaps `max_tokens`.
///
/// # Errors
/// The file cannot be read, or a line is no request; its number is named.
pub fn dataset(path: &Path, max_tokens: u32) -> Result<Vec<Asked>> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines = BufReader::new(file);
    let mut all = Vec::new();
    for number in 1.. {
        let mut line = String::new();
        let read = lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line);
        let here = || format!("{}, line {number}", path.display());
        if read.with_context(here)? == 0 {
            break;
        }
        if !line.trim().is_empty() {
            all.push(of_line(&line, max_tokens).with_context(here)?);
        }
    }
    if all.is_empty() {
        bail!("{} has no requests; give one JSON object a line, with `messages` or `prompt`", path.display());
    }
    Ok(all)
}

fn of_line(line: &str, max_tokens: u32) -> Result<Asked> {
    let value: Value = serde_json::from_str(line).context("it is no JSON object")?;
    let messages = match (&value["messages"], &value["prompt"]) {
        (messages @ Value::Array(_), _) => messages.clone(),
        (_, Value::String(prompt)) => json!([{"role": "user", "content": prompt}]),
        _ => bail!("it has neither `messages` (an array) nor `prompt` (a string)"),
    };
    let max_tokens = match &value["max_tokens"] {
        Value::Null => max_tokens,
        given => given.as_u64().and_then(|n| u32::try_from(n).ok()).context("`max_tokens` is no count")?,
    };
    Ok(Asked { messages, max_tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { input: 40, output: 10, spread: 0.5, shared: 8, seed: 3 };

    fn words(asked: &Asked) -> Vec<String> {
        asked.messages[0]["content"].as_str().unwrap_or_default().split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_same_seed_asks_the_same() {
        assert_eq!(SHAPE.asked(5), SHAPE.asked(5));
        assert_ne!(SHAPE.asked(5), SHAPE.asked(6));
        assert_ne!(SHAPE.asked(5), Shape { seed: 4, ..SHAPE }.asked(5));
    }

    #[test]
    fn prompts_are_spread_and_begin_alike() {
        let asked: Vec<Asked> = (0..200).map(|number| SHAPE.asked(number)).collect();
        let first = words(&asked[0])[..8].to_vec();
        let lens: Vec<usize> = asked.iter().map(|asked| words(asked).len()).collect();
        assert!(asked.iter().all(|asked| words(asked)[..8] == first));
        assert!(lens.iter().all(|len| (20..=60).contains(len)), "{lens:?}");
        let mean = lens.iter().sum::<usize>() / lens.len();
        assert!((35..=45).contains(&mean), "{mean}");
        assert!(asked.iter().all(|asked| (5..=15).contains(&asked.max_tokens)));
    }

    #[test]
    fn arrivals_have_their_rate() {
        let last = arrivals(20.0, 9).nth(3999).map_or(0.0, |at| at.as_secs_f64());
        assert!((last - 200.0).abs() < 20.0, "{last}");
        assert!(arrivals(20.0, 9).take(100).eq(arrivals(20.0, 9).take(100)));
        assert!(arrivals(20.0, 9).take(100).is_sorted());
    }
}
