//! How much of everything there may be. Computed once at start-up; exceeding one is a refusal, never growth.

use crate::plan::Pool;

/// The bounds of one rank, the same on every rank of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that live on a rank at once.
    pub seqs_max: u32,
    /// Rows of a rank in one step.
    pub step_rows_max: u32,
    /// Positions of a KV block.
    pub block_size: u32,
    /// KV blocks of a rank for full layers.
    pub full_blocks: u32,
    /// KV blocks of a rank for sliding layers.
    pub window_blocks: u32,
    /// Longest sequence in tokens.
    pub context: u32,
}

impl Limits {
    /// Positions of a KV block, fixed by the kernels' layout of keys.
    pub const BLOCK_SIZE: u32 = 16;

    /// Blocks of `pool` on a rank.
    #[must_use]
    pub const fn blocks(&self, pool: Pool) -> u32 {
        match pool {
            Pool::Full => self.full_blocks,
            Pool::Window => self.window_blocks,
        }
    }

    /// Most blocks of the window pool that one sequence can need: the window before the first row of a
    /// chunk, the chunk, and a partly filled block at either end.
    #[must_use]
    pub const fn window_blocks_of_sequence(&self, window: u32) -> u32 {
        (window + self.step_rows_max).div_ceil(self.block_size) + 1
    }
}
