//! The forward pass of gpt-oss, once for all backends and transports.
//!
//= gpt-oss model.py#Transformer

use std::time::Instant;

use phalanx_kernels::{Backend, Draw, KernelError, RopeTable, Sampled, StepInputs};
use phalanx_proto::memory::LOGITS_ROWS_MAX;
use phalanx_proto::{Fence, LayerIdx, Limits, ModelConfig, Phase, PhaseTimes, Placement, Rank};

use crate::collectives::{Collectives, Exchange, ExchangeKind};
use crate::error::{ForwardError, LoadError};
use crate::packed::Stored;
use crate::rope;
use crate::weights::{OnProgress, Weights, expert_shape, kv_shape, pool_index};

/// Where a step is, for whoever watches from outside.
pub trait Watch {
    /// The step has come to `phase` of `layer`.
    fn at(&self, layer: LayerIdx, phase: Phase);
}

/// Nobody watches.
impl Watch for () {
    fn at(&self, _layer: LayerIdx, _phase: Phase) {}
}

/// The memory that a step works in; made once, never grown.
struct Buffers<B: Backend> {
    /// Residual stream, `[T, H]`.
    x: B::Rows,
    /// Normed rows, `[T, H]`.
    normed: B::Rows,
    /// Queries, keys and values, `[T, Nq*D + 2*Nkv*D]`.
    qkv: B::Rows,
    /// Concatenated heads, `[T, Nq*D]`.
    heads: B::Rows,
    /// Experts of each row, `[T, K]`.
    routes: B::Routes,
    /// Received rows.
    work: B::Work,
    /// Bytes to other ranks.
    outgoing: B::Parts,
    /// Bytes from other ranks.
    incoming: B::Parts,
    /// Rows whose logits are wanted, `[LOGITS_ROWS_MAX, H]`.
    last: B::Rows,
    /// `[LOGITS_ROWS_MAX, V]`.
    logits: B::Rows,
}

/// A rank's share of a gpt-oss model, with its KV memory.
pub struct GptOss<B: Backend> {
    config: ModelConfig,
    rope: RopeTable,
    backend: B,
    weights: Weights<B>,
    kv: B::Kv,
    buffers: Buffers<B>,
}

/// One step's surroundings.
pub struct Step<'a, W: Watch + ?Sized> {
    /// Which step it is.
    pub fence: Fence,
    /// When waiting becomes a failure.
    pub deadline: Instant,
    /// Rows of each rank in it, `[ranks]`.
    pub rows_of_rank: &'a [u32],
    /// Who watches.
    pub watch: &'a W,
    /// Where the time goes.
    pub phases: &'a mut PhaseTimes,
}

/// Attributes the time since the last lap to a phase.
struct Laps<'a> {
    phases: &'a mut PhaseTimes,
    last: Instant,
}

impl Laps<'_> {
    fn lap(&mut self, phase: Phase) {
        let now = Instant::now();
        let spent = now.duration_since(self.last).as_micros();
        self.phases.add(phase, u64::try_from(spent).unwrap_or(u64::MAX));
        self.last = now;
    }
}

impl<B: Backend> GptOss<B> {
    /// Makes the memory of a step and loads the share of `rank`.
    ///
    /// # Errors
    /// A tensor that is missing or refused, by name.
    pub fn load(
        mut backend: B,
        stored: Stored<'_>,
        placement: &Placement,
        rank: Rank,
        ranks: u32,
        limits: &Limits,
        on_progress: OnProgress<'_>,
    ) -> Result<Self, LoadError> {
        let config = stored.checkpoint.config().clone();
        let kv = backend.kv(&kv_shape(&config, limits));
        backend.token_slots(limits.seqs_max as usize);
        let slots = placement.slots_used(rank);
        let buffers = Buffers::new(&mut backend, &config, ranks, slots, limits);
        let weights = Weights::load(&mut backend, stored, placement, rank, on_progress)?;
        let rope = rope::table(&config.rope, config.head_dim);
        // Memory that could not be had is known now.
        backend.finish()?;
        Ok(Self { config, rope, backend, weights, kv, buffers })
    }

    /// The model's shape.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What computes it.
    #[must_use]
    pub const fn backend(&self) -> &B {
        &self.backend
    }

    /// Bytes of weights, KV and buffers held.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.backend.allocated()
    }

    /// Says until when the step that begins next may wait for the device.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.backend.set_deadline(deadline);
    }

    /// Copies a KV block; before the step's rows.
    pub fn copy_block(&mut self, pool: phalanx_proto::Pool, from: u32, to: u32) {
        self.backend.copy_block(&mut self.kv, pool_index(pool), from, to);
    }

    /// Runs the layers over the rows of `inputs`. Every rank of the cell runs every step, also with no row. What comes of
    /// it counts once `collectives` are settled.
    ///
    /// # Errors
    /// An exchange failed: the step is worthless and the communicator broken.
    pub fn forward<C: Collectives<B::Parts>, W: Watch + ?Sized>(
        &mut self,
        inputs: &StepInputs,
        collectives: &mut C,
        step: Step<'_, W>,
    ) -> Result<(), ForwardError> {
        let Self { config, rope, backend: b, weights, kv, buffers: m } = self;
        let eps = config.eps;
        let dispatch_bytes = b.dispatch_record(config.top_k as usize, config.hidden as usize);
        let combine_bytes = b.combine_record(config.hidden as usize);
        let mut laps = Laps { phases: step.phases, last: Instant::now() };

        collectives.begin(step.fence, step.deadline);
        collectives.expect(step.rows_of_rank);
        b.begin(inputs, rope);
        b.embed(&weights.embedding, &mut m.x);
        laps.lap(Phase::Input);

        for (index, layer) in (0..).map(LayerIdx).zip(&weights.layers) {
            step.watch.at(index, Phase::Attention);
            b.norm(&m.x, &layer.attention_norm, eps, &mut m.normed);
            b.project(&m.normed, &layer.qkv, &mut m.qkv);
            b.rotate_and_store(&mut m.qkv, kv, layer.kv);
            b.attend(&m.qkv, kv, layer.kv, &layer.sinks, layer.window, &mut m.heads);
            b.project_add(&m.heads, &layer.out, &mut m.x);
            laps.lap(Phase::Attention);

            b.norm(&m.x, &layer.mlp_norm, eps, &mut m.normed);
            b.route(&m.normed, &layer.router, &mut m.routes);
            laps.lap(Phase::Router);

            step.watch.at(index, Phase::Dispatch);
            let dispatch = Exchange { layer: index, kind: ExchangeKind::Dispatch, row_bytes: dispatch_bytes };
            collectives.prepare(dispatch, &mut m.outgoing);
            b.dispatch(&m.normed, &m.routes, &layer.places, &mut m.outgoing);
            collectives.exchange(dispatch, &mut m.outgoing, &mut m.incoming)?;
            laps.lap(Phase::Dispatch);

            step.watch.at(index, Phase::Experts);
            b.receive(&m.incoming, &layer.experts, &mut m.work);
            b.gate_up(&layer.experts, &mut m.work);
            b.down(&layer.experts, &m.work, &mut m.outgoing);
            laps.lap(Phase::Experts);

            step.watch.at(index, Phase::Combine);
            let combine = Exchange { layer: index, kind: ExchangeKind::Combine, row_bytes: combine_bytes };
            collectives.exchange(combine, &mut m.outgoing, &mut m.incoming)?;
            b.combine(&m.incoming, &m.routes, &layer.places, &mut m.x);
            laps.lap(Phase::Combine);
        }
        collectives.end()?;
        laps.lap(Phase::Combine);
        b.norm(&m.x, &weights.final_norm, eps, &mut m.normed);
        laps.lap(Phase::Unembed);
        Ok(())
    }

    /// Draws a token from each of the rows `wanted` of the step, `[n]` of (row, draw).
    pub fn sample(&mut self, wanted: Vec<(u32, Draw)>, phases: &mut PhaseTimes) {
        let mut laps = Laps { phases, last: Instant::now() };
        let mut wanted = wanted.into_iter().peekable();
        while wanted.peek().is_some() {
            let (rows, draws): (Vec<u32>, Vec<Draw>) = wanted.by_ref().take(LOGITS_ROWS_MAX as usize).unzip();
            self.unembed(&rows);
            laps.lap(Phase::Unembed);
            self.backend.sample(&self.buffers.logits, &draws);
            laps.lap(Phase::Sample);
        }
    }

    /// The logits of the step's rows `wanted`, `[n, V]`.
    pub fn logits(&mut self, wanted: &[u32]) -> Vec<f32> {
        let mut all = Vec::with_capacity(wanted.len() * self.config.vocab as usize);
        for rows in wanted.chunks(LOGITS_ROWS_MAX as usize) {
            self.unembed(rows);
            all.extend(self.backend.read(&self.buffers.logits));
        }
        all
    }

    fn unembed(&mut self, rows: &[u32]) {
        let m = &mut self.buffers;
        self.backend.gather(&m.normed, rows, &mut m.last);
        self.backend.project(&m.last, &self.weights.unembedding, &mut m.logits);
    }

    /// Puts a token where [`phalanx_kernels::TokenSource::Sampled`] finds it.
    pub fn set_token(&mut self, slot: u32, token: u32) {
        self.backend.set_token(slot, token);
    }

    /// Ends the step: the next one may be run before its results are asked for.
    pub fn end(&mut self) -> B::Ended {
        self.backend.end()
    }

    /// Whether a step is done; does not wait.
    #[must_use]
    pub fn is_done(&self, step: &B::Ended) -> bool {
        self.backend.is_done(step)
    }

    /// Waits for a step and returns what was sampled, in the order it was asked for. A device runs behind the host, so its time
    /// is told as that of sampling: from `since` on, when all was enqueued and the step before was done.
    ///
    /// # Errors
    /// An op of the step failed.
    pub fn result(
        &mut self,
        step: B::Ended,
        since: Instant,
        phases: &mut PhaseTimes,
    ) -> Result<Vec<Sampled>, ForwardError> {
        let mut laps = Laps { phases, last: since };
        let tokens = self.backend.result(step);
        laps.lap(Phase::Sample);
        Ok(tokens?)
    }

    /// Something that makes steps slower and not wrong; told once.
    pub fn take_warning(&mut self) -> Option<KernelError> {
        self.backend.take_warning()
    }
}

/// Bytes from all ranks that a step has room for: rows of every rank, or the results of this one's.
pub fn incoming_bytes<B: Backend>(b: &B, config: &ModelConfig, ranks: u32, limits: &Limits) -> usize {
    let (rows, top_k, hidden) = (limits.step_rows_max as usize, config.top_k as usize, config.hidden as usize);
    (rows * ranks as usize * b.dispatch_record(top_k, hidden)).max(rows * top_k * b.combine_record(hidden))
}

impl<B: Backend> Buffers<B> {
    fn new(b: &mut B, config: &ModelConfig, ranks: u32, slots: u32, limits: &Limits) -> Self {
        let n = |v: u32| v as usize;
        let (rows, hidden, top_k) = (n(limits.step_rows_max), n(config.hidden), n(config.top_k));
        let received = rows * n(ranks);
        let choices = top_k.min(n(slots));
        let outgoing = (rows * top_k.min(n(ranks)) * b.dispatch_record(top_k, hidden))
            .max(received * choices * b.combine_record(hidden));
        let incoming = incoming_bytes(b, config, ranks, limits);
        Self {
            x: b.rows(rows, hidden),
            normed: b.rows(rows, hidden),
            qkv: b.rows(rows, n(config.qkv_width())),
            heads: b.rows(rows, n(config.attention_width())),
            routes: b.routes(rows, top_k),
            work: b.work(received, choices, expert_shape(config)),
            outgoing: b.parts(n(ranks), outgoing),
            incoming: b.parts(n(ranks), incoming),
            last: b.rows(n(LOGITS_ROWS_MAX), hidden),
            logits: b.rows(n(LOGITS_ROWS_MAX), n(config.vocab)),
        }
    }
}
