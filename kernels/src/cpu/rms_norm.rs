//! RMSNorm: `x: [n, H] -> [n, H]`, `x * (1 / sqrt(mean(x^2) + eps)) * weight` in f32.
//!
//! The sum of squares has one order: lane `i` of 16 sums the columns `i, i + 16, ..` ascending, then the lanes
//! are added in ascending order.

use super::isa::Simd;
use super::lanes::{Kernel, LANES, Lanes};
use crate::threads::Threads;

pub(super) fn rms_norm(simd: Simd, threads: &Threads, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let hidden = weight.len();
    threads.each_chunk(out, hidden, x.len(), |row, out| {
        simd.run(RmsNorm { x: &x[row * hidden..(row + 1) * hidden], weight, eps, out });
    });
}

/// One row.
struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (vectors, rest) = self.x.as_chunks::<LANES>();
        let mut squares = l.splat(0.0);
        for x in vectors {
            let x = l.load(x);
            squares = l.fma(x, x, squares);
        }
        let mut sums = [0.0f32; LANES];
        l.store(squares, &mut sums);
        for (sum, x) in sums.iter_mut().zip(rest) {
            *sum = x.mul_add(*x, *sum);
        }
        let sum = sums.iter().fold(0.0f32, |total, lane| total + lane);
        let scale = 1.0 / (sum / self.x.len() as f32 + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * scale * weight;
        }
    }
}
