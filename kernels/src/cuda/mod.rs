//! Every op on CUDA devices, by the kernels of `csrc/`.
//!
//! The backend is the host's half: it checks shapes, chooses kernels (`choose`), keeps memory and enqueues. A
//! [`Device`] is the other half: a GPU behind the driver ([`driver`]), or the same kernels on the CPU (`emulated`, for tests).
//! Between them a `queue` records what a step enqueues and submits it as graphs (docs/adr/0012-steps-as-graphs.md).
//! Ops enqueue; only reading back waits, never beyond a deadline (`wait`). What kernels find wrong is kept on the device until
//! [`Backend::finish`](crate::Backend::finish). A device that has failed stays failed.

mod angles;
mod arena;
mod backend;
mod capture;
pub mod ceiling;
mod choose;
pub mod compile;
mod device;
pub mod driver;
#[cfg(feature = "cuda-emu")]
mod emulated;
mod ended;
mod exchange;
mod graph;
mod inputs;
pub mod libraries;
mod ops;
mod pack;
mod page_locked;
mod parts;
mod pinned;
mod queue;
mod rows;
mod sample;
mod scratch;
mod sequence;
mod slots;
mod status;
mod stream;
mod wait;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use device::{Capture, Captured, Device, Family, Graph, Launch, Pinned, STAGED_MAX};
#[cfg(feature = "cuda-emu")]
pub use emulated::{Emulated, Fault, Meter};
pub use ended::Ended;
pub use exchange::{Experts, Work};
pub use ops::{KERNELS, Kernel};
pub use parts::{PART_ALIGNMENT, Parts, Places};
pub use queue::{Counts, GRAPH_BYTES};
pub use rows::{Dense, Embedding, Kv, Routes, Rows, Vector};
pub use scratch::{ScratchShape, arena_bytes, scratch_bytes};
pub use sequence::{Node, Sequence};
pub use slots::{Look, Outgoing, Port, SLOT_HEADER, Slot};

use self::choose::{DIM_MAX, DenseWgmma, HALVES_BYTES, PARTIALS_BYTES_MAX, TILE_ROWS};
use self::device::{Buffer, Memory, bytes_of};
use self::inputs::{Inputs, Late, Sight};
use self::ops::{
    ATTENTION_JOIN, ATTENTION_MERGE, AttentionArgs, DENSE_PIECES, DenseArgs, DenseWgmmaArgs, EMBED, EmbedArgs, GATHER,
    GatherArgs, Op, PiecesArgs, RMS_NORM, ROPE_BF16, ROPE_F32, RmsNormArgs, RopeArgs, RouteArgs, TOP_K, TopKArgs,
};
use self::pack::DenseLayout;
use self::sample::Drawn;
use crate::cpu::{check, need};
use crate::threads::Threads;
use crate::{KernelError, KvLayer, Precision};

/// Columns of a block, as `csrc/embed.cu` has them.
const EMBED_COLS: u32 = 512;

/// Threads that pack weights, at most: more than these wait for memory.
const PACKERS_MAX: usize = 16;

/// A CUDA device as a backend.
#[derive(Debug)]
pub struct Cuda {
    precision: Precision,
    memory: Arc<Memory>,
    /// Choices of a row: told by [`Backend::routes`](crate::Backend::routes), needed to read records.
    top_k: usize,
    inputs: Inputs,
    /// Last sampled token of each slot.
    tokens: Buffer,
    status: Buffer,
    /// Router logits, or their sums in parts.
    logits: Buffer,
    /// Of each chunk of tokens how many of the router's blocks are done; zeros between launches.
    tickets: Buffer,
    /// Where entries of a dispatch or a combine lie, with several ranks.
    entries: Buffer,
    /// Attention of single segments.
    partials: Buffer,
    /// Rows to gather, and draws.
    late: Late,
    /// Logits that are drawn from.
    weights: Buffer,
    /// Rounded rows before a projection, where `wgmma` reads them.
    pieces: Buffer,
    /// Where halves of its sums meet there: zero between launches.
    halves: Buffer,
    /// Who packs weights; nobody until the first are packed.
    packers: OnceLock<Threads>,
    /// What was sampled in this step.
    drawn: Vec<Drawn>,
    /// Pinned memory for what steps bring back, while none of them uses it.
    landings: Vec<ended::Pin>,
    /// The first thing that went wrong since the last [`Backend::finish`](crate::Backend::finish).
    error: Option<KernelError>,
    /// The device failed: nothing is enqueued any more.
    broken: bool,
}

impl Cuda {
    /// A backend on a device.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn new(device: Arc<dyn Device>, precision: Precision) -> Result<Self, KernelError> {
        let memory = Memory::new(device);
        let nothing = || memory.nothing();
        Ok(Self {
            precision,
            top_k: 0,
            inputs: Inputs::new(&memory),
            tokens: nothing(),
            status: memory.zeroed(status::BYTES)?,
            logits: nothing(),
            tickets: nothing(),
            partials: nothing(),
            late: Late::new(&memory),
            weights: nothing(),
            pieces: nothing(),
            entries: nothing(),
            halves: nothing(),
            packers: OnceLock::new(),
            drawn: Vec::new(),
            landings: Vec::new(),
            error: None,
            broken: false,
            memory,
        })
    }

    /// Makes all that the backend makes for itself, for steps within these bounds, so that nothing grows afterwards.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn reserve(&mut self, shape: &ScratchShape) -> Result<(), KernelError> {
        self.inputs.reserve(shape.inputs())?;
        self.late.reserve(shape.draws())?;
        self.logits.reserve(shape.router_logits())?;
        self.tickets.reserve(shape.router_tickets())?;
        self.partials.reserve(shape.partials())?;
        self.entries.reserve(shape.entries())?;
        self.weights.reserve(shape.weights())?;
        if self.family() == Family::Wgmma {
            self.pieces.reserve_exactly(shape.pieces())?;
            self.halves.reserve_exactly(HALVES_BYTES)?;
        }
        Ok(())
    }

    /// Takes `bytes` of the device at once, from which all further memory comes as long as it suffices: weights, KV, buffers
    /// and what the backend makes for itself. See [`arena_bytes`] and [`scratch_bytes`].
    ///
    /// # Errors
    /// [`KernelError::Device`]: the device has no such stretch, or this was done before.
    pub fn take_memory(&mut self, bytes: u64) -> Result<(), KernelError> {
        self.memory.make_arena(bytes)
    }

    /// How long the host waits for the device where no step has a [deadline](crate::Backend::set_deadline); a minute if not
    /// told.
    pub fn set_patience(&mut self, patience: Duration) {
        self.memory.queue.set_patience(patience);
    }

    /// How much is rounded on the way.
    #[must_use]
    pub const fn precision(&self) -> Precision {
        self.precision
    }

    /// Hands what is recorded to the device, so that others can enqueue behind it. Reading back does the same.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn submit(&mut self) -> Result<(), KernelError> {
        self.memory.queue.submit()
    }

    /// What has been handed to the device so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.memory.queue.counts()
    }

    /// By what it multiplies, where that is not the same on every device: devices that answer alike give the same bits.
    #[must_use]
    pub fn family(&self) -> Family {
        match self.precision {
            Precision::Exact => Family::Mma,
            Precision::Fast => self.memory.queue.device().family(),
        }
    }

    /// The threads that pack weights.
    fn packers(&self) -> &Threads {
        self.packers.get_or_init(|| {
            let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(PACKERS_MAX));
            // Fewer are slower and as right.
            let alone = |_| Threads::new(1, None).expect("the thread that calls is there");
            Threads::new(threads, None).unwrap_or_else(alone)
        })
    }

    /// Keeps the first error for [`Backend::finish`](crate::Backend::finish).
    fn note(&mut self, result: Result<(), KernelError>) {
        if let Err(error) = result {
            self.broken |= matches!(error, KernelError::Device { .. } | KernelError::Late { .. });
            self.error.get_or_insert(error);
        }
    }

    /// What was made, or something empty after an error.
    fn made<T>(&mut self, made: Result<T, KernelError>, empty: impl FnOnce(&Arc<Memory>) -> T) -> T {
        made.unwrap_or_else(|error| {
            self.note(Err(error));
            empty(&self.memory)
        })
    }

    /// The kernel of the precision.
    const fn by_precision<A: Copy>(&self, exact: Op<A>, fast: Op<A>) -> Op<A> {
        match self.precision {
            Precision::Exact => exact,
            Precision::Fast => fast,
        }
    }

    /// Enqueues a kernel, unless it has no blocks.
    fn launch<A: Copy>(&self, op: &Op<A>, grid: [u32; 3], shared: u32, args: &A) -> Result<(), KernelError> {
        if self.broken || grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: `A` is the kernel's argument struct by the table in `ops`. Every op passes buffers that it owns or
        // borrows, after it has compared their capacity with the shapes it passes; buffers that are dropped later are
        // freed in the order of the stream, behind this launch.
        unsafe {
            let launch = Launch { kernel: &op.kernel, grid, shared };
            self.memory.queue.launch(launch, ops::pointer(args), size_of::<A>())
        }
    }

    fn embed_rows(&self, table: &Embedding, out: &mut Rows) -> Result<(), KernelError> {
        need("a row of the embedding", table.cols, out.cols())?;
        out.resize(self.inputs.step.tokens.len())?;
        self.inputs.check_tokens(self.tokens.bytes() / 4, table.vocab)?;
        let args = EmbedArgs {
            table: table.buffer.address(),
            tokens: self.inputs.at(self.inputs.tokens),
            sampled: self.inputs.at(self.inputs.sampled),
            slots: self.tokens.address(),
            out: out.address_mut(),
            status: self.status.address(),
            cols: table.cols as u32,
            vocab: table.vocab as u32,
        };
        self.launch(&EMBED, [out.len() as u32, args.cols.div_ceil(EMBED_COLS), 1], 0, &args)
    }

    fn norm_rows(&self, x: &Rows, weight: &Vector, eps: f32, out: &mut Rows) -> Result<(), KernelError> {
        need("a norm's weight", weight.len, x.cols())?;
        need("a row of a norm's output", out.cols(), x.cols())?;
        out.resize(x.len())?;
        let args = RmsNormArgs {
            x: x.address(),
            weight: weight.buffer.address(),
            out: out.address_mut(),
            hidden: x.cols() as u32,
            eps,
        };
        self.launch(&RMS_NORM, [x.len() as u32, 1, 1], 16, &args)
    }

    /// `out` is an address with room for `[n, rows]`.
    fn project_to(&mut self, widened: bool, x: &Rows, weight: &Dense, out: u64, add: bool) -> Result<(), KernelError> {
        need("a row of a projection's input", x.cols() * 4, weight.cols * 4)?;
        let layout = DenseLayout::new(weight.rows, weight.cols);
        let args = DenseArgs {
            x: x.address(),
            weights: weight.buffer.address() + layout.weights.start as u64,
            bias: weight.buffer.address() + layout.bias.start as u64,
            out,
            n: x.len() as u32,
            rows: weight.rows as u32,
            cols: weight.cols as u32,
            add: u32::from(add),
        };
        if widened || self.family() == Family::Mma {
            let choice = choose::dense(widened, args.n, args.rows);
            return self.launch(&choice.op, choice.grid, choice.shared, &args);
        }
        let multiprocessors = self.memory.queue.device().multiprocessors();
        let DenseWgmma { choice, group, parts } = choose::dense_wgmma(args.n, args.rows, args.cols, multiprocessors);
        self.halves.reserve_exactly(if parts == 2 { HALVES_BYTES } else { 0 })?;
        let DenseArgs { mut x, weights, bias, out, n, rows, cols, add } = args;
        if let Some(group) = group {
            let across = weight.cols.div_ceil(16);
            self.pieces.reserve_exactly(n.next_multiple_of(group) as usize * across * 32)?;
            let round = PiecesArgs { x, pieces: self.pieces.address_mut(), n, cols, group, unused: 0 };
            self.launch(&DENSE_PIECES, [across.div_ceil(8) as u32, n.div_ceil(8), 1], 0, &round)?;
            x = self.pieces.address();
        }
        let halves = self.halves.address_mut();
        let args = DenseWgmmaArgs { x, weights, bias, out, halves, n, rows, cols, add, parts, unused: 0 };
        self.launch(&choice.op, choice.grid, choice.shared, &args)
    }

    fn project_rows(&mut self, x: &Rows, weight: &Dense, out: &mut Rows, add: bool) -> Result<(), KernelError> {
        need("a row of a projection's output", out.cols() * 4, weight.rows * 4)?;
        if add {
            need("the rows added to", out.len(), x.len())?;
        } else {
            need("a row of a projection's input", x.cols() * 4, weight.cols * 4)?;
            out.resize(x.len())?;
        }
        self.project_to(self.precision == Precision::Exact, x, weight, out.address_mut(), add)
    }

    fn rotate_and_store_rows(&mut self, qkv: &mut Rows, kv: &Kv, layer: KvLayer) -> Result<(), KernelError> {
        let (dim, kv_heads) = (kv.shape.head_dim, kv.shape.kv_heads);
        need("the rows of the step", qkv.len(), self.inputs.rows())?;
        need("the rope table for a head", self.inputs.half * 2, dim)?;
        self.inputs.check_tables(&kv.shape, layer, Sight::Itself)?;
        let cols = qkv.cols();
        // Queries, keys and values.
        let heads = (cols / dim.max(1)).checked_sub(2 * kv_heads).filter(|&heads| heads >= kv_heads);
        let heads = heads.filter(|heads| (heads + 2 * kv_heads) * dim == cols).ok_or(KernelError::Size {
            what: "a row of queries, keys and values",
            got: cols,
            need: 3 * kv_heads * dim,
        })?;
        if qkv.len() == 0 {
            return Ok(());
        }
        let (tables, stride) = self.inputs.table(layer.pool);
        let args = RopeArgs {
            qkv: qkv.address_mut(),
            cos: self.inputs.at(self.inputs.cos),
            sin: self.inputs.at(self.inputs.sin),
            kv: kv.layer(layer),
            tables,
            positions: self.inputs.at(self.inputs.positions),
            sequences: self.inputs.at(self.inputs.sequences),
            cols: cols as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            dim: dim as u32,
            stride,
            unused: 0,
        };
        let grid = choose::rope(qkv.len() as u32, [args.heads, args.kv_heads, args.dim]);
        self.launch(&self.by_precision(ROPE_F32, ROPE_BF16), grid, 0, &args)
    }

    fn attend_rows(
        &mut self,
        qkv: &Rows,
        kv: &Kv,
        layer: KvLayer,
        sinks: &Vector,
        window: Option<u32>,
        out: &mut Rows,
    ) -> Result<(), KernelError> {
        let (dim, kv_heads, heads) = (kv.shape.head_dim, kv.shape.kv_heads, sinks.len);
        need("the rows of the step", qkv.len(), self.inputs.rows())?;
        need("a row of attention's output", out.cols(), heads * dim)?;
        need("a row of attention's input", qkv.cols(), (heads + 2 * kv_heads) * dim)?;
        check("multiple of the kv heads in query heads", heads % kv_heads.max(1), 1)?;
        check("dimension of a head", dim.saturating_sub(1), DIM_MAX)?;
        check("multiple of two in the dimension of a head", dim % 2, 1)?;
        let sight = Sight::Window(window);
        self.inputs.check_tables(&kv.shape, layer, sight)?;
        out.resize(qkv.len())?;
        if qkv.len() == 0 || heads == 0 {
            return Ok(());
        }
        let shape = [heads, kv_heads, dim].map(|n| n as u32);
        let multiprocessors = self.memory.queue.device().multiprocessors();
        let (tables, stride) = self.inputs.table(layer.pool);
        let mut args = AttentionArgs {
            qkv: qkv.address(),
            kv: kv.layer(layer),
            tables,
            positions: self.inputs.at(self.inputs.positions),
            sequences: self.inputs.at(self.inputs.sequences),
            tiles: 0,
            sinks: sinks.buffer.address(),
            out: out.address_mut(),
            partials: 0,
            cols: qkv.cols() as u32,
            heads: shape[0],
            kv_heads: shape[1],
            dim: shape[2],
            stride,
            window: window.map_or(0, |window| window.max(1)),
            segments: 0,
            scale: 1.0 / (dim as f32).sqrt(),
            share: 0,
            unused: 0,
        };
        let partials = |rows: usize, segments: usize| {
            [rows, heads, segments, (2 + dim) * 4].into_iter().fold(1, usize::saturating_mul)
        };
        // What there is no room for is not shared out.
        let bounded = |bytes: usize, segments: usize| if bytes > PARTIALS_BYTES_MAX { 1 } else { segments as u32 };
        if self.precision == Precision::Exact {
            let (rows, segments) = (qkv.len() as u32, self.inputs.segments(sight));
            let bytes = partials(qkv.len(), segments);
            let (choice, split) = choose::attention_exact(multiprocessors, rows, shape, bounded(bytes, segments));
            if split {
                self.partials.reserve(bytes)?;
            }
            (args.partials, args.segments) = (self.partials.address(), segments as u32);
            self.launch(&choice.op, choice.grid, choice.shared, &args)?;
            return if split { self.launch(&ATTENTION_MERGE, [rows, shape[0], 1], 0, &args) } else { Ok(()) };
        }
        let tiling = choose::tiling(dim);
        for (many, (tiles, count, chunks)) in [false, true].into_iter().zip(self.inputs.tiles(tiling, sight)) {
            let rows = if many { TILE_ROWS[tiling] } else { 1 };
            let bytes = partials(count * rows, chunks);
            let (choice, share) =
                choose::attention_fast(multiprocessors, many, count as u32, shape, bounded(bytes, chunks));
            if share != 0 {
                self.partials.reserve(bytes)?;
            }
            (args.tiles, args.share) = (tiles, share);
            (args.partials, args.segments) = (self.partials.address(), chunks as u32);
            self.launch(&choice.op, choice.grid, choice.shared, &args)?;
            if share != 0 {
                let heads = shape[0].div_ceil(DIM_MAX as u32 / shape[2]);
                self.launch(&ATTENTION_JOIN, [count as u32, heads, rows as u32], 0, &args)?;
            }
        }
        Ok(())
    }

    fn route_rows(&mut self, x: &Rows, router: &Dense, routes: &mut Routes) -> Result<(), KernelError> {
        need("a row of the router's input", x.cols() * 4, router.cols * 4)?;
        // Asks for an expert beyond the last if there are fewer than K.
        check("expert", routes.top_k().saturating_sub(1), router.rows)?;
        routes.resize(x.len(), router.rows)?;
        self.logits.reserve(choose::route_sums(x.len()) * router.rows * 4)?;
        let [n, rows, cols, top_k] = [x.len(), router.rows, router.cols, routes.top_k()].map(|n| n as u32);
        let (logits, experts, weights) = (self.logits.address(), routes.experts(), routes.weights());
        if self.precision == Precision::Fast
            && let Some(choice) = choose::route(n, rows, cols)
        {
            self.tickets.reserve(choose::route_chunks(x.len()) * 4)?;
            let layout = DenseLayout::new(router.rows, router.cols);
            let (x, matrix) = (x.address(), router.buffer.address() + layout.weights.start as u64);
            let bias = router.buffer.address() + layout.bias.start as u64;
            let tickets = self.tickets.address_mut();
            let args =
                RouteArgs { x, matrix, bias, logits, tickets, experts, weights, n, cols, experts_count: rows, top_k };
            return self.launch(&choice.op, choice.grid, choice.shared, &args);
        }
        self.project_to(true, x, router, logits, false)?;
        let args = TopKArgs { logits, experts, weights, experts_count: rows, top_k };
        self.launch(&TOP_K, [n, 1, 1], 0, &args)
    }

    fn gather_rows(&mut self, x: &Rows, rows: &[u32], out: &mut Rows) -> Result<(), KernelError> {
        need("a gathered row", out.cols(), x.cols())?;
        for &row in rows {
            check("row", row as usize, x.len())?;
        }
        out.resize(rows.len())?;
        let args = GatherArgs {
            x: x.address(),
            rows: self.late.push(&bytes_of(rows))?,
            out: out.address_mut(),
            cols: x.cols() as u32,
            unused: 0,
        };
        self.launch(&GATHER, [rows.len() as u32, args.cols.div_ceil(EMBED_COLS), 1], 0, &args)
    }

    /// Reads what kernels found wrong, and forgets it.
    fn take_status(&mut self) -> Result<(), KernelError> {
        status::take(&mut self.status)
    }
}
