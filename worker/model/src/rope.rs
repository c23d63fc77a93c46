//! Frequencies of the rotary position embedding with YaRN's interpolation by parts.
//!
//= arXiv:2309.00071 section 3.2

use std::f64::consts::PI;

use phalanx_kernels::RopeTable;
use phalanx_proto::Rope;

/// The default factor on q and k for a context extended `factor` times.
#[must_use]
pub fn default_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1f64.mul_add(factor.ln(), 1.0) }
}

/// Frequencies `[D/2]` of a head of `head_dim`.
///
/// Dimensions that turn more than `beta_fast` times over the original context keep their frequency, those that
/// turn less than `beta_slow` times are slowed by `factor`, and those between are interpolated linearly.
#[must_use]
pub fn table(rope: &Rope, head_dim: u32) -> RopeTable {
    let half = f64::from(head_dim / 2);
    let dimension_of =
        |rotations: f64| half * (f64::from(rope.original_context) / (rotations * 2.0 * PI)).ln() / rope.theta.ln();
    let (mut low, mut high) = (dimension_of(rope.beta_fast), dimension_of(rope.beta_slow));
    if rope.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(f64::from(head_dim) - 1.0));
    let span = (high - low).max(1e-3);
    let inv_freq = (0..head_dim / 2)
        .map(|j| {
            let frequency = rope.theta.powf(-f64::from(j) / half);
            let ramp = if rope.factor > 1.0 { ((f64::from(j) - low) / span).clamp(0.0, 1.0) } else { 0.0 };
            frequency * ((1.0 - ramp) + ramp / rope.factor)
        })
        .collect();
    RopeTable { inv_freq, scale: rope.attention_factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_of_the_published_models() {
        let rope = Rope {
            theta: 150_000.0,
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 4096,
            truncate: false,
            attention_factor: default_attention_factor(32.0),
        };
        let table = table(&rope, 64);
        assert!((table.scale - 1.346_573_590_279_972_7).abs() < 1e-12);
        for (j, expected) in [
            (0, 1.0),
            (1, 0.689_044_31),
            (2, 0.474_782_06),
            (8, 0.050_813_275),
            (9, 0.031_705_696),
            (12, 0.006_794_959_5),
            (16, 4.564_839_2e-4),
            (17, 1.293_187_0e-4),
            (18, 3.830_881_2e-5),
            (31, 3.023_511_4e-7),
        ] {
            let error = (table.inv_freq[j] / expected - 1.0).abs();
            assert!(error < 1e-7, "dimension {j}: {} is not {expected}", table.inv_freq[j]);
        }
    }
}
