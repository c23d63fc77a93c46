//! Dense matrices rounded to int8 per block of 32 columns, for int8 operands.
//!
//! A block of a tile is eight vectors of bytes, each four columns of 16 rows, and 16 scales in bf16. A byte is the signed
//! weight plus 128, as the int8 dot product wants one side unsigned. A scale is the largest weight of its block over 127,
//! rounded up, so that no weight exceeds 127 steps; it is held twice, since operands hold theirs halved.

use super::int8::{Bytes, Int8Block, Q8_OFFSET, QUADS};
use super::lanes::{LANES, Lanes};
use super::tiles::{self, BLOCK, Format, Part};
use crate::threads::Threads;
use crate::{KernelError, bf16};

/// The format of dense matrices in q8.
#[derive(Debug)]
pub(super) struct Q8;

impl Format for Q8 {
    type Codes = [[u32; LANES]; QUADS];
    type Scales = [u16; LANES];
    const QUICK: usize = 2;
}

/// Rounds bf16 parts `[rows, cols]` and packs them one under the other.
pub(super) fn pack(threads: &Threads, cols: usize, parts: &[Part<'_>], out: &mut [u8]) -> Result<(), KernelError> {
    tiles::pack::<Q8>(threads, cols, parts, out, 2 * BLOCK, |_, bytes, codes, scale, lane| {
        let mut x = [0.0; BLOCK];
        for (x, value) in x.iter_mut().zip(bf16::values(bytes)) {
            *x = value;
        }
        let (rounded, of_block) = round(&x);
        for (out, quad) in codes.iter_mut().zip(rounded.as_chunks::<4>().0) {
            out[lane] = u32::from_le_bytes(*quad);
        }
        // Twice: one more in the exponent, exactly.
        scale[lane] = bf16::narrow(2.0 * of_block);
    })
}

/// The unsigned bytes of a block and its scale, a bf16.
fn round(x: &[f32; BLOCK]) -> ([u8; BLOCK], f32) {
    // As bits, so that NaN is the largest and not lost.
    let largest = f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)));
    let scale = bf16::widen(bf16::above(largest / 127.0));
    if scale < f32::MIN_POSITIVE {
        return ([Q8_OFFSET as u8; BLOCK], 0.0);
    }
    (x.map(|x| ((x / scale).round_ties_even() as i32 + Q8_OFFSET) as u8), scale)
}

impl Bytes for Q8 {
    #[inline(always)]
    fn bytes<L: Lanes>(l: L, codes: &Self::Codes) -> [L::I; QUADS] {
        // No closure: one that is not inlined is compiled without the instructions, thirty times slower.
        let mut bytes = [l.splat_i32(0); QUADS];
        for v in 0..QUADS {
            bytes[v] = l.load_codes(&codes[v]);
        }
        bytes
    }

    #[inline(always)]
    fn scales<L: Lanes>(l: L, scales: &Self::Scales) -> L::F {
        l.load_bf16(scales)
    }

    #[inline(always)]
    fn dot<L: Lanes>(l: L, acc: L::I, bytes: L::I, x: L::I) -> L::I {
        l.dot_bytes(acc, bytes, x)
    }

    #[inline(always)]
    fn begin<L: Lanes>(l: L, _: L::F, x: &Int8Block) -> L::I {
        l.splat_i32(x.q8_correction())
    }

    #[inline(always)]
    fn end<L: Lanes>(l: L, dot: L::I, scales: L::F, x: &Int8Block, sum: L::F) -> L::F {
        l.fma(l.mul(scales, l.splat(x.half_scale())), l.to_f32(dot), sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_take_the_nearest_of_127_steps() {
        let mut x = [0.0; BLOCK];
        x[..6].copy_from_slice(&[254.0, -254.0, 3.0, 5.0, -1.0, 2.1]);
        let (bytes, scale) = round(&x);
        assert_eq!(scale, 2.0);
        assert_eq!(bytes[..7], [127, -127, 2, 2, 0, 1, 0].map(|q: i32| (q + 128) as u8));
    }

    #[test]
    fn no_scale_is_so_small_that_a_weight_exceeds_its_steps() {
        for bits in (0x3f80..0x4080).step_by(3) {
            let mut x = [0.0; BLOCK];
            x[3] = -bf16::widen(bits);
            let (bytes, scale) = round(&x);
            let q = i32::from(bytes[3]) - 128;
            assert!((-127..=-126).contains(&q), "{q}");
            assert!((q as f32 * scale - x[3]).abs() <= scale * 0.5);
        }
    }

    #[test]
    fn what_is_no_number_is_not_hidden() {
        let mut x = [1.0; BLOCK];
        x[7] = f32::NAN;
        assert!(round(&x).1.is_nan());
        x[7] = f32::NEG_INFINITY;
        assert_eq!(round(&x).1, f32::INFINITY);
        assert_eq!(round(&[0.0; BLOCK]), ([128; BLOCK], 0.0));
    }
}
