//! Root mean square normalisation.

/// `x: [H] -> [H]`, `x / sqrt(mean(x^2) + eps) * weight`.
//= arXiv:1910.07467 equation 4
#[must_use]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let root = (squares / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&x, &weight)| (f64::from(x) / root * f64::from(weight)) as f32).collect()
}
