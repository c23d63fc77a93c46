//! How much of everything there may be. Computed once at start-up; exceeding one is a refusal, never growth.

use crate::config::ModelConfig;
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

    /// The bounds of a rank that holds `kv_tokens` tokens of context for `seqs_max` sequences. The window pool is
    /// sized so that it never runs out: every sequence's window, partly filled blocks at either end, and the rows
    /// of a step; and a quarter of the full pool, where windows are kept for prefixes to be used again.
    #[must_use]
    pub fn new(model: &ModelConfig, seqs_max: u32, step_rows_max: u32, kv_tokens: u32) -> Self {
        let size = Self::BLOCK_SIZE;
        let full_blocks = kv_tokens.div_ceil(size).max(1);
        let live = seqs_max * (model.window.div_ceil(size) + 2) + step_rows_max.div_ceil(size);
        let window_blocks = live + full_blocks / 4;
        let context = model.context.min(full_blocks.saturating_mul(size));
        Self { seqs_max, step_rows_max, block_size: size, full_blocks, window_blocks, context }
    }
}
