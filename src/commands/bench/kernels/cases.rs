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
    /// After so many times it meets the same memory again.
    pub(super) period: usize,
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
        period: 1,
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
        Self::of(backend, DenseUse::Projection, name, [height, cols], arithmetic)
    }

    /// Those that choose among `experts`.
    pub(super) fn router(backend: &mut B, experts: usize) -> Result<Self, KernelError> {
        Self::of(backend, DenseUse::Router, "route", [experts, HIDDEN], B::FLOATS)
    }

    fn of(
        backend: &mut B,
        used: DenseUse,
        name: &'static str,
        [height, cols]: [usize; 2],
        arithmetic: Arithmetic,
    ) -> Result<Self, KernelError> {
        let bytes = backend.dense_bytes(used, height, cols);
        let copies = packed(COLD_BYTES.div_ceil(bytes), bytes)?
            .map(|packed| backend.hold_dense(used, height, cols, packed))
            .collect::<Result<_, KernelError>>()?;
        Ok(Self { name, height, cols, arithmetic, bytes, copies })
    }

    /// Choices of experts.
    pub(super) fn routing(&self, backend: &mut B, rows: usize) -> Case<B> {
        let mut routes = backend.routes(rows, TOP_K);
        let case = self.case(backend, rows);
        let mut x = backend.rows(rows, self.cols);
        backend.write(&mut x, &numbers(rows * self.cols));
        let (copies, mut next) = (Rc::clone(&self.copies), 0);
        let run = move |backend: &mut B, _| {
            next = (next + 1) % copies.len();
            backend.route(&x, &copies[next], &mut routes);
        };
        Case { run: Box::new(run), ..case }
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
            period: copies.len(),
            run: Box::new(move |backend, _| {
                next = (next + 1) % copies.len();
                backend.project(&x, &copies[next], &mut out);
            }),
        }
    }
}

/// What is done on keys and values.
#[derive(Clone, Copy, Debug)]
pub(super) enum Does {
    /// Rotates and stores.
    Rotate,
    /// Attends, within a window or to all; each row in a sequence of its own as long as there is room for any.
    Attend(Option<u32>),
    /// The same, the last rows of one sequence.
    Prefill(Option<u32>),
}

/// Rows of sequences that are `context` tokens long, in as many layers as no cache holds.
///
/// # Errors
/// There is no memory for them.
pub(super) fn sequences<B: Machine>(
    backend: &mut B,
    name: &'static str,
    does: Does,
    context: u32,
    rows: usize,
) -> Result<Case<B>> {
    const COLS: usize = (HEADS + 2 * KV_HEADS) * DIM;
    // The keys that all rows of a sequence see; those before may be anyone's.
    let (window, of_sequence) = match does {
        Does::Rotate => (1, 1),
        Does::Attend(window) => (window.unwrap_or(context).min(context), 1),
        Does::Prefill(window) => (window.unwrap_or(context).min(context), rows as u32),
    };
    let touched = context.min(window + of_sequence - 1);
    let last = (context as usize - 1) / BLOCK_SIZE;
    let first = (context - touched) as usize / BLOCK_SIZE;
    let stretches = last - first + 1;
    let of_block = BLOCK_SIZE * 2 * KV_HEADS * DIM * backend.kv_bytes();
    let count = match does {
        Does::Prefill(_) => 1,
        _ => rows.min(B::MOST_KV_BYTES / (stretches * of_block)).max(1),
    };
    let layers = match does {
        // What is written needs not be cold.
        Does::Rotate => 4,
        Does::Attend(_) | Does::Prefill(_) => COLD_BYTES.div_ceil(count * stretches * of_block),
    };
    let pool = PoolShape { layers, blocks: count * stretches };
    let mut kv = backend.kv(&KvShape { pools: vec![pool], kv_heads: KV_HEADS, head_dim: DIM });
    let sinks = vec![0x3f; HEADS * 2];
    let sinks = backend.vector(Source::memory(&sinks))?;
    let rope = RopeTable { inv_freq: vec![0.1; DIM / 2], scale: 1.0 };
    let table = |i: usize| (0..=last).map(|at| (i * stretches + at.saturating_sub(first)) as u32).collect::<Vec<_>>();
    let step = |positions: Vec<u32>, sequences: Vec<u32>, tables: Vec<Vec<u32>>| StepInputs {
        tokens: vec![TokenSource::Given(0); positions.len()],
        positions,
        sequences,
        tables: vec![tables],
    };
    if !matches!(does, Does::Rotate) {
        // Nothing is measured on zeros. Which numbers these are is all the same.
        let seen: Vec<u32> = ((first * BLOCK_SIZE) as u32..context).collect();
        for positions in seen.chunks(512) {
            let mut qkv = backend.rows(positions.len(), COLS);
            backend.write(&mut qkv, &numbers(positions.len() * COLS));
            for sequence in 0..count {
                backend.begin(&step(positions.to_vec(), vec![0; positions.len()], vec![table(sequence)]), &rope);
                for layer in 0..layers {
                    backend.rotate_and_store(&mut qkv, &mut kv, KvLayer { pool: 0, layer });
                }
            }
        }
    }
    let (mut qkv, mut out) = (backend.rows(rows, COLS), backend.rows(rows, HEADS * DIM));
    backend.write(&mut qkv, &numbers(rows * COLS));
    let step = match does {
        Does::Prefill(_) => step((context - of_sequence..context).collect(), vec![0; rows], vec![table(0)]),
        _ => {
            let sequences = (0..rows).map(|row| (row % count) as u32).collect();
            step(vec![context - 1; rows], sequences, (0..count).map(table).collect())
        }
    };
    let read = count * touched as usize * 2 * KV_HEADS * DIM * backend.kv_bytes();
    let pairs: usize = step.positions.iter().map(|&position| window.min(position + 1) as usize).sum();
    let (bytes, operations) = match does {
        Does::Rotate => (read + rows * (2 * HEADS + 3 * KV_HEADS) * DIM * 4, rows * (HEADS + KV_HEADS) * DIM * 3),
        Does::Attend(_) | Does::Prefill(_) => (read + rows * 2 * HEADS * DIM * 4, pairs * 4 * HEADS * DIM),
    };
    let mut next = 0;
    Ok(Case {
        name,
        rows,
        bytes: bytes as u64,
        operations: operations as u64,
        arithmetic: B::FLOATS,
        period: layers,
        run: Box::new(move |backend, first| {
            // What begins a step says whose keys are seen.
            if first {
                backend.begin(&step, &rope);
            }
            next = (next + 1) % layers;
            let layer = KvLayer { pool: 0, layer: next };
            match does {
                Does::Rotate => backend.rotate_and_store(&mut qkv, &mut kv, layer),
                Does::Attend(window) | Does::Prefill(window) => {
                    backend.attend(&qkv, &kv, layer, &sinks, window, &mut out);
                }
            }
        }),
    })
}

/// How rows travel between a layer's router and its experts, on one rank.
#[derive(Clone, Copy, Debug)]
pub(super) enum Travels {
    /// To the experts' ranks.
    Dispatch,
    /// Back home, and together.
    Combine,
}

/// Rows on their way to the experts that `router` chooses, or results on their way back.
///
/// # Errors
/// There is no memory for the rows.
pub(super) fn travel<B: Machine>(
    backend: &mut B,
    router: &Matrices<B>,
    travels: Travels,
    rows: usize,
) -> Result<Case<B>> {
    let (mut x, mut routes) = (backend.rows(rows, HIDDEN), backend.routes(rows, TOP_K));
    backend.write(&mut x, &numbers(rows * HIDDEN));
    backend.route(&x, &router.copies[0], &mut routes);
    let places: Vec<(u32, u32)> = (0..router.height as u32).map(|expert| (0, expert)).collect();
    let places = backend.places(&places);
    let (record, result) = (backend.dispatch_record(TOP_K, HIDDEN), backend.combine_record(HIDDEN));
    let of_rows = (rows * HIDDEN * 4) as u64;
    let (name, bytes, operations, run): (_, _, _, Run<B>) = match travels {
        Travels::Dispatch => {
            let mut out = backend.parts(1, rows * record);
            let run = move |backend: &mut B, _| backend.dispatch(&x, &routes, &places, &mut out);
            ("dispatch", of_rows + (rows * record) as u64, 0, Box::new(run))
        }
        Travels::Combine => {
            let mut results = vec![0; rows * TOP_K * result];
            noise(5, &mut results);
            tame(&mut results);
            let returned = backend.received(results)?;
            let run = move |backend: &mut B, _| backend.combine(&returned, &routes, &places, &mut x);
            let operations = 2 * (rows * TOP_K * HIDDEN) as u64;
            ("combine", 2 * of_rows + (rows * TOP_K * result) as u64, operations, Box::new(run))
        }
    };
    Ok(Case { name, rows, bytes, operations, arithmetic: B::FLOATS, period: 1, run })
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
            period: steps,
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
        period: 1,
        run: Box::new(move |backend, _| {
            backend.begin(&StepInputs::default(), &RopeTable { inv_freq: vec![0.1; DIM / 2], scale: 1.0 });
            backend.sample(&logits, &draws);
        }),
    }
}
