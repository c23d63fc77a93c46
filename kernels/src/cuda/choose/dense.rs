//! Dense matrices and the router.

use super::{Choice, NARROW, PARTIALS_BYTES, SHARED_MAX, STAGED_BYTES, TILE, WIDE};
use crate::cuda::ops::{
    DENSE_F32, DENSE_MMA_8, DENSE_MMA_64, DENSE_WGMMA, DenseArgs, DenseWgmmaArgs, ROUTE_FEW, ROUTE_MANY, RouteArgs,
};

/// A dense matrix of `rows` for `n` tokens; `widened` keeps activations in f32.
pub(in crate::cuda) fn dense(widened: bool, n: u32, rows: u32) -> Choice<DenseArgs> {
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

/// A dense kernel on Hopper, as `csrc/dense_wgmma.cu` has it.
struct DenseRing {
    /// Tokens of a block. Eight stay with it, all columns of them.
    tokens: u32,
    /// Row tiles of a block.
    tiles: u32,
    /// Column tiles of a stage.
    columns: u32,
    stages: u32,
}

const DENSE_RINGS: [DenseRing; 5] = [
    DenseRing { tokens: 8, tiles: 4, columns: 8, stages: 5 },
    DenseRing { tokens: 32, tiles: 4, columns: 8, stages: 8 },
    DenseRing { tokens: 64, tiles: 4, columns: 8, stages: 6 },
    DenseRing { tokens: 128, tiles: 8, columns: 4, stages: 5 },
    DenseRing { tokens: 256, tiles: 8, columns: 2, stages: 4 },
];

impl DenseRing {
    const fn resident(&self) -> bool {
        self.tokens == NARROW
    }

    /// Bytes of a column tile that come through the ring.
    const fn column(&self) -> u32 {
        self.tiles * 512 + if self.resident() { 0 } else { self.tokens * 32 }
    }

    /// Bytes of a block's sums.
    const fn sums(&self) -> u32 {
        self.tiles * TILE * self.tokens * 4
    }

    /// Barriers, stages, sums that wait, and `across` column tiles of resident tokens.
    fn shared(&self, across: u32) -> u64 {
        let resident = if self.resident() { u64::from(across) * 256 } else { 0 };
        u64::from(128 + self.stages * self.columns * self.column() + self.sums()) + resident
    }
}

/// Where halves of dense matrices meet: the sums of all units at most.
pub(in crate::cuda) const HALVES_BYTES: usize = 6 << 20;

/// What a multiprocessor of Hopper has less, and a block takes more, than what a block can have: of shared memory.
const SYSTEM_SHARED: u32 = 1 << 10;

/// How a dense matrix is multiplied on Hopper.
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct DenseWgmma {
    pub(in crate::cuda) choice: Choice<DenseWgmmaArgs>,
    /// Tokens of a group of pieces that `dense_pieces` makes before; `None`: the kernel takes tokens as they are.
    pub(in crate::cuda) group: Option<u32>,
    /// Blocks that share a unit: 2 if each has a half of the columns.
    pub(in crate::cuda) parts: u32,
}

/// A dense matrix `[rows, cols]` for `n` tokens on Hopper: by the kernel whose busiest block reads least.
pub(in crate::cuda) fn dense_wgmma(n: u32, rows: u32, cols: u32, multiprocessors: u32) -> DenseWgmma {
    let across = cols.div_ceil(TILE);
    let plan = |ring: &DenseRing, op, parts| {
        let units = u64::from(rows.div_ceil(TILE * ring.tiles)) * u64::from(n.div_ceil(ring.tokens));
        let (blocks, columns) = (units * u64::from(parts), across.div_ceil(parts));
        let shared = ring.shared(columns);
        // Two blocks of a multiprocessor hide each other's waits; more would gain nothing.
        let resident = (u64::from(SHARED_MAX + SYSTEM_SHARED) / (shared + u64::from(SYSTEM_SHARED))).min(2);
        let at_once = (u64::from(multiprocessors) * resident).max(1);
        // Halves are for blocks that are all there at once, and have room to meet.
        let meet = blocks <= at_once && units * u64::from(ring.sums()) <= HALVES_BYTES as u64;
        let fits = shared <= u64::from(SHARED_MAX) && (!ring.resident() || n <= ring.tokens) && (parts == 1 || meet);
        let turns = blocks.div_ceil(at_once);
        let meeting = if parts == 2 { 2 * u64::from(ring.sums()) } else { 0 };
        let bytes = turns * u64::from(columns) * u64::from(ring.column()) + meeting;
        let choice = Choice { op, grid: [blocks.min(at_once) as u32, 1, 1], shared: shared as u32 };
        let group = (!ring.resident()).then_some(ring.tokens);
        fits.then_some((bytes, DenseWgmma { choice, group, parts }))
    };
    // Of those that are alike the widest, which reads the least in all.
    let rings = DENSE_RINGS.iter().zip(DENSE_WGMMA).rev();
    let plans = rings.flat_map(|(ring, op)| [1, 2].map(|parts| plan(ring, op, parts))).flatten();
    plans.min_by_key(|&(bytes, _)| bytes).expect("all rings but the first fit any matrix").1
}

/// Rows that take the narrow router at most. It reads the matrix once for every 8, the wide one once for every 64; but a
/// block of the wide one takes as long whether there are others or not.
const ROUTE_FEW_MAX: u32 = 1024;
/// Groups of columns that are blocks of their own in the narrow router.
const ROUTE_GROUPS: u32 = 4;
/// Shared memory of the routers: what tells the last block, and partial sums of 8 segments; or two stages of 64 columns
/// with 8 for padding, in three parts, and a sum of each token and row.
const ROUTE_BYTES: [u32; 2] = [16 + PARTIALS_BYTES, 16 + 2 * 3 * WIDE[0] * (64 + 8) * 2 + WIDE[0] * WIDE[1] * TILE * 4];

/// The router in fast precision for `n` tokens, which chooses too. Columns are whole tiles; others are no model's, and go
/// the way of exact precision.
pub(in crate::cuda) fn route(n: u32, rows: u32, cols: u32) -> Option<Choice<RouteArgs>> {
    let tiles = rows.div_ceil(TILE);
    let choice = if n <= ROUTE_FEW_MAX {
        Choice { op: ROUTE_FEW, grid: [tiles, n.div_ceil(NARROW), ROUTE_GROUPS], shared: ROUTE_BYTES[0] }
    } else {
        Choice { op: ROUTE_MANY, grid: [tiles.div_ceil(WIDE[1]), n.div_ceil(WIDE[0]), 1], shared: ROUTE_BYTES[1] }
    };
    cols.is_multiple_of(TILE).then_some(choice)
}

/// Rows of logits, or of their sums, that up to `n` tokens need.
pub(in crate::cuda) fn route_sums(n: usize) -> usize {
    n.max(n.min(ROUTE_FEW_MAX as usize) * ROUTE_GROUPS as usize)
}

/// Chunks of `n` tokens that the router may have, of which each has a ticket.
pub(in crate::cuda) const fn route_chunks(n: usize) -> usize {
    n.div_ceil(NARROW as usize)
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
    fn the_router_in_fast_precision_covers_every_row_and_token_once() {
        for (n, rows) in [(1, 1), (8, 128), (9, 33), (64, 128), (1024, 32), (1025, 128), (8192, 300)] {
            let choice = route(n, rows, 2880).unwrap();
            let [tokens, tiles] = if choice.op.kernel.name == "route_many" { WIDE } else { [NARROW, 1] };
            assert!((choice.grid[0] - 1) * tiles * TILE < rows && rows <= choice.grid[0] * tiles * TILE);
            assert!((choice.grid[1] - 1) * tokens < n && n <= choice.grid[1] * tokens);
            assert!(choice.grid[1] as usize <= route_chunks(n as usize), "{n}: a chunk has no ticket");
            assert!((n * choice.grid[2]) as usize <= route_sums(n as usize), "{n}: a sum has no room");
            // As much as a block can have on every device from 8.0 on.
            assert!(choice.shared <= 99 << 10);
        }
        assert!(route(1, 128, 2888).is_none(), "half a column tile");
    }

    #[test]
    fn dense_matrices_on_hopper_take_what_has_the_least_to_read() {
        for (n, rows, cols, name, blocks, parts) in [
            (1, 5120, 2880, "dense_wgmma_8", 160, 2),
            (8, 2880, 4096, "dense_wgmma_8", 90, 2),
            (8, 201_088, 2880, "dense_wgmma_8", 132, 1),
            (9, 5120, 2880, "dense_wgmma_32", 80, 1),
            (32, 2880, 4096, "dense_wgmma_32", 90, 2),
            (64, 5120, 2880, "dense_wgmma_64", 80, 1),
            (64, 2880, 4096, "dense_wgmma_64", 90, 2),
            (128, 5120, 2880, "dense_wgmma_128", 80, 2),
            (128, 2880, 4096, "dense_wgmma_64", 90, 1),
            (256, 5120, 2880, "dense_wgmma_256", 80, 2),
            (2048, 2880, 4096, "dense_wgmma_256", 132, 1),
            (8192, 5120, 2880, "dense_wgmma_256", 132, 1),
            (8192, 2880, 4096, "dense_wgmma_256", 132, 1),
            // More columns than there is room for.
            (1, 64, 1 << 20, "dense_wgmma_32", 2, 2),
        ] {
            let DenseWgmma { choice, group, parts: got } = dense_wgmma(n, rows, cols, 132);
            let what = format!("{n} {rows} {cols}: {choice:?}");
            assert_eq!((choice.op.kernel.name, choice.grid, got), (name, [blocks, 1, 1], parts), "{what}");
            assert_eq!(group.is_none(), name == "dense_wgmma_8", "{what}");
        }
    }

    #[test]
    fn conformance_multiplies_by_every_dense_kernel_on_hopper() {
        let taken = |rows, cols, counts: [u32; 5]| {
            counts.map(|n| dense_wgmma(n, rows, cols, 16)).map(|plan| (plan.group.unwrap_or(8), plan.parts))
        };
        assert_eq!(taken(1000, 70, [3, 20, 64, 100, 300]), [(8, 1), (32, 1), (64, 1), (128, 1), (256, 1)]);
        assert_eq!(taken(70, 1002, [3, 20, 200, 300, 600]), [(8, 2), (32, 2), (64, 2), (64, 1), (128, 2)]);
        // Where faults are planted.
        assert_eq!(taken(65, 4000, [3, 40, 40, 40, 40])[..2], [(8, 2), (32, 2)]);
    }

    #[test]
    fn halves_of_dense_matrices_have_room_and_a_block_each() {
        for n in (1..40).chain((40..10_000).step_by(61)) {
            for (rows, cols) in
                [(1, 1), (16, 100), (5120, 2880), (2880, 4096), (201_088, 2880), (1 << 20, 16), (48, 1 << 20)]
            {
                for multiprocessors in [1, 16, 132, 1 << 20] {
                    let DenseWgmma { choice, parts, .. } = dense_wgmma(n, rows, cols, multiprocessors);
                    assert!(
                        choice.shared <= SHARED_MAX && choice.grid[0] >= 1 && choice.grid[0] <= 2 * multiprocessors
                    );
                    let ring =
                        DENSE_RINGS.iter().zip(DENSE_WGMMA).find(|(_, op)| op.kernel == choice.op.kernel).unwrap().0;
                    let units = rows.div_ceil(TILE * ring.tiles) * n.div_ceil(ring.tokens);
                    if parts == 2 {
                        assert_eq!(choice.grid[0], 2 * units, "{n} {rows} {cols}");
                        assert!((units * ring.sums()) as usize <= HALVES_BYTES);
                    }
                    if choice.grid[0] > multiprocessors {
                        assert!(2 * (choice.shared + SYSTEM_SHARED) <= SHARED_MAX + SYSTEM_SHARED, "{n} {rows} {cols}");
                    }
                }
            }
        }
    }
}
