//! The format of dense weights in q8.

use super::mxfp4::BLOCK;
use crate::bf16;

/// `weights: [n]` as q8 holds them: each block of 32 is rounded to multiples of its scale, the even one of two. The scale
/// is the least bf16 that is not below `max |w| / 127`.
#[must_use]
pub fn round(weights: &[f32]) -> Vec<f64> {
    let block = |block: &[f32]| -> Vec<f64> {
        let least = block.iter().fold(0.0f32, |most, w| most.max(w.abs())) / 127.0;
        let nearest = bf16::widen(bf16::narrow(least));
        let scale = if nearest < least { f32::from_bits(nearest.to_bits() + (1 << 16)) } else { nearest };
        let round = |&w: &f32| if scale < f32::MIN_POSITIVE { 0.0 } else { f64::from((w / scale).round_ties_even()) };
        block.iter().map(|w| round(w) * f64::from(scale)).collect()
    };
    weights.chunks(BLOCK).flat_map(block).collect()
}
