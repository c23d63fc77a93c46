//! The experts of a layer on this rank, and the rows they work on.
//!
//! Rows arrive by rank; each (row, choice) held here becomes an item. Items are grouped by slot, so that an
//! expert's weights are read once for all its rows: a task is one expert's group of four tiles times all its items.
//! Gate-up: 64 rows of the matrix are 32 activations, one block of the down matrix's operand, rounded to it at
//! once. Down: each result goes to the wire at the place where its (row, choice) is expected.

use std::ops::Range;

use super::dense::need;
use super::exp::exp;
use super::int8::{ByRows, Int8Block, Multiply, Operand};
use super::isa::Simd;
use super::lanes::{Kernel, LANES, Lanes};
use super::mxfp4::{self, Mxfp4};
use super::tiles::{BLOCK, Tiles};
use crate::memory::{LINE, Packed, resident};
use crate::threads::{Disjoint, Threads};
use crate::wire;
use crate::{ExpertShape, ExpertSource, HostParts, KernelError, NO_SLOT, Precision, SWIGLU_ALPHA};

/// Tiles of a task: 64 matrix rows.
const GROUP: usize = 4;

/// Items of an expert up to which they all go by in one pass over its weights.
const FEW: usize = 8;
/// Groups of a gate-up task then: memory is read on while a group's results become activations.
const SPAN: usize = 4;

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
        let span = if few { SPAN } else { 1 };
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

/// Results of a group of tiles for a few items.
type Results<const TOKENS: usize> = [[f32; GROUP * LANES]; TOKENS];

/// The group's matrix rows times `x`, plus bias. What belongs to tiles beyond the matrix is left as it is.
#[inline(always)]
fn multiply<L: Lanes, O: Operand, const TOKENS: usize>(
    l: L,
    matrix: &Tiles<Mxfp4>,
    group: usize,
    x: [&[O]; TOKENS],
    results: &mut Results<TOKENS>,
) where
    Mxfp4: Multiply<O>,
{
    let first = group * GROUP;
    for tile in first..matrix.tiles().min(first + GROUP) {
        let [sums] = Mxfp4::sums::<L, 1, TOKENS>(l, matrix, tile, x);
        let bias = l.load(matrix.bias(tile));
        for (sum, result) in sums.into_iter().zip(&mut *results) {
            l.store(l.add(sum, bias), &mut result.as_chunks_mut().0[tile - first]);
        }
    }
}

/// 64 rows of an expert's gate-up matrix for all its items, some times over.
struct GateUp<'a, O> {
    matrix: &'a Tiles<Mxfp4>,
    groups: Range<usize>,
    limit: f32,
    items: &'a [Item],
    /// Index of the first of `items` among all.
    first: usize,
    /// `[rows, H]`
    rows: &'a [O],
    /// `[items, I]`, of which this task alone writes its items' 32 columns of each group.
    activations: &'a Disjoint<'a, O>,
}

impl<O: Operand> Kernel for GateUp<'_, O>
where
    Mxfp4: Multiply<O>,
{
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        self.all_rows(l, 0..self.items.len());
    }
}

impl<O: Operand> ByRows for GateUp<'_, O>
where
    Mxfp4: Multiply<O>,
{
    #[inline(always)]
    fn rows<L: Lanes, const TOKENS: usize>(&self, l: L, at: usize) {
        let cols = self.matrix.cols() / O::COLUMNS;
        let x: [&[O]; TOKENS] = std::array::from_fn(|t| {
            let row = self.items[at + t].row as usize;
            &self.rows[row * cols..(row + 1) * cols]
        });
        // A group's results are dealt with after the next group's product: what they wait for has arrived by then, and
        // meanwhile weights keep coming in.
        let mut results = [[[0.0; GROUP * LANES]; TOKENS]; 2];
        let groups = self.groups.clone();
        for group in groups.clone() {
            multiply(l, self.matrix, group, x, &mut results[group % 2]);
            if group > groups.start {
                self.activate(group - 1, at, &results[(group - 1) % 2]);
            }
        }
        if let Some(last) = groups.last() {
            self.activate(last, at, &results[last % 2]);
        }
    }
}

impl<O: Operand> GateUp<'_, O> {
    /// Activations of a group of the items from `at` on.
    #[inline(always)]
    fn activate<const TOKENS: usize>(&self, group: usize, at: usize, results: &Results<TOKENS>) {
        let (row_width, width) = (self.matrix.rows() / 2 / O::COLUMNS, BLOCK / O::COLUMNS);
        for (t, result) in results.iter().enumerate() {
            let activated = swiglu(result, self.limit);
            let start = (self.first + at + t) * row_width + group * width;
            // SAFETY: tasks differ in their items or in their columns; within a task each part is dropped before
            // the next is made.
            O::from_block(&activated, unsafe { self.activations.slice(start..start + width) });
        }
    }
}

/// `min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1)` of 32 pairs `g, u`.
//= gpt-oss model.py#swiglu
#[inline(always)]
fn swiglu(pairs: &[f32; 2 * BLOCK], limit: f32) -> [f32; BLOCK] {
    let mut out = [0.0; BLOCK];
    for (out, [gate, up]) in out.iter_mut().zip(pairs.as_chunks().0) {
        // Written so that NaN stays NaN.
        let gate = if *gate > limit { limit } else { *gate };
        let up = if *up > limit { limit } else { *up };
        let up = if up < -limit { -limit } else { up };
        *out = gate / (1.0 + exp(-SWIGLU_ALPHA * gate)) * (up + 1.0);
    }
    out
}

/// 64 rows of an expert's down matrix for all its items.
struct Down<'a, O> {
    matrix: &'a Tiles<Mxfp4>,
    precision: Precision,
    group: usize,
    items: &'a [Item],
    /// Index of the first of `items` among all.
    first: usize,
    /// `[items, I]`
    activations: &'a [O],
    /// For each rank `[results, H]` of the wire type, of which this task alone writes its items' 64 columns.
    parts: &'a [Disjoint<'a, u8>],
}

impl<O: Operand> Kernel for Down<'_, O>
where
    Mxfp4: Multiply<O>,
{
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        self.all_rows(l, 0..self.items.len());
    }
}

impl<O: Operand> ByRows for Down<'_, O>
where
    Mxfp4: Multiply<O>,
{
    #[inline(always)]
    fn rows<L: Lanes, const TOKENS: usize>(&self, l: L, at: usize) {
        let cols = self.matrix.cols() / O::COLUMNS;
        let x: [&[O]; TOKENS] = std::array::from_fn(|t| {
            let item = self.first + at + t;
            &self.activations[item * cols..(item + 1) * cols]
        });
        let mut results = [[0.0; GROUP * LANES]; TOKENS];
        multiply(l, self.matrix, self.group, x, &mut results);
        let size = wire::bytes(self.precision);
        let column = self.group * GROUP * LANES;
        let width = (GROUP * LANES).min(self.matrix.rows() - column);
        for (t, result) in results.iter().enumerate() {
            let item = self.items[at + t];
            let start = (item.index as usize * self.matrix.rows() + column) * size;
            // SAFETY: tasks differ in their items or in their columns, and no two items share an index of a rank;
            // within a task each part is dropped before the next is made.
            let out = unsafe { self.parts[item.rank as usize].slice(start..start + width * size) };
            wire::encode(self.precision, &result[..width], out);
        }
    }
}
