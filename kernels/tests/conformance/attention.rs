//! Rotation, KV memory and attention.

use phalanx_kernels::reference::{attention, rope};
use phalanx_kernels::{BLOCK_SIZE, KvLayer, KvShape, PoolShape, StepInputs, TokenSource};

use crate::compare::{close, same};
use crate::data::{Random, Tensor, rope_table};
use crate::operand::Operand;
use crate::{Make, Tested, tolerances};

/// A sequence whose rows from `first` on are in the KV memory.
pub(crate) struct Sequence {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) window: Option<u32>,
    /// Position of the first row.
    pub(crate) first: u32,
    /// Queries, keys and values before rotation, `[n, cols]`.
    pub(crate) qkv: Vec<f32>,
    pub(crate) sinks: Tensor,
}

/// What a backend made of a sequence.
pub(crate) struct Attended {
    /// After rotation, `[n, cols]`.
    pub(crate) qkv: Vec<f32>,
    /// `[n, Nq * D]`
    pub(crate) out: Vec<f32>,
}

const LAYER: KvLayer = KvLayer { pool: 1, layer: 1 };

impl Sequence {
    pub(crate) fn new([heads, kv_heads, dim]: [usize; 3], window: Option<u32>, first: u32, rows: usize) -> Self {
        let mut random = Random(heads as u64 * 100 + dim as u64);
        let qkv = random.numbers(rows * (heads + 2 * kv_heads) * dim).iter().map(|x| x * 2.0).collect();
        Self { heads, kv_heads, dim, window, first, qkv, sinks: random.tensor(heads, 3.0) }
    }

    fn cols(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    fn rows(&self) -> usize {
        self.qkv.len() / self.cols()
    }

    fn what(&self, name: &str) -> String {
        let Self { heads, kv_heads, dim, window, first, .. } = self;
        format!("{name}, {heads} heads, {kv_heads} kv heads of {dim}, window {window:?}, from position {first}")
    }

    /// First position whose whole surroundings are in the KV memory.
    fn complete_from(&self) -> u32 {
        if self.first == 0 { 0 } else { self.first + self.window.unwrap_or(u32::MAX) - 1 }
    }

    /// Runs the rows in chunks of `chunk`.
    pub(crate) fn run<B: Tested>(&self, make: &Make<B>, chunk: usize) -> Attended {
        let mut b = make.backend();
        let blocks = self.rows() / BLOCK_SIZE + 2;
        let pools = vec![PoolShape { layers: 1, blocks: 1 }, PoolShape { layers: 3, blocks }];
        let mut kv = b.kv(&KvShape { pools, kv_heads: self.kv_heads, head_dim: self.dim });
        let sinks = b.vector(self.sinks.source()).unwrap();
        let mut qkv = b.rows(chunk, self.cols());
        let mut out = b.rows(chunk, self.heads * self.dim);
        // Blocks in descending order; what no row sees names no block at all.
        let first_block = self.first as usize / BLOCK_SIZE;
        let mut table = vec![u32::MAX; first_block];
        table.extend((0..blocks as u32).rev());
        let mut attended = Attended { qkv: Vec::new(), out: Vec::new() };
        for (i, values) in self.qkv.chunks(chunk * self.cols()).enumerate() {
            let n = values.len() / self.cols();
            let position = self.first + (i * chunk) as u32;
            let inputs = StepInputs {
                tokens: vec![TokenSource::Given(0); n],
                positions: (position..position + n as u32).collect(),
                sequences: vec![1; n],
                tables: vec![vec![], vec![vec![], table.clone()]],
            };
            b.begin(&inputs, &rope_table(self.dim));
            b.write(&mut qkv, values);
            b.rotate_and_store(&mut qkv, &mut kv, LAYER);
            attended.qkv.extend(b.read(&qkv));
            if position >= self.complete_from() {
                b.attend(&qkv, &kv, LAYER, &sinks, self.window, &mut out);
                attended.out.extend(b.read(&out));
            } else {
                attended.out.extend(vec![0.0; n * self.heads * self.dim]);
            }
            b.finish().unwrap();
        }
        attended
    }

    /// What attention should make of the rotated rows; keys and values are kept as `keys`, queries rounded.
    pub(crate) fn expected(&self, keys: Operand, queries: Operand, qkv: &[f32]) -> Vec<f32> {
        let (dim, cols) = (self.dim, self.cols());
        let kept = keys.round_f32(qkv);
        let part = |row: u32, head: usize| &kept[(row - self.first) as usize * cols..][head * dim..(head + 1) * dim];
        let mut out = Vec::new();
        for (position, row) in (self.first..).zip(qkv.chunks(cols)) {
            for (head, &sink) in self.sinks.values.iter().enumerate() {
                if position < self.complete_from() {
                    out.extend(vec![0.0; dim]);
                    continue;
                }
                let kv_head = self.heads + head * self.kv_heads / self.heads;
                let visible = attention::visible(position, self.window);
                let keys: Vec<_> = visible.clone().map(|row| part(row, kv_head)).collect();
                let values: Vec<_> = visible.map(|row| part(row, kv_head + self.kv_heads)).collect();
                let query = queries.round_f32(&row[head * dim..(head + 1) * dim]);
                out.extend(attention::attend(&query, &keys, &values, sink));
            }
        }
        out
    }

    pub(crate) fn check<B: Tested>(&self, make: &Make<B>, chunk: usize) {
        let got = self.run(make, chunk);
        let expected = self.expected(make.keys, make.attention, &got.qkv);
        close(&self.what(&make.name), self.heads * self.dim, &expected, &got.out, tolerances::attend(make.attention))
            .unwrap();
    }
}

pub(crate) fn rotates<B: Tested>(make: &Make<B>) {
    for dim in [2, 8, 24, 64] {
        // The last position of the published context is among them.
        for first in [0, 4090, 131_064] {
            let sequence = Sequence::new([3, 1, dim], Some(1), first, 8);
            let got = sequence.run(make, 8);
            let mut expected = sequence.qkv.clone();
            for (position, row) in (first..).zip(expected.chunks_mut(5 * dim)) {
                row[..4 * dim].chunks_mut(dim).for_each(|head| rope::rotate(head, position, &rope_table(dim)));
            }
            close(&sequence.what(&make.name), 5 * dim, &expected, &got.qkv, tolerances::ROTATE).unwrap();
        }
    }
}

pub(crate) fn attends_from_the_first_position_on<B: Tested>(make: &Make<B>) {
    for rows in [1, 2, 15, 16, 17, 63, 64, 65, 130] {
        Sequence::new([4, 2, 16], None, 0, rows).check(make, rows);
    }
}

pub(crate) fn attends_at_window_edges<B: Tested>(make: &Make<B>) {
    // One key, less than a block, around a block, around a segment, the published window.
    for window in [1, 5, 15, 16, 17, 63, 64, 65, 128] {
        Sequence::new([2, 1, 16], Some(window), 0, 150).check(make, 150);
    }
}

pub(crate) fn attends_with_any_heads<B: Tested>(make: &Make<B>) {
    for shape in [[1, 1, 2], [6, 2, 8], [13, 1, 24], [9, 3, 30], [16, 2, 32], [64, 8, 64], [5, 5, 128]] {
        for window in [None, Some(20)] {
            Sequence::new(shape, window, 0, 70).check(make, 7);
        }
    }
}

pub(crate) fn attends_far_beyond_the_original_context<B: Tested>(make: &Make<B>) {
    Sequence::new([8, 1, 64], Some(128), 130_941, 131).check(make, 1);
    Sequence::new([8, 1, 64], Some(20), 65_530, 40).check(make, 1);
}

/// Pasts of several chunks and segments: all rows at once, in steps whose rows share out a past, and one by one.
pub(crate) fn attends_over_long_pasts<B: Tested>(make: &Make<B>) {
    for (shape, window) in [([3, 1, 30], None), ([2, 1, 72], Some(300))] {
        let sequence = Sequence::new(shape, window, 0, 530);
        let got = sequence.run(make, 530);
        let expected = sequence.expected(make.keys, make.attention, &got.qkv);
        let [heads, _, dim] = shape;
        let tolerance = tolerances::attend(make.attention);
        close(&sequence.what(&make.name), heads * dim, &expected, &got.out, tolerance).unwrap();
        for chunk in [100, 1] {
            let what = format!("{}, {chunk} rows at once", sequence.what(&make.name));
            same(&what, heads * dim, &got.out, &sequence.run(make, chunk).out).unwrap();
        }
    }
}

pub(crate) fn attends_to_the_sink_alone<B: Tested>(make: &Make<B>) {
    let mut sequence = Sequence::new([2, 1, 16], None, 0, 20);
    // The first head's sink takes nearly everything, the second's takes nothing.
    sequence.sinks = Tensor::new(&[80.0, -1e30]);
    let got = sequence.run(make, 20);
    let expected = sequence.expected(make.keys, make.attention, &got.qkv);
    for (expected, got) in expected.chunks(16).zip(got.out.chunks(16)) {
        close(&make.name, 16, expected, got, tolerances::attend(make.attention) * 10.0).unwrap();
    }
    // The first position sees itself alone: without a sink's share the output is its value.
    let value = &make.keys.round_f32(&got.qkv[48..64]);
    close(&make.name, 16, value, &got.out[16..32], 1e-7).unwrap();
}

pub(crate) fn copies_blocks<B: Tested>(make: &Make<B>) {
    let dim = 8;
    let mut b = make.backend();
    let shape = KvShape { pools: vec![PoolShape { layers: 2, blocks: 5 }], kv_heads: 2, head_dim: dim };
    let mut kv = b.kv(&shape);
    let sinks = b.vector(Tensor::new(&[0.0; 4]).source()).unwrap();
    let (mut qkv, mut out) = (b.rows(9, 8 * dim), b.rows(9, 4 * dim));
    let inputs = |block: u32, rows: u32| StepInputs {
        tokens: vec![TokenSource::Given(0); rows as usize],
        positions: (9 - rows..9).collect(),
        sequences: vec![0; rows as usize],
        tables: vec![vec![vec![block]]],
    };
    let values = Random(9).numbers(2 * 9 * 8 * dim);
    let mut expected = Vec::new();
    for layer in 0..2 {
        b.begin(&inputs(3, 9), &rope_table(dim));
        b.write(&mut qkv, &values[layer * 9 * 8 * dim..][..9 * 8 * dim]);
        b.rotate_and_store(&mut qkv, &mut kv, KvLayer { pool: 0, layer });
        b.attend(&qkv, &kv, KvLayer { pool: 0, layer }, &sinks, None, &mut out);
        expected.push(b.read(&out)[8 * 4 * dim..].to_vec());
    }
    b.copy_block(&mut kv, 0, 3, 1);
    for (layer, expected) in expected.iter().enumerate() {
        // Only the last row is computed again, on the copy.
        b.begin(&inputs(1, 1), &rope_table(dim));
        b.write(&mut qkv, &values[layer * 9 * 8 * dim..][8 * 8 * dim..9 * 8 * dim]);
        b.rotate_and_store(&mut qkv, &mut kv, KvLayer { pool: 0, layer });
        b.attend(&qkv, &kv, KvLayer { pool: 0, layer }, &sinks, None, &mut out);
        same(&make.name, 4 * dim, expected, &b.read(&out)).unwrap();
    }
    b.finish().unwrap();
}
