//! Drawing a token.

use crate::random::uniform;
use crate::{Draw, Sampled};

/// The probabilities from which `draw` chooses among `logits: [V]`, in the order of [`Draw`]: logits edited, tokens not
/// allowed dropped, the softmax at its temperature, zero outside what is kept (lowest id first among equals), and summing
/// to one.
#[must_use]
pub fn probabilities(logits: &[f32], draw: &Draw) -> Vec<f64> {
    let mut logits: Vec<f32> = logits.to_vec();
    for edit in &draw.edits {
        logits[edit.token as usize] = edit.apply(logits[edit.token as usize]);
    }
    let mut order: Vec<usize> = (0..logits.len()).filter(|&i| draw.allows(i)).collect();
    // Stable: equals stay in ascending order.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(std::cmp::Ordering::Equal));
    let mut weights = vec![0.0; logits.len()];
    if draw.temperature == 0.0 || order.is_empty() {
        weights[order.first().copied().unwrap_or(0)] = 1.0;
        return weights;
    }
    let largest = f64::from(logits[order[0]]);
    let weight = |i: usize| ((f64::from(logits[i]) - largest) / f64::from(draw.temperature)).exp();
    if draw.top_k > 0 {
        order.truncate(draw.top_k as usize);
    }
    let all: f64 = order.iter().map(|&i| weight(i)).sum();
    let mut sum = 0.0;
    let mut nucleus = Vec::new();
    for &i in &order {
        nucleus.push(i);
        sum += weight(i);
        if sum >= f64::from(draw.top_p) * all {
            break;
        }
    }
    nucleus.retain(|&i| weight(i) >= f64::from(draw.min_p));
    nucleus.iter().for_each(|&i| weights[i] = weight(i));
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// The logarithms of the probabilities of the softmax of `logits: [V]`.
#[must_use]
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().map(f64::from).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - largest - sum.ln()).collect()
}

/// The first token, by id, at which the running probability exceeds the draw's random number; and what is to be reported
/// with it.
#[must_use]
pub fn sample(logits: &[f32], draw: &Draw) -> Sampled {
    let target = uniform(draw.seed, draw.choice, draw.position);
    let mut running = 0.0;
    let mut token = 0;
    for (id, probability) in (0..).zip(probabilities(logits, draw)) {
        if probability > 0.0 {
            token = id;
        }
        running += probability;
        if running > target {
            break;
        }
    }
    let Some(count) = draw.logprobs else { return Sampled { token, ..Sampled::default() } };
    let logprobs = log_softmax(logits);
    let mut order: Vec<u32> = (0..).take(logits.len()).collect();
    let larger = |a: u32, b: u32| logits[b as usize].partial_cmp(&logits[a as usize]);
    order.sort_by(|&a, &b| larger(a, b).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate(count as usize);
    let top = order.into_iter().map(|id| (id, logprobs[id as usize] as f32)).collect();
    Sampled { token, logprob: logprobs[token as usize] as f32, top }
}
