//! Matrix times vector.

/// `x: [cols] -> [rows]`, `x W^T + b` with `weight: [rows, cols]` and `bias: [rows]`.
#[must_use]
pub fn linear<X: Copy + Into<f64>, W: Copy + Into<f64>>(x: &[X], weight: &[W], bias: &[f32]) -> Vec<f32> {
    let rows = weight.chunks_exact(x.len()).zip(bias);
    rows.map(|(weight, &bias)| (dot(x, weight) + f64::from(bias)) as f32).collect()
}

fn dot<X: Copy + Into<f64>, W: Copy + Into<f64>>(x: &[X], weight: &[W]) -> f64 {
    x.iter().zip(weight).map(|(&x, &weight)| x.into() * weight.into()).sum()
}
