//! How far an op may be from the reference, as a part of the row's largest number, and why.

use phalanx_kernels::Precision;

use crate::operand::Operand;

/// f32 arithmetic on a row: the scale and two products are rounded, the sum of squares by a few units.
pub(crate) const NORM: f32 = 1e-6;

/// A sum of up to 3000 products in f32, each step rounded to `2^-24` of the sum so far; errors cancel mostly.
pub(crate) const PROJECT: f32 = 4e-6;

/// Two products and a sum, of cosines and sines that are rounded once.
pub(crate) const ROTATE: f32 = 3e-7;

/// Scores of up to 128 dimensions (an error in a score is a relative error of its weight), `exp` and sums.
/// Keys, values and queries are compared as the backend rounded them, so their rounding is not part of it. Where weights
/// are rounded to bf16 too, each is off by up to `2^-9` of itself; and values that cancel leave less than they were.
pub(crate) const fn attend(weights: Operand) -> f32 {
    match weights {
        Operand::Whole | Operand::Int8 => 4e-6,
        Operand::Bf16 => 8e-3,
        Operand::F16 => 1e-3,
    }
}

/// A softmax of a few numbers, of logits computed like a projection.
pub(crate) const ROUTE: f32 = 4e-6;

/// A sum of `K` products.
pub(crate) const COMBINE: f32 = 5e-7;

/// An expert, two matrices and SwiGLU between them. Fast: where a number lies close to the border of two int8 (or
/// bf16) values, a last bit decides which it becomes; an activation then differs by `1/127` of its block's largest
/// and its result by a weight of that, and the wire's rounding adds `2^-8`.
pub(crate) const fn expert(precision: Precision) -> f32 {
    match precision {
        Precision::Exact => 5e-6,
        Precision::Fast => 4e-3,
    }
}

/// `exp` of the logits, summed.
pub(crate) const PROBABILITY: f64 = 1e-6;
