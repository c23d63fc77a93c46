//! Paged attention with sinks and a sliding window: `q: [T, Nq, D] -> [T, Nq, D]`.
//!
//! A task is a row and a kv head; the query heads of a kv head read its keys and values together. Keys are taken
//! in segments of 64 positions aligned to absolute position. In a segment:
//! - a score is the sum over `d` ascending, fused, from zero, times `1/sqrt(D)`; keys out of sight have `-inf`;
//! - `p = exp(score - maximum)`, zero for keys out of sight; their sum has one order: lane `i` of 16 sums the keys
//!   `i, i + 16, ..` ascending, then the lanes are added in ascending order;
//! - each dimension's output is the sum over keys ascending of `p * v`, fused, from zero.
//!
//! Segments are merged ascending, weighted by `exp` of their maximum less the joint one; the sink joins once, last.
//! So nothing depends on chunks, on threads or on what else is in the step; stretches out of sight are never read.

use super::exp::exp;
use super::isa::Simd;
use super::kv::{Element, Kv, Slab, Stored, check};
use super::lanes::{Kernel, LANES, Lanes};
use crate::threads::Threads;
use crate::{BLOCK_SIZE, KernelError, KvLayer, SEGMENT, StepInputs};

/// What a row sees: `position - window < j <= position`.
fn first_visible(position: usize, window: Option<u32>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window.max(1) as usize))
}

/// The op's tensors beside the KV memory.
pub(super) struct Tensors<'a> {
    /// `[T, cols]`, queries first.
    pub(super) qkv: &'a [f32],
    /// Numbers of a row of `qkv`.
    pub(super) cols: usize,
    /// `[Nq]`
    pub(super) sinks: &'a [f32],
    /// `[T, Nq * D]`
    pub(super) out: &'a mut [f32],
}

/// Attention of all rows over a layer's keys and values.
pub(super) fn attend(
    simd: Simd,
    threads: &Threads,
    inputs: &StepInputs,
    kv: &Kv,
    layer: KvLayer,
    window: Option<u32>,
    tensors: Tensors<'_>,
) -> Result<(), KernelError> {
    kv.check_tables(inputs, layer, |position| first_visible(position, window))?;
    check("multiple of the kv heads in query heads", tensors.sinks.len() % kv.kv_heads().max(1), 1)?;
    let (slab, stored) = kv.read(layer);
    match stored {
        Stored::Exact(pool) => attend_pool(simd, threads, inputs, kv, layer, window, tensors, slab, pool),
        Stored::Fast(pool) => attend_pool(simd, threads, inputs, kv, layer, window, tensors, slab, pool),
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the second half of `attend`, split off to be generic")]
fn attend_pool<E: Element>(
    simd: Simd,
    threads: &Threads,
    inputs: &StepInputs,
    kv: &Kv,
    layer: KvLayer,
    window: Option<u32>,
    Tensors { qkv, cols, sinks, out }: Tensors<'_>,
    slab: Slab,
    pool: &[E],
) {
    let kv_heads = kv.kv_heads();
    let group = sinks.len() / kv_heads;
    let width = group * kv.head_dim();
    let seen: usize = inputs.positions.iter().map(|&p| p as usize + 1 - first_visible(p as usize, window)).sum();
    threads.each_chunk(out, width, 2 * seen * width * kv_heads, |task, out| {
        let (row, head) = (task / kv_heads, task % kv_heads);
        let position = inputs.positions[row] as usize;
        simd.run(Attend {
            pool,
            slab,
            table: &inputs.tables[layer.pool][inputs.sequences[row] as usize],
            head,
            first: first_visible(position, window),
            end: position + 1,
            q: &qkv[row * cols + head * width..][..width],
            sinks: &sinks[head * group..(head + 1) * group],
            out,
        });
    });
}

/// One row's query heads of one kv head.
struct Attend<'a, E> {
    pool: &'a [E],
    slab: Slab,
    table: &'a [u32],
    /// The kv head.
    head: usize,
    /// First visible position.
    first: usize,
    /// Position behind the last visible.
    end: usize,
    /// `[group, D]`
    q: &'a [f32],
    /// `[group]`
    sinks: &'a [f32],
    /// `[group, D]`
    out: &'a mut [f32],
}

impl<E: Element> Kernel for Attend<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let mut head = 0;
        while L::WIDE && head + 8 <= self.sinks.len() {
            self.heads::<L, 8>(l, head);
            head += 8;
        }
        while head + 4 <= self.sinks.len() {
            self.heads::<L, 4>(l, head);
            head += 4;
        }
        while head < self.sinks.len() {
            self.heads::<L, 1>(l, head);
            head += 1;
        }
    }
}

/// Scores, then probabilities, of a segment's keys.
type Scores = [f32; SEGMENT];

impl<E: Element> Attend<'_, E> {
    /// `N` query heads from `head` on.
    #[inline(always)]
    fn heads<L: Lanes, const N: usize>(&mut self, l: L, head: usize) {
        let dim = self.slab.head_dim;
        let padded = Slab::padded(dim);
        let mut softmax = [Softmax::default(); N];
        let mut outputs = vec![[0.0f32; LANES]; N * padded / LANES];
        for segment in self.first / SEGMENT..self.end.div_ceil(SEGMENT) {
            let start = segment * SEGMENT;
            let visible = self.first.max(start)..self.end.min(start + SEGMENT);
            let mut scores = self.scores::<L, N>(l, head, start, &visible);
            let mut weights = [(0.0, 0.0); N];
            for ((scores, softmax), weights) in scores.iter_mut().zip(&mut softmax).zip(&mut weights) {
                *weights = softmax.merge(scores);
            }
            self.values::<L, N>(l, start, &visible, &scores, &weights, &mut outputs);
        }
        for (h, softmax) in softmax.iter().enumerate() {
            let scale = softmax.finish(self.sinks[head + h]);
            let outputs = outputs[h * padded / LANES..(h + 1) * padded / LANES].as_flattened();
            for (out, value) in self.out[(head + h) * dim..(head + h + 1) * dim].iter_mut().zip(outputs) {
                *out = value * scale;
            }
        }
    }

    /// Scaled scores of a segment's keys for `N` heads, `-inf` for keys out of sight.
    #[inline(always)]
    fn scores<L: Lanes, const N: usize>(
        &self,
        l: L,
        head: usize,
        start: usize,
        visible: &std::ops::Range<usize>,
    ) -> [Scores; N] {
        let dim = self.slab.head_dim;
        let q: [&[f32]; N] = std::array::from_fn(|h| &self.q[(head + h) * dim..(head + h + 1) * dim]);
        assert!(q.iter().all(|q| q.len() == dim), "whole heads");
        let mut scores = [[f32::NEG_INFINITY; SEGMENT]; N];
        for block in visible.start / BLOCK_SIZE..visible.end.div_ceil(BLOCK_SIZE) {
            let slab = &self.pool[self.slab.range(self.table[block], self.head)];
            let keys = &slab.as_chunks::<LANES>().0[..dim];
            let mut sums = [l.splat(0.0); N];
            for (d, key) in keys.iter().enumerate() {
                let key = E::load(l, key);
                for h in 0..N {
                    // SAFETY: `d` is below `dim`, the length of every query, asserted above.
                    sums[h] = l.fma(key, l.splat(unsafe { *q[h].get_unchecked(d) }), sums[h]);
                }
            }
            for h in 0..N {
                l.store(sums[h], &mut scores[h].as_chunks_mut().0[block - start / BLOCK_SIZE]);
            }
        }
        let scale = 1.0 / (dim as f32).sqrt();
        let (low, high) = ((visible.start - start) as u32, (visible.end - start) as u32);
        for scores in &mut scores {
            for (key, score) in (0..).zip(scores) {
                *score = if key >= low && key < high { *score * scale } else { f32::NEG_INFINITY };
            }
        }
        scores
    }

    /// Adds a segment's values, weighted, to the outputs `[N, padded]`.
    #[inline(always)]
    fn values<L: Lanes, const N: usize>(
        &self,
        l: L,
        start: usize,
        visible: &std::ops::Range<usize>,
        probabilities: &[Scores; N],
        weights: &[(f32, f32); N],
        outputs: &mut [[f32; LANES]],
    ) {
        let dim = self.slab.head_dim;
        let vectors = Slab::padded(dim) / LANES;
        for vector in 0..vectors {
            let mut sums = [l.splat(0.0); N];
            for block in visible.start / BLOCK_SIZE..visible.end.div_ceil(BLOCK_SIZE) {
                let slab = &self.pool[self.slab.range(self.table[block], self.head)];
                let values = &slab.as_chunks::<LANES>().0[dim..];
                let first = block * BLOCK_SIZE;
                for position in visible.start.max(first)..visible.end.min(first + BLOCK_SIZE) {
                    let value = E::load(l, &values[(position - first) * vectors + vector]);
                    for h in 0..N {
                        sums[h] = l.fma(value, l.splat(probabilities[h][position - start]), sums[h]);
                    }
                }
            }
            for h in 0..N {
                let out = &mut outputs[h * vectors + vector];
                let (before, now) = weights[h];
                l.store(l.fma(sums[h], l.splat(now), l.mul(l.load(out), l.splat(before))), out);
            }
        }
    }
}

/// Maximum and sum of the segments so far.
#[derive(Clone, Copy)]
struct Softmax {
    maximum: f32,
    sum: f32,
}

impl Default for Softmax {
    fn default() -> Self {
        Self { maximum: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl Softmax {
    /// Turns a segment's scores into probabilities and takes them in. Returns the weights of the outputs so far
    /// and of the segment's.
    #[inline(always)]
    fn merge(&mut self, scores: &mut Scores) -> (f32, f32) {
        let vectors = scores.as_chunks_mut::<LANES>().0;
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for scores in vectors.iter() {
            for (lane, score) in lanes.iter_mut().zip(scores) {
                *lane = larger(*score, *lane);
            }
        }
        let maximum = lanes.iter().fold(f32::NEG_INFINITY, |most, lane| larger(*lane, most));
        let mut lanes = [0.0; LANES];
        for scores in vectors.iter_mut() {
            for (lane, score) in lanes.iter_mut().zip(scores) {
                *score = exp(*score - maximum);
                *lane += *score;
            }
        }
        let sum = lanes.iter().fold(0.0, |sum: f32, lane| sum + lane);
        let joint = larger(maximum, self.maximum);
        let (before, now) = (exp(self.maximum - joint), exp(maximum - joint));
        self.sum = sum.mul_add(now, self.sum * before);
        self.maximum = joint;
        (before, now)
    }

    /// Takes in the sink and returns the factor that makes the outputs' weights sum to less than one by its part.
    #[inline(always)]
    fn finish(self, sink: f32) -> f32 {
        let joint = larger(sink, self.maximum);
        let before = exp(self.maximum - joint);
        before / self.sum.mul_add(before, exp(sink - joint))
    }
}

/// The larger number; `b` if either is NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}
