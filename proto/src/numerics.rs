//! What decides the bits of a result besides the weights and the row.

use std::fmt;

/// How much is rounded on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Weights widened in registers, f32 activations, f32 KV, f32 on the wire: the parity oracle.
    Exact,
    /// int8 activations per block of 32 in the experts, keys and values in 16 bits, bf16 rows on the wire.
    #[default]
    Fast,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        })
    }
}

/// How dense weights are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DenseType {
    /// bfloat16, as in the checkpoint.
    #[default]
    Bf16,
    /// int8 with a scale per block of 32, multiplied with rows rounded alike; never the router.
    Q8,
}

impl fmt::Display for DenseType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        })
    }
}

/// Two workers with the same id compute the same bits. A cell has one; it is part of the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NumericsId(pub String);

impl NumericsId {
    /// Longest accepted id in bytes.
    pub const LEN_MAX: usize = 256;

    /// The id of a backend: kernels' version, architecture family, precision and types; `kv` is how fast precision holds keys
    /// and values.
    #[must_use]
    pub fn new(kernels: u32, family: &str, precision: Precision, dense: DenseType, kv: &str) -> Self {
        let kv = match precision {
            Precision::Exact => "f32",
            Precision::Fast => kv,
        };
        Self(format!("{family}-{kernels}/{precision}/dense-{dense}/kv-{kv}"))
    }
}

impl fmt::Display for NumericsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
