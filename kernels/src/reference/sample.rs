//! Drawing a token.

use crate::Draw;
use crate::random::uniform;

/// The probabilities from which `draw` chooses among `logits: [V]`: the softmax at its temperature, zero outside the
/// smallest set of likeliest tokens (lowest id first among equals) that reaches `top_p`, and summing to one.
#[must_use]
pub fn probabilities(logits: &[f32], draw: &Draw) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Stable: equals stay in ascending order.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(std::cmp::Ordering::Equal));
    let mut weights = vec![0.0; logits.len()];
    if draw.temperature == 0.0 {
        weights[order[0]] = 1.0;
        return weights;
    }
    let largest = f64::from(logits[order[0]]);
    let weight = |i: usize| ((f64::from(logits[i]) - largest) / f64::from(draw.temperature)).exp();
    let all: f64 = order.iter().map(|&i| weight(i)).sum();
    let mut sum = 0.0;
    for i in order {
        weights[i] = weight(i);
        sum += weights[i];
        if sum >= f64::from(draw.top_p) * all {
            break;
        }
    }
    weights.iter().map(|weight| weight / sum).collect()
}

/// The first token, by id, at which the running probability exceeds the draw's random number.
#[must_use]
pub fn sample(logits: &[f32], draw: &Draw) -> u32 {
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
    token
}
