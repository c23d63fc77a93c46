//! The vocabulary of gpt-oss: what every backend can do.
//!
//! Shape letters: `T` rows of this rank in the step, `H` hidden, `Nq` query heads, `Nkv` key and value heads,
//! `D` head width, `E` experts, `K` experts of a token, `I` expert width, `V` vocabulary, `M` rows received.
//!
//! Ops are enqueued: they return nothing, and what they find out (routes, counts, tokens) stays where the
//! backend keeps it until [`Backend::finish`]. Shapes come from the plan alone.

use std::sync::Arc;
use std::time::Instant;

use crate::memory::{Packed, Source};

/// Positions of a KV block.
pub const BLOCK_SIZE: usize = 16;

/// Positions of an attention segment. Segments begin at multiples of this, each has its own maximum, sum and
/// output, and they are merged in ascending order; so the result does not depend on chunks or threads.
pub const SEGMENT: usize = 64;

/// The constant in `g * sigmoid(alpha * g)`.
//= gpt-oss model.py#swiglu
pub const SWIGLU_ALPHA: f32 = 1.702;

/// In a dispatched row's slot list: this choice is worked on by another rank.
pub const NO_SLOT: u32 = u32::MAX;

/// How much is rounded on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 activations, KV and wire; weights widened in registers.
    Exact,
    /// int8 activations per block of 32 in the experts (bf16 on GPUs), keys and values in 16 bits, bf16 on the wire. See also [`DenseFormat`].
    #[default]
    Fast,
}

/// How dense weights are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DenseFormat {
    /// As in the checkpoint; products in f32.
    #[default]
    Bf16,
    /// int8 with a scale per block of 32, like the rows they are multiplied with.
    Q8,
}

/// What a dense matrix is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseUse {
    /// Attention and unembedding: held as the backend was told.
    Projection,
    /// Choosing experts: never rounded beyond the checkpoint's bf16.
    Router,
}

/// What went wrong inside a step; found at [`Backend::finish`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// Bytes of a tensor do not have the size that its shape needs.
    #[error("{what} has {got} bytes, its shape needs {need}")]
    Size {
        /// Which tensor.
        what: &'static str,
        /// Bytes there are.
        got: usize,
        /// Bytes there should be.
        need: usize,
    },
    /// Another rank sent rows that cannot be read.
    #[error("rank {rank} sent {what}; all ranks must run the same build")]
    Received {
        /// The rank.
        rank: usize,
        /// What was wrong.
        what: &'static str,
    },
    /// A block scale of an MXFP4 tensor is not a number, or a weight of its block is beyond f32.
    #[error(
        "scale {index} of {what} makes a weight that is no number of f32; the checkpoint is damaged, fetch it again"
    )]
    Scale {
        /// Which tensor.
        what: &'static str,
        /// Index of the scale in the tensor.
        index: usize,
    },
    /// A step names something that does not exist.
    #[error("the step names {what} {index}, but there are {len}; plan and worker disagree")]
    Plan {
        /// What is named.
        what: &'static str,
        /// The index.
        index: usize,
        /// How many there are.
        len: usize,
    },
    /// The processor lacks an instruction set that was asked for.
    #[error("this processor has no {isa}; let the instruction set be detected")]
    Isa {
        /// The instruction set.
        isa: &'static str,
    },
    /// This build cannot compute on a processor that was asked for.
    #[error("this build has no backend for {processor}; compute on cpu")]
    Processor {
        /// The processor.
        processor: &'static str,
    },
    /// A device failed or refused.
    #[error("the device cannot {what}: {why}; free its memory or restart the worker, and see docs/gpu-validation.md")]
    Device {
        /// What was to be done.
        what: &'static str,
        /// What the device or its driver said.
        why: String,
    },
    /// A device did not answer in time.
    #[error(
        "the device did not {what} in time: it hangs, or is far slower than it should be; restart the worker, and if that \
         does not help reset the GPU (nvidia-smi --gpu-reset) or restart the machine"
    )]
    Late {
        /// What was waited for.
        what: &'static str,
    },
    /// The threads could not be started.
    #[error("cannot start {threads} threads: {why}; use fewer --threads")]
    Threads {
        /// How many.
        threads: usize,
        /// The system's reason.
        why: String,
    },
}

/// Rotary frequencies, `[D/2]`, and the factor on both q and k.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Radians a position, for each pair of dimensions.
    pub inv_freq: Vec<f64>,
    /// Multiplies cosine and sine.
    pub scale: f64,
}

/// What a row reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// This token.
    Given(u32),
    /// The token last sampled into this token slot, see [`Draw::slot`].
    Sampled(u32),
}

/// What the rows of one step are. Row `t` of a step is the same row in every `[T, ..]` tensor.
#[derive(Clone, Debug, Default)]
pub struct StepInputs {
    /// What each row reads, `[T]`.
    pub tokens: Vec<TokenSource>,
    /// Position of each row in its sequence, `[T]`.
    pub positions: Vec<u32>,
    /// Sequence of each row as an index into the tables, `[T]`.
    pub sequences: Vec<u32>,
    /// Per pool (as in [`KvShape::pools`]) and sequence: block of each stretch of [`BLOCK_SIZE`] positions.
    /// Stretches that no row of the step sees may hold any number.
    pub tables: Vec<Vec<Vec<u32>>>,
}

/// One kind of KV memory: how many layers share a block id and how many blocks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolShape {
    /// Layers of the pool.
    pub layers: usize,
    /// Blocks of each layer.
    pub blocks: usize,
}

/// The paged KV memory of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// The pools.
    pub pools: Vec<PoolShape>,
    /// `Nkv`.
    pub kv_heads: usize,
    /// `D`.
    pub head_dim: usize,
}

/// A layer's place in the KV memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// Index of the pool.
    pub pool: usize,
    /// Index of the layer within the pool.
    pub layer: usize,
}

/// A bf16 matrix with its bias, to be stacked under others of the same width.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// bf16 little endian, `[rows, cols]`.
    pub weight: Source<'a>,
    /// bf16 little endian, `[rows]`.
    pub bias: Option<Source<'a>>,
}

impl Stack<'_> {
    /// Rows of the matrix, if it has `cols` columns.
    ///
    /// # Errors
    /// [`KernelError::Size`] where weight or bias have another size.
    pub fn rows(&self, cols: usize) -> Result<usize, KernelError> {
        let got = self.weight.bytes().len();
        let rows = got.checked_div(2 * cols).unwrap_or(0);
        if got != rows * cols * 2 {
            return Err(KernelError::Size { what: "a weight matrix", got, need: rows * cols * 2 });
        }
        match self.bias.map(|bias| bias.bytes().len()) {
            Some(got) if got != rows * 2 => Err(KernelError::Size { what: "a bias", got, need: rows * 2 }),
            _ => Ok(rows),
        }
    }
}

/// Widths of the experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertShape {
    /// `H`, a multiple of 32.
    pub hidden: usize,
    /// `I`, a multiple of 32.
    pub intermediate: usize,
    /// Clamp of the SwiGLU inputs.
    pub limit: f32,
}

/// One expert as the checkpoint holds it. Rows `2i` of gate-up are gates, rows `2i + 1` are ups.
#[derive(Clone, Copy, Debug)]
pub struct ExpertSource<'a> {
    /// `[2I, H/32, 16]` bytes: byte `b` of a block holds columns `2b` (low nibble) and `2b + 1`.
    pub gate_up_blocks: Source<'a>,
    /// `[2I, H/32]`, E8M0.
    pub gate_up_scales: Source<'a>,
    /// bf16 `[2I]`.
    pub gate_up_bias: Source<'a>,
    /// `[H, I/32, 16]` bytes.
    pub down_blocks: Source<'a>,
    /// `[H, I/32]`, E8M0.
    pub down_scales: Source<'a>,
    /// bf16 `[H]`.
    pub down_bias: Source<'a>,
}

impl<'a> ExpertSource<'a> {
    /// All parts.
    #[must_use]
    pub const fn parts(&self) -> [Source<'a>; 6] {
        [
            self.gate_up_blocks,
            self.gate_up_scales,
            self.gate_up_bias,
            self.down_blocks,
            self.down_scales,
            self.down_bias,
        ]
    }
}

/// How a token is drawn from a row of logits, in this order: single logits are edited; tokens that are not allowed are
/// dropped; logits are divided by the temperature; the `top_k` most likely tokens are kept, of those the nucleus of
/// `top_p`, of those what `min_p` allows; one is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// Where the token is kept for [`TokenSource::Sampled`]; below the number given to [`Backend::token_slots`].
    pub slot: u32,
    /// 0 takes the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keeps this many most likely tokens, the lowest ids among equals; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of most likely tokens with at least this probability among those kept so far.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Seed of the request.
    pub seed: u64,
    /// Choice of the request.
    pub choice: u32,
    /// Position that the token will have.
    pub position: u32,
    /// Changes to single logits, each token at most once; tokens outside the vocabulary are ignored.
    pub edits: Vec<Edit>,
    /// Which tokens may be drawn, bit `i % 64` of word `i / 64` for token `i`; absent, all may. Missing words allow
    /// nothing.
    pub allowed: Option<Arc<[u64]>>,
    /// How many of the most likely tokens are reported with the one drawn; absent, nothing is reported.
    pub logprobs: Option<u32>,
}

impl Draw {
    /// The largest logit.
    #[must_use]
    pub const fn greedy(slot: u32, position: u32) -> Self {
        Self {
            slot,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            choice: 0,
            position,
            edits: Vec::new(),
            allowed: None,
            logprobs: None,
        }
    }

    /// Whether a token may be drawn.
    #[must_use]
    pub fn allows(&self, token: usize) -> bool {
        self.allowed
            .as_ref()
            .is_none_or(|words| words.get(token / 64).is_some_and(|word| word >> (token % 64) & 1 == 1))
    }
}

/// A change to the logit of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    /// The token.
    pub token: u32,
    /// Divides a logit above 0 and multiplies any other; 1 changes nothing.
    pub repetition: f32,
    /// Added afterwards.
    pub add: f32,
}

impl Edit {
    /// The logit after the change.
    #[must_use]
    pub fn apply(&self, logit: f32) -> f32 {
        (if logit > 0.0 { logit / self.repetition } else { logit * self.repetition }) + self.add
    }
}

/// A token that was drawn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Logarithm of its probability by the logits as they were, before anything of [`Draw`]; 0 unless asked for.
    pub logprob: f32,
    /// The most likely tokens by the same measure, in descending order, the lowest ids first among equals; as many as
    /// were asked for, or as there are.
    pub top: Vec<(u32, f32)>,
}

/// A processor that runs gpt-oss.
///
/// A row's result is a function of the row, of what its position sees, and of the weights: bit for bit the same
/// alone or beside others.
pub trait Backend: Send + Sized + 'static {
    /// f32 activations, `[rows, cols]`, of fixed capacity.
    type Rows: Send;
    /// f32 `[n]`.
    type Vector: Send;
    /// A dense matrix with bias, laid out for this backend.
    type Dense: Send;
    /// The embedding table.
    type Embedding: Send;
    /// The expert slots of one layer on this rank.
    type Experts: Send;
    /// Where each expert of a layer lives: `[E]` of (rank, slot).
    type Places: Send;
    /// Keys and values.
    type Kv: Send;
    /// The experts chosen for each row and their weights, `[T, K]`.
    type Routes: Send;
    /// Received rows in the experts' hands: grouped by slot, between gate-up and down.
    type Work: Send;
    /// Bytes to or from each rank.
    type Parts: Send;
    /// A step that was ended and may still be under way.
    type Ended: Send;

    // Memory. Sizes are capacities; nothing grows afterwards.

    /// Activations for up to `rows` rows.
    fn rows(&mut self, rows: usize, cols: usize) -> Self::Rows;

    /// Routes for up to `rows` rows of `K` choices. A backend has one `K`: [`Backend::receive`] reads records by it.
    fn routes(&mut self, rows: usize, top_k: usize) -> Self::Routes;

    /// Room for `received` rows of which each has up to `choices` slots here.
    fn work(&mut self, received: usize, choices: usize, shape: ExpertShape) -> Self::Work;

    /// Buffers for exchanges with `ranks` ranks, this one included, of up to `bytes_max` bytes in all.
    fn parts(&mut self, ranks: usize, bytes_max: usize) -> Self::Parts;

    /// KV memory.
    fn kv(&mut self, shape: &KvShape) -> Self::Kv;

    /// Remembers the last sampled token of up to `slots` sequences.
    fn token_slots(&mut self, slots: usize);

    // Weights. Sources are released piece by piece as they are read.

    /// bf16 `[n]` widened to f32.
    ///
    /// # Errors
    /// [`KernelError::Size`].
    fn vector(&mut self, source: Source<'_>) -> Result<Self::Vector, KernelError>;

    // Matrices are packed into bytes, once and for all layouts of a cell, and then held as those bytes: packed bytes can
    // be kept in a file and used by the next process, or by another rank.

    /// Names the form of packed bytes. What is packed under one name can be held under it.
    fn packing(&self) -> String;

    /// Bytes of a packed dense matrix.
    fn dense_bytes(&self, used: DenseUse, rows: usize, cols: usize) -> usize;

    /// Packs bf16 matrices `[rows, cols]`, stacked into one, into all of `out`.
    ///
    /// # Errors
    /// [`KernelError::Size`].
    fn pack_dense(&self, used: DenseUse, cols: usize, stack: &[Stack<'_>], out: &mut [u8]) -> Result<(), KernelError>;

    /// Holds a packed matrix `[rows, cols]`.
    ///
    /// # Errors
    /// [`KernelError::Size`].
    fn hold_dense(
        &mut self,
        used: DenseUse,
        rows: usize,
        cols: usize,
        packed: Packed,
    ) -> Result<Self::Dense, KernelError>;

    /// Packs matrices `[rows, cols]`, stacked into one, and holds them.
    ///
    /// # Errors
    /// [`KernelError::Size`].
    fn dense(&mut self, used: DenseUse, cols: usize, stack: &[Stack<'_>]) -> Result<Self::Dense, KernelError> {
        let rows = stack.iter().map(|matrix| matrix.rows(cols)).sum::<Result<_, _>>()?;
        let packed = Packed::filled(self.dense_bytes(used, rows, cols), |out| self.pack_dense(used, cols, stack, out))?;
        self.hold_dense(used, rows, cols, packed)
    }

    /// The embedding, bf16 `[V, H]`. Used in place where the backend reads host memory.
    ///
    /// # Errors
    /// [`KernelError::Size`].
    fn embedding(&mut self, cols: usize, table: EmbeddingSource) -> Result<Self::Embedding, KernelError>;

    /// Room for the experts of one layer.
    fn experts(&mut self, slots: usize, shape: ExpertShape) -> Self::Experts;

    /// Bytes of a packed expert of the layer.
    fn expert_bytes(&self, experts: &Self::Experts) -> usize;

    /// Packs an expert of the layer into all of `out`.
    ///
    /// # Errors
    /// [`KernelError::Size`], [`KernelError::Scale`].
    fn pack_expert(
        &self,
        experts: &Self::Experts,
        source: &ExpertSource<'_>,
        out: &mut [u8],
    ) -> Result<(), KernelError>;

    /// Puts a packed expert into a slot.
    ///
    /// # Errors
    /// [`KernelError::Size`], [`KernelError::Plan`] for a slot that does not exist.
    fn hold_expert(&mut self, experts: &mut Self::Experts, slot: usize, packed: Packed) -> Result<(), KernelError>;

    /// Empties a slot, so that there is room for another expert.
    fn clear_expert(&mut self, experts: &mut Self::Experts, slot: usize);

    /// Packs an expert and puts it into a slot.
    ///
    /// # Errors
    /// Those of packing and holding; the slot is then empty.
    fn load_expert(
        &mut self,
        experts: &mut Self::Experts,
        slot: usize,
        source: &ExpertSource<'_>,
    ) -> Result<(), KernelError> {
        // What was there is dropped first: there is no room for both.
        self.clear_expert(experts, slot);
        let packed = Packed::filled(self.expert_bytes(experts), |out| self.pack_expert(experts, source, out))?;
        self.hold_expert(experts, slot, packed)
    }

    /// Where each expert of a layer lives, `[E]` of (rank, slot).
    fn places(&mut self, places: &[(u32, u32)]) -> Self::Places;

    // The step, in the order of the forward pass.

    /// Says until when the host may wait for the step that begins next. Where ops are done when they return, nothing waits.
    fn set_deadline(&mut self, _deadline: Instant) {}

    /// Begins a step of `T` rows. `T` may be 0: the rank then only serves its experts.
    fn begin(&mut self, inputs: &StepInputs, rope: &RopeTable);

    /// Copies a block of every layer of a pool.
    fn copy_block(&mut self, kv: &mut Self::Kv, pool: usize, from: u32, to: u32);

    /// `out: [T, H]` = embedding of each row's token.
    fn embed(&mut self, table: &Self::Embedding, out: &mut Self::Rows);

    /// `x: [n, H] -> out: [n, H]`, `x * rsqrt(mean(x^2) + eps) * weight`, in f32.
    fn norm(&mut self, x: &Self::Rows, weight: &Self::Vector, eps: f32, out: &mut Self::Rows);

    /// `x: [n, cols] -> out: [n, rows]`, `x W^T + b`.
    fn project(&mut self, x: &Self::Rows, weight: &Self::Dense, out: &mut Self::Rows);

    /// Rotates q and k of `qkv: [T, Nq*D + 2*Nkv*D]` in place (half-split pairs `j, j + D/2`) and writes k and v
    /// to the KV memory at each row's position.
    fn rotate_and_store(&mut self, qkv: &mut Self::Rows, kv: &mut Self::Kv, layer: KvLayer);

    /// `qkv: [T, Nq*D + ..] -> out: [T, Nq*D]`. Row at position `p` sees keys `p - window < j <= p` (all `j <= p`
    /// without a window) of its sequence; scores are scaled by `1/sqrt(D)`; `sinks: [Nq]` join the softmax's
    /// sum once, unscaled and without a value.
    fn attend(
        &mut self,
        qkv: &Self::Rows,
        kv: &Self::Kv,
        layer: KvLayer,
        sinks: &Self::Vector,
        window: Option<u32>,
        out: &mut Self::Rows,
    );

    /// `residual: [T, rows] += x W^T + b`.
    fn project_add(&mut self, x: &Self::Rows, weight: &Self::Dense, residual: &mut Self::Rows);

    /// `x: [T, H] -> [T, K]`: the `K` largest router logits in descending order, the lowest expert among equals,
    /// and the softmax over those `K`.
    fn route(&mut self, x: &Self::Rows, router: &Self::Dense, routes: &mut Self::Routes);

    /// Writes each row of `x: [T, H]` once into the part of every rank that holds one of its experts.
    /// A record is `K` slots (u32 little endian, [`NO_SLOT`] where another rank holds the choice) and `H` numbers
    /// of the wire type; records follow row order.
    fn dispatch(&mut self, x: &Self::Rows, routes: &Self::Routes, places: &Self::Places, out: &mut Self::Parts);

    /// Reads the records of all ranks, in rank order, and groups them by slot.
    fn receive(&mut self, received: &Self::Parts, experts: &Self::Experts, work: &mut Self::Work);

    /// For each (row, choice) here: `[H] -> [I]`, gate-up with bias, then
    /// `min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1)`. [`down`](Self::down) of the same
    /// experts and work follows, and may be what does both.
    fn gate_up(&mut self, experts: &Self::Experts, work: &mut Self::Work);

    /// For each (row, choice) here: `[I] -> [H]`, down with bias, one row of the wire type per choice into the
    /// part of the rank that the row came from, in the order of its records and their choices.
    fn down(&mut self, experts: &Self::Experts, work: &Self::Work, out: &mut Self::Parts);

    /// `residual: [T, H] += sum over k ascending of weight_k * returned_k`, in f32.
    fn combine(
        &mut self,
        returned: &Self::Parts,
        routes: &Self::Routes,
        places: &Self::Places,
        residual: &mut Self::Rows,
    );

    /// `out: [n, cols]` = rows `rows[0..n]` of `x`.
    fn gather(&mut self, x: &Self::Rows, rows: &[u32], out: &mut Self::Rows);

    /// Draws a token from each row of `logits: [n, V]`. A draw is a function of the row and of its own fields.
    fn sample(&mut self, logits: &Self::Rows, draws: &[Draw]);

    /// Puts a token into a slot, as if it had been sampled.
    fn set_token(&mut self, slot: u32, token: u32);

    // Ending a step. The next one may begin before what the last one gave has come.

    /// Ends a step: what all [`Backend::sample`]s since [`Backend::begin`] drew is asked for, and what went wrong since the
    /// last step ended.
    fn end(&mut self) -> Self::Ended;

    /// Whether an ended step is done; does not wait.
    fn is_done(&self, ended: &Self::Ended) -> bool;

    /// Waits for an ended step: what was drawn, in order.
    ///
    /// # Errors
    /// What went wrong in it first; its results are then worthless.
    fn result(&mut self, ended: Self::Ended) -> Result<Vec<Sampled>, KernelError>;

    // Reading back; these wait.

    /// The numbers of `rows`, row-major.
    fn read(&mut self, rows: &Self::Rows) -> Vec<f32>;

    /// Makes `rows` hold `values: [n, cols]`; for tests and for tools.
    fn write(&mut self, rows: &mut Self::Rows, values: &[f32]);

    /// Waits for all ops, outside of a step or instead of ending it.
    ///
    /// # Errors
    /// What went wrong first since the last step ended, or the last `finish`.
    fn finish(&mut self) -> Result<(), KernelError>;

    /// Something that makes steps slower and not wrong; told once.
    fn take_warning(&mut self) -> Option<KernelError> {
        None
    }

    // What the backend is.

    /// Bytes of a dispatch record: `K` slots and `H` numbers of the wire type.
    fn dispatch_record(&self, top_k: usize, hidden: usize) -> usize;

    /// Bytes of a returned row.
    fn combine_record(&self, hidden: usize) -> usize;

    /// Bytes of weights, KV and buffers held.
    fn allocated(&self) -> u64;
}

/// Where the embedding table's bytes are: bf16 little endian, `[V, H]`.
pub type EmbeddingSource = Arc<dyn EmbeddingBytes>;

/// Owns the bytes of an embedding table, in memory or in a mapped checkpoint.
pub trait EmbeddingBytes: Send + Sync {
    /// The whole table.
    fn table(&self) -> &[u8];
}
