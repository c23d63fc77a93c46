//! What a backend multiplies weights with: expected results are made of the same numbers, so that a tolerance is for
//! the arithmetic alone.

use half::f16;
use phalanx_kernels::reference::{exchange, mxfp4};
use phalanx_kernels::{DenseFormat, Precision};

/// How a row is rounded before it meets a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// Not at all.
    Whole,
    /// To int8 a block of 32.
    Int8,
    /// To bf16.
    Bf16,
    /// To f16.
    F16,
}

impl Operand {
    /// Of projections on CPUs and of the reference: q8 weights meet int8 rows.
    pub(crate) fn of_cpu_projections(dense: DenseFormat) -> Self {
        if dense == DenseFormat::Q8 { Self::Int8 } else { Self::Whole }
    }

    /// Of the experts of CPUs and of the reference.
    pub(crate) fn of_cpu_experts(precision: Precision) -> Self {
        if precision == Precision::Fast { Self::Int8 } else { Self::Whole }
    }

    /// Of all matrices of CUDA devices but the router.
    pub(crate) fn of_cuda(precision: Precision) -> Self {
        if precision == Precision::Fast { Self::Bf16 } else { Self::Whole }
    }

    /// Of keys and values as CPUs and the reference keep them.
    pub(crate) fn of_cpu_keys(precision: Precision) -> Self {
        if precision == Precision::Fast { Self::F16 } else { Self::Whole }
    }

    /// The row as it is multiplied.
    pub(crate) fn round(self, x: &[f32]) -> Vec<f64> {
        match self {
            Self::Whole => x.iter().copied().map(f64::from).collect(),
            Self::Int8 => mxfp4::round_to_int8(x),
            Self::Bf16 | Self::F16 => self.round_f32(x).into_iter().map(f64::from).collect(),
        }
    }

    /// The same for what is f32 after rounding.
    pub(crate) fn round_f32(self, x: &[f32]) -> Vec<f32> {
        match self {
            Self::Whole => x.to_vec(),
            Self::Int8 => mxfp4::round_to_int8(x).into_iter().map(|x| x as f32).collect(),
            Self::Bf16 => exchange::from_wire(Precision::Fast, &exchange::to_wire(Precision::Fast, x)),
            Self::F16 => x.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
        }
    }
}
