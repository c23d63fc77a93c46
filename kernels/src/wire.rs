//! Numbers as they travel between ranks: f32 (exact) or bf16 (fast), little endian.

use crate::Precision;
use crate::bf16;

/// Bytes of a number on the wire.
pub(crate) const fn bytes(precision: Precision) -> usize {
    match precision {
        Precision::Exact => 4,
        Precision::Fast => 2,
    }
}

/// Bytes of a dispatch record: `K` slots and `H` numbers.
pub(crate) const fn dispatch_record(precision: Precision, top_k: usize, hidden: usize) -> usize {
    top_k * 4 + hidden * bytes(precision)
}

/// Rounds numbers to the wire type.
#[inline(always)]
pub(crate) fn encode(precision: Precision, values: &[f32], out: &mut [u8]) {
    match precision {
        Precision::Exact => {
            for (v, o) in values.iter().zip(out.as_chunks_mut::<4>().0) {
                *o = v.to_le_bytes();
            }
        }
        Precision::Fast => {
            for (v, o) in values.iter().zip(out.as_chunks_mut::<2>().0) {
                *o = bf16::narrow(*v).to_le_bytes();
            }
        }
    }
}

/// Numbers from the wire.
#[inline(always)]
pub(crate) fn decode(precision: Precision, bytes: &[u8], out: &mut [f32]) {
    match precision {
        Precision::Exact => {
            for (b, o) in bytes.as_chunks::<4>().0.iter().zip(out) {
                *o = f32::from_le_bytes(*b);
            }
        }
        Precision::Fast => {
            for (b, o) in bytes.as_chunks::<2>().0.iter().zip(out) {
                *o = bf16::widen(u16::from_le_bytes(*b));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_keeps_every_bit_and_fast_rounds() {
        let values = [1.0, -0.0, 1.003_906_3, f32::MIN_POSITIVE, 3.4e38];
        for (precision, size) in [(Precision::Exact, 4), (Precision::Fast, 2)] {
            let mut wire = vec![0; values.len() * size];
            encode(precision, &values, &mut wire);
            let mut back = [0.0; 5];
            decode(precision, &wire, &mut back);
            let expected = values.map(|v| if size == 4 { v } else { bf16::widen(bf16::narrow(v)) });
            assert_eq!(back.map(f32::to_bits), expected.map(f32::to_bits));
        }
    }
}
