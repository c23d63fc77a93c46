//! What is measured: ops on weights, keys and values that no cache holds.

use std::rc::Rc;

use anyhow::Result;
use phalanx_kernels::memory::{Packed, Source};
use phalanx_kernels::{
    BLOCK_SIZE, Backend, DenseUse, Draw, ExpertShape, KernelError, KvLayer, KvShape, PoolShape, RopeTable, StepInputs,
    TokenSource,
};

use super::machine::Machine;

/// Bytes of weights, or of keys and values, that an op goes through before it meets the same again: beyond any cache.
const COLD_BYTES: usize = 256 << 20;

/// Most bytes of keys and values that are held.
const MOST_KV_BYTES: usize = 1 << 30;

pub(super) const HIDDEN: usize = 2880;
const INTERMEDIATE: usize = 2880;
pub(super) const HEADS: usize = 64;
pub(super) const KV_HEADS: usize = 8;
pub(super) const DIM: usize = 64;
const TOP_K: usize = 4;
pub(super) const VOCAB: usize = 201_088;
const EXPERT: ExpertShape = ExpertShape { hidden: HIDDEN, intermediate: INTERMEDIATE, limit: 7.0 };

/// What bounds an op's arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arithmetic {
    /// MXFP4 codes with int8.
    Mxfp4,
    /// q8 weights with int8.
    Q8,
    F32,
    /// bf16 in matrix units, also for widened MXFP4 codes.
    Bf16,
}

impl Arithmetic {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Mxfp4 => "mxfp4",
            Self::Q8 => "q8",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

type Run<B> = Box<dyn FnMut(&mut B, bool)>;

/// An op at a number of rows: how to do it once, and what must move and be done for it.
pub(super) struct Case<B> {
    pub(super) name: &'static str,
    pub(super) rows: usize,
    /// Bytes that must move: each weight once, keys and values, rows in and out.
    pub(super) bytes: u64,
    /// Two for each multiplication.
    pub(super) operations: u64,
    pub(super) arithmetic: Arithmetic,
    /// Does it once; says whether it is the first time since another op was measured.
    pub(super) run: Run<B>,
}

/// Bytes that look random and are always the same.
fn noise(seed: u64, out: &mut [u8]) {
    let mut state = seed;
    for chunk in out.chunks_mut(8) {
        // Knuth's MMIX generator.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        chunk.copy_from_slice(&(state >> 13).to_le_bytes()[..chunk.len()]);
    }
}

/// Makes bytes such that no number of them is an infinity, NaN or so small that it is dear to compute with.
fn tame(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte = *byte & 0x0f | 0x30);
}

/// Small numbers.
fn numbers(n: usize) -> Vec<f32> {
    let mut bytes = vec![0; n];
    noise(7, &mut bytes);
    bytes.into_iter().map(|byte| (f32::from(byte) - 127.5) / 64.0).collect()
}

/// Packed weights without meaning, `count` times `len` bytes: speed does not depend on them, as long as none is a NaN. They
/// are one stretch of memory, as those that a worker maps are: apart, each would begin and end in small pages.
fn packed(count: usize, len: usize) -> Result<impl Iterator<Item = Packed>, KernelError> {
    let all = Packed::filled(count * len, |out| {
        noise(count as u64, out);
        tame(out);
        Ok::<_, KernelError>(())
    })?;
    Ok((0..count).map(move |i| all.slice(i * len..(i + 1) * len)))
}

pub(super) fn norm<B: Machine>(backend: &mut B, rows: usize) -> Result<Case<B>> {
    let weight = vec![0x3f; HIDDEN * 2];
    let weight = backend.vector(Source::memory(&weight))?;
    let (mut x, mut out) = (backend.rows(rows, HIDDEN), backend.rows(rows, HIDDEN));
    backend.write(&mut x, &numbers(rows * HIDDEN));
    Ok(Case {
        name: "norm",
        rows,
        bytes: (rows * HIDDEN * 8) as u64,
        operations: (rows * HIDDEN * 4) as u64,
        arithmetic: B::FLOATS,
        run: Box::new(move |backend, _| backend.norm(&x, &weight, 1e-5, &mut out)),
    })
}

/// Copies of a dense matrix, to be gone through one after the other.
pub(super) struct Matrices<B: Backend> {
    name: &'static str,
    height: usize,
    cols: usize,
    arithmetic: Arithmetic,
    /// Bytes of a copy.
    bytes: usize,
    copies: Rc<[B::Dense]>,
}

impl<B: Machine> Matrices<B> {
    pub(super) fn new(
        backend: &mut B,
        name: &'static str,
        height: usize,
        cols: usize,
        arithmetic: Arithmetic,
    ) -> Result<Self, KernelError> {
        let bytes = backend.dense_bytes(DenseUse::Projection, height, cols);
        let copies = packed(COLD_BYTES.div_ceil(bytes), bytes)?
            .map(|packed| backend.hold_dense(DenseUse::Projection, height, cols, packed))
            .collect::<Result<_, KernelError>>()?;
        Ok(Self { name, height, cols, arithmetic, bytes, copies })
    }

    pub(super) fn case(&self, backend: &mut B, rows: usize) -> Case<B> {
        let Self { name, height, cols, arithmetic, bytes, .. } = *self;
        let (mut x, mut out) = (backend.rows(rows, cols), backend.rows(rows, height));
        backend.write(&mut x, &numbers(rows * cols));
        let (copies, mut next) = (Rc::clone(&self.copies), 0);
        Case {
            name,
            rows,
            bytes: (bytes + rows * (cols + height) * 4) as u64,
            operations: 2 * (rows * height * cols) as u64,
            arithmetic,
            run: Box::new(move |backend, _| {
                next = (next + 1) % copies.len();
                backend.project(&x, &copies[next], &mut out);
            }),
        }
    }
}

/// Keys and values of sequences, each `context` tokens long, to be gone through one after the other.
pub(super) struct Sequences<B: Backend> {
    window: Option<u32>,
    tokens: u32,
    sequences: usize,
    /// Bytes of a sequence's keys and values that a row sees.
    bytes: usize,
    kv: Rc<B::Kv>,
    sinks: Rc<B::Vector>,
}

impl<B: Machine> Sequences<B> {
    const COLS: usize = (HEADS + 2 * KV_HEADS) * DIM;

    /// As many as `rows`, or as no cache holds, where there is memory for them.
    pub(super) fn new(backend: &mut B, tokens: u32, window: Option<u32>, rows: usize) -> Result<Self> {
        let stretch = (tokens as usize).div_ceil(BLOCK_SIZE);
        // A window touches so much of a sequence.
        let seen = window.map_or(stretch, |window| (window as usize).div_ceil(BLOCK_SIZE).min(stretch));
        let of_sequence = seen * BLOCK_SIZE * 2 * KV_HEADS * DIM * backend.kv_bytes();
        let most = MOST_KV_BYTES / (of_sequence / seen * stretch);
        let sequences = COLD_BYTES.div_ceil(of_sequence).max(rows).min(most).max(1);
        let pool = PoolShape { layers: 1, blocks: sequences * stretch };
        let mut kv = backend.kv(&KvShape { pools: vec![pool], kv_heads: KV_HEADS, head_dim: DIM });
        let sinks = vec![0x3f; HEADS * 2];
        let sinks = backend.vector(Source::memory(&sinks))?;
        let batch = (tokens as usize).min(512);
        let mut qkv = backend.rows(batch, Self::COLS);
        let values = numbers(batch * Self::COLS);
        let mut written = 0;
        for (sequence, first) in (0..sequences).flat_map(|i| (0..tokens).step_by(batch).map(move |first| (i, first))) {
            let rows = batch.min((tokens - first) as usize);
            // Turned again and again, they stay as large as they were.
            if written != rows {
                backend.write(&mut qkv, &values[..rows * Self::COLS]);
                written = rows;
            }
            backend.begin(
                &StepInputs {
                    tokens: vec![TokenSource::Given(0); rows],
                    positions: (first..first + rows as u32).collect(),
                    sequences: vec![0; rows],
                    tables: vec![vec![((sequence * stretch) as u32..((sequence + 1) * stretch) as u32).collect()]],
                },
                &RopeTable { inv_freq: vec![0.1; DIM / 2], scale: 1.0 },
            );
            backend.rotate_and_store(&mut qkv, &mut kv, KvLayer { pool: 0, layer: 0 });
        }
        Ok(Self { window, tokens, sequences, bytes: of_sequence, kv: Rc::new(kv), sinks: Rc::new(sinks) })
    }

    fn table(&self, sequence: usize) -> Vec<u32> {
        let stretch = (self.tokens as usize).div_ceil(BLOCK_SIZE);
        let sequence = sequence % self.sequences;
        ((sequence * stretch) as u32..((sequence + 1) * stretch) as u32).collect()
    }

    /// The last rows of sequences: each row belongs to another one as long as there are any.
    pub(super) fn decode(&self, backend: &mut B, name: &'static str, rows: usize) -> Case<B> {
        let sequences = self.sequences;
        let step = |first: usize| StepInputs {
            tokens: vec![TokenSource::Given(0); rows],
            positions: vec![self.tokens - 1; rows],
            sequences: (0..rows).map(|row| (row % sequences) as u32).collect(),
            tables: vec![(0..rows.min(sequences)).map(|i| self.table(first + i)).collect()],
        };
        // As many steps as go through what no cache holds.
        let steps = COLD_BYTES.div_ceil(rows * self.bytes).min(sequences.div_ceil(rows));
        let steps = (0..steps).map(|i| step(i * rows)).collect();
        let seen = u64::from(self.window.unwrap_or(self.tokens).min(self.tokens));
        self.case(backend, name, steps, rows.min(sequences) as u64 * seen, rows as u64 * seen)
    }

    /// The last `rows` rows of one sequence, which has so many at least.
    pub(super) fn prefill(&self, backend: &mut B, name: &'static str, rows: usize) -> Case<B> {
        let first = self.tokens - rows as u32;
        // Many rows read their keys from caches anyway.
        let step = StepInputs {
            tokens: vec![TokenSource::Given(0); rows],
            positions: (first..self.tokens).collect(),
            sequences: vec![0; rows],
            tables: vec![vec![self.table(0)]],
        };
        let window = self.window.unwrap_or(self.tokens);
        let seen = (first..self.tokens).map(|position| u64::from(window.min(position + 1))).sum();
        let touched = u64::from(self.tokens.min(rows as u32 - 1 + window));
        self.case(backend, name, vec![step], touched, seen)
    }

    /// Steps that together read `touched` keys each, and multiply by `seen`.
    fn case(&self, backend: &mut B, name: &'static str, steps: Vec<StepInputs>, touched: u64, seen: u64) -> Case<B> {
        let rows = steps[0].positions.len();
        let mut qkv = backend.rows(rows, Self::COLS);
        let mut out = backend.rows(rows, HEADS * DIM);
        backend.write(&mut qkv, &numbers(rows * Self::COLS));
        let (kv, sinks, window, mut next) = (Rc::clone(&self.kv), Rc::clone(&self.sinks), self.window, 0);
        let rope = RopeTable { inv_freq: vec![0.1; DIM / 2], scale: 1.0 };
        Case {
            name,
            rows,
            bytes: touched * (2 * KV_HEADS * DIM * backend.kv_bytes()) as u64 + (rows * 2 * HEADS * DIM * 4) as u64,
            operations: seen * (4 * HEADS * DIM) as u64,
            arithmetic: B::FLOATS,
            // What begins a step says whose keys are seen; unless all are seen each time, it is measured along.
            run: Box::new(move |backend, first| {
                next = (next + 1) % steps.len();
                if first || steps.len() > 1 {
                    backend.begin(&steps[next], &rope);
                }
                backend.attend(&qkv, &kv, KvLayer { pool: 0, layer: 0 }, &sinks, window, &mut out);
            }),
        }
    }
}

/// A layer's experts.
pub(super) struct Layer<B: Backend> {
    experts: Rc<B::Experts>,
    count: usize,
    /// Bytes of an expert.
    bytes: usize,
    arithmetic: Arithmetic,
}

impl<B: Machine> Layer<B> {
    pub(super) fn new(backend: &mut B, count: usize, arithmetic: Arithmetic) -> Result<Self, KernelError> {
        let mut experts = backend.experts(count, EXPERT);
        let bytes = backend.expert_bytes(&experts);
        for (slot, packed) in packed(count, bytes)?.enumerate() {
            backend.hold_expert(&mut experts, slot, packed)?;
        }
        Ok(Self { experts: Rc::new(experts), count, bytes, arithmetic })
    }

    /// Gate-up, SwiGLU and down of rows whose choices are spread evenly.
    ///
    /// # Errors
    /// There is no memory for the rows.
    pub(super) fn case(&self, backend: &mut B, rows: usize) -> Result<Case<B>> {
        drop(backend.routes(rows, TOP_K));
        let mut work = backend.work(rows, TOP_K, EXPERT);
        let mut out = backend.parts(1, rows * TOP_K * backend.combine_record(HIDDEN));
        // As many steps as go through all weights, so that few rows do not meet the same experts each time.
        let steps = (4 * self.count).div_ceil((rows * TOP_K).min(self.count));
        let mut random = Choices(11);
        let (mut received, mut visits) = (Vec::new(), 0);
        for _ in 0..steps {
            let (records, visited) = random.records(rows, self.count, backend.combine_record(HIDDEN));
            received.push(backend.received(records)?);
            visits += visited;
        }
        let visited = visits as f64 / steps as f64;
        let (experts, mut next) = (Rc::clone(&self.experts), 0);
        Ok(Case {
            name: "experts",
            rows,
            bytes: (visited * self.bytes as f64) as u64 + (rows * (1 + TOP_K) * backend.combine_record(HIDDEN)) as u64,
            operations: 6 * (rows * TOP_K * HIDDEN * INTERMEDIATE) as u64,
            arithmetic: self.arithmetic,
            run: Box::new(move |backend, _| {
                next = (next + 1) % received.len();
                backend.receive(&received[next], &experts, &mut work);
                backend.gate_up(&experts, &mut work);
                backend.down(&experts, &work, &mut out);
            }),
        })
    }
}

/// Experts chosen by chance, always the same.
struct Choices(u64);

impl Choices {
    fn expert(&mut self, experts: usize) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize % experts) as u32
    }

    /// Records of `rows` rows of `row_bytes`, and how many experts they visit.
    fn records(&mut self, rows: usize, experts: usize, row_bytes: usize) -> (Vec<u8>, usize) {
        let (mut part, mut visited) = (Vec::new(), vec![false; experts]);
        for _ in 0..rows {
            let mut chosen = Vec::new();
            while chosen.len() < TOP_K {
                let expert = self.expert(experts);
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                    visited[expert as usize] = true;
                }
            }
            part.extend(chosen.into_iter().flat_map(u32::to_le_bytes));
            let at = part.len();
            part.resize(at + row_bytes, 0);
            noise(self.0, &mut part[at..]);
            tame(&mut part[at..]);
        }
        (part, visited.into_iter().filter(|&visited| visited).count())
    }
}

pub(super) fn sample<B: Machine>(backend: &mut B, rows: usize) -> Case<B> {
    backend.token_slots(rows);
    let mut logits = backend.rows(rows, VOCAB);
    backend.write(&mut logits, &numbers(rows * VOCAB));
    let draws: Vec<Draw> =
        (0..rows as u32).map(|slot| Draw { temperature: 1.0, top_p: 0.95, ..Draw::greedy(slot, 1) }).collect();
    Case {
        name: "sample",
        rows,
        bytes: (rows * VOCAB * 4) as u64,
        operations: (rows * VOCAB * 2) as u64,
        arithmetic: B::FLOATS,
        run: Box::new(move |backend, _| {
            backend.begin(&StepInputs::default(), &RopeTable { inv_freq: vec![0.1; DIM / 2], scale: 1.0 });
            backend.sample(&logits, &draws);
        }),
    }
}
