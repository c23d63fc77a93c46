//! Every op of gpt-oss: naive as a reference, fast on CPUs, behind one trait.
//!
//! - [`backend`]: the vocabulary, about fifteen fused ops with their shapes.
//! - [`mod@reference`]: each op as the paper states it, in f64; the specification, never optimised.
//! - [`cpu`]: each op for AVX-512, AVX2 and any other processor, with the same bits on all of them.
//! - [`cuda`]: each op for CUDA devices, by the kernels of `csrc/`.
//! - [`memory`]: mapped files and buffers; [`ReadAhead`] brings in files before they are used.
//!
//! Absent on purpose: the model (which op follows which), ranks and transports, plans.
//! Two rules bind every backend: a row's result depends on the row alone, never on how many rows there are or
//! how work is divided; and every sum has one order.

#![allow(unsafe_code, reason = "one of the two homes of unsafe: instruction sets, mapped files and devices")]

mod ahead;
pub mod backend;
mod bf16;
pub mod cpu;
pub mod cuda;
mod f16;
pub mod memory;
pub mod parts;
pub mod random;
pub mod reference;
mod scales;
mod threads;
mod wire;

pub use ahead::ReadAhead;
pub use cpu::{Cpu, CpuOptions, Isa};
pub use cuda::Cuda;
pub use parts::HostParts;
pub use reference::Reference;

pub use backend::{
    BLOCK_SIZE, Backend, DenseFormat, DenseUse, Draw, Edit, EmbeddingBytes, EmbeddingSource, ExpertShape, ExpertSource,
    KernelError, KvLayer, KvShape, NO_SLOT, PoolShape, Precision, RopeTable, SEGMENT, SWIGLU_ALPHA, Sampled, Stack,
    StepInputs, TokenSource,
};

/// Changes whenever the bits of any op change: part of every worker's numerics id.
pub const VERSION: u32 = 7;
