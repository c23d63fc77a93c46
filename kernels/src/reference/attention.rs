//! Attention with sinks and a sliding window.

use std::ops::RangeInclusive;

/// Positions that a query at `position` sees: `position - window < j <= position`.
#[must_use]
pub fn visible(position: u32, window: Option<u32>) -> RangeInclusive<u32> {
    window.map_or(0, |window| (position + 1).saturating_sub(window))..=position
}

/// `q: [D]` over the visible `keys` and `values`, `[D]` each, to `[D]`. The sink joins the softmax's sum, unscaled and without a value.
//= gpt-oss model.py#sdpa
#[must_use]
pub fn attend(q: &[f32], keys: &[&[f32]], values: &[&[f32]], sink: f32) -> Vec<f32> {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let score = |key: &&[f32]| q.iter().zip(*key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.iter().map(score).collect();
    let largest = scores.iter().copied().fold(f64::from(sink), f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum = weights.iter().sum::<f64>() + (f64::from(sink) - largest).exp();
    let value = |d| weights.iter().zip(values).map(|(weight, value)| weight / sum * f64::from(value[d])).sum::<f64>();
    (0..q.len()).map(|d| value(d) as f32).collect()
}
