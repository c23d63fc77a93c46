//! Rotary position embedding: half-split pairs `(j, j + D/2)` of each head, in place.
//!
//! Angles are taken in f64 once a step (`libm`, the same on every machine), their cosines and sines times the
//! table's factor are rounded to f32. Then `a' = fma(a, cos, -(b sin))` and `b' = fma(b, cos, a sin)`.

use super::isa::Simd;
use super::lanes::{Kernel, Lanes};
use crate::RopeTable;
use crate::threads::Threads;

/// Cosines and sines of a step's rows, `[T, D/2]` each.
#[derive(Debug, Default)]
pub(super) struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Computes them for the rows' positions.
    pub(super) fn set(&mut self, positions: &[u32], table: &RopeTable) {
        self.half = table.inv_freq.len();
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for frequency in &table.inv_freq {
                let (sin, cos) = libm::sincos(f64::from(position) * frequency);
                self.cos.push((cos * table.scale) as f32);
                self.sin.push((sin * table.scale) as f32);
            }
        }
    }

    /// Half of `D`.
    pub(super) const fn half(&self) -> usize {
        self.half
    }

    /// Rotates the first `heads * D` numbers of each row of `rows: [T, cols]`.
    pub(super) fn rotate(&self, simd: Simd, threads: &Threads, rows: &mut [f32], cols: usize, heads: usize) {
        let work = rows.len();
        threads.each_chunk(rows, cols, work, |row, values| {
            let range = row * self.half..(row + 1) * self.half;
            let (cos, sin) = (&self.cos[range.clone()], &self.sin[range]);
            simd.run(Rotate { cos, sin, heads: &mut values[..heads * 2 * self.half] });
        });
    }
}

/// The heads of one row.
struct Rotate<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    /// `[heads, D]`
    heads: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut((2 * half).max(1)) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
                (*a, *b) = (a.mul_add(*cos, -(*b * sin)), b.mul_add(*cos, *a * sin));
            }
        }
    }
}
