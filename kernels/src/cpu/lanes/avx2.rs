//! Lanes as two registers of 256 bits.

use std::arch::x86_64::*;

use super::{CODE_BYTES, CODE_VALUES, HALF_WAY, Kernel, LANES, Lanes};

/// AVX2 and FMA. A value exists only where [`Avx2::detect`] found them: on this rests every
/// `SAFETY: the processor has the instructions` below.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// `None` if the processor lacks an instruction.
    pub(crate) fn detect() -> Option<Self> {
        let all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run<K: Kernel>(lanes: Avx2, kernel: K) -> K::Output {
    kernel.run(lanes)
}

impl Lanes for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    const WIDE: bool = false;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the processor has the instructions.
        unsafe { run(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { [_mm256_set1_ps(v); 2] }
    }

    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 2 * 32 bytes are readable.
        unsafe { [_mm256_loadu_ps(v.as_ptr()), _mm256_loadu_ps(v.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 2 * 16 bytes are readable.
        unsafe {
            let halves = [_mm_loadu_si128(v.as_ptr().cast()), _mm_loadu_si128(v.as_ptr().add(8).cast())];
            let [a, b] = [_mm256_cvtepu16_epi32(halves[0]), _mm256_cvtepu16_epi32(halves[1])];
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b))]
        }
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 2 * 16 bytes are readable.
        unsafe {
            let halves = [_mm_loadu_si128(v.as_ptr().cast()), _mm_loadu_si128(v.as_ptr().add(8).cast())];
            halves.map(|half| _mm256_cvtph_ps(half))
        }
    }

    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        // SAFETY: the processor has the instructions; 2 * 32 bytes are writable.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn scales(self, bytes: &[u8; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 16 bytes are readable.
        unsafe {
            let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
            let exponents = [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))];
            let least = _mm256_set1_epi32(0x0040_0000);
            let [a, b] = [_mm256_slli_epi32::<23>(exponents[0]), _mm256_slli_epi32::<23>(exponents[1])];
            [_mm256_castsi256_ps(_mm256_max_epi32(a, least)), _mm256_castsi256_ps(_mm256_max_epi32(b, least))]
        }
    }

    #[inline(always)]
    fn steps(self, bytes: &[u8; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 16 bytes are readable.
        unsafe {
            let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
            let exponents = [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))];
            let first = _mm256_set1_epi32((1 << 23) + HALF_WAY);
            let [a, b] = [_mm256_slli_epi32::<23>(exponents[0]), _mm256_slli_epi32::<23>(exponents[1])];
            [_mm256_castsi256_ps(_mm256_add_epi32(a, first)), _mm256_castsi256_ps(_mm256_add_epi32(b, first))]
        }
    }

    #[inline(always)]
    fn count_from(self, steps: Self::F, v: i32) -> Self::I {
        // SAFETY: the processor has the instructions.
        unsafe {
            let v = _mm256_set1_epi32(v);
            [_mm256_add_epi32(_mm256_castps_si256(steps[0]), v), _mm256_add_epi32(_mm256_castps_si256(steps[1]), v)]
        }
    }

    #[inline(always)]
    fn counted(self, count: Self::I, steps: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe {
            [
                _mm256_sub_ps(_mm256_castsi256_ps(count[0]), steps[0]),
                _mm256_sub_ps(_mm256_castsi256_ps(count[1]), steps[1]),
            ]
        }
    }

    #[inline(always)]
    fn load_codes(self, v: &[u32; LANES]) -> Self::I {
        // SAFETY: the processor has the instructions; 2 * 32 bytes are readable.
        unsafe { [_mm256_loadu_si256(v.as_ptr().cast()), _mm256_loadu_si256(v.as_ptr().add(8).cast())] }
    }

    #[inline(always)]
    fn code_value(self, codes: Self::I, nibble: u32) -> Self::F {
        // SAFETY: the processor has the instructions; 32 bytes of the table are read.
        unsafe {
            let magnitudes = _mm256_loadu_ps(CODE_VALUES.as_ptr());
            let sign = _mm256_set1_epi32(i32::MIN);
            let shift = _mm256_set1_epi32((4 * nibble).cast_signed());
            let index = [_mm256_srlv_epi32(codes[0], shift), _mm256_srlv_epi32(codes[1], shift)];
            // The permutation looks at the lowest three bits of each index only; bit 3 is the sign.
            let signs = [
                _mm256_and_si256(_mm256_slli_epi32::<28>(index[0]), sign),
                _mm256_and_si256(_mm256_slli_epi32::<28>(index[1]), sign),
            ];
            [
                _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, index[0]), _mm256_castsi256_ps(signs[0])),
                _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, index[1]), _mm256_castsi256_ps(signs[1])),
            ]
        }
    }

    #[inline(always)]
    fn code_bytes(self, codes: Self::I, high: bool) -> Self::I {
        // SAFETY: the processor has the instructions; the table is 16 bytes.
        unsafe {
            let mask = _mm256_set1_epi8(0x0f);
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(CODE_BYTES.as_ptr().cast()));
            let nibbles =
                if high { [_mm256_srli_epi32::<4>(codes[0]), _mm256_srli_epi32::<4>(codes[1])] } else { codes };
            [
                _mm256_shuffle_epi8(table, _mm256_and_si256(nibbles[0], mask)),
                _mm256_shuffle_epi8(table, _mm256_and_si256(nibbles[1], mask)),
            ]
        }
    }

    #[inline(always)]
    fn splat_i32(self, v: i32) -> Self::I {
        // SAFETY: the processor has the instructions.
        unsafe { [_mm256_set1_epi32(v); 2] }
    }

    #[inline(always)]
    fn dot(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        // SAFETY: the processor has the instructions.
        unsafe {
            // Two products are at most 2 * 24 * 128, which does not saturate 16 bits.
            let pairs = [_mm256_maddubs_epi16(unsigned[0], signed[0]), _mm256_maddubs_epi16(unsigned[1], signed[1])];
            let ones = _mm256_set1_epi16(1);
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(pairs[0], ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(pairs[1], ones)),
            ]
        }
    }

    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        // SAFETY: the processor has the instructions.
        unsafe {
            // Two products of at most 128 * 127 do not saturate 16 bits; of 255 * 127 they would.
            let [low, high] = [_mm256_set1_epi8(0x7f), _mm256_set1_epi8(i8::MIN)];
            let ones = _mm256_set1_epi16(1);
            let mut sums = acc;
            // No closure or iterator: one that is not inlined is compiled without the instructions.
            for i in 0..2 {
                let low = _mm256_maddubs_epi16(_mm256_and_si256(unsigned[i], low), signed[i]);
                let high = _mm256_maddubs_epi16(_mm256_and_si256(unsigned[i], high), signed[i]);
                let both = _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
                sums[i] = _mm256_add_epi32(acc[i], both);
            }
            sums
        }
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // SAFETY: the processor has the instruction, which reads nothing that is not there.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
    }
}
