//! Rows to the ranks of their experts, the experts' work, and results back home.

use std::sync::Arc;

use super::Cuda;
use super::choose::{self, ExpertLaunches, ExpertMatrix};
use super::device::{Buffer, Family, Memory, bytes_of};
use super::ops::{
    COMBINE_BF16, COMBINE_F32, CombineArgs, DISPATCH_BF16, DISPATCH_F32, DispatchArgs, EntriesArgs, ExpertArgs,
    PLACE_ENTRIES, RECEIVE_ROWS, RECEIVE_TILES, ReceiveArgs, RowsArgs, TilesArgs,
};
use super::pack::ExpertLayout;
use super::parts::{PART, PART_ALIGNMENT, Parts, Places};
use super::rows::{Routes, Rows};
use crate::cpu::{check, need};
use crate::{ExpertShape, KernelError, NO_SLOT, Precision, wire};

/// Columns of a block of dispatch and combine.
const BLOCK_COLUMNS: usize = 4 * DISPATCH_F32.kernel.threads as usize;
/// Bytes of where an entry lies.
const ENTRY: usize = 8;
/// Items of a tile of wgmma's.
pub(super) const ITEM_TILE: usize = 8;
/// Bytes of an expert's entry in the slot table: six addresses.
const SLOT: usize = 48;

/// The expert slots of one layer.
#[derive(Debug)]
pub struct Experts {
    shape: ExpertShape,
    slots: Vec<Option<Buffer>>,
    /// `[slots]` of six addresses
    table: Buffer,
    /// `[slots]`: 1 where an expert is loaded
    filled: Buffer,
}

impl Experts {
    pub(super) fn new(memory: &Arc<Memory>, slots: usize, shape: ExpertShape) -> Result<Self, KernelError> {
        let empty = std::iter::repeat_with(|| None).take(slots).collect();
        Ok(Self { shape, slots: empty, table: memory.zeroed(slots * SLOT)?, filled: memory.zeroed(slots * 4)? })
    }

    pub(super) fn nothing(memory: &Arc<Memory>, shape: ExpertShape) -> Self {
        Self { shape, slots: Vec::new(), table: memory.nothing(), filled: memory.nothing() }
    }

    pub(super) const fn shape(&self) -> ExpertShape {
        self.shape
    }

    /// Gives back what is in a slot; nothing is in a slot that does not exist.
    pub(super) fn clear(&mut self, slot: usize) -> Result<(), KernelError> {
        if slot < self.slots.len() { self.set(slot, None) } else { Ok(()) }
    }

    /// Puts a packed expert into a slot.
    pub(super) fn hold(&mut self, memory: &Arc<Memory>, slot: usize, packed: &[u8]) -> Result<(), KernelError> {
        check("expert slot", slot, self.slots.len())?;
        self.clear(slot)?;
        need("a packed expert", packed.len(), ExpertLayout::new(self.shape).bytes)?;
        self.set(slot, Some(memory.filled(packed)?))
    }

    /// Fills a slot with what `pack` writes.
    pub(super) fn load(
        &mut self,
        memory: &Arc<Memory>,
        slot: usize,
        pack: impl FnOnce(&mut [u8]) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        check("expert slot", slot, self.slots.len())?;
        self.clear(slot)?;
        self.set(slot, Some(memory.made(ExpertLayout::new(self.shape).bytes, pack)?))
    }

    fn set(&mut self, slot: usize, expert: Option<Buffer>) -> Result<(), KernelError> {
        let layout = ExpertLayout::new(self.shape);
        let starts = [&layout.gate_up, &layout.down].map(|m| [m.codes.start, m.scales.start, m.bias.start]);
        let address = |start: &usize| expert.as_ref().map_or(0, |expert| expert.address() + *start as u64);
        let entry: Vec<u64> = starts.as_flattened().iter().map(address).collect();
        self.table.upload(slot * SLOT, &bytes_of(&entry))?;
        self.filled.upload(slot * 4, &u32::from(expert.is_some()).to_le_bytes())?;
        self.slots[slot] = expert;
        Ok(())
    }
}

/// Received rows in the experts' hands. Items, a (row, choice) each, are grouped by slot; the host never learns how many
/// there are.
#[derive(Debug)]
pub struct Work {
    shape: ExpertShape,
    rows_max: usize,
    items_max: usize,
    /// Ranks of the last receive.
    ranks: usize,
    /// Slots of the experts that it was for; none if it was refused.
    slots: usize,
    /// Its items, at most, as far as the host knows.
    items_now: usize,
    /// As many as they are where ranks have as much to do.
    items_likely: usize,
    /// `[rows, H]` of the wire type; with wgmma the items' tiles of 8, `[item tiles, H / 8, 8, 8]`
    rows: Buffer,
    /// `[items, I]`, f32 or bf16; with wgmma tiles as well
    activations: Buffer,
    row_source: Buffer,
    item_row: Buffer,
    order: Buffer,
    /// Rows and items.
    counts: Buffer,
    /// `[slots + 1]`
    starts: Buffer,
    /// Zeros between launches, `[2 + slots]`: how far blocks are that do both matrices.
    progress: Buffer,
    /// `[ranks]`: the parts that go back.
    results: Arc<Buffer>,
}

impl Work {
    pub(super) fn new(
        memory: &Arc<Memory>,
        precision: Precision,
        family: Family,
        rows: usize,
        choices: usize,
        shape: ExpertShape,
    ) -> Result<Self, KernelError> {
        // Tiles are made when the number of slots is known.
        let tiled = family == Family::Wgmma;
        let (items, size) = (rows * choices, wire::bytes(precision));
        Ok(Self {
            shape,
            rows_max: rows,
            items_max: items,
            ranks: 0,
            slots: 0,
            items_now: items,
            items_likely: items,
            rows: if tiled { memory.nothing() } else { memory.zeroed(rows * shape.hidden * size)? },
            activations: if tiled { memory.nothing() } else { memory.zeroed(items * shape.intermediate * size)? },
            row_source: memory.zeroed(rows * 8)?,
            item_row: memory.zeroed(items * 4)?,
            order: memory.zeroed(items * 4)?,
            counts: memory.zeroed(8)?,
            starts: memory.nothing(),
            progress: memory.nothing(),
            results: Arc::new(memory.nothing()),
        })
    }

    pub(super) fn nothing(memory: &Arc<Memory>, shape: ExpertShape) -> Self {
        let nothing = || memory.nothing();
        Self {
            shape,
            rows_max: 0,
            items_max: 0,
            ranks: 0,
            slots: 0,
            items_now: 0,
            items_likely: 0,
            rows: nothing(),
            activations: nothing(),
            row_source: nothing(),
            item_row: nothing(),
            order: nothing(),
            counts: nothing(),
            starts: nothing(),
            progress: nothing(),
            results: Arc::new(nothing()),
        }
    }
}

/// Blocks of a row of dispatch and combine.
const fn column_blocks(cols: usize) -> u32 {
    if cols == 0 { 1 } else { cols.div_ceil(BLOCK_COLUMNS) as u32 }
}

/// Bytes of where `entries` lie and of how many each of several ranks has.
pub(super) const fn entries_bytes(entries: usize, ranks: usize) -> usize {
    if ranks > 1 { entries * ENTRY + ranks * 4 } else { 0 }
}

/// Tiles of as many items: slot `s` has those from `starts[s] / 8 + s` on.
const fn item_tiles(items: usize, slots: usize) -> usize {
    items / ITEM_TILE + slots
}

impl Cuda {
    pub(super) fn dispatch_rows(
        &mut self,
        x: &Rows,
        routes: &Routes,
        places: &Places,
        out: &mut Parts,
    ) -> Result<(), KernelError> {
        need("the rows dispatched", x.len(), routes.len())?;
        places.check(routes, out.ranks)?;
        let record = wire::dispatch_record(self.precision, routes.top_k(), x.cols());
        need("the bytes of a record, of which 4", record % PART_ALIGNMENT, 0)?;
        let copies = if out.gathered.is_some() { 1 } else { routes.top_k().min(out.ranks) };
        if out.gathered.is_some() {
            places.check_gathered()?;
        }
        let most = x.len() * copies * record;
        if most > out.bytes_max {
            return Err(KernelError::Size { what: "the buffer of a dispatch", got: out.bytes_max, need: most });
        }
        (out.bytes_now, out.is_room) = (most, false);
        let one = out.gathered.is_some() || out.ranks == 1;
        let parts = out.places_mut().address_mut();
        let at = if one { 0 } else { self.place_entries(routes, places, (parts, out.ranks), record, false)?[0] };
        let args = DispatchArgs {
            x: x.address(),
            experts: routes.experts(),
            places: places.buffer.address(),
            out: out.address_mut(),
            parts,
            at,
            rows: x.len() as u32,
            hidden: x.cols() as u32,
            top_k: routes.top_k() as u32,
            gathered: u32::from(out.gathered.is_some()),
        };
        // A step without rows has a part too: it is empty.
        let blocks = if one { x.len().max(1) } else { x.len() * routes.top_k() };
        let op = self.by_precision(DISPATCH_F32, DISPATCH_BF16);
        self.launch(&op, [blocks as u32, column_blocks(x.cols()), 1], 0, &args)
    }

    /// Finds where each entry's record begins, of `bytes`, and says where it says so: `[T, K]`. Where `counted`, results
    /// instead, of which each rank has as many as entries; how many those are is said at the second address, `[ranks]`.
    fn place_entries(
        &mut self,
        routes: &Routes,
        places: &Places,
        (parts, ranks): (u64, usize),
        bytes: usize,
        counted: bool,
    ) -> Result<[u64; 2], KernelError> {
        let entries = routes.len() * routes.top_k();
        self.entries.reserve(entries_bytes(entries, ranks))?;
        let at = self.entries.address_mut();
        let counts = if counted { at + (entries * ENTRY) as u64 } else { 0 };
        let args = EntriesArgs {
            experts: routes.experts(),
            places: places.buffer.address(),
            parts,
            at,
            counts,
            bytes: bytes as u64,
            entries: entries as u32,
            top_k: routes.top_k() as u32,
        };
        let shared = 2 * (PLACE_ENTRIES.kernel.threads / 32) * 4;
        self.launch(&PLACE_ENTRIES, [ranks as u32, 1, 1], shared, &args)?;
        Ok([at, counts])
    }

    pub(super) fn receive_parts(
        &self,
        received: &Parts,
        experts: &Experts,
        work: &mut Work,
    ) -> Result<(), KernelError> {
        work.slots = 0;
        need("the width of the rows received", work.shape.hidden, experts.shape.hidden)?;
        need("the width of the experts at work", work.shape.intermediate, experts.shape.intermediate)?;
        let (size, hidden, slots) = (wire::bytes(self.precision), work.shape.hidden, experts.slots.len());
        check("expert slot", slots.saturating_sub(1), choose::SLOTS_MAX)?;
        check("choice", 0, self.top_k)?;
        if received.are_results() {
            // Nobody sent them: they are this rank's own.
            return Err(KernelError::Plan { what: "received rows", index: 0, len: 0 });
        }
        (work.ranks, work.slots) = (received.ranks, slots);
        if work.results.bytes() < received.ranks * PART {
            work.results = Arc::new(self.memory.zeroed(received.ranks * PART)?);
        }
        work.starts.reserve((slots + 1) * 4)?;
        work.progress.reserve((slots + 2) * 4)?;
        let tiled = self.family() == Family::Wgmma;
        if tiled {
            let tiles = item_tiles(work.items_max, slots) * ITEM_TILE;
            work.rows.reserve_exactly(tiles * hidden * size)?;
            work.activations.reserve_exactly(tiles * work.shape.intermediate * size)?;
        }
        let record_bytes = wire::dispatch_record(self.precision, self.top_k, hidden);
        let multiprocessors = self.memory.queue.device().multiprocessors();
        let rows_now = (received.bytes_now / record_bytes).min(work.rows_max);
        work.items_now = (rows_now * self.top_k).min(work.items_max);
        // A row comes with at least one choice of this rank; of all choices each rank has its share.
        let ranks = received.ranks.max(1);
        let choices =
            if received.is_room { rows_now * self.top_k / ranks } else { rows_now * self.top_k.div_ceil(ranks) };
        work.items_likely = choices.min(work.items_now);
        let entries = u32::try_from(received.bytes_now / record_bytes * self.top_k).unwrap_or(u32::MAX);
        let shape = [received.ranks as u32, slots as u32, hidden as u32];
        let chosen = choose::receive(tiled, [entries, work.items_now as u32], shape, multiprocessors);
        let args = ReceiveArgs {
            received: received.bytes.address(),
            parts: received.places_address(),
            filled: experts.filled.address(),
            row_source: work.row_source.address_mut(),
            item_row: work.item_row.address_mut(),
            order: work.order.address_mut(),
            starts: work.starts.address_mut(),
            counts: work.counts.address_mut(),
            results: work.results.address(),
            tiles: work.rows.address_mut(),
            status: self.status.address(),
            record_bytes: record_bytes as u64,
            result_bytes: (hidden * size) as u64,
            ranks: received.ranks as u32,
            top_k: self.top_k as u32,
            slots: slots as u32,
            rows_max: work.rows_max as u32,
            // A block that moves has no room for more.
            items_max: if chosen.moves > 0 { work.items_now } else { work.items_max } as u32,
            me: received.gathered.unwrap_or(NO_SLOT),
            stretches: chosen.stretches,
            moves: chosen.moves,
            hidden: hidden as u32,
            unused: 0,
        };
        self.launch(&chosen.choice.op, chosen.choice.grid, chosen.choice.shared, &args)?;
        // What the host knows of the number of rows and items is a guess.
        let most = 8 * multiprocessors as usize;
        if !tiled {
            let copy = RowsArgs {
                received: args.received,
                row_source: args.row_source,
                counts: args.counts,
                rows: work.rows.address_mut(),
                row_bytes: (hidden * size) as u32,
                unused: 0,
            };
            return self.launch(&RECEIVE_ROWS, [rows_now.clamp(1, most) as u32, 1, 1], 0, &copy);
        }
        if chosen.moves > 0 {
            return Ok(());
        }
        let args = TilesArgs {
            received: args.received,
            row_source: args.row_source,
            item_row: args.item_row,
            order: args.order,
            starts: args.starts,
            tiles: args.tiles,
            hidden: hidden as u32,
            slots: slots as u32,
        };
        let blocks = item_tiles(work.items_now, slots).clamp(1, most);
        self.launch(&RECEIVE_TILES, [blocks as u32, 1, 1], 0, &args)
    }

    /// The kernels of the experts' matrices.
    fn choose_experts(&self, slots: usize, work: &Work) -> ExpertLaunches {
        let (slots, [hidden, intermediate]) =
            (slots as u32, [work.shape.hidden, work.shape.intermediate].map(|n| n as u32));
        match self.family() {
            Family::Mma => ExpertLaunches::Apart([
                choose::experts(self.precision, ExpertMatrix::GateUp, 2 * intermediate, slots),
                choose::experts(self.precision, ExpertMatrix::Down, hidden, slots),
            ]),
            Family::Wgmma => {
                let multiprocessors = self.memory.queue.device().multiprocessors();
                choose::experts_wgmma([hidden, intermediate], slots, work.items_likely as u32, multiprocessors)
            }
        }
    }

    /// The experts' arguments, after a receive.
    fn expert_args(&self, experts: &Experts, work: &Work, results: u64) -> Result<ExpertArgs, KernelError> {
        need("the expert slots at work", experts.slots.len(), work.slots)?;
        Ok(ExpertArgs {
            slots: experts.table.address(),
            starts: work.starts.address(),
            order: work.order.address(),
            item_row: work.item_row.address(),
            rows: work.rows.address(),
            activations: work.activations.address(),
            results,
            progress: work.progress.address(),
            hidden: work.shape.hidden as u32,
            intermediate: work.shape.intermediate as u32,
            limit: work.shape.limit,
            slots_count: experts.slots.len() as u32,
        })
    }

    /// Gate-up, unless one launch does both matrices: then [`down_items`](Self::down_items) does.
    pub(super) fn gate_up_items(&self, experts: &Experts, work: &Work) -> Result<(), KernelError> {
        let args = self.expert_args(experts, work, 0)?;
        match self.choose_experts(experts.slots.len(), work) {
            ExpertLaunches::Together(_) => Ok(()),
            ExpertLaunches::Apart([choice, _]) => self.launch(&choice.op, choice.grid, choice.shared, &args),
        }
    }

    pub(super) fn down_items(&self, experts: &Experts, work: &Work, out: &mut Parts) -> Result<(), KernelError> {
        let most = work.items_max * work.shape.hidden * wire::bytes(self.precision);
        if most > out.bytes_max {
            return Err(KernelError::Size { what: "the buffer of results", got: out.bytes_max, need: most });
        }
        need("the ranks of results", out.ranks, work.ranks)?;
        out.become_results(&work.results);
        let args = self.expert_args(experts, work, out.address_mut())?;
        let (ExpertLaunches::Together(choice) | ExpertLaunches::Apart([_, choice])) =
            self.choose_experts(experts.slots.len(), work);
        self.launch(&choice.op, choice.grid, choice.shared, &args)
    }

    pub(super) fn combine_rows(
        &mut self,
        returned: &Parts,
        routes: &Routes,
        places: &Places,
        residual: &mut Rows,
    ) -> Result<(), KernelError> {
        need("the rows combined", residual.len(), routes.len())?;
        places.check(routes, returned.ranks)?;
        let [at, counts] = if returned.ranks == 1 {
            [0; 2]
        } else {
            let (parts, result) = (returned.places_address(), wire::bytes(self.precision) * residual.cols());
            self.place_entries(routes, places, (parts, returned.ranks), result, true)?
        };
        let args = CombineArgs {
            results: returned.bytes.address(),
            parts: returned.places_address(),
            at,
            counts,
            weights: routes.weights(),
            residual: residual.address_mut(),
            status: self.status.address(),
            rows: residual.len() as u32,
            hidden: residual.cols() as u32,
            top_k: routes.top_k() as u32,
            ranks: returned.ranks as u32,
        };
        // A step without rows still sees that nothing came.
        let blocks = residual.len().max(1) as u32;
        let op = self.by_precision(COMBINE_F32, COMBINE_BF16);
        self.launch(&op, [blocks, column_blocks(residual.cols()), 1], 0, &args)
    }
}
