//! What the backend on GPUs makes for itself, as a straight line over the limits, which are not known yet when a worker
//! says what it needs.

use phalanx_kernels::cuda::{ScratchShape, arena_bytes, scratch_bytes};
use phalanx_proto::memory::LOGITS_ROWS_MAX;
use phalanx_proto::{Bytes, Limits, ModelConfig, Pool, Sampling, Scratch};

/// Ranks of a cell, at most; each costs some bytes.
const RANKS_MAX: usize = 1024;
/// Bytes that a layer's tables have for each expert: its slot's addresses and mark, and its place.
const EXPERT_BYTES: u64 = 48 + 4 + 8;
/// Buffers of a layer beside its experts.
const LAYER_BUFFERS: u64 = 16;
/// Rows, or sequences, over which the line's slope is taken.
const MANY: usize = 1 << 16;

/// The largest step of a rank with these limits, whatever its share.
fn shape(config: &ModelConfig, rows: usize, sequences: usize) -> ScratchShape {
    let n = |v: u32| v as usize;
    ScratchShape {
        rows,
        sequences,
        positions: n(config.context),
        pools: [Pool::Full, Pool::Window].len(),
        projected: n(config.hidden.max(config.attention_width())),
        heads: n(config.heads),
        head_dim: n(config.head_dim),
        experts: n(config.experts),
        top_k: n(config.top_k),
        slots: n(config.experts),
        ranks: RANKS_MAX,
        vocab: n(config.vocab),
        logits_rows: n(LOGITS_ROWS_MAX),
        sampled: rows,
        token_slots: sequences,
        edits: n(config.vocab),
        logprobs: n(Sampling::LOGPROBS_MAX),
    }
}

/// The largest step of a rank that keeps to these limits.
pub(crate) fn largest_step(config: &ModelConfig, limits: &Limits) -> ScratchShape {
    ScratchShape {
        positions: limits.context as usize,
        ..shape(config, limits.step_rows_max as usize, limits.seqs_max as usize)
    }
}

/// A line that no limits take the bound of the backend above. Buffers grow by a quarter more than they need at most, and
/// what attention needs has a bound of its own.
pub(super) fn gpu_scratch(config: &ModelConfig) -> Scratch {
    let with = |heads: u32, rows, sequences| {
        scratch_bytes(&ScratchShape { heads: heads as usize, ..shape(config, rows, sequences) })
    };
    let more = |bytes: u64| bytes + bytes / 4;
    let line = |many: u64, none: u64, per: u64| {
        u32::try_from(more(many.saturating_sub(none)).div_ceil(per)).unwrap_or(u32::MAX)
    };
    let none = with(0, 0, 0);
    let attention = with(config.heads, MANY, 0) - with(0, MANY, 0);
    let row = line(with(0, MANY, 0), none, MANY as u64);
    let stretches = u64::from(config.context.div_ceil(Limits::BLOCK_SIZE));
    let stretch = line(with(0, 0, MANY), none, MANY as u64 * stretches);
    let (layers, experts) = (config.layers.len() as u64, u64::from(config.experts));
    let tables = layers * experts * EXPERT_BYTES + 8 * RANKS_MAX as u64 * 20;
    let fixed = more(none) + attention + arena_bytes(tables, layers * (experts + LAYER_BUFFERS));
    Scratch { fixed: Bytes(fixed), row, stretch }
}

#[cfg(test)]
mod tests {
    use super::*;
    use phalanx_model::nano;

    #[test]
    fn the_bound_is_below_the_line() {
        let nano = nano::checkpoint().unwrap().config().clone();
        let large =
            ModelConfig { heads: 64, head_dim: 64, experts: 128, vocab: 201_088, context: 131_072, ..nano.clone() };
        for config in [nano, large] {
            let line = gpu_scratch(&config);
            for rows in [0, 1, 7, 64, 100, 256, 1000, 8192, 65_536] {
                for sequences in [0, 1, 3, 64, 300, 4096] {
                    let stretches = sequences * config.context.div_ceil(Limits::BLOCK_SIZE) as usize;
                    let bytes =
                        line.fixed.0 + u64::from(line.row) * rows as u64 + u64::from(line.stretch) * stretches as u64;
                    let bound = scratch_bytes(&shape(&config, rows, sequences));
                    assert!(bound <= bytes, "{rows} rows, {sequences} sequences: {bound} of {bytes}");
                    assert!(
                        bytes <= (700 << 20) + 2 * bound,
                        "{rows} rows, {sequences} sequences: {bytes} for {bound}"
                    );
                }
            }
        }
    }
}
