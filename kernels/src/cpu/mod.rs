//! Every op on CPUs.
//!
//! Kernels are written once over sixteen lanes (`lanes`) and compiled for AVX-512, AVX2 and any other processor;
//! all give the same bits, with any number of threads. A lane is an output row, sums run over columns ascending
//! with fused multiply-adds, and no sum crosses lanes except where a module's head states the order.

mod attention;
pub mod ceiling;
mod dense;
mod exchange;
mod exp;
mod experts;
mod int8;
mod isa;
mod kv;
mod lanes;
mod mxfp4;
mod q8;
mod rms_norm;
mod rope;
mod router;
mod rows;
mod sample;
mod tiles;

pub use dense::Dense;
pub use exchange::Places;
pub use experts::{Experts, Work};
pub use isa::Isa;
pub use kv::Kv;
pub use router::Routes;
pub use rows::Rows;
pub use sample::sample;

pub use crate::threads::unbind;

pub(crate) use self::dense::need;
pub(crate) use self::kv::check;

use self::dense::{Rounded, Store};
use self::isa::Simd;
use self::rope::Angles;
use crate::memory::{Packed, Source, resident};
use crate::threads::Threads;
use crate::{
    Backend, DenseFormat, DenseUse, Draw, EmbeddingSource, ExpertShape, ExpertSource, HostParts, KernelError, KvLayer,
    KvShape, Precision, RopeTable, Sampled, Stack, StepInputs, TokenSource, bf16, wire,
};

/// Changes whenever packed bytes change.
const LAYOUT: u32 = 3;

/// Rows whose router logits are held at once.
const ROUTER_ROWS: usize = 64;

/// How a [`Cpu`] computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// How much is rounded on the way.
    pub precision: Precision,
    /// How projections are held.
    pub dense: DenseFormat,
    /// Threads that compute; 0 counts as 1.
    pub threads: usize,
    /// Binds threads to cores, from the one of this number on among those that the process may use.
    pub pin: Option<usize>,
    /// The instruction set; `None` takes the processor's best.
    pub isa: Option<Isa>,
}

/// Processors as a backend. Ops are done when they return.
#[derive(Debug)]
pub struct Cpu {
    precision: Precision,
    dense: DenseFormat,
    isa: Isa,
    simd: Simd,
    threads: Threads,
    /// Choices of a row: told by [`Backend::routes`], needed to read records.
    top_k: usize,
    inputs: StepInputs,
    angles: Angles,
    /// Router logits of up to [`ROUTER_ROWS`] rows.
    logits: Vec<f32>,
    /// Rows rounded for the product at work.
    rounded: Rounded,
    /// Rows and columns of all activations there are.
    shapes: Vec<(usize, usize)>,
    /// Last sampled token of each slot.
    tokens: Vec<u32>,
    /// What was sampled in this step.
    sampled: Vec<Sampled>,
    /// The first thing that went wrong since the last [`Backend::finish`].
    error: Option<KernelError>,
    allocated: u64,
}

/// f32 `[n]`.
#[derive(Debug)]
pub struct Vector {
    values: Vec<f32>,
}

/// The embedding table, read in place.
pub struct Embedding {
    cols: usize,
    table: EmbeddingSource,
}

impl std::fmt::Debug for Embedding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedding").field("cols", &self.cols).finish_non_exhaustive()
    }
}

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`KernelError::Isa`], [`KernelError::Threads`].
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        Ok(Self {
            precision: options.precision,
            dense: options.dense,
            isa,
            simd: Simd::new(isa).ok_or_else(|| KernelError::Isa { isa: isa.name() })?,
            threads: Threads::new(options.threads, options.pin)?,
            top_k: 0,
            inputs: StepInputs::default(),
            angles: Angles::default(),
            logits: Vec::new(),
            rounded: Rounded::new(),
            shapes: Vec::new(),
            tokens: Vec::new(),
            sampled: Vec::new(),
            error: None,
            allocated: 0,
        })
    }

    /// How much is rounded on the way.
    #[must_use]
    pub const fn precision(&self) -> Precision {
        self.precision
    }

    /// The instruction set in use.
    #[must_use]
    pub const fn isa(&self) -> Isa {
        self.isa
    }

    /// How a dense matrix is held.
    const fn format(&self, used: DenseUse) -> DenseFormat {
        match used {
            DenseUse::Projection => self.dense,
            DenseUse::Router => DenseFormat::Bf16,
        }
    }

    /// Keeps the first error for [`Backend::finish`].
    fn note(&mut self, result: Result<(), KernelError>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }

    fn project_into(&mut self, x: &Rows, weight: &Dense, out: &mut Rows, store: Store) -> Result<(), KernelError> {
        need("a row of a projection's input", x.cols() * 4, weight.cols() * 4)?;
        need("a row of a projection's output", out.cols() * 4, weight.rows() * 4)?;
        match store {
            Store::Replace => resize(out, x.len())?,
            Store::Add => need("the rows added to", out.len(), x.len())?,
        }
        let Self { simd, threads, rounded, .. } = self;
        dense::project(*simd, threads, x.values(), rounded, weight, out.values_mut(), store);
        Ok(())
    }

    fn embed_rows(&self, table: &Embedding, out: &mut Rows) -> Result<(), KernelError> {
        need("a row of the embedding", table.cols, out.cols())?;
        resize(out, self.inputs.tokens.len())?;
        let bytes = table.table.table();
        let row_bytes = table.cols * 2;
        let vocab = bytes.len().checked_div(row_bytes).unwrap_or(0);
        for (source, out) in self.inputs.tokens.iter().zip(out.values_mut().chunks_exact_mut(table.cols.max(1))) {
            let token = match *source {
                TokenSource::Given(token) => token,
                TokenSource::Sampled(slot) => self.tokens[check("token slot", slot as usize, self.tokens.len())?],
            };
            let token = check("token", token as usize, vocab)?;
            for (out, value) in out.iter_mut().zip(bf16::values(&bytes[token * row_bytes..(token + 1) * row_bytes])) {
                *out = value;
            }
        }
        Ok(())
    }

    fn rotate_and_store_rows(&self, qkv: &mut Rows, kv: &mut Kv, layer: KvLayer) -> Result<(), KernelError> {
        let (dim, kv_heads) = (kv.head_dim(), kv.kv_heads());
        self.check_rows(qkv)?;
        need("the rope table for a head", self.angles.half() * 2, dim)?;
        kv.check_tables(&self.inputs, layer, |position| position)?;
        let cols = qkv.cols();
        // Queries and keys.
        let heads = (cols / dim.max(1)).checked_sub(kv_heads).filter(|heads| *heads >= kv_heads);
        let heads = heads.ok_or(KernelError::Size {
            what: "a row of queries, keys and values",
            got: cols,
            need: 3 * kv_heads * dim,
        })?;
        self.angles.rotate(self.simd, &self.threads, qkv.values_mut(), cols, heads);
        kv.store(&self.threads, &self.inputs, layer, qkv.values(), cols, (heads - kv_heads) * dim);
        Ok(())
    }

    /// Refuses tensors that do not hold the step's rows.
    fn check_rows(&self, rows: &Rows) -> Result<(), KernelError> {
        need("the rows of the step", rows.len(), self.inputs.positions.len())
    }

    fn route_rows(&mut self, x: &Rows, router: &Dense, routes: &mut Routes) -> Result<(), KernelError> {
        need("a row of the router's input", x.cols() * 4, router.cols() * 4)?;
        if x.len() > routes.capacity() {
            return Err(KernelError::Plan { what: "row", index: x.len() - 1, len: routes.capacity() });
        }
        // Asks for an expert beyond the last if there are fewer than K.
        check("expert", routes.top_k().saturating_sub(1), router.rows())?;
        routes.set_len(x.len());
        let experts = router.rows();
        for first in (0..x.len()).step_by(ROUTER_ROWS) {
            let rows = first..x.len().min(first + ROUTER_ROWS);
            self.logits.resize(rows.len() * experts, 0.0);
            let x = &x.values()[rows.start * x.cols()..rows.end * x.cols()];
            let Self { simd, threads, rounded, logits, .. } = self;
            dense::project(*simd, threads, x, rounded, router, logits, Store::Replace);
            for (row, logits) in rows.zip(self.logits.chunks_exact(experts)) {
                routes.choose(row, logits);
            }
        }
        Ok(())
    }

    fn sample_rows(&mut self, logits: &Rows, draws: &[Draw]) -> Result<(), KernelError> {
        need("the draws of the logits", draws.len(), logits.len())?;
        let mut tokens = vec![Sampled::default(); draws.len()];
        // A vocabulary's softmax is as dear as a few multiplications an entry.
        let work = logits.values().len() * 8;
        self.threads.each_chunk(&mut tokens, 1, work, |row, token| {
            token[0] = sample::sample_with(self.simd, logits.row(row), &draws[row]);
        });
        for (draw, token) in draws.iter().zip(&tokens) {
            let slot = check("token slot", draw.slot as usize, self.tokens.len())?;
            self.tokens[slot] = token.token;
        }
        self.sampled.extend(tokens);
        Ok(())
    }
}

/// Makes `rows` hold `len` rows.
fn resize(rows: &mut Rows, len: usize) -> Result<(), KernelError> {
    if len > rows.capacity() {
        return Err(KernelError::Plan { what: "row", index: len - 1, len: rows.capacity() });
    }
    rows.set_len(len);
    Ok(())
}

impl Backend for Cpu {
    type Rows = Rows;
    type Vector = Vector;
    type Dense = Dense;
    type Embedding = Embedding;
    type Experts = Experts;
    type Places = Places;
    type Kv = Kv;
    type Routes = Routes;
    type Work = Work;
    type Parts = HostParts;
    type Ended = Result<Vec<Sampled>, KernelError>;

    fn rows(&mut self, rows: usize, cols: usize) -> Rows {
        self.shapes.push((rows, cols));
        let rows = Rows::new(rows, cols);
        self.allocated += rows.bytes();
        rows
    }

    fn routes(&mut self, rows: usize, top_k: usize) -> Routes {
        self.top_k = top_k;
        let routes = Routes::new(rows, top_k);
        self.allocated += routes.bytes();
        routes
    }

    fn work(&mut self, received: usize, choices: usize, shape: ExpertShape) -> Work {
        let work = Work::new(self.precision, received, choices, shape);
        self.allocated += work.bytes();
        work
    }

    fn parts(&mut self, ranks: usize, bytes_max: usize) -> HostParts {
        self.allocated += bytes_max as u64;
        // Shared evenly at first; a rank that needs more than its share grows, within `bytes_max` for all.
        let mut parts = HostParts { by_rank: (0..ranks).map(|_| resident(bytes_max / ranks)).collect() };
        parts.clear();
        parts
    }

    fn kv(&mut self, shape: &KvShape) -> Kv {
        let kv = Kv::new(self.precision, shape);
        self.allocated += kv.bytes();
        kv
    }

    fn token_slots(&mut self, slots: usize) {
        self.tokens = vec![0; slots];
    }

    fn vector(&mut self, source: Source<'_>) -> Result<Vector, KernelError> {
        need("a vector of bf16", source.bytes().len() % 2, 0)?;
        let values: Vec<f32> = bf16::values(source.bytes()).collect();
        source.release();
        self.allocated += size_of_val(&values[..]) as u64;
        Ok(Vector { values })
    }

    fn packing(&self) -> String {
        let dense = match self.dense {
            DenseFormat::Bf16 => "bf16",
            DenseFormat::Q8 => "q8",
        };
        format!("cpu-{LAYOUT}-{dense}")
    }

    fn dense_bytes(&self, used: DenseUse, rows: usize, cols: usize) -> usize {
        dense::bytes_of(self.format(used), rows, cols)
    }

    fn pack_dense(&self, used: DenseUse, cols: usize, stack: &[Stack<'_>], out: &mut [u8]) -> Result<(), KernelError> {
        dense::pack(&self.threads, self.format(used), cols, stack, out)
    }

    fn hold_dense(&mut self, used: DenseUse, rows: usize, cols: usize, packed: Packed) -> Result<Dense, KernelError> {
        let dense = Dense::new(self.format(used), rows, cols, packed.populated())?;
        self.allocated += dense.bytes();
        // Room to round the rows that this matrix will be multiplied with.
        let rows_max = self.shapes.iter().filter(|shape| shape.1 == cols).map(|shape| shape.0).max();
        self.allocated += dense.make_room(&mut self.rounded, rows_max.unwrap_or(0));
        Ok(dense)
    }

    fn embedding(&mut self, cols: usize, table: EmbeddingSource) -> Result<Embedding, KernelError> {
        let bytes = table.table().len();
        need("the embedding", bytes, bytes.checked_div(cols * 2).unwrap_or(0) * cols * 2)?;
        Ok(Embedding { cols, table })
    }

    fn experts(&mut self, slots: usize, shape: ExpertShape) -> Experts {
        Experts::new(slots, shape)
    }

    fn expert_bytes(&self, experts: &Experts) -> usize {
        experts.packed_bytes().0
    }

    fn pack_expert(&self, experts: &Experts, source: &ExpertSource<'_>, out: &mut [u8]) -> Result<(), KernelError> {
        experts.pack(&self.threads, source, out)
    }

    fn hold_expert(&mut self, experts: &mut Experts, slot: usize, packed: Packed) -> Result<(), KernelError> {
        self.clear_expert(experts, slot);
        let packed = packed.populated();
        experts.hold(slot, &packed)?;
        self.allocated += packed.len() as u64;
        Ok(())
    }

    fn clear_expert(&mut self, experts: &mut Experts, slot: usize) {
        self.allocated -= experts.clear(slot);
    }

    fn places(&mut self, places: &[(u32, u32)]) -> Places {
        Places::new(places)
    }

    fn begin(&mut self, inputs: &StepInputs, rope: &RopeTable) {
        self.sampled.clear();
        let rows = inputs.tokens.len();
        let whole = need("the positions of the step's rows", inputs.positions.len(), rows)
            .and_then(|()| need("the sequences of the step's rows", inputs.sequences.len(), rows));
        if whole.is_ok() {
            self.inputs.clone_from(inputs);
        } else {
            // Rows that are not whole are no rows.
            self.inputs = StepInputs::default();
        }
        self.note(whole);
        self.angles.set(&self.inputs.positions, rope);
    }

    fn copy_block(&mut self, kv: &mut Kv, pool: usize, from: u32, to: u32) {
        let copied = kv.copy_block(pool, from, to);
        self.note(copied);
    }

    fn embed(&mut self, table: &Embedding, out: &mut Rows) {
        let result = self.embed_rows(table, out);
        self.note(result);
    }

    fn norm(&mut self, x: &Rows, weight: &Vector, eps: f32, out: &mut Rows) {
        let result = need("a norm's weight", weight.values.len(), x.cols())
            .and_then(|()| need("a row of a norm's output", out.cols(), x.cols()))
            .and_then(|()| resize(out, x.len()));
        if result.is_ok() {
            rms_norm::rms_norm(self.simd, &self.threads, x.values(), &weight.values, eps, out.values_mut());
        }
        self.note(result);
    }

    fn project(&mut self, x: &Rows, weight: &Dense, out: &mut Rows) {
        let result = self.project_into(x, weight, out, Store::Replace);
        self.note(result);
    }

    fn rotate_and_store(&mut self, qkv: &mut Rows, kv: &mut Kv, layer: KvLayer) {
        let result = self.rotate_and_store_rows(qkv, kv, layer);
        self.note(result);
    }

    fn attend(&mut self, qkv: &Rows, kv: &Kv, layer: KvLayer, sinks: &Vector, window: Option<u32>, out: &mut Rows) {
        let width = sinks.values.len() * kv.head_dim();
        let result = self
            .check_rows(qkv)
            .and_then(|()| need("a row of attention's output", out.cols(), width))
            .and_then(|()| need("a row of attention's input", qkv.cols(), width + 2 * kv.kv_heads() * kv.head_dim()))
            .and_then(|()| resize(out, qkv.len()))
            .and_then(|()| {
                let (qkv, cols, sinks) = (qkv.values(), qkv.cols(), &sinks.values[..]);
                let tensors = attention::Tensors { qkv, cols, sinks, out: out.values_mut() };
                attention::attend(self.simd, &self.threads, &self.inputs, kv, layer, window, tensors)
            });
        self.note(result);
    }

    fn project_add(&mut self, x: &Rows, weight: &Dense, residual: &mut Rows) {
        let result = self.project_into(x, weight, residual, Store::Add);
        self.note(result);
    }

    fn route(&mut self, x: &Rows, router: &Dense, routes: &mut Routes) {
        let result = self.route_rows(x, router, routes);
        self.note(result);
    }

    fn dispatch(&mut self, x: &Rows, routes: &Routes, places: &Places, out: &mut HostParts) {
        let result = need("the rows dispatched", x.len(), routes.len()).and_then(|()| {
            exchange::dispatch(self.simd, &self.threads, self.precision, x.values(), routes, places, out)
        });
        self.note(result);
    }

    fn receive(&mut self, received: &HostParts, experts: &Experts, work: &mut Work) {
        let result = work.receive(self.simd, &self.threads, received, experts, self.top_k);
        self.note(result);
    }

    fn gate_up(&mut self, experts: &Experts, work: &mut Work) {
        work.gate_up(self.simd, &self.threads, experts);
    }

    fn down(&mut self, experts: &Experts, work: &Work, out: &mut HostParts) {
        work.down(self.simd, &self.threads, experts, out);
    }

    fn combine(&mut self, returned: &HostParts, routes: &Routes, places: &Places, residual: &mut Rows) {
        let result = need("the rows combined", residual.len(), routes.len()).and_then(|()| {
            let residual = residual.values_mut();
            exchange::combine(self.simd, &self.threads, self.precision, returned, routes, places, residual)
        });
        self.note(result);
    }

    fn gather(&mut self, x: &Rows, rows: &[u32], out: &mut Rows) {
        let result =
            need("a gathered row", out.cols(), x.cols()).and_then(|()| resize(out, rows.len())).and_then(|()| {
                for (out, &row) in out.values_mut().chunks_exact_mut(x.cols().max(1)).zip(rows) {
                    out.copy_from_slice(x.row(check("row", row as usize, x.len())?));
                }
                Ok(())
            });
        self.note(result);
    }

    fn sample(&mut self, logits: &Rows, draws: &[Draw]) {
        let result = self.sample_rows(logits, draws);
        self.note(result);
    }

    fn set_token(&mut self, slot: u32, token: u32) {
        let result = check("token slot", slot as usize, self.tokens.len()).map(|slot| self.tokens[slot] = token);
        self.note(result);
    }

    fn end(&mut self) -> Self::Ended {
        let sampled = std::mem::take(&mut self.sampled);
        self.finish().map(|()| sampled)
    }

    fn is_done(&self, _ended: &Self::Ended) -> bool {
        true
    }

    fn result(&mut self, ended: Self::Ended) -> Result<Vec<Sampled>, KernelError> {
        ended
    }

    fn read(&mut self, rows: &Rows) -> Vec<f32> {
        rows.values().to_vec()
    }

    fn write(&mut self, rows: &mut Rows, values: &[f32]) {
        let result = resize(rows, values.len().checked_div(rows.cols()).unwrap_or(0))
            .and_then(|()| need("the numbers of whole rows", values.len(), rows.values().len()))
            .map(|()| rows.values_mut().copy_from_slice(values));
        self.note(result);
    }

    fn finish(&mut self) -> Result<(), KernelError> {
        self.error.take().map_or(Ok(()), Err)
    }

    fn dispatch_record(&self, top_k: usize, hidden: usize) -> usize {
        wire::dispatch_record(self.precision, top_k, hidden)
    }

    fn combine_record(&self, hidden: usize) -> usize {
        hidden * wire::bytes(self.precision)
    }

    fn allocated(&self) -> u64 {
        self.allocated
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    /// Bytes that are always the same.
    fn bytes(len: usize, mask: u8) -> Vec<u8> {
        let next = |state: u32| state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let states = std::iter::successors(Some(7u32), |state| Some(next(*state)));
        states.take(len).map(|state| (state >> 24) as u8 & mask).collect()
    }

    #[test]
    fn packed_bytes_are_those_that_files_of_this_layout_hold() {
        let cpu = |dense| Cpu::new(CpuOptions { dense, ..CpuOptions::default() }).unwrap();
        let hash =
            |packed: Packed| Sha256::digest(&packed[..])[..4].iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (weight, bias) = (bytes(40 * 70 * 2, 0x3f), bytes(40 * 2, 0x3f));
        let stack = [Stack { weight: Source::memory(&weight), bias: Some(Source::memory(&bias)) }];
        let dense = |format| {
            let cpu = cpu(format);
            let len = cpu.dense_bytes(DenseUse::Projection, 40, 70);
            let packed = Packed::filled(len, |out| cpu.pack_dense(DenseUse::Projection, 70, &stack, out));
            hash(packed.unwrap())
        };
        let mut cpu = cpu(DenseFormat::Q8);
        let experts = cpu.experts(0, ExpertShape { hidden: 64, intermediate: 32, limit: 7.0 });
        let mut parts = [64 * 32, 64 * 2, 64 * 2, 64 * 16, 64, 64 * 2].map(|len| bytes(len, 0x7f));
        // The largest scale, whose codes become others.
        parts[1][5] = 254;
        parts[0][5 * 16..6 * 16].iter_mut().for_each(|codes| *codes &= 0xbb);
        let [gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias] =
            parts.each_ref().map(|part| Source::memory(part));
        let source = ExpertSource { gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias };
        let packed = Packed::filled(cpu.expert_bytes(&experts), |out| cpu.pack_expert(&experts, &source, out));
        let hashes = [dense(DenseFormat::Bf16), dense(DenseFormat::Q8), hash(packed.unwrap())];
        assert_eq!(
            (LAYOUT, hashes.join(" ").as_str()),
            (3, "34e8b441 a87532b7 39239559"),
            "bytes have changed: LAYOUT must be one more"
        );
    }
}
