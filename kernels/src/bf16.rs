//! The upper half of an f32.

/// The f32 with the same value; exact.
#[inline(always)]
pub(crate) const fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The nearest bf16, the even one between two; NaN stays NaN.
#[inline(always)]
pub(crate) const fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return ((bits >> 16) | 0x40) as u16;
    }
    // Half a unit of the last place kept, less one bit if that place is even.
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The least bf16 that is not below `value`, a positive number; NaN and infinity stay what they are.
#[inline(always)]
pub(crate) const fn above(value: f32) -> u16 {
    let cut = narrow(value);
    if widen(cut) < value { cut + 1 } else { cut }
}

/// Numbers of a bf16 little endian tensor.
pub(crate) fn values(bytes: &[u8]) -> impl ExactSizeIterator<Item = f32> + '_ {
    bytes.as_chunks::<2>().0.iter().map(|&pair| widen(u16::from_le_bytes(pair)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrowing_takes_the_nearest_and_the_even_between_two() {
        for (bits, expected) in [
            (0x3f80_0000, 0x3f80),
            (0x3f80_7fff, 0x3f80),
            (0x3f80_8000, 0x3f80),
            (0x3f81_8000, 0x3f82),
            (0x3f80_8001, 0x3f81),
            (0x7f7f_ffff, 0x7f80),
            (0xff80_0000, 0xff80),
            (0x0000_8001, 0x0001),
        ] {
            assert_eq!(narrow(f32::from_bits(bits)), expected, "{bits:08x}");
        }
        assert!(widen(narrow(f32::from_bits(0x7f80_0001))).is_nan());
    }

    #[test]
    fn rounding_up_never_falls_below() {
        for (bits, expected) in
            [(0x3f80_0000, 0x3f80), (0x3f80_0001, 0x3f81), (0x3f80_ffff, 0x3f81), (0x7f80_0000, 0x7f80)]
        {
            assert_eq!(above(f32::from_bits(bits)), expected, "{bits:08x}");
        }
        assert!(widen(above(f32::NAN)).is_nan());
    }

    #[test]
    fn widening_is_undone_by_narrowing() {
        for bits in (0..=u16::MAX).filter(|&b| !widen(b).is_nan()) {
            assert_eq!(narrow(widen(bits)), bits);
        }
    }
}
