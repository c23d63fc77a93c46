//! A small model of two layers, one sliding and one full, made of every op.

use phalanx_kernels::DenseUse::{Projection, Router};
use phalanx_kernels::{ExpertShape, KvLayer, KvShape, PoolShape, RopeTable, Stack, StepInputs, TokenSource};

use crate::data::{Expert, Random, Tensor, rope_table};
use crate::{Make, Tested};

const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 64;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 24;
const EXPERTS: usize = 5;
const TOP_K: usize = 3;
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
    backend: B,
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
    rows: usize,
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
            rows,
            backend: b,
        }
    }

    /// Logits of a step's rows, `[T, V]`. Sequence `s` has the blocks `8s..8s + 8`.
    pub(crate) fn step(&mut self, rows: &[Row]) -> Vec<f32> {
        let b = &mut self.backend;
        let table = |sequence: u32| (8 * sequence..8 * sequence + 8).rev().collect::<Vec<u32>>();
        let inputs = StepInputs {
            tokens: rows.iter().map(|row| TokenSource::Given(row.2)).collect(),
            positions: rows.iter().map(|row| row.1).collect(),
            sequences: rows.iter().map(|row| row.0).collect(),
            // A step without rows has no tables.
            tables: if rows.is_empty() { Vec::new() } else { vec![(0..8).map(table).collect(); 2] },
        };
        let mut x = b.rows(self.rows, HIDDEN);
        let mut normed = b.rows(self.rows, HIDDEN);
        let mut qkv = b.rows(self.rows, (HEADS + 2 * KV_HEADS) * DIM);
        let mut heads = b.rows(self.rows, HEADS * DIM);
        let mut logits = b.rows(self.rows, VOCAB);
        let mut routes = b.routes(self.rows, TOP_K);
        let mut work = b.work(self.rows, TOP_K, ExpertShape { hidden: HIDDEN, intermediate: INTERMEDIATE, limit: 7.0 });
        let bytes = self.rows * b.dispatch_record(TOP_K, HIDDEN).max(TOP_K * b.combine_record(HIDDEN));
        let (mut there, mut back) = (b.parts(1, bytes), b.parts(1, bytes));
        b.begin(&inputs, &self.rope);
        b.embed(&self.embedding, &mut x);
        for (pool, window) in [(0, Some(WINDOW)), (1, None)] {
            let layer = KvLayer { pool, layer: 0 };
            b.norm(&x, &self.norm, 1e-5, &mut normed);
            b.project(&normed, &self.qkv, &mut qkv);
            b.rotate_and_store(&mut qkv, &mut self.kv, layer);
            b.attend(&qkv, &self.kv, layer, &self.sinks, window, &mut heads);
            b.project_add(&heads, &self.out, &mut x);
            b.norm(&x, &self.norm, 1e-5, &mut normed);
            b.route(&normed, &self.router, &mut routes);
            b.dispatch(&normed, &routes, &self.places, &mut there);
            b.receive(&there, &self.experts, &mut work);
            b.gate_up(&self.experts, &mut work);
            b.down(&self.experts, &work, &mut back);
            b.combine(&back, &routes, &self.places, &mut x);
        }
        b.norm(&x, &self.norm, 1e-5, &mut normed);
        b.project(&normed, &self.unembedding, &mut logits);
        let logits = b.read(&logits);
        b.finish().unwrap();
        logits
    }
}
