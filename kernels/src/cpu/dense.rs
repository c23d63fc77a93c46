//! Dense matrices: `x: [n, cols] -> [n, rows]`, `x W^T + b`, in bf16 or q8.
//!
//! bf16: weights are widened in registers; a lane is an output row, its sum runs over the columns ascending, one fused
//! multiply-add each, from zero. q8: see [`super::q8`] and [`super::int8`]; rows of `x` are rounded to int8 first. The
//! bias is added last. Several tiles and several `x` rows are worked on at once, which no sum notices.

use super::int8::{ByRows, Int8Block, Multiply, to_operand};
use super::isa::Simd;
use super::lanes::{Kernel, LANES, Lanes};
use super::q8::{self, Q8};
use super::tiles::{self, BLOCK, Format, Part, Tiles, blocks};
use crate::memory::{Packed, resident};
use crate::threads::{Disjoint, Threads};
use crate::{DenseFormat, KernelError, Stack};

/// Tiles of a task.
const GROUP: usize = 4;
/// `x` rows of a task: with the weights of a group they stay in a core's own cache.
const CHUNK: usize = 64;

/// A packed matrix with its bias.
#[derive(Debug)]
pub struct Dense(Weights);

#[derive(Debug)]
enum Weights {
    Bf16(Tiles<Bf16>),
    Q8(Tiles<Q8>),
}

/// bf16: a block is 32 vectors, each a column of 16 rows.
#[derive(Debug)]
struct Bf16;

impl Format for Bf16 {
    type Codes = [[u16; LANES]; BLOCK];
    type Scales = [u8; 0];
    const QUICK: usize = 1;
}

/// Bytes of a packed matrix.
pub(super) const fn bytes_of(format: DenseFormat, rows: usize, cols: usize) -> usize {
    match format {
        DenseFormat::Bf16 => Tiles::<Bf16>::bytes_of(rows, cols),
        DenseFormat::Q8 => Tiles::<Q8>::bytes_of(rows, cols),
    }
}

/// Packs bf16 matrices `[rows, cols]` one under the other.
pub(super) fn pack(
    threads: &Threads,
    format: DenseFormat,
    cols: usize,
    stack: &[Stack<'_>],
    out: &mut [u8],
) -> Result<(), KernelError> {
    let mut parts = Vec::with_capacity(stack.len());
    let mut first = 0;
    for matrix in stack {
        let rows = matrix.rows(cols)?;
        parts.push(Part { first, rows, weights: matrix.weight, bias: matrix.bias });
        first += rows;
    }
    match format {
        DenseFormat::Bf16 => tiles::pack::<Bf16>(threads, cols, &parts, out, 2 * BLOCK, |_, bytes, codes, _, lane| {
            for (out, value) in codes.iter_mut().zip(bytes.as_chunks::<2>().0) {
                out[lane] = u16::from_le_bytes(*value);
            }
        }),
        DenseFormat::Q8 => q8::pack(threads, cols, &parts, out),
    }
}

impl Dense {
    /// A matrix of bytes that [`pack`] wrote.
    pub(super) fn new(format: DenseFormat, rows: usize, cols: usize, packed: Packed) -> Result<Self, KernelError> {
        Ok(Self(match format {
            DenseFormat::Bf16 => Weights::Bf16(Tiles::new(rows, cols, packed)?),
            DenseFormat::Q8 => Weights::Q8(Tiles::new(rows, cols, packed)?),
        }))
    }

    pub(super) const fn rows(&self) -> usize {
        match &self.0 {
            Weights::Bf16(tiles) => tiles.rows(),
            Weights::Q8(tiles) => tiles.rows(),
        }
    }

    pub(super) const fn cols(&self) -> usize {
        match &self.0 {
            Weights::Bf16(tiles) => tiles.cols(),
            Weights::Q8(tiles) => tiles.cols(),
        }
    }

    /// Makes room to round `rows` rows for this matrix; returns the bytes added.
    pub(super) fn make_room(&self, rounded: &mut Rounded, rows: usize) -> u64 {
        let Weights::Q8(weight) = &self.0 else { return 0 };
        let (before, need) = (rounded.len(), rows * blocks(weight.cols()));
        if need <= before {
            return 0;
        }
        // Dropped first: nothing in it is kept.
        *rounded = Rounded::new();
        *rounded = resident(need);
        ((need - before) * size_of::<Int8Block>()) as u64
    }

    pub(super) fn bytes(&self) -> u64 {
        match &self.0 {
            Weights::Bf16(tiles) => tiles.bytes(),
            Weights::Q8(tiles) => tiles.bytes(),
        }
    }
}

/// Refuses tensors of another size than their shape's.
pub(crate) const fn need(what: &'static str, got: usize, need: usize) -> Result<(), KernelError> {
    if got == need { Ok(()) } else { Err(KernelError::Size { what, got, need }) }
}

/// What becomes of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Store {
    /// `out = result`
    Replace,
    /// `out = out + result`
    Add,
}

/// Rows rounded to int8 for a product; kept for the next one.
pub(super) type Rounded = Vec<Int8Block>;

/// `x: [n, cols] -> out: [n, rows]`.
pub(super) fn project(
    simd: Simd,
    threads: &Threads,
    x: &[f32],
    rounded: &mut Rounded,
    weight: &Dense,
    out: &mut [f32],
    store: Store,
) {
    match &weight.0 {
        Weights::Bf16(weight) => project_tiles(simd, threads, x, weight.cols(), weight, out, store),
        Weights::Q8(weight) => {
            let (cols, width) = (weight.cols(), blocks(weight.cols()));
            let need = x.len().checked_div(cols).unwrap_or(0) * width;
            if rounded.len() < need {
                rounded.resize(need, Int8Block::default());
            }
            let rounded = &mut rounded[..need];
            threads.each_chunk(rounded, width, 4 * x.len(), |row, out| {
                simd.run(Round { x: &x[row * cols..(row + 1) * cols], out });
            });
            project_tiles(simd, threads, rounded, width, weight, out, store);
        }
    }
}

/// One row to int8.
struct Round<'a> {
    x: &'a [f32],
    out: &'a mut [Int8Block],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        to_operand(self.x, self.out);
    }
}

/// `x: [n, width] -> out: [n, rows]`, where a row is `width` elements of the operand.
fn project_tiles<F: Multiply<O>, O: Sync>(
    simd: Simd,
    threads: &Threads,
    x: &[O],
    width: usize,
    weight: &Tiles<F>,
    out: &mut [f32],
    store: Store,
) {
    let n = out.len().checked_div(weight.rows()).unwrap_or(0);
    assert!(x.len() == n * width, "inputs and outputs have the same rows");
    let groups = weight.tiles().div_ceil(GROUP);
    let chunks = n.div_ceil(CHUNK);
    let out = Disjoint::new(out);
    threads.each(groups * chunks, n * weight.rows() * weight.cols(), |task| {
        let (group, chunk) = (task / chunks, task % chunks);
        let rows = chunk * CHUNK..n.min((chunk + 1) * CHUNK);
        simd.run(Project { x, width, weight, group, rows, out: &out, store });
    });
}

/// A group of tiles times a chunk of `x` rows.
struct Project<'a, F, O> {
    x: &'a [O],
    /// Elements of a row of `x`.
    width: usize,
    weight: &'a Tiles<F>,
    group: usize,
    rows: std::ops::Range<usize>,
    /// `[n, weight.rows]`, of which this task alone writes its rows' and its tiles' part.
    out: &'a Disjoint<'a, f32>,
    store: Store,
}

impl<F: Multiply<O>, O> Kernel for Project<'_, F, O> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        if F::UNPACKED {
            return self.all_rows(l, self.rows.clone());
        }
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

impl<F: Multiply<O>, O> ByRows for Project<'_, F, O> {
    #[inline(always)]
    fn rows<L: Lanes, const N: usize>(&self, l: L, at: usize) {
        self.tokens::<L, 1, N>(l, at);
    }
}

impl<F: Multiply<O>, O> Project<'_, F, O> {
    /// `TOKENS` rows from `row` on, `TILES` tiles at once where there are as many.
    #[inline(always)]
    fn tokens<L: Lanes, const TILES: usize, const TOKENS: usize>(&self, l: L, row: usize) {
        let mut tile = self.group * GROUP;
        let end = self.weight.tiles().min(tile + GROUP);
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
        let width = self.width;
        let x: [&[O]; TOKENS] = std::array::from_fn(|t| &self.x[(row + t) * width..(row + t + 1) * width]);
        let sums = F::sums::<L, TILES, TOKENS>(l, self.weight, tile, x);
        for (i, sums) in sums.into_iter().enumerate() {
            let first = (tile + i) * LANES;
            let bias = l.load(self.weight.bias(tile + i));
            let width = LANES.min(self.weight.rows() - first);
            for (t, sum) in sums.into_iter().enumerate() {
                let mut result = [0.0; LANES];
                l.store(l.add(sum, bias), &mut result);
                let start = (row + t) * self.weight.rows() + first;
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

impl Multiply<f32> for Bf16 {
    const UNPACKED: bool = false;

    #[inline(always)]
    fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
        l: L,
        matrix: &Tiles<Self>,
        tile: usize,
        x: [&[f32]; TOKENS],
    ) -> [[L::F; TOKENS]; TILES] {
        let cols = matrix.cols();
        let tiles = matrix.some::<TILES>(tile);
        tiles.iter().for_each(|tile| tile.check(blocks(cols)));
        assert!(x.iter().all(|x| x.len() == cols), "whole rows");
        let mut sums = [[l.splat(0.0); TOKENS]; TILES];
        for b in 0..blocks(cols) {
            // SAFETY: every tile has as many blocks, checked above.
            let weights: [_; TILES] = std::array::from_fn(|i| unsafe { tiles[i].cluster(l, b, TOKENS) });
            // SAFETY: a cluster without scales is one block.
            let weights: [_; TILES] = std::array::from_fn(|i| unsafe { weights[i].block(0) }.0);
            for (c, k) in (b * BLOCK..cols).take(BLOCK).enumerate() {
                let mut w = [l.splat(0.0); TILES];
                for (w, weights) in w.iter_mut().zip(&weights) {
                    *w = l.load_bf16(&weights[c]);
                }
                for t in 0..TOKENS {
                    // SAFETY: every row has `cols` columns, checked above.
                    let x = l.splat(unsafe { *x[t].get_unchecked(k) });
                    for i in 0..TILES {
                        sums[i][t] = l.fma(w[i], x, sums[i][t]);
                    }
                }
            }
        }
        sums
    }
}
