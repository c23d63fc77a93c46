//! The products of an expert: a group of four tiles times a few of its items.
//!
//! Gate-up: 64 rows of the matrix are 32 activations, one block of the down matrix's operand, rounded to it at
//! once. Down: each result goes to the wire at the place where its (row, choice) is expected.

use std::ops::Range;

use super::Item;
use crate::cpu::exp::exp;
use crate::cpu::int8::{ByRows, Multiply, Operand};
use crate::cpu::lanes::{Kernel, LANES, Lanes};
use crate::cpu::mxfp4::Mxfp4;
use crate::cpu::tiles::{BLOCK, Tiles};
use crate::threads::Disjoint;
use crate::{Precision, SWIGLU_ALPHA, wire};

/// Tiles of a group: 64 matrix rows.
pub(super) const GROUP: usize = 4;

/// Results of a group of tiles for a few items.
type Results<const TOKENS: usize> = [[f32; GROUP * LANES]; TOKENS];

/// The group's matrix rows times `x`, plus bias. What belongs to tiles beyond the matrix is left as it is.
#[inline(always)]
fn multiply<L: Lanes, O: Operand, const TOKENS: usize>(
    l: L,
    matrix: &Tiles<Mxfp4>,
    group: usize,
    x: [&[O]; TOKENS],
    results: &mut Results<TOKENS>,
) where
    Mxfp4: Multiply<O>,
{
    let first = group * GROUP;
    for tile in first..matrix.tiles().min(first + GROUP) {
        let [sums] = Mxfp4::sums::<L, 1, TOKENS>(l, matrix, tile, x);
        let bias = l.load(matrix.bias(tile));
        for (sum, result) in sums.into_iter().zip(&mut *results) {
            l.store(l.add(sum, bias), &mut result.as_chunks_mut().0[tile - first]);
        }
    }
}

/// 64 rows of an expert's gate-up matrix for all its items, some times over.
pub(super) struct GateUp<'a, O> {
    pub(super) matrix: &'a Tiles<Mxfp4>,
    pub(super) groups: Range<usize>,
    pub(super) limit: f32,
    pub(super) items: &'a [Item],
    /// Index of the first of `items` among all.
    pub(super) first: usize,
    /// `[rows, H]`
    pub(super) rows: &'a [O],
    /// `[items, I]`, of which this task alone writes its items' 32 columns of each group.
    pub(super) activations: &'a Disjoint<'a, O>,
}

impl<O: Operand> Kernel for GateUp<'_, O>
where
    Mxfp4: Multiply<O>,
{
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        self.all_rows(l, 0..self.items.len());
    }
}

impl<O: Operand> ByRows for GateUp<'_, O>
where
    Mxfp4: Multiply<O>,
{
    #[inline(always)]
    fn rows<L: Lanes, const TOKENS: usize>(&self, l: L, at: usize) {
        let cols = self.matrix.cols() / O::COLUMNS;
        let x: [&[O]; TOKENS] = std::array::from_fn(|t| {
            let row = self.items[at + t].row as usize;
            &self.rows[row * cols..(row + 1) * cols]
        });
        // A group's results are dealt with after the next group's product: what they wait for has arrived by then, and
        // meanwhile weights keep coming in.
        let mut results = [[[0.0; GROUP * LANES]; TOKENS]; 2];
        let groups = self.groups.clone();
        for group in groups.clone() {
            multiply(l, self.matrix, group, x, &mut results[group % 2]);
            if group > groups.start {
                self.activate(group - 1, at, &results[(group - 1) % 2]);
            }
        }
        if let Some(last) = groups.last() {
            self.activate(last, at, &results[last % 2]);
        }
    }
}

impl<O: Operand> GateUp<'_, O> {
    /// Activations of a group of the items from `at` on.
    #[inline(always)]
    fn activate<const TOKENS: usize>(&self, group: usize, at: usize, results: &Results<TOKENS>) {
        let (row_width, width) = (self.matrix.rows() / 2 / O::COLUMNS, BLOCK / O::COLUMNS);
        for (t, result) in results.iter().enumerate() {
            let activated = swiglu(result, self.limit);
            let start = (self.first + at + t) * row_width + group * width;
            // SAFETY: tasks differ in their items or in their columns; within a task each part is dropped before
            // the next is made.
            O::from_block(&activated, unsafe { self.activations.slice(start..start + width) });
        }
    }
}

/// `min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1)` of 32 pairs `g, u`.
//= gpt-oss model.py#swiglu
#[inline(always)]
fn swiglu(pairs: &[f32; 2 * BLOCK], limit: f32) -> [f32; BLOCK] {
    let mut out = [0.0; BLOCK];
    for (out, [gate, up]) in out.iter_mut().zip(pairs.as_chunks().0) {
        // Written so that NaN stays NaN.
        let gate = if *gate > limit { limit } else { *gate };
        let up = if *up > limit { limit } else { *up };
        let up = if up < -limit { -limit } else { up };
        *out = gate / (1.0 + exp(-SWIGLU_ALPHA * gate)) * (up + 1.0);
    }
    out
}

/// 64 rows of an expert's down matrix for all its items.
pub(super) struct Down<'a, O> {
    pub(super) matrix: &'a Tiles<Mxfp4>,
    pub(super) precision: Precision,
    pub(super) group: usize,
    pub(super) items: &'a [Item],
    /// Index of the first of `items` among all.
    pub(super) first: usize,
    /// `[items, I]`
    pub(super) activations: &'a [O],
    /// For each rank `[results, H]` of the wire type, of which this task alone writes its items' 64 columns.
    pub(super) parts: &'a [Disjoint<'a, u8>],
}

impl<O: Operand> Kernel for Down<'_, O>
where
    Mxfp4: Multiply<O>,
{
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        self.all_rows(l, 0..self.items.len());
    }
}

impl<O: Operand> ByRows for Down<'_, O>
where
    Mxfp4: Multiply<O>,
{
    #[inline(always)]
    fn rows<L: Lanes, const TOKENS: usize>(&self, l: L, at: usize) {
        let cols = self.matrix.cols() / O::COLUMNS;
        let x: [&[O]; TOKENS] = std::array::from_fn(|t| {
            let item = self.first + at + t;
            &self.activations[item * cols..(item + 1) * cols]
        });
        let mut results = [[0.0; GROUP * LANES]; TOKENS];
        multiply(l, self.matrix, self.group, x, &mut results);
        let size = wire::bytes(self.precision);
        let column = self.group * GROUP * LANES;
        let width = (GROUP * LANES).min(self.matrix.rows() - column);
        for (t, result) in results.iter().enumerate() {
            let item = self.items[at + t];
            let start = (item.index as usize * self.matrix.rows() + column) * size;
            // SAFETY: tasks differ in their items or in their columns, and no two items share an index of a rank;
            // within a task each part is dropped before the next is made.
            let out = unsafe { self.parts[item.rank as usize].slice(start..start + width * size) };
            wire::encode(self.precision, &result[..width], out);
        }
    }
}
