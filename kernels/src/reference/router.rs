//! Choosing experts.

/// The `top_k` largest of `logits: [E]` in descending order, the lowest expert among equals, with the softmax over those alone.
//= gpt-oss model.py#MLPBlock
#[must_use]
pub fn route(logits: &[f32], top_k: usize) -> Vec<(u32, f32)> {
    let mut experts: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    // Stable: equals stay in ascending order.
    experts.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal));
    experts.truncate(top_k);
    let largest = experts.first().map_or(0.0, |first| f64::from(first.1));
    let weight = |logit: f32| (f64::from(logit) - largest).exp();
    let sum: f64 = experts.iter().map(|&(_, logit)| weight(logit)).sum();
    experts.iter().map(|&(expert, logit)| (expert, (weight(logit) / sum) as f32)).collect()
}
