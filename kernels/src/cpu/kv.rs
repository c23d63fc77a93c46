//! Keys and values in blocks of 16 positions.
//!
//! Layout of a pool: `[layer][block][kv head]`, and there keys `[D][16]` (a lane is a position) followed by values
//! `[16][D rounded up to 16]` (a lane is a dimension). f32 in exact precision, f16 in fast.

use super::lanes::{LANES, Lanes};
use crate::memory::Aligned;
use crate::threads::{Disjoint, Threads};
use crate::{BLOCK_SIZE, KernelError, KvLayer, KvShape, Precision, StepInputs, f16};

const _: () = assert!(BLOCK_SIZE == LANES, "a block of keys fills the lanes");

/// A stored key or value.
pub(super) trait Element: Copy + Default + Send + Sync {
    /// Rounds to the stored type.
    fn narrow(value: f32) -> Self;
    /// Sixteen of them, widened.
    fn load<L: Lanes>(l: L, v: &[Self; LANES]) -> L::F;
}

impl Element for f32 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn load<L: Lanes>(l: L, v: &[Self; LANES]) -> L::F {
        l.load(v)
    }
}

/// f16
impl Element for u16 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        f16::narrow(value)
    }

    #[inline(always)]
    fn load<L: Lanes>(l: L, v: &[Self; LANES]) -> L::F {
        l.load_f16(v)
    }
}

/// Keys and values of a rank, by pool.
#[derive(Debug)]
pub struct Kv {
    shape: KvShape,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Exact(Vec<Aligned<f32>>),
    Fast(Vec<Aligned<u16>>),
}

impl Kv {
    pub(super) fn new(precision: Precision, shape: &KvShape) -> Self {
        let len = |pool: &crate::PoolShape| pool.layers * pool.blocks * shape.kv_heads * Slab::len_of(shape.head_dim);
        let data = match precision {
            Precision::Exact => Data::Exact(shape.pools.iter().map(|pool| Aligned::resident(len(pool))).collect()),
            Precision::Fast => Data::Fast(shape.pools.iter().map(|pool| Aligned::resident(len(pool))).collect()),
        };
        Self { shape: shape.clone(), data }
    }

    pub(super) fn bytes(&self) -> u64 {
        match &self.data {
            Data::Exact(pools) => pools.iter().map(Aligned::bytes).sum(),
            Data::Fast(pools) => pools.iter().map(Aligned::bytes).sum(),
        }
    }

    pub(super) const fn kv_heads(&self) -> usize {
        self.shape.kv_heads
    }

    pub(super) const fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    /// Copies a block of every layer of a pool.
    pub(super) fn copy_block(&mut self, pool: usize, from: u32, to: u32) -> Result<(), KernelError> {
        let shape = *pool_of(&self.shape, pool)?;
        let (from, to) =
            (check("KV block", from as usize, shape.blocks)?, check("KV block", to as usize, shape.blocks)?);
        let block = self.shape.kv_heads * Slab::len_of(self.shape.head_dim);
        let ranges = (0..shape.layers).map(|layer| {
            let start = (layer * shape.blocks + from) * block;
            (start..start + block, (layer * shape.blocks + to) * block)
        });
        match &mut self.data {
            Data::Exact(pools) => ranges.for_each(|(source, to)| pools[pool].copy_within(source, to)),
            Data::Fast(pools) => ranges.for_each(|(source, to)| pools[pool].copy_within(source, to)),
        }
        Ok(())
    }

    /// Blocks of a layer's pool, if the layer exists.
    fn blocks(&self, layer: KvLayer) -> Result<usize, KernelError> {
        let pool = pool_of(&self.shape, layer.pool)?;
        check("KV layer", layer.layer, pool.layers)?;
        Ok(pool.blocks)
    }

    /// Checks that the blocks of all positions from `first(position)` up to each row's own exist.
    pub(super) fn check_tables(
        &self,
        inputs: &StepInputs,
        layer: KvLayer,
        first: impl Fn(usize) -> usize,
    ) -> Result<(), KernelError> {
        let blocks = self.blocks(layer)?;
        if inputs.positions.is_empty() {
            return Ok(());
        }
        let pools = inputs.tables.len();
        let tables = inputs.tables.get(layer.pool).ok_or(KernelError::Plan {
            what: "table of pool",
            index: layer.pool,
            len: pools,
        })?;
        for (&position, &sequence) in inputs.positions.iter().zip(&inputs.sequences) {
            let table = &tables[check("sequence", sequence as usize, tables.len())?];
            let position = position as usize;
            let stretch = check("stretch of a block table", position / BLOCK_SIZE, table.len())?;
            for &block in &table[first(position) / BLOCK_SIZE..=stretch] {
                check("KV block", block as usize, blocks)?;
            }
        }
        Ok(())
    }

    /// Writes keys and values `[T, 2 * Nkv * D]`, found at `offset` of each row of `qkv: [T, cols]`, at the rows'
    /// positions. The tables were checked.
    pub(super) fn store(
        &mut self,
        threads: &Threads,
        inputs: &StepInputs,
        layer: KvLayer,
        qkv: &[f32],
        cols: usize,
        offset: usize,
    ) {
        if inputs.positions.is_empty() {
            return;
        }
        let shape = &self.shape;
        let view = Slab::of_layer(shape, layer);
        match &mut self.data {
            Data::Exact(pools) => store(threads, inputs, &view, layer, &mut pools[layer.pool], qkv, cols, offset),
            Data::Fast(pools) => store(threads, inputs, &view, layer, &mut pools[layer.pool], qkv, cols, offset),
        }
    }

    /// The layer's keys and values for reading.
    pub(super) fn read(&self, layer: KvLayer) -> (Slab, Stored<'_>) {
        let stored = match &self.data {
            Data::Exact(pools) => Stored::Exact(&pools[layer.pool]),
            Data::Fast(pools) => Stored::Fast(&pools[layer.pool]),
        };
        (Slab::of_layer(&self.shape, layer), stored)
    }
}

/// A pool's numbers.
pub(super) enum Stored<'a> {
    Exact(&'a [f32]),
    Fast(&'a [u16]),
}

fn pool_of(shape: &KvShape, pool: usize) -> Result<&crate::PoolShape, KernelError> {
    shape.pools.get(pool).ok_or(KernelError::Plan { what: "KV pool", index: pool, len: shape.pools.len() })
}

/// `index` if it is below `len`.
pub(crate) const fn check(what: &'static str, index: usize, len: usize) -> Result<usize, KernelError> {
    if index < len { Ok(index) } else { Err(KernelError::Plan { what, index, len }) }
}

/// Where a layer's slabs, the keys and values of one (block, head), lie in its pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slab {
    /// `D`
    pub(super) head_dim: usize,
    kv_heads: usize,
    /// First element of the layer.
    first: usize,
}

impl Slab {
    /// `D` rounded up to whole lanes.
    pub(super) const fn padded(head_dim: usize) -> usize {
        head_dim.next_multiple_of(LANES)
    }

    /// Elements of a slab.
    const fn len_of(head_dim: usize) -> usize {
        BLOCK_SIZE * (head_dim + Self::padded(head_dim))
    }

    fn of_layer(shape: &KvShape, layer: KvLayer) -> Self {
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let first = layer.layer * shape.pools[layer.pool].blocks * kv_heads * Self::len_of(head_dim);
        Self { head_dim, kv_heads, first }
    }

    /// The slab of a block and a head.
    #[inline(always)]
    pub(super) const fn range(&self, block: u32, head: usize) -> std::ops::Range<usize> {
        let len = Self::len_of(self.head_dim);
        let start = self.first + (block as usize * self.kv_heads + head) * len;
        start..start + len
    }
}

#[allow(clippy::too_many_arguments, reason = "one step of `Kv::store`, split off to be generic")]
fn store<E: Element>(
    threads: &Threads,
    inputs: &StepInputs,
    view: &Slab,
    layer: KvLayer,
    pool: &mut [E],
    qkv: &[f32],
    cols: usize,
    offset: usize,
) {
    let dim = view.head_dim;
    let pool = Disjoint::new(pool);
    let tables = &inputs.tables[layer.pool];
    threads.each(view.kv_heads, qkv.len(), |head| {
        for (row, qkv) in qkv.chunks_exact(cols).enumerate() {
            let (position, sequence) = (inputs.positions[row] as usize, inputs.sequences[row] as usize);
            let block = tables[sequence][position / BLOCK_SIZE];
            let lane = position % BLOCK_SIZE;
            // SAFETY: tasks differ in the head, hence in their slabs; within a task each is dropped before the next.
            let slab = unsafe { pool.slice(view.range(block, head)) };
            let (keys, values) = slab.split_at_mut(dim * BLOCK_SIZE);
            let key = &qkv[offset + head * dim..][..dim];
            let value = &qkv[offset + (view.kv_heads + head) * dim..][..dim];
            for (out, key) in keys.as_chunks_mut::<BLOCK_SIZE>().0.iter_mut().zip(key) {
                out[lane] = E::narrow(*key);
            }
            for (out, value) in values[lane * Slab::padded(dim)..].iter_mut().zip(value) {
                *out = E::narrow(*value);
            }
        }
    });
}
