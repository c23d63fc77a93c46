//! Lanes as one register of 512 bits.

use std::arch::x86_64::*;

use super::{CODE_BYTES, CODE_VALUES, HALF_WAY, Kernel, LANES, Lanes};

/// [`CODE_BYTES`] four times over.
const CODE_BYTES_4: [[u8; 16]; 4] = [CODE_BYTES; 4];

/// AVX-512 F, BW, DQ and VL; from [`VNNI`] on also VNNI, at [`VBMI`] also VBMI. A value exists only where
/// [`Avx512::detect`] found them: on this rests every `SAFETY: the processor has the instructions` below.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const LEVEL: u8>(());

/// The instructions that every AVX-512 has that is spoken of here.
pub(crate) const BASE: u8 = 0;
/// And the int8 dot product.
pub(crate) const VNNI: u8 = 1;
/// And tables of 64 bytes.
pub(crate) const VBMI: u8 = 2;

impl<const LEVEL: u8> Avx512<LEVEL> {
    /// `None` if the processor lacks an instruction.
    pub(crate) fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        let vnni = LEVEL < VNNI || is_x86_feature_detected!("avx512vnni");
        let vbmi = LEVEL < VBMI || is_x86_feature_detected!("avx512vbmi");
        (base && vnni && vbmi).then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run_base<K: Kernel>(lanes: Avx512<BASE>, kernel: K) -> K::Output {
    kernel.run(lanes)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
fn run_vnni<K: Kernel>(lanes: Avx512<VNNI>, kernel: K) -> K::Output {
    kernel.run(lanes)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma")]
fn run_vbmi<K: Kernel>(lanes: Avx512<VBMI>, kernel: K) -> K::Output {
    kernel.run(lanes)
}

impl<const LEVEL: u8> Lanes for Avx512<LEVEL> {
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the processor has the instructions.
        unsafe {
            match LEVEL {
                BASE => run_base(Avx512(()), kernel),
                VNNI => run_vnni(Avx512(()), kernel),
                _ => run_vbmi(Avx512(()), kernel),
            }
        }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { _mm512_set1_ps(v) }
    }

    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 64 bytes are readable.
        unsafe { _mm512_loadu_ps(v.as_ptr()) }
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 32 bytes are readable.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(v.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 32 bytes are readable.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(v.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        // SAFETY: the processor has the instructions; 64 bytes are writable.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn scales(self, bytes: &[u8; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 16 bytes are readable.
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            let normal = _mm512_slli_epi32::<23>(exponents);
            _mm512_castsi512_ps(_mm512_max_epi32(normal, _mm512_set1_epi32(0x0040_0000)))
        }
    }

    #[inline(always)]
    fn steps(self, bytes: &[u8; LANES]) -> Self::F {
        // SAFETY: the processor has the instructions; 16 bytes are readable.
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            let first = _mm512_set1_epi32((1 << 23) + HALF_WAY);
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32::<23>(exponents), first))
        }
    }

    #[inline(always)]
    fn count_from(self, steps: Self::F, v: i32) -> Self::I {
        // SAFETY: the processor has the instructions.
        unsafe { _mm512_add_epi32(_mm512_castps_si512(steps), _mm512_set1_epi32(v)) }
    }

    #[inline(always)]
    fn counted(self, count: Self::I, steps: Self::F) -> Self::F {
        // SAFETY: the processor has the instructions.
        unsafe { _mm512_sub_ps(_mm512_castsi512_ps(count), steps) }
    }

    #[inline(always)]
    fn load_codes(self, v: &[u32; LANES]) -> Self::I {
        // SAFETY: the processor has the instructions; 64 bytes are readable.
        unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
    }

    #[inline(always)]
    fn code_value(self, codes: Self::I, nibble: u32) -> Self::F {
        // SAFETY: the processor has the instructions; the table is 64 bytes.
        unsafe {
            // The permutation looks at the lowest four bits of each index only.
            let index = _mm512_srlv_epi32(codes, _mm512_set1_epi32((4 * nibble).cast_signed()));
            _mm512_permutexvar_ps(index, _mm512_loadu_ps(CODE_VALUES.as_ptr()))
        }
    }

    #[inline(always)]
    fn code_bytes(self, codes: Self::I, high: bool) -> Self::I {
        // SAFETY: the processor has the instructions; the tables are 16 and 64 bytes.
        unsafe {
            let nibbles = if high { _mm512_srli_epi32::<4>(codes) } else { codes };
            if LEVEL >= VBMI {
                // Looks at the lowest six bits of an index: of a table four times over, four of them count.
                return _mm512_permutexvar_epi8(nibbles, _mm512_loadu_si512(CODE_BYTES_4.as_ptr().cast()));
            }
            let index = _mm512_and_si512(nibbles, _mm512_set1_epi8(0x0f));
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(CODE_BYTES.as_ptr().cast()));
            _mm512_shuffle_epi8(table, index)
        }
    }

    #[inline(always)]
    fn splat_i32(self, v: i32) -> Self::I {
        // SAFETY: the processor has the instructions.
        unsafe { _mm512_set1_epi32(v) }
    }

    #[inline(always)]
    fn dot(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        // SAFETY: the processor has the instructions, VNNI where it is named.
        unsafe {
            if LEVEL >= VNNI {
                _mm512_dpbusd_epi32(acc, unsigned, signed)
            } else {
                // Two products are at most 2 * 24 * 128, which does not saturate 16 bits.
                let pairs = _mm512_maddubs_epi16(unsigned, signed);
                _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
            }
        }
    }

    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        // SAFETY: the processor has the instructions, VNNI where it is named.
        unsafe {
            if LEVEL >= VNNI {
                _mm512_dpbusd_epi32(acc, unsigned, signed)
            } else {
                // Two products of at most 128 * 127 do not saturate 16 bits; of 255 * 127 they would.
                let low = _mm512_maddubs_epi16(_mm512_and_si512(unsigned, _mm512_set1_epi8(0x7f)), signed);
                let high = _mm512_maddubs_epi16(_mm512_and_si512(unsigned, _mm512_set1_epi8(i8::MIN)), signed);
                let ones = _mm512_set1_epi16(1);
                let sum = _mm512_add_epi32(_mm512_madd_epi16(low, ones), _mm512_madd_epi16(high, ones));
                _mm512_add_epi32(acc, sum)
            }
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
        unsafe { _mm512_cvtepi32_ps(v) }
    }
}
