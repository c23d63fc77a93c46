//! Paged KV memory: which block belongs to which sequence.
//!
//= arXiv:2309.06180 (PagedAttention)

use std::collections::BTreeMap;

use phalanx_proto::{BlockGrant, BlockId, Limits, Pool};

/// The blocks of one pool of one rank that belong to nobody.
#[derive(Clone, Debug)]
pub struct FreeBlocks {
    free: Vec<BlockId>,
    total: u32,
}

impl FreeBlocks {
    /// All blocks free.
    #[must_use]
    pub fn new(total: u32) -> Self {
        Self { free: (0..total).rev().map(BlockId).collect(), total }
    }

    /// Blocks that belong to nobody.
    #[must_use]
    pub fn len(&self) -> usize {
        self.free.len()
    }

    /// Whether every block belongs to somebody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.is_empty()
    }

    /// Blocks in all.
    #[must_use]
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// The free blocks.
    pub fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.free.iter().copied()
    }
}

/// The blocks of one sequence in one pool, by stretch.
#[derive(Clone, Debug, Default)]
pub struct BlockTable {
    blocks: BTreeMap<u32, BlockId>,
}

impl BlockTable {
    /// Blocks held.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.blocks.values().copied()
    }

    /// Stretches of `first..end` that still need a block.
    pub fn missing(&self, first: u32, end: u32) -> impl Iterator<Item = u32> + '_ {
        (first..end).filter(|index| !self.blocks.contains_key(index))
    }

    /// Takes a block for every stretch of `first..end` that has none.
    /// Takes nothing and returns `None` if there are too few.
    #[must_use]
    pub fn take(&mut self, pool: Pool, first: u32, end: u32, free: &mut FreeBlocks) -> Option<Vec<BlockGrant>> {
        let missing: Vec<u32> = self.missing(first, end).collect();
        if missing.len() > free.len() {
            return None;
        }
        let grants = missing.into_iter().zip(std::iter::from_fn(|| free.free.pop())).map(|(index, block)| {
            self.blocks.insert(index, block);
            BlockGrant { pool, index, block }
        });
        Some(grants.collect())
    }

    /// Gives back every block before stretch `first`.
    pub fn give_back_before(&mut self, first: u32, free: &mut FreeBlocks) {
        let kept = self.blocks.split_off(&first);
        free.free.extend(std::mem::replace(&mut self.blocks, kept).into_values());
    }

    /// Gives back every block.
    pub fn give_back(&mut self, free: &mut FreeBlocks) {
        free.free.extend(std::mem::take(&mut self.blocks).into_values());
    }
}

/// The stretches of `pool` that rows `start..end` write or see.
#[must_use]
pub const fn stretches(pool: Pool, start: u32, end: u32, window: u32, limits: &Limits) -> (u32, u32) {
    let first = match pool {
        Pool::Full => 0,
        Pool::Window => (start + 1).saturating_sub(window),
    };
    (first / limits.block_size, end.div_ceil(limits.block_size))
}
