//! Which kernel an op takes and how it is cut into blocks: pure functions of shapes.
//!
//! A choice never changes bits: the kernels of an op add in the same order, and blocks share no sum. In fast precision
//! every token count takes `mma`, in exact none does.

use super::ops::{
    ATTENTION_BF16, ATTENTION_F32, ATTENTION_SEGMENTS_BF16, ATTENTION_SEGMENTS_F32, AttentionArgs, DENSE_F32,
    DENSE_MMA_8, DENSE_MMA_64, DenseArgs, Op,
};
use crate::{Precision, SEGMENT};

/// A kernel, its blocks and its shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice<A> {
    pub(super) op: Op<A>,
    pub(super) grid: [u32; 3],
    pub(super) shared: u32,
}

/// Rows of a tile of a matrix.
const TILE: u32 = 16;
/// Tokens of a block of the narrow kernels.
const NARROW: u32 = 8;
/// Tokens and row tiles of a block of the wide kernel.
const WIDE: [u32; 2] = [64, 8];
/// Partial sums of eight segments of a tile.
const PARTIALS_BYTES: u32 = 8 * TILE * NARROW * 4;
/// Tokens whose columns are staged, 64 and 8 for padding.
const STAGED_BYTES: u32 = WIDE[0] * (64 + 8) * 2;

/// A dense matrix of `rows` for `n` tokens; `widened` keeps activations in f32.
pub(super) fn dense(widened: bool, n: u32, rows: u32) -> Choice<DenseArgs> {
    let (tiles, chunks) = (rows.div_ceil(TILE), n.div_ceil(NARROW));
    if widened {
        return Choice { op: DENSE_F32, grid: [tiles, chunks, 1], shared: PARTIALS_BYTES };
    }
    // The narrow kernel reads the weights once for every 8 tokens, the wide one has an eighth of the blocks.
    if n <= 2 * NARROW {
        return Choice { op: DENSE_MMA_8, grid: [tiles, chunks, 1], shared: PARTIALS_BYTES };
    }
    Choice { op: DENSE_MMA_64, grid: [tiles.div_ceil(WIDE[1]), n.div_ceil(WIDE[0]), 1], shared: STAGED_BYTES }
}

/// Query heads of a block of attention.
const HEADS: u32 = 8;
/// Dimensions of a head, at most.
pub(super) const DIM_MAX: usize = 128;

/// What attention by single segments may leave for its merge; beyond that there is work for all multiprocessors anyway.
pub(super) const PARTIALS_BYTES_MAX: usize = 256 << 20;

/// Rows of a tile of attention, for heads of up to 64 dimensions and for wider ones.
pub(super) const TILE_ROWS: [usize; 2] = [8, 4];

/// Which of [`TILE_ROWS`] and of the fast kernels is for heads of `dim`.
pub(super) const fn tiling(dim: usize) -> usize {
    (dim > 64) as usize
}

/// Attention by `blocks` rows (fast: tiles of rows), whose longest past spans `segments` segments of keys. `true`: a block
/// a segment, and a merge.
pub(super) fn attention(
    precision: Precision,
    multiprocessors: u32,
    blocks: u32,
    [heads, kv_heads, dim]: [u32; 3],
    segments: u32,
) -> (Choice<AttentionArgs>, bool) {
    let columns = kv_heads * (heads / kv_heads.max(1)).div_ceil(HEADS);
    // Blocks alone leave multiprocessors idle, and there is more than one segment to share out.
    let split = segments > 1 && blocks * columns < multiprocessors;
    let tiling = tiling(dim as usize);
    let op = match (split, precision) {
        (false, Precision::Exact) => ATTENTION_F32,
        (false, Precision::Fast) => ATTENTION_BF16[tiling],
        (true, Precision::Exact) => ATTENTION_SEGMENTS_F32,
        (true, Precision::Fast) => ATTENTION_SEGMENTS_BF16[tiling],
    };
    let segment = SEGMENT as u32;
    let shared = match precision {
        // Queries, probabilities, weights, and a tile of keys or values.
        Precision::Exact => (HEADS * DIM_MAX as u32 + HEADS * segment + 2 * HEADS + segment * (dim + 1)) * 4,
        // Queries and keys or values in bf16, probabilities too, scores and weights in f32; with padding.
        Precision::Fast => {
            let (pairs, stride) = (TILE_ROWS[tiling] as u32 * HEADS, dim.next_multiple_of(16) + 8);
            ((pairs + segment) * stride + pairs * (segment + 8)) * 2 + pairs * (segment + 4 + 2) * 4
        }
    };
    (Choice { op, grid: [blocks, columns, if split { segments } else { 1 }], shared }, split)
}

/// Row tiles and warps of a block of the experts' fast kernels.
const EXPERT_TILES: u32 = 4;
/// Tokens whose columns are staged, 128 and 8 for padding.
const EXPERT_STAGED_BYTES: u32 = 32 * (128 + 8) * 2;

/// Blocks and shared memory of an expert matrix of `rows` in `slots` slots.
pub(super) fn experts(precision: Precision, rows: u32, slots: u32) -> ([u32; 3], u32) {
    let tiles = rows / TILE;
    match precision {
        Precision::Exact => ([tiles, slots, 1], 0),
        Precision::Fast => ([tiles.div_ceil(EXPERT_TILES), slots, 1], EXPERT_STAGED_BYTES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_matrices_take_mma_for_any_number_of_tokens_and_exact_ones_never() {
        for n in [1, 2, 7, 8, 9, 16, 17, 64, 65, 8192] {
            assert!(dense(false, n, 5120).op.kernel.name.starts_with("dense_mma"), "{n}");
            assert_eq!(dense(true, n, 5120).op.kernel.name, "dense_f32", "{n}");
        }
    }

    #[test]
    fn blocks_cover_every_row_and_token_once() {
        for (n, rows) in [(1, 1), (16, 16), (17, 17), (64, 128), (65, 129), (200, 201_088)] {
            for widened in [false, true] {
                let choice = dense(widened, n, rows);
                let [tokens, tiles] = if choice.op.kernel.name == "dense_mma_64" { WIDE } else { [NARROW, 1] };
                assert!((choice.grid[0] - 1) * tiles * TILE < rows && rows <= choice.grid[0] * tiles * TILE);
                assert!((choice.grid[1] - 1) * tokens < n && n <= choice.grid[1] * tokens);
            }
        }
    }

    #[test]
    fn long_pasts_of_few_rows_are_split() {
        let split = |n, segments| attention(Precision::Fast, 132, n, [64, 8, 64], segments).1;
        assert!(split(1, 2) && split(16, 128));
        assert!(!split(1, 1) && !split(17, 128) && !split(8192, 128));
        // 32 query heads of a kv head are four chunks.
        assert_eq!(attention(Precision::Exact, 132, 3, [64, 2, 128], 5).0.grid, [3, 8, 5]);
        for (precision, dim) in [(Precision::Exact, 128), (Precision::Fast, 64), (Precision::Fast, 128)] {
            let shared = attention(precision, 132, 1, [8, 1, dim], 1).0.shared;
            assert!(shared <= 48 << 10, "{precision:?}, {dim}: {shared}");
        }
    }

    #[test]
    fn nothing_needs_more_shared_memory_than_every_device_has() {
        let shared = [dense(true, 1, 1).shared, dense(false, 64, 64).shared, experts(Precision::Fast, 64, 1).1];
        assert!(shared.iter().all(|&bytes| bytes <= 48 << 10), "{shared:?}");
    }
}
