//! The experts' activation function.

use crate::SWIGLU_ALPHA;

/// `y: [2I] -> [I]`: gates `y[2i]` clamped from above, ups `y[2i + 1]` from both sides;
/// `g * sigmoid(alpha g) * (u + 1)`.
//= gpt-oss model.py#swiglu
#[must_use]
pub fn swiglu(y: &[f32], limit: f32) -> Vec<f32> {
    let limit = f64::from(limit);
    let pair = |pair: &[f32]| {
        let gate = f64::from(pair[0]).min(limit);
        let up = f64::from(pair[1]).clamp(-limit, limit);
        let sigmoid = 1.0 / (1.0 + (-f64::from(SWIGLU_ALPHA) * gate).exp());
        (gate * sigmoid * (up + 1.0)) as f32
    };
    y.chunks_exact(2).map(pair).collect()
}
