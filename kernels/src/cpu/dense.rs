//! Dense matrices: `x: [n, cols] -> [n, rows]`, `x W^T + b`, bf16 weights widened in registers.
//!
//! Layout: tiles of 16 output rows, `[tile][cols][16]`, the last tile padded with zeros. A lane is an output row;
//! its sum runs over the columns ascending, one fused multiply-add each, from zero; the bias is added last.
//! Several tiles and several `x` rows are worked on at once to fill the registers, which no sum notices.

use super::isa::Simd;
use super::lanes::{Kernel, LANES, Lanes};
use super::threads::{Disjoint, Threads};
use crate::memory::{Aligned, Source};
use crate::{KernelError, Stack, bf16};

/// Tiles of a task.
const GROUP: usize = 4;
/// `x` rows of a task: with the weights of a group they stay in a core's own cache.
const CHUNK: usize = 64;
/// Bytes that a thread reads before it gives their pages back.
const PIECE_BYTES: usize = 4 << 20;

/// A packed matrix with its bias.
#[derive(Debug)]
pub struct Dense {
    rows: usize,
    cols: usize,
    /// bf16 `[tile][cols][16]`
    weights: Aligned<u16>,
    /// `[tile * 16]`, zeros without a bias.
    bias: Aligned<f32>,
}

impl Dense {
    /// Packs matrices `[rows, cols]` one under the other.
    pub(super) fn pack(threads: &Threads, cols: usize, stack: &[Stack<'_>]) -> Result<Self, KernelError> {
        let mut matrices = Vec::with_capacity(stack.len());
        let mut rows = 0;
        for matrix in stack {
            let got = matrix.weight.bytes().len();
            let here = got.checked_div(2 * cols).unwrap_or(0);
            need("a weight matrix", got, here * cols * 2)?;
            if let Some(bias) = matrix.bias {
                need("a bias", bias.bytes().len(), here * 2)?;
            }
            matrices.push(Matrix { first: rows, rows: here, source: matrix.weight });
            rows += here;
        }
        let tiles = rows.div_ceil(LANES);
        let mut weights = Aligned::zeroed(tiles * cols * LANES);
        let mut bias = Aligned::zeroed(tiles * LANES);
        let tile = cols * LANES;
        let piece = (PIECE_BYTES / (2 * tile).max(1)).max(1);
        threads.each_chunk(&mut weights, piece * tile, usize::MAX, |i, out| {
            pack_piece(&matrices, i * piece * LANES, cols, out);
        });
        for (matrix, stack) in matrices.iter().zip(stack) {
            matrix.source.release();
            if let Some(source) = stack.bias {
                for (out, value) in bias[matrix.first..].iter_mut().zip(bf16::values(source.bytes())) {
                    *out = value;
                }
                source.release();
            }
        }
        Ok(Self { rows, cols, weights, bias })
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    pub(super) const fn cols(&self) -> usize {
        self.cols
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.weights.bytes() + self.bias.bytes()
    }
}

/// Refuses tensors of another size than their shape's.
pub(crate) const fn need(what: &'static str, got: usize, need: usize) -> Result<(), KernelError> {
    if got == need { Ok(()) } else { Err(KernelError::Size { what, got, need }) }
}

/// A source matrix and the row of the stack at which it begins.
struct Matrix<'a> {
    first: usize,
    rows: usize,
    source: Source<'a>,
}

/// Packs whole tiles from row `first` of the stack on.
fn pack_piece(matrices: &[Matrix<'_>], first: usize, cols: usize, out: &mut [u16]) {
    let last = first + out.len().checked_div(cols).unwrap_or(0);
    for matrix in matrices {
        let range = first.max(matrix.first)..last.min(matrix.first + matrix.rows);
        if range.is_empty() {
            continue;
        }
        let bytes = (range.start - matrix.first) * cols * 2..(range.end - matrix.first) * cols * 2;
        let source = matrix.source.slice(bytes).expect("the rows lie within the matrix");
        for (row, values) in range.zip(source.bytes().chunks_exact(cols * 2)) {
            let (tile, lane) = ((row - first) / LANES, row % LANES);
            let tile = &mut out[tile * cols * LANES..(tile + 1) * cols * LANES];
            for (out, value) in tile.as_chunks_mut::<LANES>().0.iter_mut().zip(values.as_chunks::<2>().0) {
                out[lane] = u16::from_le_bytes(*value);
            }
        }
        source.release();
    }
}

/// What becomes of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Store {
    /// `out = result`
    Replace,
    /// `out = out + result`
    Add,
}

/// `x: [n, cols] -> out: [n, rows]`.
pub(super) fn project(simd: Simd, threads: &Threads, x: &[f32], weight: &Dense, out: &mut [f32], store: Store) {
    let n = out.len().checked_div(weight.rows).unwrap_or(0);
    assert!(x.len() == n * weight.cols, "inputs and outputs have the same rows");
    let groups = weight.bias.len().div_ceil(GROUP * LANES);
    let chunks = n.div_ceil(CHUNK);
    let out = Disjoint::new(out);
    threads.each(groups * chunks, n * weight.rows * weight.cols, |task| {
        let (group, chunk) = (task / chunks, task % chunks);
        let rows = chunk * CHUNK..n.min((chunk + 1) * CHUNK);
        simd.run(Project { x, weight, group, rows, out: &out, store });
    });
}

/// A group of tiles times a chunk of `x` rows.
struct Project<'a> {
    x: &'a [f32],
    weight: &'a Dense,
    group: usize,
    rows: std::ops::Range<usize>,
    /// `[n, weight.rows]`, of which this task alone writes its rows' and its tiles' part.
    out: &'a Disjoint<'a, f32>,
    store: Store,
}

impl Kernel for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let mut row = self.rows.start;
        while L::WIDE && row + 8 <= self.rows.end {
            self.tokens::<L, 2, 8>(l, row);
            row += 8;
        }
        while row + 4 <= self.rows.end {
            if L::WIDE {
                self.tokens::<L, 4, 4>(l, row);
            } else {
                self.tokens::<L, 1, 4>(l, row);
            }
            row += 4;
        }
        while row < self.rows.end {
            self.tokens::<L, 4, 1>(l, row);
            row += 1;
        }
    }
}

impl Project<'_> {
    /// `TOKENS` rows from `row` on, `TILES` tiles at once where there are as many.
    #[inline(always)]
    fn tokens<L: Lanes, const TILES: usize, const TOKENS: usize>(&self, l: L, row: usize) {
        let tiles = self.weight.bias.len() / LANES;
        let mut tile = self.group * GROUP;
        let end = tiles.min(tile + GROUP);
        while tile + TILES <= end {
            self.block::<L, TILES, TOKENS>(l, tile, row);
            tile += TILES;
        }
        while tile < end {
            self.block::<L, 1, TOKENS>(l, tile, row);
            tile += 1;
        }
    }

    #[inline(always)]
    fn block<L: Lanes, const TILES: usize, const TOKENS: usize>(&self, l: L, tile: usize, row: usize) {
        let cols = self.weight.cols;
        let weights: [&[[u16; LANES]]; TILES] = std::array::from_fn(|i| {
            self.weight.weights[(tile + i) * cols * LANES..(tile + i + 1) * cols * LANES].as_chunks().0
        });
        let x: [&[f32]; TOKENS] = std::array::from_fn(|t| &self.x[(row + t) * cols..(row + t + 1) * cols]);
        let sums = sums(l, cols, weights, x);
        for (i, sums) in sums.into_iter().enumerate() {
            let first = (tile + i) * LANES;
            let bias = l.load(self.weight.bias[first..].first_chunk().expect("biases fill their tiles"));
            let width = LANES.min(self.weight.rows - first);
            for (t, sum) in sums.into_iter().enumerate() {
                let mut result = [0.0; LANES];
                l.store(l.add(sum, bias), &mut result);
                let start = (row + t) * self.weight.rows + first;
                // SAFETY: tasks differ in their tiles or in their rows, hence in every element they write; within
                // a task each part is dropped before the next is made.
                let out = unsafe { self.out.slice(start..start + width) };
                match self.store {
                    Store::Replace => out.copy_from_slice(&result[..width]),
                    Store::Add => out.iter_mut().zip(&result).for_each(|(out, result)| *out += result),
                }
            }
        }
    }
}

/// The sums of `TILES` tiles for `TOKENS` rows: lane `r` of `[i][t]` is the dot product of `x[t]` and row `r` of tile `i`.
#[inline(always)]
fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
    l: L,
    cols: usize,
    weights: [&[[u16; LANES]]; TILES],
    x: [&[f32]; TOKENS],
) -> [[L::F; TOKENS]; TILES] {
    assert!(weights.iter().all(|w| w.len() == cols) && x.iter().all(|x| x.len() == cols), "one length");
    let mut sums = [[l.splat(0.0); TOKENS]; TILES];
    for k in 0..cols {
        let mut w = [l.splat(0.0); TILES];
        for i in 0..TILES {
            // SAFETY: every slice has `cols` elements, asserted above.
            w[i] = l.load_bf16(unsafe { weights[i].get_unchecked(k) });
        }
        for t in 0..TOKENS {
            // SAFETY: as above.
            let x = l.splat(unsafe { *x[t].get_unchecked(k) });
            for i in 0..TILES {
                sums[i][t] = l.fma(w[i], x, sums[i][t]);
            }
        }
    }
    sums
}
