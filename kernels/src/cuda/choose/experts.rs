//! Received rows and the matrices of the experts.

use super::{Choice, TILE};
use crate::Precision;
use crate::cuda::ops::{
    DOWN_BF16, DOWN_F32, DOWN_WGMMA, EXPERTS_WGMMA, ExpertArgs, GATE_UP_BF16, GATE_UP_F32, GATE_UP_WGMMA, RECEIVE,
    RECEIVE_FEW, RECEIVE_WARP, ReceiveArgs,
};

/// How what was received is listed.
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct Receive {
    pub(in crate::cuda) choice: Choice<ReceiveArgs>,
    /// Warps that walk over entries; 0: a lane has one.
    pub(in crate::cuda) stretches: u32,
    /// Items that a block moves to their tiles; 0: another kernel moves rows.
    pub(in crate::cuda) moves: u32,
}

/// Entries that every block lists for itself, at most.
const FEW_ENTRIES: u32 = 1024;
/// Entries that every warp lists for itself, at most, and their ranks: each has a lane.
const LANES: u32 = 32;
/// Columns that a thread moves at once.
const PIECE: u32 = 8;
/// Expert slots of a layer on a rank.
pub(in crate::cuda) const SLOTS_MAX: usize = 2048;
/// Numbers in shared memory of how many items of each slot a warp has.
const COUNTS_MAX: u32 = 8 << 10;

/// Received are at most `entries`, of which at most `items` are for this rank's `slots`; they go to tiles where `tiled`.
pub(in crate::cuda) fn receive(
    tiled: bool,
    [entries, items]: [u32; 2],
    [ranks, slots, hidden]: [u32; 3],
    multiprocessors: u32,
) -> Receive {
    if tiled && entries <= LANES && ranks <= LANES {
        let grid = [entries.max(1), hidden.div_ceil(PIECE * RECEIVE_WARP.kernel.threads).max(1), 1];
        return Receive { choice: Choice { op: RECEIVE_WARP, grid, shared: 0 }, stretches: 0, moves: 1 };
    }
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
pub(in crate::cuda) enum ExpertMatrix {
    /// `[2 I, H]`
    GateUp,
    /// `[H, I]`
    Down,
}

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
pub(in crate::cuda) enum ExpertLaunches {
    /// Both matrices by one.
    Together(Choice<ExpertArgs>),
    /// Gate-up, and down.
    Apart([Choice<ExpertArgs>; 2]),
}

/// The experts on Hopper, for about `items` items in `slots` slots. A guess that is wrong costs time only: each kernel takes any
/// number, and all add in the same order. (How many [`receive`] takes is no guess.)
pub(in crate::cuda) fn experts_wgmma(
    [hidden, intermediate]: [u32; 2],
    slots: u32,
    items: u32,
    multiprocessors: u32,
) -> ExpertLaunches {
    // Of slots that are all in use, at most; each of them has an item.
    let units = |ring: &Ring, rows: u32| {
        let chunks = (u64::from(slots) + u64::from(items / ring.items)).min(u64::from(items.max(1)));
        u64::from(rows.div_ceil(TILE * ring.tiles)) * chunks
    };
    // Beyond what is resident, blocks would find nothing.
    let resident = |ring: &Ring| u64::from(multiprocessors * ring.resident);
    let grid = |ring: &Ring, units: u64| [units.min(resident(ring)) as u32, 1, 1];
    let (gate_up, down) = (2 * intermediate, hidden);
    let apart = |which: usize, ring: &Ring| {
        let shared = ring.shared(slots);
        ExpertLaunches::Apart([
            Choice { op: GATE_UP_WGMMA[which], grid: grid(ring, units(ring, gate_up)), shared },
            Choice { op: DOWN_WGMMA[which], grid: grid(ring, units(ring, down)), shared },
        ])
    };
    // Weights are read once for every `items` of a ring: so a ring holds what nearly all slots have where choices are even.
    let at = match items.div_ceil(slots.max(1)) {
        // Where every unit of gate-up has a block of its own, those of down would only wait.
        0..=2 if units(&RINGS[0], gate_up) <= resident(&RINGS[0]) => return apart(0, &RINGS[0]),
        0..=2 => 0,
        3..=8 => 1,
        9..=20 => 2,
        21..=44 => 3,
        _ => 4,
    };
    let ring = &RINGS[at];
    match EXPERTS_WGMMA.get(at) {
        Some(&op) => {
            let grid = grid(ring, units(ring, gate_up) + units(ring, down));
            ExpertLaunches::Together(Choice { op, grid, shared: ring.shared(slots) })
        }
        None => apart(1, ring),
    }
}

/// Row tiles and warps of a block of the experts' fast kernels.
const EXPERT_TILES: u32 = 4;
/// Tokens whose columns are staged, 128 and 8 for padding.
const EXPERT_STAGED_BYTES: u32 = 32 * (128 + 8) * 2;

/// An expert matrix of `rows` in `slots` slots.
pub(in crate::cuda) fn experts(
    precision: Precision,
    matrix: ExpertMatrix,
    rows: u32,
    slots: u32,
) -> Choice<ExpertArgs> {
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
    use crate::cuda::choose::SHARED_MAX;

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
        // One row of the published models: a block a unit, all resident.
        let ExpertLaunches::Apart([gate_up, down]) = experts_wgmma([2880, 2880], 128, 4, 132) else {
            panic!("one row")
        };
        assert_eq!([gate_up.grid, down.grid], [[360, 1, 1], [180, 1, 1]]);
    }

    #[test]
    fn few_entries_are_listed_by_every_block_that_moves_them() {
        let few = receive(true, [1024, 1000], [8, 128, 2880], 132);
        assert_eq!((few.choice.op.kernel.name, few.choice.grid, few.moves), ("receive_few", [132, 1, 1], 8));
        assert_eq!(receive(true, [33, 4], [1, 128, 2880], 132).choice.grid, [4, 1, 1]);
        for many in [receive(true, [1025; 2], [8, 128, 2880], 132), receive(false, [4, 4], [1, 128, 2880], 132)] {
            assert_eq!((many.choice.op.kernel.name, many.choice.grid, many.moves), ("receive", [1, 1, 1], 0));
        }
        // As much as a block can have on every device from 8.0 on.
        for (multiprocessors, slots) in [(1, SLOTS_MAX as u32), (132, SLOTS_MAX as u32), (1, 256), (132, 1)] {
            for entries in [1024, 32_768] {
                let chosen = receive(true, [entries; 2], [1024, slots, 2880], multiprocessors);
                assert!(chosen.choice.shared <= 99 << 10 && chosen.stretches > 0, "{slots}: {chosen:?}");
            }
        }
    }

    #[test]
    fn entries_and_ranks_that_a_warp_has_lanes_for_are_listed_by_each() {
        let name = |entries, ranks| receive(true, [entries; 2], [ranks, 128, 2880], 132).choice.op.kernel.name;
        assert_eq!([name(0, 1), name(4, 1), name(32, 32)], ["receive_warp"; 3]);
        assert_eq!([name(33, 1), name(32, 33)], ["receive_few"; 2]);
        // A block an entry, or one that says that there is none, and a stretch of 1024 columns.
        let few = receive(true, [32, 5], [8, 128, 2880], 132);
        assert_eq!((few.choice.grid, few.choice.shared, few.moves), ([32, 3, 1], 0, 1));
        assert_eq!(receive(true, [0, 0], [1, 0, 0], 132).choice.grid, [1, 1, 1]);
    }
}
