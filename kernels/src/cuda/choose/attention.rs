//! Attention and the rotation before it.

use super::Choice;
use crate::SEGMENT;
use crate::cuda::ops::{ATTENTION_F32, ATTENTION_FEW, ATTENTION_MANY, ATTENTION_SEGMENTS_F32, AttentionArgs};

/// Threads of a block of the rotation, and numbers of a row that a thread takes at once, mostly.
const ROPE: [u32; 2] = [128, 4];

/// Blocks of the rotation of `rows` rows of `heads` query heads; a block goes on with what no other has.
pub(in crate::cuda) fn rope(rows: u32, [heads, kv_heads, dim]: [u32; 3]) -> [u32; 3] {
    // Pairs of queries and keys, and single values.
    let numbers = (heads + kv_heads) * (dim / 2) + kv_heads * dim;
    [rows, numbers.div_ceil(ROPE[0] * ROPE[1]), 1]
}

/// Query heads of a block of attention.
const HEADS: u32 = 8;
/// Dimensions of a head, at most.
pub(in crate::cuda) const DIM_MAX: usize = 128;

/// What attention by single segments may leave for its merge; beyond that there is work for all multiprocessors anyway.
pub(in crate::cuda) const PARTIALS_BYTES_MAX: usize = 256 << 20;

/// Positions of a chunk of keys in fast precision, which has its own maximum and sum.
pub(in crate::cuda) const CHUNK: usize = 256;
/// Stages, each with the keys and values of a segment, of a single row and of many rows, by [`tiling`].
const STAGES: [[u32; 2]; 2] = [[3, 2], [2, 2]];

/// Rows of a sequence that follow each other are many from here on.
pub(in crate::cuda) const MANY_ROWS: usize = 16;

/// Rows of a tile of many rows, for heads of up to 64 dimensions and for wider ones.
pub(in crate::cuda) const TILE_ROWS: [usize; 2] = [16, 8];

/// Which of [`TILE_ROWS`] and of the fast kernels is for heads of `dim`.
pub(in crate::cuda) const fn tiling(dim: usize) -> usize {
    (dim > 64) as usize
}

/// Blocks of a row or a tile: up to 8 query heads of one kv head.
fn columns(heads: u32, kv_heads: u32) -> u32 {
    kv_heads * (heads / kv_heads.max(1)).div_ceil(HEADS)
}

/// Exact attention by `rows` rows, whose longest past spans `segments` segments of keys. `true`: a block a segment, and a
/// merge.
pub(in crate::cuda) fn attention_exact(
    multiprocessors: u32,
    rows: u32,
    [heads, kv_heads, dim]: [u32; 3],
    segments: u32,
) -> (Choice<AttentionArgs>, bool) {
    let columns = columns(heads, kv_heads);
    // Blocks alone leave multiprocessors idle, and there is more than one segment to share out.
    let split = segments > 1 && rows * columns < multiprocessors;
    let op = if split { ATTENTION_SEGMENTS_F32 } else { ATTENTION_F32 };
    // Queries, probabilities, weights, and a tile of keys or values.
    let segment = SEGMENT as u32;
    let shared = (HEADS * DIM_MAX as u32 + HEADS * segment + 2 * HEADS + segment * (dim + 1)) * 4;
    (Choice { op, grid: [rows, columns, if split { segments } else { 1 }], shared }, split)
}

/// Fast attention by `tiles` tiles, of single rows or of many rows each, the widest of which spans `chunks` chunks of keys
/// of which partial results may be kept; with how many chunks are a block's share, 0 if a block takes all of its tile's.
pub(in crate::cuda) fn attention_fast(
    multiprocessors: u32,
    many: bool,
    tiles: u32,
    [heads, kv_heads, dim]: [u32; 3],
    chunks: u32,
) -> (Choice<AttentionArgs>, u32) {
    let columns = columns(heads, kv_heads);
    let blocks = u64::from(tiles) * u64::from(columns);
    let tiling = tiling(dim as usize);
    // So many blocks of a multiprocessor are busy at once.
    let (op, resident) = if many { (ATTENTION_MANY, 2) } else { (ATTENTION_FEW, 4) };
    let wanted = u64::from(multiprocessors) * resident;
    let parts = wanted / blocks.max(1);
    let share = match parts {
        // A join costs as much as a few chunks.
        _ if chunks < 3 => 0,
        // What many rows leave of a chunk is half as much as its keys and values, written and read again: that pays
        // where most multiprocessors would have nothing to do. No more blocks than are busy, since queries are dear.
        4.. if many => chunks.div_ceil(parts as u32),
        1.. if !many => 1,
        _ => 0,
    };
    let parts = if share == 0 { 1 } else { chunks.div_ceil(share) };
    let ring = STAGES[many as usize][tiling] * 2 * SEGMENT as u32 * (64 << tiling) * 2;
    // A block that joins has the outputs, maxima and sums so far; the last two in each lane of four.
    let pairs = if many { TILE_ROWS[tiling] as u32 * HEADS } else { HEADS };
    let shared = ring + if share == 0 { pairs * ((64 << tiling) + 4 * 2) * 4 } else { 0 };
    (Choice { op: op[tiling], grid: [tiles, columns, parts], shared }, share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rotation_of_a_row_is_shared_out() {
        // 72 heads of 32 pairs and 8 of 64 values, 512 a block.
        assert_eq!(rope(3, [64, 8, 64]), [3, 6, 1]);
        assert_eq!(rope(1, [1, 1, 2]), [1, 1, 1]);
    }

    #[test]
    fn long_pasts_of_few_rows_are_split() {
        let split = |n, segments| attention_exact(132, n, [64, 8, 64], segments).1;
        assert!(split(1, 2) && split(16, 128));
        assert!(!split(1, 1) && !split(17, 128) && !split(8192, 128));
        // 32 query heads of a kv head are four chunks.
        assert_eq!(attention_exact(132, 3, [64, 2, 128], 5).0.grid, [3, 8, 5]);
        assert!(attention_exact(132, 1, [8, 1, 128], 1).0.shared <= 48 << 10);
        let few = |n, chunks| attention_fast(132, false, n, [64, 8, 64], chunks);
        // A window is walked by one block, whatever is beside it.
        assert_eq!([few(1, 2).1, few(64, 2).1, few(100, 32).1], [0; 3]);
        assert_eq!((few(1, 32).1, few(1, 32).0.grid), (1, [1, 8, 32]));
        assert_eq!((few(64, 32).1, few(64, 32).0.grid), (1, [64, 8, 32]));
        let many = |n, chunks| attention_fast(132, true, n, [64, 8, 64], chunks);
        assert_eq!([many(1, 2).1, many(64, 32).1, many(9, 32).1], [0; 3]);
        assert_eq!((many(4, 32).1, many(4, 32).0.grid), (4, [4, 8, 8]));
        assert_eq!((many(8, 32).1, many(8, 32).0.grid), (8, [8, 8, 4]));
        for (many, dim) in [(false, 64), (false, 128), (true, 64), (true, 128)] {
            // As much as a block can have on every device from 8.0 on.
            let shared = attention_fast(132, many, 1, [8, 1, dim], 1).0.shared;
            assert!(shared <= 99 << 10, "{many}, {dim}: {shared}");
        }
    }
}
