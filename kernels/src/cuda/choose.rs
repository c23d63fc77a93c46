//! Which kernel an op takes and how it is cut into blocks: pure functions of shapes.
//!
//! A choice never changes bits: the kernels of an op add in the same order, however blocks share a sum. In fast
//! precision every token count takes `mma`, in exact none does.

use super::ops::{
    ATTENTION_F32, ATTENTION_FEW, ATTENTION_MANY, ATTENTION_SEGMENTS_F32, AttentionArgs, DENSE_F32, DENSE_MMA_8,
    DENSE_MMA_64, DENSE_WGMMA, DOWN_BF16, DOWN_F32, DOWN_WGMMA, DenseArgs, DenseWgmmaArgs, EXPERTS_WGMMA, ExpertArgs,
    GATE_UP_BF16, GATE_UP_F32, GATE_UP_WGMMA, Op, RECEIVE, RECEIVE_FEW, ROUTE_FEW, ROUTE_MANY, ReceiveArgs, RouteArgs,
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

/// A dense kernel on Hopper, as `csrc/dense_wgmma.cu` has it; a multiprocessor holds one block.
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
    DenseRing { tokens: 8, tiles: 4, columns: 8, stages: 8 },
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

/// Row tiles whose sums can wait in global memory, and bytes of these sums.
const DENSE_TICKETS: u32 = 1024;
const DENSE_SUMS: u32 = 12 << 20;
/// What halves of dense matrices need to meet: a ticket a row tile, and sums.
pub(super) const HALVES_BYTES: usize = (DENSE_TICKETS * 4 + DENSE_SUMS) as usize;

/// How a dense matrix is multiplied on Hopper.
#[derive(Clone, Copy, Debug)]
pub(super) struct DenseWgmma {
    pub(super) choice: Choice<DenseWgmmaArgs>,
    /// Tokens of a group of pieces that `dense_pieces` makes before; `None`: the kernel takes tokens as they are.
    pub(super) group: Option<u32>,
    /// Blocks that share a unit: 2 if each has a half of the columns.
    pub(super) parts: u32,
}

/// A dense matrix `[rows, cols]` for `n` tokens on Hopper: by the kernel whose busiest multiprocessor reads least.
pub(super) fn dense_wgmma(n: u32, rows: u32, cols: u32, multiprocessors: u32) -> DenseWgmma {
    let across = cols.div_ceil(TILE);
    let plan = |ring: &DenseRing, op, parts| {
        let units = u64::from(rows.div_ceil(TILE * ring.tiles)) * u64::from(n.div_ceil(ring.tokens));
        let (blocks, columns) = (units * u64::from(parts), across.div_ceil(parts));
        let shared = ring.shared(columns);
        // Halves are for blocks that are all there at once, and have room to meet.
        let meet = blocks <= u64::from(multiprocessors)
            && units * u64::from(ring.tiles) <= u64::from(DENSE_TICKETS)
            && blocks * u64::from(ring.sums()) <= u64::from(DENSE_SUMS);
        let fits = shared <= u64::from(SHARED_MAX) && (!ring.resident() || n <= ring.tokens) && (parts == 1 || meet);
        let turns = blocks.div_ceil(u64::from(multiprocessors.max(1)));
        let meeting = if parts == 2 { 2 * u64::from(ring.sums()) } else { 0 };
        let bytes = turns * u64::from(columns) * u64::from(ring.column()) + meeting;
        let choice = Choice { op, grid: [blocks.min(u64::from(multiprocessors)) as u32, 1, 1], shared: shared as u32 };
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
pub(super) fn route(n: u32, rows: u32, cols: u32) -> Option<Choice<RouteArgs>> {
    let tiles = rows.div_ceil(TILE);
    let choice = if n <= ROUTE_FEW_MAX {
        Choice { op: ROUTE_FEW, grid: [tiles, n.div_ceil(NARROW), ROUTE_GROUPS], shared: ROUTE_BYTES[0] }
    } else {
        Choice { op: ROUTE_MANY, grid: [tiles.div_ceil(WIDE[1]), n.div_ceil(WIDE[0]), 1], shared: ROUTE_BYTES[1] }
    };
    cols.is_multiple_of(TILE).then_some(choice)
}

/// Rows of logits, or of their sums, that up to `n` tokens need.
pub(super) fn route_sums(n: usize) -> usize {
    n.max(n.min(ROUTE_FEW_MAX as usize) * ROUTE_GROUPS as usize)
}

/// Chunks of `n` tokens that the router may have, of which each has a ticket.
pub(super) const fn route_chunks(n: usize) -> usize {
    n.div_ceil(NARROW as usize)
}

/// Threads of a block of the rotation, and numbers of a row that a thread takes at once, mostly.
const ROPE: [u32; 2] = [128, 4];

/// Blocks of the rotation of `rows` rows of `heads` query heads; a block goes on with what no other has.
pub(super) fn rope(rows: u32, [heads, kv_heads, dim]: [u32; 3]) -> [u32; 3] {
    // Pairs of queries and keys, and single values.
    let numbers = (heads + kv_heads) * (dim / 2) + kv_heads * dim;
    [rows, numbers.div_ceil(ROPE[0] * ROPE[1]), 1]
}

/// Query heads of a block of attention.
const HEADS: u32 = 8;
/// Dimensions of a head, at most.
pub(super) const DIM_MAX: usize = 128;

/// What attention by single segments may leave for its merge; beyond that there is work for all multiprocessors anyway.
pub(super) const PARTIALS_BYTES_MAX: usize = 256 << 20;

/// Positions of a chunk of keys in fast precision, which has its own maximum and sum.
pub(super) const CHUNK: usize = 256;
/// Stages, each with the keys and values of a segment, of a single row and of many rows, by [`tiling`].
const STAGES: [[u32; 2]; 2] = [[3, 2], [2, 2]];

/// Rows of a sequence that follow each other are many from here on.
pub(super) const MANY_ROWS: usize = 16;

/// Rows of a tile of many rows, for heads of up to 64 dimensions and for wider ones.
pub(super) const TILE_ROWS: [usize; 2] = [16, 8];

/// Which of [`TILE_ROWS`] and of the fast kernels is for heads of `dim`.
pub(super) const fn tiling(dim: usize) -> usize {
    (dim > 64) as usize
}

/// Blocks of a row or a tile: up to 8 query heads of one kv head.
fn columns(heads: u32, kv_heads: u32) -> u32 {
    kv_heads * (heads / kv_heads.max(1)).div_ceil(HEADS)
}

/// Exact attention by `rows` rows, whose longest past spans `segments` segments of keys. `true`: a block a segment, and a
/// merge.
pub(super) fn attention_exact(
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
pub(super) fn attention_fast(
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

/// How what was received is listed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receive {
    pub(super) choice: Choice<ReceiveArgs>,
    /// Warps that walk over entries.
    pub(super) stretches: u32,
    /// Items that a block moves to their tiles; 0: another kernel moves rows.
    pub(super) moves: u32,
}

/// Entries that every block lists for itself, at most.
const FEW_ENTRIES: u32 = 1024;
/// Expert slots of a layer on a rank.
pub(super) const SLOTS_MAX: usize = 2048;
/// Numbers in shared memory of how many items of each slot a warp has.
const COUNTS_MAX: u32 = 8 << 10;

/// Received are at most `entries`, of which at most `items` are for this rank's `slots`; they go to tiles where `tiled`.
pub(super) fn receive(
    tiled: bool,
    [entries, items]: [u32; 2],
    [ranks, slots]: [u32; 2],
    multiprocessors: u32,
) -> Receive {
    let few = tiled && entries <= FEW_ENTRIES;
    let (op, blocks) = if few { (RECEIVE_FEW, items.clamp(1, multiprocessors.max(1))) } else { (RECEIVE, 1) };
    let moves = if few { items.div_ceil(blocks).max(1) } else { 0 };
    let warps = op.kernel.threads / 32;
    let stretches = (COUNTS_MAX / slots.max(1)).clamp(1, warps);
    // Senders, moves, and numbers: two of each warp, totals, slots.
    let shared = ranks * 32 + moves * 16 + (2 * warps + 4 + slots + stretches * slots) * 4;
    Receive { choice: Choice { op, grid: [blocks, 1, 1], shared }, stretches, moves }
}

/// A matrix of the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExpertMatrix {
    /// `[2 I, H]`
    GateUp,
    /// `[H, I]`
    Down,
}

/// Shared memory that a block can have on Hopper.
pub(super) const SHARED_MAX: u32 = 227 << 10;

/// A ring of stages on Hopper, as `csrc/experts_wgmma.cu` has it.
struct Ring {
    /// Items of a block.
    items: u32,
    /// Row tiles of a block.
    tiles: u32,
    /// Blocks of 32 columns of a stage.
    blocks: u32,
    stages: u32,
    /// Blocks of a multiprocessor, by shared memory and registers.
    resident: u32,
}

impl Ring {
    /// Barriers, units that begin with a stage, stages, and the slots' first chunks.
    const fn shared(&self, slots: u32) -> u32 {
        let stage = self.blocks * (self.tiles * (256 + 16) + self.items * 64);
        128 + self.stages * (32 + stage) + (slots + 1) * 4
    }
}

const RINGS: [Ring; 5] = [
    Ring { items: 8, tiles: 4, blocks: 6, stages: 5, resident: 4 },
    Ring { items: 16, tiles: 4, blocks: 6, stages: 4, resident: 4 },
    Ring { items: 32, tiles: 8, blocks: 6, stages: 4, resident: 2 },
    Ring { items: 48, tiles: 8, blocks: 6, stages: 3, resident: 2 },
    Ring { items: 176, tiles: 12, blocks: 2, stages: 7, resident: 1 },
];

/// Launches of the experts on Hopper.
#[derive(Clone, Copy, Debug)]
pub(super) enum ExpertLaunches {
    /// Both matrices by one.
    Together(Choice<ExpertArgs>),
    /// Gate-up, and down.
    Apart([Choice<ExpertArgs>; 2]),
}

/// The experts on Hopper, for about `items` items in `slots` slots. A guess that is wrong costs time only: each kernel takes any
/// number, and all add in the same order. (How many [`receive`] takes is no guess.)
pub(super) fn experts_wgmma(
    [hidden, intermediate]: [u32; 2],
    slots: u32,
    items: u32,
    multiprocessors: u32,
) -> ExpertLaunches {
    // Weights are read once for every `items` of a ring: so a ring holds what nearly all slots have where choices are even.
    let ring = match items.div_ceil(slots.max(1)) {
        0..=2 => 0,
        3..=8 => 1,
        9..=20 => 2,
        21..=44 => 3,
        _ => 4,
    };
    let Ring { tiles, items: chunk, resident, .. } = RINGS[ring];
    let shared = RINGS[ring].shared(slots);
    // Units of slots that are all in use, at most: beyond them and beyond what is resident, blocks would find nothing.
    let chunks = u64::from(slots) + u64::from(items / chunk);
    let units = |rows: u32| u64::from(rows.div_ceil(TILE * tiles)) * chunks;
    let resident_blocks = u64::from(multiprocessors * resident);
    let blocks = |units: u64| [units.min(resident_blocks) as u32, 1, 1];
    let (gate_up, down) = (units(2 * intermediate), units(hidden));
    // Where every unit of gate-up has a block of its own, those of down would only wait.
    let waits = u64::from(items) * u64::from((2 * intermediate).div_ceil(TILE * tiles)) <= resident_blocks;
    match EXPERTS_WGMMA.get(ring) {
        Some(&op) if ring > 0 || !waits => {
            ExpertLaunches::Together(Choice { op, grid: blocks(gate_up + down), shared })
        }
        _ => {
            let apart = usize::from(ring > 0);
            ExpertLaunches::Apart([
                Choice { op: GATE_UP_WGMMA[apart], grid: blocks(gate_up), shared },
                Choice { op: DOWN_WGMMA[apart], grid: blocks(down), shared },
            ])
        }
    }
}

/// Row tiles and warps of a block of the experts' fast kernels.
const EXPERT_TILES: u32 = 4;
/// Tokens whose columns are staged, 128 and 8 for padding.
const EXPERT_STAGED_BYTES: u32 = 32 * (128 + 8) * 2;

/// An expert matrix of `rows` in `slots` slots.
pub(super) fn experts(precision: Precision, matrix: ExpertMatrix, rows: u32, slots: u32) -> Choice<ExpertArgs> {
    let tiles = rows / TILE;
    let op = match (precision, matrix) {
        (Precision::Exact, ExpertMatrix::GateUp) => GATE_UP_F32,
        (Precision::Exact, ExpertMatrix::Down) => DOWN_F32,
        (Precision::Fast, ExpertMatrix::GateUp) => GATE_UP_BF16,
        (Precision::Fast, ExpertMatrix::Down) => DOWN_BF16,
    };
    match precision {
        Precision::Exact => Choice { op, grid: [tiles, slots, 1], shared: 0 },
        Precision::Fast => Choice { op, grid: [tiles.div_ceil(EXPERT_TILES), slots, 1], shared: EXPERT_STAGED_BYTES },
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

    #[test]
    fn hopper_takes_as_many_items_at_once_as_slots_have() {
        let choose = |slots, items| match experts_wgmma([2880, 2880], slots, items, 132) {
            ExpertLaunches::Together(both) => vec![both],
            ExpertLaunches::Apart(each) => each.to_vec(),
        };
        for (items, names) in [
            (0, vec!["gate_up_wgmma_8", "down_wgmma_8"]),
            (4, vec!["gate_up_wgmma_8", "down_wgmma_8"]),
            (8, vec!["experts_wgmma_8"]),
            (2 * 128, vec!["experts_wgmma_8"]),
            (2 * 128 + 1, vec!["experts_wgmma_16"]),
            (20 * 128, vec!["experts_wgmma_32"]),
            (44 * 128, vec!["experts_wgmma_48"]),
            (32_768, vec!["gate_up_wgmma_176", "down_wgmma_176"]),
        ] {
            let choices = choose(128, items);
            assert_eq!(choices.iter().map(|choice| choice.op.kernel.name).collect::<Vec<_>>(), names, "{items}");
            for choice in choices {
                assert!(choice.grid[0] >= 1 && choice.grid[0] <= 132 * 4 && choice.shared <= SHARED_MAX, "{choice:?}");
            }
        }
        // Blocks that are resident together share the multiprocessor's 228 KiB, 1 KiB of each block being the system's.
        for ring in &RINGS {
            assert!(ring.resident * (ring.shared(128) + 1024) <= 228 << 10, "{} items", ring.items);
            assert!(ring.shared(SLOTS_MAX as u32) <= SHARED_MAX, "{} items", ring.items);
        }
        // A small layer has no more blocks than units.
        let ExpertLaunches::Apart([gate_up, down]) = experts_wgmma([64, 64], 2, 3, 132) else { panic!("few units") };
        assert_eq!([gate_up.grid, down.grid], [[4, 1, 1], [2, 1, 1]]);
    }

    #[test]
    fn dense_matrices_on_hopper_take_what_has_the_least_to_read() {
        for (n, rows, cols, name, blocks, parts) in [
            (1, 5120, 2880, "dense_wgmma_8", 80, 1),
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
    }

    #[test]
    fn halves_of_dense_matrices_have_room_and_a_block_each() {
        for n in (1..40).chain((40..10_000).step_by(61)) {
            for (rows, cols) in
                [(1, 1), (16, 100), (5120, 2880), (2880, 4096), (201_088, 2880), (1 << 20, 16), (48, 1 << 20)]
            {
                for multiprocessors in [1, 16, 132, 1 << 20] {
                    let DenseWgmma { choice, parts, .. } = dense_wgmma(n, rows, cols, multiprocessors);
                    assert!(choice.shared <= SHARED_MAX && choice.grid[0] >= 1 && choice.grid[0] <= multiprocessors);
                    let ring =
                        DENSE_RINGS.iter().zip(DENSE_WGMMA).find(|(_, op)| op.kernel == choice.op.kernel).unwrap().0;
                    let units = rows.div_ceil(TILE * ring.tiles) * n.div_ceil(ring.tokens);
                    if parts == 2 {
                        assert_eq!(choice.grid[0], 2 * units, "{n} {rows} {cols}");
                        let bytes = DENSE_TICKETS * 4 + choice.grid[0] * ring.sums();
                        assert!(units * ring.tiles <= DENSE_TICKETS && bytes as usize <= HALVES_BYTES);
                    }
                }
            }
        }
    }

    #[test]
    fn few_entries_are_listed_by_every_block_that_moves_them() {
        let few = receive(true, [1024, 1000], [8, 128], 132);
        assert_eq!((few.choice.op.kernel.name, few.choice.grid, few.moves), ("receive_few", [132, 1, 1], 8));
        assert_eq!(receive(true, [4, 4], [1, 128], 132).choice.grid, [4, 1, 1]);
        assert_eq!(receive(true, [0, 0], [1, 0], 132).choice.grid, [1, 1, 1]);
        for many in [receive(true, [1025, 1025], [8, 128], 132), receive(false, [4, 4], [1, 128], 132)] {
            assert_eq!((many.choice.op.kernel.name, many.choice.grid, many.moves), ("receive", [1, 1, 1], 0));
        }
        // As much as a block can have on every device from 8.0 on.
        for (multiprocessors, slots) in [(1, SLOTS_MAX as u32), (132, SLOTS_MAX as u32), (1, 256), (132, 1)] {
            for entries in [1024, 32_768] {
                let chosen = receive(true, [entries; 2], [1024, slots], multiprocessors);
                assert!(chosen.choice.shared <= 99 << 10 && chosen.stretches > 0, "{slots}: {chosen:?}");
            }
        }
    }

    #[test]
    fn only_hopper_multiplies_by_warpgroups() {
        use crate::cuda::Family;
        assert_eq!(Family::of((9, 0)), Family::Wgmma);
        for capability in [(8, 0), (8, 6), (8, 9), (10, 0), (10, 3), (12, 0), (12, 1)] {
            assert_eq!(Family::of(capability), Family::Mma, "{capability:?}");
        }
    }

    #[test]
    fn nothing_needs_more_shared_memory_than_every_device_has() {
        let experts = experts(Precision::Fast, ExpertMatrix::Down, 64, 1).shared;
        let shared = [dense(true, 1, 1).shared, dense(false, 64, 64).shared, experts];
        assert!(shared.iter().all(|&bytes| bytes <= 48 << 10), "{shared:?}");
    }
}
