//! Drawing a token from a row of logits `[V]`.
//!
//! At temperature 0 the largest logit wins, the lowest id among equals. Otherwise token `i` has the weight
//! `exp((logit_i - largest) / temperature)`; with `top_p` below 1 only the smallest set of the heaviest tokens
//! (lowest id first among equals) whose weights reach `top_p` of the sum is kept. Weights are summed in f64 by
//! ascending id, and the token at which the running sum exceeds `uniform(seed, choice, position)` of the whole is
//! drawn. NaN never wins; where nothing can win, token 0 does.

use super::exp::exp;
use super::isa::Simd;
use super::lanes::{Kernel, Lanes};
use crate::Draw;
use crate::random::uniform;

/// Draws a token; a function of its arguments alone, on every processor.
#[must_use]
pub fn sample(logits: &[f32], draw: &Draw) -> u32 {
    sample_with(Simd::detect(), logits, draw)
}

/// As [`sample`], with given instructions.
pub(super) fn sample_with(simd: Simd, logits: &[f32], draw: &Draw) -> u32 {
    let best = greedy(logits);
    let largest = logits.get(best as usize).copied().unwrap_or(f32::NAN);
    // Greedy also where no softmax exists: a temperature that is no number, an infinite or missing maximum.
    if !(draw.temperature > 0.0 && draw.temperature.is_finite() && largest.is_finite()) {
        return best;
    }
    let mut weights = logits.to_vec();
    simd.run(Weigh { weights: &mut weights, largest, temperature: draw.temperature });
    if draw.top_p < 1.0 {
        let kept = nucleus(&weights, draw.top_p);
        for (id, weight) in (0..).zip(&mut weights) {
            if !kept.keeps(id, *weight) {
                *weight = 0.0;
            }
        }
    }
    let sum: f64 = weights.iter().copied().map(f64::from).sum();
    let target = uniform(draw.seed, draw.choice, draw.position) * sum;
    let mut running = 0.0;
    for (id, &weight) in (0..).zip(&weights) {
        running += f64::from(weight);
        if running > target {
            return id;
        }
    }
    best
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
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (id, &logit) in (0..).zip(logits) {
        if logit > largest {
            (best, largest) = (id, logit);
        }
    }
    best
}

/// Tokens heavier than `least`, and those as heavy up to id `last`.
struct Kept {
    least: f32,
    last: u32,
}

impl Kept {
    fn keeps(&self, id: u32, weight: f32) -> bool {
        weight > self.least || (weight == self.least && id <= self.last)
    }
}

/// The smallest set of heaviest tokens that reaches `top_p` of the sum; at least one token.
fn nucleus(weights: &[f32], top_p: f32) -> Kept {
    let enough = f64::from(top_p) * weights.iter().map(|&w| f64::from(w)).sum::<f64>();
    // Most sets are small: sort only the heavy tokens, and more of them if those do not suffice.
    for least in [1e-2, 1e-5, 0.0] {
        let mut heavy: Vec<(u32, f32)> = (0..).zip(weights.iter().copied()).filter(|&(_, w)| w >= least).collect();
        heavy.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut sum = 0.0;
        for (last, least) in heavy {
            sum += f64::from(least);
            if sum >= enough {
                return Kept { least, last };
            }
        }
    }
    Kept { least: 0.0, last: u32::MAX }
}
