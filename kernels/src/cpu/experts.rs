//! The experts of a layer on this rank, and the rows they work on.
//!
//! Rows arrive by rank; each (row, choice) held here becomes an item. Items are grouped by slot, so that an
//! expert's weights are read once for all its rows: a task is one expert's group of four tiles times all its items, see
//! [`product`].

mod product;

use std::ops::Range;

use self::product::{Down, GROUP, GateUp};
use super::dense::need;
use super::int8::{Int8Block, Multiply, Operand};
use super::isa::Simd;
use super::lanes::{Kernel, LANES, Lanes};
use super::mxfp4::{self, Mxfp4};
use super::tiles::{BLOCK, Tiles};
use crate::memory::{LINE, Packed, resident};
use crate::threads::{Disjoint, Threads};
use crate::wire;
use crate::{ExpertShape, ExpertSource, HostParts, KernelError, NO_SLOT, Precision};

/// Items of an expert, on average, up to which memory is what an op waits for.
const FEW: usize = 8;
/// Groups of a gate-up task then: memory is read on while a group's results become activations.
const SPAN: usize = 4;
/// But only if each thread has so many tasks.
const TASKS: usize = 8;

/// Two matrices, packed one behind the other.
#[derive(Debug)]
struct Expert {
    /// `[2I, H]`
    gate_up: Tiles<Mxfp4>,
    /// `[H, I]`
    down: Tiles<Mxfp4>,
}

/// The expert slots of one layer.
#[derive(Debug)]
pub struct Experts {
    shape: ExpertShape,
    slots: Vec<Option<Expert>>,
}

impl Experts {
    pub(super) fn new(slots: usize, shape: ExpertShape) -> Self {
        Self { shape, slots: std::iter::repeat_with(|| None).take(slots).collect() }
    }

    /// Bytes of a packed expert, and those of them that are gate-up.
    pub(super) const fn packed_bytes(&self) -> (usize, usize) {
        let ExpertShape { hidden, intermediate, .. } = self.shape;
        let gate_up = Tiles::<Mxfp4>::bytes_of(2 * intermediate, hidden);
        debug_assert!(gate_up.is_multiple_of(LINE), "what follows begins on a cache line");
        (gate_up + Tiles::<Mxfp4>::bytes_of(hidden, intermediate), gate_up)
    }

    pub(super) fn pack(&self, threads: &Threads, source: &ExpertSource<'_>, out: &mut [u8]) -> Result<(), KernelError> {
        let ExpertShape { hidden, intermediate, .. } = self.shape;
        let (all, gate_up) = self.packed_bytes();
        need("the room for a packed expert", out.len(), all)?;
        let (gate_up, down) = out.split_at_mut(gate_up);
        mxfp4::pack(
            threads,
            [2 * intermediate, hidden],
            [source.gate_up_blocks, source.gate_up_scales, source.gate_up_bias],
            ["gate_up_proj_blocks of an expert", "gate_up_proj_scales of an expert", "gate_up_proj_bias of an expert"],
            gate_up,
        )?;
        mxfp4::pack(
            threads,
            [hidden, intermediate],
            [source.down_blocks, source.down_scales, source.down_bias],
            ["down_proj_blocks of an expert", "down_proj_scales of an expert", "down_proj_bias of an expert"],
            down,
        )
    }

    /// Fills a slot.
    pub(super) fn hold(&mut self, slot: usize, packed: &Packed) -> Result<(), KernelError> {
        let ExpertShape { hidden, intermediate, .. } = self.shape;
        let (all, gate_up) = self.packed_bytes();
        need("a packed expert", packed.len(), all)?;
        let len = self.slots.len();
        let place = self.slots.get_mut(slot).ok_or(KernelError::Plan { what: "expert slot", index: slot, len })?;
        *place = Some(Expert {
            gate_up: Tiles::new(2 * intermediate, hidden, packed.slice(0..gate_up))?,
            down: Tiles::new(hidden, intermediate, packed.slice(gate_up..all))?,
        });
        Ok(())
    }

    /// Empties a slot; returns the bytes given back.
    pub(super) fn clear(&mut self, slot: usize) -> u64 {
        let old = self.slots.get_mut(slot).and_then(Option::take);
        old.map_or(0, |old| old.gate_up.bytes() + old.down.bytes())
    }
}

/// A (row, choice) held here.
#[derive(Clone, Copy, Debug, Default)]
struct Item {
    /// Received row.
    row: u32,
    /// Slot of its expert.
    slot: u32,
    /// Rank that it came from.
    rank: u32,
    /// Index among the results for that rank.
    index: u32,
}

/// Rows as operands of the matrices.
#[derive(Debug)]
enum Operands {
    Exact { rows: Vec<f32>, activations: Vec<f32> },
    Fast { rows: Vec<Int8Block>, activations: Vec<Int8Block> },
}

/// Received rows in the experts' hands.
#[derive(Debug)]
pub struct Work {
    precision: Precision,
    shape: ExpertShape,
    rows_max: usize,
    items_max: usize,
    operands: Operands,
    /// In the order of arrival; afterwards grouped by slot.
    items: Vec<Item>,
    /// Items in the order of arrival, while they are grouped.
    arrived: Vec<Item>,
    /// First item of each slot, `[slots + 1]`.
    starts: Vec<u32>,
    /// Slots that have items.
    active: Vec<u32>,
    /// Results for each rank.
    results: Vec<u32>,
}

impl Work {
    pub(super) fn new(precision: Precision, rows: usize, choices: usize, shape: ExpertShape) -> Self {
        let (hidden, intermediate, items) = (shape.hidden, shape.intermediate, rows * choices);
        let operands = match precision {
            Precision::Exact => {
                Operands::Exact { rows: resident(rows * hidden), activations: resident(items * intermediate) }
            }
            Precision::Fast => Operands::Fast {
                rows: resident(rows * hidden / BLOCK),
                activations: resident(items * intermediate / BLOCK),
            },
        };
        Self {
            precision,
            shape,
            rows_max: rows,
            items_max: items,
            operands,
            items: Vec::with_capacity(items),
            arrived: Vec::with_capacity(items),
            starts: Vec::new(),
            active: Vec::new(),
            results: Vec::new(),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        let operands = match &self.operands {
            Operands::Exact { rows, activations } => size_of_val(&rows[..]) + size_of_val(&activations[..]),
            Operands::Fast { rows, activations } => size_of_val(&rows[..]) + size_of_val(&activations[..]),
        };
        (operands + 2 * self.items_max * size_of::<Item>()) as u64
    }

    /// Reads the records of all ranks and groups them by slot. The rows of a rank whose bytes are not records of
    /// this layer are left out.
    ///
    /// # Errors
    /// The first such rank.
    pub(super) fn receive(
        &mut self,
        simd: Simd,
        threads: &Threads,
        received: &HostParts,
        experts: &Experts,
        top_k: usize,
    ) -> Result<(), KernelError> {
        let record = wire::dispatch_record(self.precision, top_k, self.shape.hidden);
        self.arrived.clear();
        self.results.clear();
        let (mut rows, mut result) = (Vec::new(), Ok(()));
        for (rank, bytes) in received.by_rank.iter().enumerate() {
            let before = self.arrived.len();
            match self.check(bytes, record, top_k, experts, rows.len()) {
                Ok(()) => {
                    for bytes in bytes.chunks_exact(record) {
                        self.read_slots(&bytes[..top_k * 4], rows.len(), rank, before);
                        rows.push(&bytes[top_k * 4..]);
                    }
                }
                Err(what) => result = result.and(Err(KernelError::Received { rank, what })),
            }
            self.results.push((self.arrived.len() - before) as u32);
        }
        self.group(experts.slots.len());
        let (precision, hidden) = (self.precision, self.shape.hidden);
        match &mut self.operands {
            Operands::Exact { rows: out, .. } => read_rows(simd, threads, precision, hidden, &rows, out),
            Operands::Fast { rows: out, .. } => read_rows(simd, threads, precision, hidden, &rows, out),
        }
        result
    }

    /// Whether `bytes` are records that fit.
    fn check(
        &self,
        bytes: &[u8],
        record: usize,
        top_k: usize,
        experts: &Experts,
        rows: usize,
    ) -> Result<(), &'static str> {
        if top_k == 0 || !bytes.len().is_multiple_of(record) {
            return Err("a part that is not made of whole records");
        }
        let mut items = self.arrived.len();
        for bytes in bytes.chunks_exact(record) {
            for slot in slots(&bytes[..top_k * 4]) {
                if !matches!(experts.slots.get(slot as usize), Some(Some(_))) {
                    return Err("a row for an expert slot that is empty");
                }
                items += 1;
            }
        }
        if rows + bytes.len() / record > self.rows_max || items > self.items_max {
            return Err("more rows than a step may have");
        }
        Ok(())
    }

    fn read_slots(&mut self, bytes: &[u8], row: usize, rank: usize, first_of_rank: usize) {
        for slot in slots(bytes) {
            let index = (self.arrived.len() - first_of_rank) as u32;
            self.arrived.push(Item { row: row as u32, slot, rank: rank as u32, index });
        }
    }

    /// Groups items by slot, in order of arrival within a slot.
    fn group(&mut self, slots: usize) {
        self.starts.clear();
        self.starts.resize(slots + 1, 0);
        for item in &self.arrived {
            self.starts[item.slot as usize + 1] += 1;
        }
        self.active.clear();
        self.active.extend((0..slots as u32).filter(|&slot| self.starts[slot as usize + 1] > 0));
        for slot in 0..slots {
            self.starts[slot + 1] += self.starts[slot];
        }
        self.items.clear();
        self.items.resize(self.arrived.len(), Item::default());
        let mut next = self.starts.clone();
        for item in &self.arrived {
            let place = &mut next[item.slot as usize];
            self.items[*place as usize] = *item;
            *place += 1;
        }
    }

    /// The active slots with their experts and items.
    fn active<'a>(&'a self, experts: &'a Experts, index: usize) -> Option<(&'a Expert, Range<usize>)> {
        let slot = self.active[index] as usize;
        let expert = experts.slots.get(slot)?.as_ref()?;
        Some((expert, self.starts[slot] as usize..self.starts[slot + 1] as usize))
    }

    /// For each item `[H] -> [I]`.
    pub(super) fn gate_up(&mut self, simd: Simd, threads: &Threads, experts: &Experts) {
        // Taken out for the time being, to read items beside them.
        let empty = Operands::Fast { rows: Vec::new(), activations: Vec::new() };
        let mut operands = std::mem::replace(&mut self.operands, empty);
        match &mut operands {
            Operands::Exact { rows, activations } => self.gate_up_of(simd, threads, experts, rows, activations),
            Operands::Fast { rows, activations } => self.gate_up_of(simd, threads, experts, rows, activations),
        }
        self.operands = operands;
    }

    fn gate_up_of<O: Operand>(
        &self,
        simd: Simd,
        threads: &Threads,
        experts: &Experts,
        rows: &[O],
        activations: &mut [O],
    ) where
        Mxfp4: Multiply<O>,
    {
        let ExpertShape { hidden, intermediate, limit } = self.shape;
        let groups = intermediate / BLOCK;
        let few = self.items.len() <= FEW * self.active.len();
        let many = self.active.len() * groups >= threads.count() * TASKS * SPAN;
        let span = if few && many { SPAN } else { 1 };
        let spans = groups.div_ceil(span);
        let activations = Disjoint::new(activations);
        threads.each(self.active.len() * spans, self.items.len() * 2 * intermediate * hidden, |task| {
            let Some((expert, items)) = self.active(experts, task / spans) else { return };
            let first = items.start;
            let (items, start) = (&self.items[items], task % spans * span);
            let groups = start..groups.min(start + span);
            simd.run(GateUp { matrix: &expert.gate_up, groups, limit, items, first, rows, activations: &activations });
        });
    }

    /// For each item `[I] -> [H]`, to the part of the rank that it came from.
    pub(super) fn down(&self, simd: Simd, threads: &Threads, experts: &Experts, out: &mut HostParts) {
        match &self.operands {
            Operands::Exact { activations, .. } => self.down_of(simd, threads, experts, activations, out),
            Operands::Fast { activations, .. } => self.down_of(simd, threads, experts, activations, out),
        }
    }

    fn down_of<O: Operand>(
        &self,
        simd: Simd,
        threads: &Threads,
        experts: &Experts,
        activations: &[O],
        out: &mut HostParts,
    ) where
        Mxfp4: Multiply<O>,
    {
        let ExpertShape { hidden, intermediate, .. } = self.shape;
        let row_bytes = hidden * wire::bytes(self.precision);
        out.clear();
        out.by_rank.resize_with(self.results.len(), Vec::new);
        for (part, &results) in out.by_rank.iter_mut().zip(&self.results) {
            part.resize(results as usize * row_bytes, 0);
        }
        let parts: Vec<_> = out.by_rank.iter_mut().map(|part| Disjoint::new(part)).collect();
        let groups = hidden.div_ceil(GROUP * LANES);
        threads.each(self.active.len() * groups, self.items.len() * intermediate * hidden, |task| {
            let Some((expert, items)) = self.active(experts, task / groups) else { return };
            let first = items.start;
            simd.run(Down {
                matrix: &expert.down,
                precision: self.precision,
                group: task % groups,
                items: &self.items[items],
                first,
                activations,
                parts: &parts,
            });
        });
    }
}

/// Rows of the wire as operands.
fn read_rows<O: Operand>(
    simd: Simd,
    threads: &Threads,
    precision: Precision,
    hidden: usize,
    rows: &[&[u8]],
    out: &mut [O],
) {
    let width = hidden / O::COLUMNS;
    threads.each_chunk(&mut out[..rows.len() * width], width, 4 * rows.len() * hidden, |row, out| {
        simd.run(ReadRow { precision, bytes: rows[row], out });
    });
}

/// One row from the wire.
struct ReadRow<'a, O> {
    precision: Precision,
    bytes: &'a [u8],
    out: &'a mut [O],
}

impl<O: Operand> Kernel for ReadRow<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let size = BLOCK * wire::bytes(self.precision);
        for (bytes, out) in self.bytes.chunks_exact(size).zip(self.out.chunks_exact_mut(BLOCK / O::COLUMNS)) {
            let mut x = [0.0; BLOCK];
            wire::decode(self.precision, bytes, &mut x);
            O::from_block(&x, out);
        }
    }
}

/// The slots of a record that are held here.
fn slots(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|&slot| u32::from_le_bytes(slot)).filter(|&slot| slot != NO_SLOT)
}
