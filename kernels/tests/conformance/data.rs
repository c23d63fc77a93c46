//! Numbers that look random and are always the same.

use std::sync::Arc;

use phalanx_kernels::memory::Source;
use phalanx_kernels::{EmbeddingBytes, EmbeddingSource, ExpertSource, RopeTable};

/// A linear congruential generator (Knuth's MMIX constants).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.bits()) * u64::from(n)) >> 32) as u32
    }

    /// In `[-1, 1)`.
    pub(crate) fn number(&mut self) -> f32 {
        self.bits() as f32 / (1u32 << 31) as f32 - 1.0
    }

    pub(crate) fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }

    /// A bf16 tensor.
    pub(crate) fn tensor(&mut self, n: usize, size: f32) -> Tensor {
        Tensor::new(&self.numbers(n).iter().map(|x| x * size).collect::<Vec<_>>())
    }
}

/// bf16, as bytes of a checkpoint and as numbers.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) bytes: Vec<u8>,
    pub(crate) values: Vec<f32>,
}

impl Tensor {
    /// Cuts numbers off to bf16.
    pub(crate) fn new(values: &[f32]) -> Self {
        let upper = |value: &f32| (value.to_bits() >> 16) as u16;
        Self {
            bytes: values.iter().flat_map(|value| upper(value).to_le_bytes()).collect(),
            values: values.iter().map(|value| f32::from_bits(u32::from(upper(value)) << 16)).collect(),
        }
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::memory(&self.bytes)
    }
}

/// An embedding table in memory.
pub(crate) struct Table(pub(crate) Vec<u8>);

impl EmbeddingBytes for Table {
    fn table(&self) -> &[u8] {
        &self.0
    }
}

impl Tensor {
    pub(crate) fn embedding(&self) -> EmbeddingSource {
        Arc::new(Table(self.bytes.clone()))
    }
}

/// An expert's tensors.
#[derive(Clone)]
pub(crate) struct Expert {
    pub(crate) gate_up_blocks: Vec<u8>,
    pub(crate) gate_up_scales: Vec<u8>,
    pub(crate) gate_up_bias: Tensor,
    pub(crate) down_blocks: Vec<u8>,
    pub(crate) down_scales: Vec<u8>,
    pub(crate) down_bias: Tensor,
}

impl Expert {
    /// Weights of about `2^-2`, so that `I` of `H` columns give gates of either sign and within the clamps or not.
    pub(crate) fn random(random: &mut Random, hidden: usize, intermediate: usize) -> Self {
        let mut bytes = |n: usize, low: u32, high: u32| -> Vec<u8> {
            (0..n).map(|_| (low + random.below(high - low)) as u8).collect()
        };
        let gate_up_blocks = bytes(intermediate * hidden, 0, 256);
        let gate_up_scales = bytes(2 * intermediate * hidden / 32, 122, 127);
        let down_blocks = bytes(intermediate * hidden / 2, 0, 256);
        let down_scales = bytes(intermediate * hidden / 32, 119, 125);
        Self {
            gate_up_blocks,
            gate_up_scales,
            gate_up_bias: random.tensor(2 * intermediate, 1.0),
            down_blocks,
            down_scales,
            down_bias: random.tensor(hidden, 1.0),
        }
    }

    pub(crate) fn source(&self) -> ExpertSource<'_> {
        ExpertSource {
            gate_up_blocks: Source::memory(&self.gate_up_blocks),
            gate_up_scales: Source::memory(&self.gate_up_scales),
            gate_up_bias: self.gate_up_bias.source(),
            down_blocks: Source::memory(&self.down_blocks),
            down_scales: Source::memory(&self.down_scales),
            down_bias: self.down_bias.source(),
        }
    }
}

/// Frequencies like gpt-oss's, for heads of `dim`.
pub(crate) fn rope_table(dim: usize) -> RopeTable {
    let frequency =
        |j: usize| 150_000f64.powf(-2.0 * j as f64 / dim as f64) * if j > dim / 4 { 1.0 / 32.0 } else { 1.0 };
    RopeTable { inv_freq: (0..dim / 2).map(frequency).collect(), scale: 1.346_573_590_279_972_7 }
}
