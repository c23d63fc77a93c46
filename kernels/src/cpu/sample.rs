//! Drawing a token from a row of logits `[V]`.
//!
//! At temperature 0 the largest logit wins, the lowest id among equals. Otherwise token `i` has the weight
//! `exp((logit_i - largest) / temperature)`, and only the tokens that [`Draw`] keeps have one. Weights are summed in f64 by
//! ascending id, and the token at which the running sum exceeds `uniform(seed, choice, position)` of the whole is
//! drawn. NaN never wins; where nothing can win, token 0 does.

use std::cell::RefCell;

use super::exp::exp;
use super::isa::Simd;
use super::lanes::{Kernel, LANES, Lanes};
use crate::random::uniform;
use crate::{Draw, Sampled};

/// Draws a token; a function of its arguments alone, on every processor.
#[must_use]
pub fn sample(logits: &[f32], draw: &Draw) -> Sampled {
    sample_with(Simd::detect(), logits, draw)
}

thread_local! {
    /// A copy of the row, edited and then weighed.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// As [`sample`], with given instructions.
pub(super) fn sample_with(simd: Simd, logits: &[f32], draw: &Draw) -> Sampled {
    ROW.with_borrow_mut(|row| {
        let token = choose(simd, logits, draw, row);
        match draw.logprobs {
            None => Sampled { token, ..Sampled::default() },
            Some(count) => report(simd, logits, token, count as usize, row),
        }
    })
}

fn choose(simd: Simd, logits: &[f32], draw: &Draw, row: &mut Vec<f32>) -> u32 {
    let random = draw.temperature > 0.0 && draw.temperature.is_finite();
    let changed = !draw.edits.is_empty() || draw.allowed.is_some();
    if !random && !changed {
        return greedy(logits);
    }
    row.clear();
    row.extend_from_slice(logits);
    for edit in &draw.edits {
        if let Some(logit) = row.get_mut(edit.token as usize) {
            *logit = edit.apply(*logit);
        }
    }
    if let Some(words) = &draw.allowed {
        let bits = words.iter().copied().chain(std::iter::repeat(0));
        for (tokens, word) in row.chunks_mut(64).zip(bits) {
            if word != u64::MAX {
                let dropped = tokens.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
                dropped.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
    }
    let best = greedy(row);
    let largest = row.get(best as usize).copied().unwrap_or(f32::NAN);
    // Greedy also where no softmax exists: an infinite or missing maximum.
    if !(random && largest.is_finite()) {
        return best;
    }
    simd.run(Weigh { weights: row, largest, temperature: draw.temperature });
    if draw.top_k > 0 || draw.top_p < 1.0 || draw.min_p > 0.0 {
        let kept = Kept::new(row, draw);
        for (id, weight) in (0..).zip(row.iter_mut()) {
            if !kept.keeps(id, *weight) {
                *weight = 0.0;
            }
        }
    }
    let sum: f64 = row.iter().copied().map(f64::from).sum();
    let target = uniform(draw.seed, draw.choice, draw.position) * sum;
    let mut running = 0.0;
    for (id, &weight) in (0..).zip(row.iter()) {
        running += f64::from(weight);
        if running > target {
            return id;
        }
    }
    best
}

/// How likely `token` was, and the `count` most likely tokens.
fn report(simd: Simd, logits: &[f32], token: u32, count: usize, row: &mut Vec<f32>) -> Sampled {
    let largest = logits.get(greedy(logits) as usize).copied().unwrap_or(f32::NAN);
    row.clear();
    row.extend_from_slice(logits);
    simd.run(Weigh { weights: row, largest, temperature: 1.0 });
    let log_sum = row.iter().copied().map(f64::from).sum::<f64>().ln();
    let logprob = |logit: f32| (f64::from(logit) - f64::from(largest) - log_sum) as f32;
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count.min(logits.len()) + 1);
    for (id, &logit) in (0..).zip(logits) {
        // The first to come stays before those as large.
        if !logit.is_nan() && (top.len() < count || top.last().is_some_and(|&(_, least)| logit > least)) {
            let at = top.partition_point(|&(_, before)| before >= logit);
            top.insert(at, (id, logit));
            top.truncate(count);
        }
    }
    top.iter_mut().for_each(|(_, logit)| *logit = logprob(*logit));
    Sampled { token, logprob: logits.get(token as usize).map_or(f32::NAN, |&logit| logprob(logit)), top }
}

/// Turns logits into weights.
struct Weigh<'a> {
    weights: &'a mut [f32],
    largest: f32,
    temperature: f32,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for weight in self.weights {
            let value = exp((*weight - self.largest) / self.temperature);
            *weight = if value.is_nan() { 0.0 } else { value };
        }
    }
}

/// The largest logit, the lowest id among equals.
fn greedy(logits: &[f32]) -> u32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &logit)| *lane = larger(*lane, logit));
    }
    let largest = lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger);
    if largest == f32::NEG_INFINITY {
        return 0;
    }
    let at = logits.iter().position(|&logit| logit == largest).unwrap_or(0);
    u32::try_from(at).unwrap_or(0)
}

/// Tokens heavier than `least`, and those as heavy up to id `last`.
struct Kept {
    least: f32,
    last: u32,
}

impl Kept {
    /// What a draw keeps of tokens of these weights; at least one.
    fn new(weights: &[f32], draw: &Draw) -> Self {
        let count = if draw.top_k == 0 { usize::MAX } else { draw.top_k as usize };
        let heaviest = weights.iter().copied().fold(0.0, f32::max);
        let by_weight = Self { least: draw.min_p.min(1.0) * heaviest, last: u32::MAX };
        if count >= weights.len() && draw.top_p >= 1.0 {
            return by_weight;
        }
        let whole: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        // Most sets are small: sort only the heavy tokens, and more of them if those do not suffice.
        for least in [1e-2, 1e-5, 0.0] {
            let mut heavy: Vec<(u32, f32)> = (0..).zip(weights.iter().copied()).filter(|&(_, w)| w >= least).collect();
            heavy.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let all = heavy.len() >= count.min(weights.len());
            heavy.truncate(count);
            if !all && count < weights.len() && least > 0.0 {
                continue;
            }
            let of_kept = if count < weights.len() { heavy.iter().map(|(_, w)| f64::from(*w)).sum() } else { whole };
            let enough = f64::from(draw.top_p) * of_kept;
            let mut sum = 0.0;
            for &(last, weight) in &heavy {
                sum += f64::from(weight);
                if sum >= enough {
                    return if weight < by_weight.least { by_weight } else { Self { least: weight, last } };
                }
            }
            if all && count < weights.len() {
                let (last, weight) = heavy.last().copied().unwrap_or((u32::MAX, 0.0));
                return if weight < by_weight.least { by_weight } else { Self { least: weight, last } };
            }
        }
        by_weight
    }

    fn keeps(&self, id: u32, weight: f32) -> bool {
        weight > self.least || (weight == self.least && id <= self.last)
    }
}
