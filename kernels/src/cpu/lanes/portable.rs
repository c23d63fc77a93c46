//! Lanes as arrays, for any processor.

use super::{CODE_BYTES, CODE_VALUES, HALF_WAY, Kernel, LANES, Lanes};
use crate::{bf16, f16};

/// Plain loops. Where the target always has a fused multiply-add (aarch64) they become vector instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Lanes for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    const WIDE: bool = false;

    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; LANES]
    }

    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        *v
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F {
        v.map(bf16::widen)
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16; LANES]) -> Self::F {
        v.map(f16::widen)
    }

    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        *out = v;
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn scales(self, bytes: &[u8; LANES]) -> Self::F {
        bytes.map(|byte| f32::from_bits((u32::from(byte) << 23).max(0x0040_0000)))
    }

    #[inline(always)]
    fn steps(self, bytes: &[u8; LANES]) -> Self::F {
        bytes.map(|byte| f32::from_bits(((u32::from(byte) + 1) << 23) + HALF_WAY.cast_unsigned()))
    }

    #[inline(always)]
    fn count_from(self, steps: Self::F, v: i32) -> Self::I {
        steps.map(|steps| steps.to_bits().cast_signed().wrapping_add(v))
    }

    #[inline(always)]
    fn counted(self, count: Self::I, steps: Self::F) -> Self::F {
        std::array::from_fn(|i| f32::from_bits(count[i].cast_unsigned()) - steps[i])
    }

    #[inline(always)]
    fn load_codes(self, v: &[u32; LANES]) -> Self::I {
        v.map(u32::cast_signed)
    }

    #[inline(always)]
    fn code_value(self, codes: Self::I, nibble: u32) -> Self::F {
        codes.map(|v| CODE_VALUES[(v >> (4 * nibble)) as usize & 15])
    }

    #[inline(always)]
    fn code_bytes(self, codes: Self::I, high: bool) -> Self::I {
        let shift = if high { 4 } else { 0 };
        codes.map(|v| i32::from_le_bytes(v.to_le_bytes().map(|byte| CODE_BYTES[usize::from(byte >> shift & 15)])))
    }

    #[inline(always)]
    fn splat_i32(self, v: i32) -> Self::I {
        [v; LANES]
    }

    #[inline(always)]
    fn dot(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        std::array::from_fn(|i| {
            let (u, s) = (unsigned[i].to_le_bytes(), signed[i].to_le_bytes());
            u.iter().zip(s).fold(acc[i], |sum, (&u, s)| sum.wrapping_add(i32::from(u) * i32::from(s.cast_signed())))
        })
    }

    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        self.dot(acc, unsigned, signed)
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        v.map(|v| v as f32)
    }
}
