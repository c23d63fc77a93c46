//! Every op on CUDA devices, by the kernels of `csrc/`.
//!
//! The backend is the host's half: it checks shapes, chooses kernels ([`choose`]), keeps memory and enqueues. A
//! [`Device`] is the other half: the driver ([`driver`]), or the same kernels on the CPU (`emulated`, for tests).
//! Ops enqueue; only reading back waits. What kernels find wrong is kept on the device until
//! [`Backend::finish`](crate::Backend::finish). A device that has failed stays failed.

mod choose;
mod device;
#[cfg(feature = "cuda-emu")]
mod emulated;
mod exchange;
mod inputs;
mod ops;
mod pack;
mod rows;
mod sample;
mod status;

use std::sync::Arc;

pub use device::{Device, Launch};
#[cfg(feature = "cuda-emu")]
pub use emulated::{Emulated, Fault};
pub use exchange::{Experts, Parts, Places, Work};
pub use ops::{KERNELS, Kernel};
pub use rows::{Dense, Embedding, Kv, Routes, Rows, Vector};

use self::choose::DIM_MAX;
use self::device::{Buffer, Memory, bytes_of};
use self::inputs::{Inputs, Sight, upload};
use self::ops::{
    ATTENTION_MERGE, AttentionArgs, DenseArgs, EMBED, EmbedArgs, GATHER, GatherArgs, Op, RMS_NORM, ROPE_BF16, ROPE_F32,
    RmsNormArgs, RopeArgs, TOP_K, TopKArgs,
};
use self::pack::{DenseLayout, pack_dense};
use self::sample::{Drawn, Draws};
use crate::cpu::{check, need};
use crate::memory::Source;
use crate::{
    Backend, Draw, EmbeddingSource, ExpertShape, ExpertSource, KernelError, KvLayer, KvShape, Precision, RopeTable,
    SEGMENT, Sampled, Stack, StepInputs, bf16, wire,
};

/// A CUDA device as a backend.
#[derive(Debug)]
pub struct Cuda {
    precision: Precision,
    memory: Arc<Memory>,
    /// Choices of a row: told by [`Backend::routes`], needed to read records.
    top_k: usize,
    inputs: Inputs,
    /// Last sampled token of each slot.
    tokens: Buffer,
    status: Buffer,
    /// Router logits.
    logits: Buffer,
    /// Attention of single segments.
    partials: Buffer,
    /// Rows to gather.
    gathered: Buffer,
    draws: Draws,
    /// What was sampled in this step.
    drawn: Vec<Drawn>,
    /// The first thing that went wrong since the last [`Backend::finish`].
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
            partials: nothing(),
            gathered: nothing(),
            draws: Draws { draws: nothing(), edits: nothing(), allowed: nothing(), weights: nothing() },
            drawn: Vec::new(),
            error: None,
            broken: false,
            memory,
        })
    }

    /// How much is rounded on the way.
    #[must_use]
    pub const fn precision(&self) -> Precision {
        self.precision
    }

    /// Keeps the first error for [`Backend::finish`].
    fn note(&mut self, result: Result<(), KernelError>) {
        if let Err(error) = result {
            self.broken |= matches!(error, KernelError::Device { .. });
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
            self.memory.device.launch(launch, ops::pointer(args), size_of::<A>())
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
            out: out.address(),
            status: self.status.address(),
            cols: table.cols as u32,
            vocab: table.vocab as u32,
        };
        self.launch(&EMBED, [out.len() as u32, 1, 1], 0, &args)
    }

    fn norm_rows(&self, x: &Rows, weight: &Vector, eps: f32, out: &mut Rows) -> Result<(), KernelError> {
        need("a norm's weight", weight.len, x.cols())?;
        need("a row of a norm's output", out.cols(), x.cols())?;
        out.resize(x.len())?;
        let args = RmsNormArgs {
            x: x.address(),
            weight: weight.buffer.address(),
            out: out.address(),
            hidden: x.cols() as u32,
            eps,
        };
        self.launch(&RMS_NORM, [x.len() as u32, 1, 1], 16, &args)
    }

    /// `out` is an address with room for `[n, rows]`.
    fn project_to(&self, widened: bool, x: &Rows, weight: &Dense, out: u64, add: bool) -> Result<(), KernelError> {
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
        let choice = choose::dense(widened, args.n, args.rows);
        self.launch(&choice.op, choice.grid, choice.shared, &args)
    }

    fn project_rows(&self, x: &Rows, weight: &Dense, out: &mut Rows, add: bool) -> Result<(), KernelError> {
        need("a row of a projection's output", out.cols() * 4, weight.rows * 4)?;
        if add {
            need("the rows added to", out.len(), x.len())?;
        } else {
            need("a row of a projection's input", x.cols() * 4, weight.cols * 4)?;
            out.resize(x.len())?;
        }
        self.project_to(self.precision == Precision::Exact, x, weight, out.address(), add)
    }

    fn rotate_and_store_rows(&mut self, qkv: &Rows, kv: &Kv, layer: KvLayer) -> Result<(), KernelError> {
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
            qkv: qkv.address(),
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
        self.launch(&self.by_precision(ROPE_F32, ROPE_BF16), [qkv.len() as u32, 1, 1], 0, &args)
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
        let sight = Sight::Window(window);
        self.inputs.check_tables(&kv.shape, layer, sight)?;
        out.resize(qkv.len())?;
        if qkv.len() == 0 || heads == 0 {
            return Ok(());
        }
        let spans = |&position: &u32| position as usize / SEGMENT - sight.first(position as usize) / SEGMENT + 1;
        let segments = self.inputs.step.positions.iter().map(spans).max().unwrap_or(1);
        let shape = [heads, kv_heads, dim].map(|n| n as u32);
        let rows = qkv.len() as u32;
        let multiprocessors = self.memory.device.multiprocessors();
        let (choice, split) = choose::attention(self.precision, multiprocessors, rows, shape, segments as u32);
        if split {
            self.partials.reserve(qkv.len() * heads * segments * (2 + dim) * 4)?;
        }
        let (tables, stride) = self.inputs.table(layer.pool);
        let args = AttentionArgs {
            qkv: qkv.address(),
            kv: kv.layer(layer),
            tables,
            positions: self.inputs.at(self.inputs.positions),
            sequences: self.inputs.at(self.inputs.sequences),
            sinks: sinks.buffer.address(),
            out: out.address(),
            partials: self.partials.address(),
            cols: qkv.cols() as u32,
            heads: shape[0],
            kv_heads: shape[1],
            dim: shape[2],
            stride,
            window: window.map_or(0, |window| window.max(1)),
            segments: segments as u32,
            scale: 1.0 / (dim as f32).sqrt(),
        };
        self.launch(&choice.op, choice.grid, choice.shared, &args)?;
        if split { self.launch(&ATTENTION_MERGE, [rows, shape[0], 1], 0, &args) } else { Ok(()) }
    }

    fn route_rows(&mut self, x: &Rows, router: &Dense, routes: &mut Routes) -> Result<(), KernelError> {
        need("a row of the router's input", x.cols() * 4, router.cols * 4)?;
        // Asks for an expert beyond the last if there are fewer than K.
        check("expert", routes.top_k().saturating_sub(1), router.rows)?;
        routes.resize(x.len(), router.rows)?;
        self.logits.reserve(x.len() * router.rows * 4)?;
        self.project_to(true, x, router, self.logits.address(), false)?;
        let args = TopKArgs {
            logits: self.logits.address(),
            experts: routes.experts(),
            weights: routes.weights(),
            experts_count: router.rows as u32,
            top_k: routes.top_k() as u32,
        };
        self.launch(&TOP_K, [x.len() as u32, 1, 1], 0, &args)
    }

    fn gather_rows(&mut self, x: &Rows, rows: &[u32], out: &mut Rows) -> Result<(), KernelError> {
        need("a gathered row", out.cols(), x.cols())?;
        for &row in rows {
            check("row", row as usize, x.len())?;
        }
        out.resize(rows.len())?;
        upload(&mut self.gathered, rows)?;
        let args = GatherArgs {
            x: x.address(),
            rows: self.gathered.address(),
            out: out.address(),
            cols: x.cols() as u32,
            unused: 0,
        };
        self.launch(&GATHER, [rows.len() as u32, 1, 1], 0, &args)
    }

    /// Reads what kernels found wrong, and forgets it.
    fn take_status(&mut self) -> Result<(), KernelError> {
        let bytes = self.status.download(status::BYTES)?;
        let words = [0, 4, 8, 12].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte])));
        if words[0] != 0 {
            self.status.upload(0, &[0; status::BYTES])?;
        }
        status::read(words)
    }
}

impl Backend for Cuda {
    type Rows = Rows;
    type Vector = Vector;
    type Dense = Dense;
    type Embedding = Embedding;
    type Experts = Experts;
    type Places = Places;
    type Kv = Kv;
    type Routes = Routes;
    type Work = Work;
    type Parts = Parts;

    fn rows(&mut self, rows: usize, cols: usize) -> Rows {
        let made = Rows::new(&self.memory, rows, cols);
        self.made(made, |memory| Rows::nothing(memory, cols))
    }

    fn routes(&mut self, rows: usize, top_k: usize) -> Routes {
        self.top_k = top_k;
        let made = Routes::new(&self.memory, rows, top_k);
        self.made(made, |memory| Routes::nothing(memory, top_k))
    }

    fn work(&mut self, received: usize, choices: usize, shape: ExpertShape) -> Work {
        let made = Work::new(&self.memory, self.precision, received, choices, shape);
        self.made(made, |memory| Work::nothing(memory, shape))
    }

    fn parts(&mut self, ranks: usize, bytes_max: usize) -> Parts {
        let made = Parts::new(&self.memory, ranks, bytes_max);
        self.made(made, |memory| Parts::nothing(memory, ranks))
    }

    fn kv(&mut self, shape: &KvShape) -> Kv {
        let made = Kv::new(&self.memory, self.precision, shape);
        self.made(made, |_| Kv::nothing(shape))
    }

    fn token_slots(&mut self, slots: usize) {
        let made = self.memory.zeroed(slots * 4);
        self.tokens = self.made(made, Memory::nothing);
    }

    fn vector(&mut self, source: Source<'_>) -> Result<Vector, KernelError> {
        need("a vector of bf16", source.bytes().len() % 2, 0)?;
        let values: Vec<f32> = bf16::values(source.bytes()).collect();
        source.release();
        Ok(Vector { buffer: self.memory.filled(&bytes_of(&values))?, len: values.len() })
    }

    fn dense(&mut self, cols: usize, stack: &[Stack<'_>]) -> Result<Dense, KernelError> {
        let (rows, bytes) = pack_dense(cols, stack)?;
        Ok(Dense { buffer: self.memory.filled(&bytes)?, rows, cols })
    }

    fn embedding(&mut self, cols: usize, table: EmbeddingSource) -> Result<Embedding, KernelError> {
        let bytes = table.table();
        let vocab = bytes.len().checked_div(cols * 2).unwrap_or(0);
        need("the embedding", bytes.len(), vocab * cols * 2)?;
        Ok(Embedding { buffer: self.memory.filled(bytes)?, cols, vocab })
    }

    fn experts(&mut self, slots: usize, shape: ExpertShape) -> Experts {
        let made = Experts::new(&self.memory, slots, shape);
        self.made(made, |memory| Experts::nothing(memory, shape))
    }

    fn load_expert(
        &mut self,
        experts: &mut Experts,
        slot: usize,
        source: &ExpertSource<'_>,
    ) -> Result<(), KernelError> {
        experts.load(&self.memory, slot, source)
    }

    fn places(&mut self, places: &[(u32, u32)]) -> Places {
        let made = Places::new(&self.memory, places);
        self.made(made, Places::nothing)
    }

    fn begin(&mut self, inputs: &StepInputs, rope: &RopeTable) {
        self.drawn.clear();
        let result = self.inputs.begin(inputs, rope);
        self.note(result);
    }

    fn copy_block(&mut self, kv: &mut Kv, pool: usize, from: u32, to: u32) {
        let result = kv.copy_block(pool, from, to);
        self.note(result);
    }

    fn embed(&mut self, table: &Embedding, out: &mut Rows) {
        let result = self.embed_rows(table, out);
        self.note(result);
    }

    fn norm(&mut self, x: &Rows, weight: &Vector, eps: f32, out: &mut Rows) {
        let result = self.norm_rows(x, weight, eps, out);
        self.note(result);
    }

    fn project(&mut self, x: &Rows, weight: &Dense, out: &mut Rows) {
        let result = self.project_rows(x, weight, out, false);
        self.note(result);
    }

    fn rotate_and_store(&mut self, qkv: &mut Rows, kv: &mut Kv, layer: KvLayer) {
        let result = self.rotate_and_store_rows(qkv, kv, layer);
        self.note(result);
    }

    fn attend(&mut self, qkv: &Rows, kv: &Kv, layer: KvLayer, sinks: &Vector, window: Option<u32>, out: &mut Rows) {
        let result = self.attend_rows(qkv, kv, layer, sinks, window, out);
        self.note(result);
    }

    fn project_add(&mut self, x: &Rows, weight: &Dense, residual: &mut Rows) {
        let result = self.project_rows(x, weight, residual, true);
        self.note(result);
    }

    fn route(&mut self, x: &Rows, router: &Dense, routes: &mut Routes) {
        let result = self.route_rows(x, router, routes);
        self.note(result);
    }

    fn dispatch(&mut self, x: &Rows, routes: &Routes, places: &Places, out: &mut Parts) {
        let result = self.dispatch_rows(x, routes, places, out);
        self.note(result);
    }

    fn receive(&mut self, received: &Parts, experts: &Experts, work: &mut Work) {
        let result = self.receive_parts(received, experts, work);
        self.note(result);
    }

    fn gate_up(&mut self, experts: &Experts, work: &mut Work) {
        let result = self.gate_up_items(experts, work);
        self.note(result);
    }

    fn down(&mut self, experts: &Experts, work: &Work, out: &mut Parts) {
        let result = self.down_items(experts, work, out);
        self.note(result);
    }

    fn combine(&mut self, returned: &Parts, routes: &Routes, places: &Places, residual: &mut Rows) {
        let result = self.combine_rows(returned, routes, places, residual);
        self.note(result);
    }

    fn gather(&mut self, x: &Rows, rows: &[u32], out: &mut Rows) {
        let result = self.gather_rows(x, rows, out);
        self.note(result);
    }

    fn sample(&mut self, logits: &Rows, draws: &[Draw]) {
        let result = self.sample_rows(logits, draws);
        self.note(result);
    }

    fn set_token(&mut self, slot: u32, token: u32) {
        let result = check("token slot", slot as usize, self.tokens.bytes() / 4)
            .and_then(|slot| self.tokens.upload(slot * 4, &token.to_le_bytes()));
        self.note(result);
    }

    fn sampled(&mut self) -> Vec<Sampled> {
        let read: Result<Vec<_>, _> = self.drawn.iter().map(Drawn::read).collect();
        self.made(read, |_| Vec::new()).concat()
    }

    fn read(&mut self, rows: &Rows) -> Vec<f32> {
        let read = rows.read();
        self.made(read, |_| Vec::new())
    }

    fn write(&mut self, rows: &mut Rows, values: &[f32]) {
        let result = rows.write(values);
        self.note(result);
    }

    fn finish(&mut self) -> Result<(), KernelError> {
        let waited = self.memory.device.synchronize();
        self.note(waited);
        if !self.broken {
            let status = self.take_status();
            self.note(status);
        }
        match &self.error {
            Some(error) if self.broken => Err(error.clone()),
            _ => self.error.take().map_or(Ok(()), Err),
        }
    }

    fn dispatch_record(&self, top_k: usize, hidden: usize) -> usize {
        wire::dispatch_record(self.precision, top_k, hidden)
    }

    fn combine_record(&self, hidden: usize) -> usize {
        hidden * wire::bytes(self.precision)
    }

    fn allocated(&self) -> u64 {
        self.memory.held()
    }
}
