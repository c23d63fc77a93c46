//! A small model of two layers, one sliding and one full, made of every op.

use phalanx_kernels::DenseUse::{Projection, Router};
use phalanx_kernels::{
    Draw, ExpertShape, KvLayer, KvShape, PoolShape, RopeTable, Sampled, Stack, StepInputs, TokenSource,
};

use crate::data::{Expert, Random, Tensor, rope_table};
use crate::{Make, Tested};

pub(crate) const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 64;
pub(crate) const HEADS: usize = 6;
const KV_HEADS: usize = 2;
pub(crate) const DIM: usize = 24;
pub(crate) const EXPERTS: usize = 5;
pub(crate) const TOP_K: usize = 3;
pub(crate) const VOCAB: usize = 100;
const WINDOW: u32 = 20;
const BLOCKS: usize = 64;

/// Weights as a checkpoint has them.
struct Weights {
    embedding: Tensor,
    norm: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    sinks: Tensor,
    out: Tensor,
    out_bias: Tensor,
    router: Tensor,
    router_bias: Tensor,
    experts: Vec<Expert>,
}

impl Weights {
    fn new() -> Self {
        let mut random = Random(41);
        let cols = (HEADS + 2 * KV_HEADS) * DIM;
        Self {
            embedding: random.tensor(VOCAB * HIDDEN, 1.0),
            norm: random.tensor(HIDDEN, 1.5),
            qkv: random.tensor(cols * HIDDEN, 0.3),
            qkv_bias: random.tensor(cols, 0.3),
            sinks: random.tensor(HEADS, 2.0),
            out: random.tensor(HIDDEN * HEADS * DIM, 0.2),
            out_bias: random.tensor(HIDDEN, 0.1),
            router: random.tensor(EXPERTS * HIDDEN, 1.0),
            router_bias: random.tensor(EXPERTS, 0.5),
            experts: (0..EXPERTS).map(|_| Expert::random(&mut random, HIDDEN, INTERMEDIATE)).collect(),
        }
    }
}

/// The model on a backend, with the KV memory of a few sequences.
pub(crate) struct Layers<B: Tested> {
    pub(crate) backend: B,
    embedding: B::Embedding,
    norm: B::Vector,
    qkv: B::Dense,
    sinks: B::Vector,
    out: B::Dense,
    router: B::Dense,
    unembedding: B::Dense,
    experts: B::Experts,
    places: B::Places,
    rope: RopeTable,
    kv: B::Kv,
    buffers: Buffers<B>,
}

/// What a step works in.
struct Buffers<B: Tested> {
    x: B::Rows,
    normed: B::Rows,
    qkv: B::Rows,
    heads: B::Rows,
    last: B::Rows,
    logits: B::Rows,
    routes: B::Routes,
    work: B::Work,
    there: B::Parts,
    back: B::Parts,
}

impl<B: Tested> Buffers<B> {
    /// Room for steps of up to `rows` rows.
    fn new(b: &mut B, rows: usize) -> Self {
        let bytes = rows * b.dispatch_record(TOP_K, HIDDEN).max(TOP_K * b.combine_record(HIDDEN));
        Self {
            x: b.rows(rows, HIDDEN),
            normed: b.rows(rows, HIDDEN),
            qkv: b.rows(rows, (HEADS + 2 * KV_HEADS) * DIM),
            heads: b.rows(rows, HEADS * DIM),
            last: b.rows(rows, HIDDEN),
            logits: b.rows(rows, VOCAB),
            routes: b.routes(rows, TOP_K),
            work: b.work(rows, TOP_K, ExpertShape { hidden: HIDDEN, intermediate: INTERMEDIATE, limit: 7.0 }),
            there: b.parts(1, bytes),
            back: b.parts(1, bytes),
        }
    }
}

/// A row of a step: sequence, position and token.
pub(crate) type Row = (u32, u32, u32);

impl<B: Tested> Layers<B> {
    /// Room for steps of up to `rows` rows.
    pub(crate) fn new(make: &Make<B>, rows: usize) -> Self {
        let weights = Weights::new();
        let mut b = make.backend();
        let pools = vec![PoolShape { layers: 1, blocks: BLOCKS }; 2];
        let kv = b.kv(&KvShape { pools, kv_heads: KV_HEADS, head_dim: DIM });
        let mut dense = |used, cols, weight: &Tensor, bias: Option<&Tensor>| {
            b.dense(used, cols, &[Stack { weight: weight.source(), bias: bias.map(Tensor::source) }]).unwrap()
        };
        let qkv = dense(Projection, HIDDEN, &weights.qkv, Some(&weights.qkv_bias));
        let out = dense(Projection, HEADS * DIM, &weights.out, Some(&weights.out_bias));
        let router = dense(Router, HIDDEN, &weights.router, Some(&weights.router_bias));
        let unembedding = dense(Projection, HIDDEN, &weights.embedding, None);
        let mut experts = b.experts(EXPERTS, ExpertShape { hidden: HIDDEN, intermediate: INTERMEDIATE, limit: 7.0 });
        for (slot, expert) in weights.experts.iter().enumerate() {
            b.load_expert(&mut experts, slot, &expert.source()).unwrap();
        }
        b.token_slots(8);
        let places: Vec<(u32, u32)> = (0..EXPERTS as u32).map(|expert| (0, expert)).collect();
        Self {
            embedding: b.embedding(HIDDEN, weights.embedding.embedding()).unwrap(),
            norm: b.vector(weights.norm.source()).unwrap(),
            qkv,
            sinks: b.vector(weights.sinks.source()).unwrap(),
            out,
            router,
            unembedding,
            experts,
            places: b.places(&places),
            rope: rope_table(DIM),
            kv,
            buffers: Buffers::new(&mut b, rows),
            backend: b,
        }
    }

    /// Logits of a step's rows, `[T, V]`.
    pub(crate) fn step(&mut self, rows: &[Row]) -> Vec<f32> {
        self.forward(rows);
        let (b, m) = (&mut self.backend, &mut self.buffers);
        b.project(&m.normed, &self.unembedding, &mut m.logits);
        let logits = b.read(&m.logits);
        b.finish().unwrap();
        logits
    }

    /// A step and what is drawn from its rows: a draw for each of the first ones.
    pub(crate) fn draw(&mut self, rows: &[Row], draws: &[Draw]) -> Vec<Sampled> {
        self.forward(rows);
        let (b, m) = (&mut self.backend, &mut self.buffers);
        b.gather(&m.normed, &(0..draws.len() as u32).collect::<Vec<_>>(), &mut m.last);
        b.project(&m.last, &self.unembedding, &mut m.logits);
        b.sample(&m.logits, draws);
        let ended = b.end();
        b.result(ended).unwrap()
    }

    /// Gives back some of what a step of one row works in, after others of the same kind were made.
    pub(crate) fn move_buffers(&mut self) {
        let b = &mut self.backend;
        let made = (b.rows(1, HEADS * DIM), b.rows(1, VOCAB));
        (self.buffers.heads, self.buffers.logits) = made;
    }

    /// Runs the layers. Sequence `s` has the blocks `8s..8s + 8`.
    fn forward(&mut self, rows: &[Row]) {
        let (b, m) = (&mut self.backend, &mut self.buffers);
        let table = |sequence: u32| (8 * sequence..8 * sequence + 8).rev().collect::<Vec<u32>>();
        let inputs = StepInputs {
            tokens: rows.iter().map(|row| TokenSource::Given(row.2)).collect(),
            positions: rows.iter().map(|row| row.1).collect(),
            sequences: rows.iter().map(|row| row.0).collect(),
            // A step without rows has no tables.
            tables: if rows.is_empty() { Vec::new() } else { vec![(0..8).map(table).collect(); 2] },
        };
        b.begin(&inputs, &self.rope);
        b.embed(&self.embedding, &mut m.x);
        for (pool, window) in [(0, Some(WINDOW)), (1, None)] {
            let layer = KvLayer { pool, layer: 0 };
            b.norm(&m.x, &self.norm, 1e-5, &mut m.normed);
            b.project(&m.normed, &self.qkv, &mut m.qkv);
            b.rotate_and_store(&mut m.qkv, &mut self.kv, layer);
            b.attend(&m.qkv, &self.kv, layer, &self.sinks, window, &mut m.heads);
            b.project_add(&m.heads, &self.out, &mut m.x);
            b.norm(&m.x, &self.norm, 1e-5, &mut m.normed);
            b.route(&m.normed, &self.router, &mut m.routes);
            b.dispatch(&m.normed, &m.routes, &self.places, &mut m.there);
            b.receive(&m.there, &self.experts, &mut m.work);
            b.gate_up(&self.experts, &mut m.work);
            b.down(&self.experts, &m.work, &mut m.back);
            b.combine(&m.back, &m.routes, &self.places, &mut m.x);
        }
        b.norm(&m.x, &self.norm, 1e-5, &mut m.normed);
    }
}
