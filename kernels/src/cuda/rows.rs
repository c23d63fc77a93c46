//! What a step computes, on the device.

use std::sync::Arc;

use super::device::{Buffer, Memory, bytes_of};
use crate::cpu::need;
use crate::{KernelError, KvLayer, KvShape, Precision};

/// f32 `[n, cols]` with room for a fixed number of rows.
#[derive(Debug)]
pub struct Rows {
    buffer: Buffer,
    cols: usize,
    capacity: usize,
    len: usize,
}

impl Rows {
    pub(super) fn new(memory: &Arc<Memory>, rows: usize, cols: usize) -> Result<Self, KernelError> {
        Ok(Self { buffer: memory.zeroed(rows * cols * 4)?, cols, capacity: rows, len: 0 })
    }

    pub(super) fn nothing(memory: &Arc<Memory>, cols: usize) -> Self {
        Self { buffer: memory.nothing(), cols, capacity: 0, len: 0 }
    }

    pub(super) const fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Where it is, to be written there.
    pub(super) const fn address_mut(&mut self) -> u64 {
        self.buffer.address_mut()
    }

    /// Numbers of a row.
    pub(super) const fn cols(&self) -> usize {
        self.cols
    }

    /// Rows it holds now, `n`.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Makes it hold `len` rows.
    pub(super) const fn resize(&mut self, len: usize) -> Result<(), KernelError> {
        if len > self.capacity {
            return Err(KernelError::Plan { what: "row", index: len - 1, len: self.capacity });
        }
        self.len = len;
        Ok(())
    }

    pub(super) fn read(&self) -> Result<Vec<f32>, KernelError> {
        let bytes = self.buffer.download(self.len * self.cols * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&number| f32::from_le_bytes(number)).collect())
    }

    pub(super) fn write(&mut self, values: &[f32]) -> Result<(), KernelError> {
        self.resize(values.len().checked_div(self.cols).unwrap_or(0))?;
        need("the numbers of whole rows", values.len(), self.len * self.cols)?;
        self.buffer.upload(0, &bytes_of(values))
    }
}

/// The experts chosen for each row and their weights, `[T, K]` each.
#[derive(Debug)]
pub struct Routes {
    experts: Buffer,
    weights: Buffer,
    top_k: usize,
    capacity: usize,
    len: usize,
    /// `E` of the router that chose.
    experts_count: usize,
}

impl Routes {
    pub(super) fn new(memory: &Arc<Memory>, rows: usize, top_k: usize) -> Result<Self, KernelError> {
        let (experts, weights) = (memory.zeroed(rows * top_k * 4)?, memory.zeroed(rows * top_k * 4)?);
        Ok(Self { experts, weights, top_k, capacity: rows, len: 0, experts_count: 0 })
    }

    pub(super) fn nothing(memory: &Arc<Memory>, top_k: usize) -> Self {
        let (experts, weights) = (memory.nothing(), memory.nothing());
        Self { experts, weights, top_k, capacity: 0, len: 0, experts_count: 0 }
    }

    pub(super) const fn experts(&self) -> u64 {
        self.experts.address()
    }

    pub(super) const fn weights(&self) -> u64 {
        self.weights.address()
    }

    pub(super) const fn top_k(&self) -> usize {
        self.top_k
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn experts_count(&self) -> usize {
        self.experts_count
    }

    /// Makes it hold `len` rows, chosen from `experts`.
    pub(super) const fn resize(&mut self, len: usize, experts: usize) -> Result<(), KernelError> {
        if len > self.capacity {
            return Err(KernelError::Plan { what: "row", index: len - 1, len: self.capacity });
        }
        (self.len, self.experts_count) = (len, experts);
        Ok(())
    }
}

/// f32 `[n]`
#[derive(Debug)]
pub struct Vector {
    pub(super) buffer: Buffer,
    pub(super) len: usize,
}

/// A dense matrix `[rows, cols]` with its bias, packed.
#[derive(Debug)]
pub struct Dense {
    pub(super) buffer: Buffer,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// The embedding table, bf16 `[V, H]`.
#[derive(Debug)]
pub struct Embedding {
    pub(super) buffer: Buffer,
    pub(super) cols: usize,
    pub(super) vocab: usize,
}

/// Keys and values: for each pool `[layer][block][kv head]`, there keys `[16][D]` and values `[16][D]`; f32 or bf16.
#[derive(Debug)]
pub struct Kv {
    pub(super) shape: KvShape,
    pools: Vec<Buffer>,
    /// Bytes of a block of a layer.
    block: usize,
}

impl Kv {
    pub(super) fn new(memory: &Arc<Memory>, precision: Precision, shape: &KvShape) -> Result<Self, KernelError> {
        let block = 2 * crate::BLOCK_SIZE * shape.kv_heads * shape.head_dim * crate::wire::bytes(precision);
        let pools = shape.pools.iter().map(|pool| memory.zeroed(pool.layers * pool.blocks * block));
        Ok(Self { shape: shape.clone(), pools: pools.collect::<Result<_, _>>()?, block })
    }

    pub(super) fn nothing(shape: &KvShape) -> Self {
        Self { shape: KvShape { pools: Vec::new(), ..shape.clone() }, pools: Vec::new(), block: 0 }
    }

    /// Where a layer begins; the layer exists.
    pub(super) fn layer(&self, layer: KvLayer) -> u64 {
        let blocks = self.shape.pools[layer.pool].blocks;
        self.pools[layer.pool].address() + (layer.layer * blocks * self.block) as u64
    }

    /// Copies a block of every layer of a pool.
    pub(super) fn copy_block(&mut self, pool: usize, from: u32, to: u32) -> Result<(), KernelError> {
        let pools = self.shape.pools.len();
        let shape =
            *self.shape.pools.get(pool).ok_or(KernelError::Plan { what: "KV pool", index: pool, len: pools })?;
        let from = crate::cpu::check("KV block", from as usize, shape.blocks)?;
        let to = crate::cpu::check("KV block", to as usize, shape.blocks)?;
        for layer in 0..shape.layers {
            let at = |block: usize| (layer * shape.blocks + block) * self.block;
            self.pools[pool].copy_within(at(from), at(to), self.block)?;
        }
        Ok(())
    }
}
