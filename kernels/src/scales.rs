//! Which block scales of MXFP4 weights a backend takes: one rule for all.

/// Bytes of a block's codes.
const BLOCK_BYTES: usize = 16;
/// The largest scale byte that is a number: `2^127`.
pub(crate) const LARGEST: u8 = 254;

/// The first of `scales` that is no number, or so large that a weight of its block (`blocks`: 16 bytes of codes each) is
/// beyond f32, as is twice `2^127`.
pub(crate) fn unusable(scales: &[u8], blocks: &[u8]) -> Option<usize> {
    // Many at once; which one it was is asked only then.
    if scales.iter().fold(0, |largest, &scale| scale.max(largest)) < LARGEST {
        return None;
    }
    let fits = |(&scale, codes): (&u8, &[u8; BLOCK_BYTES])| match scale {
        u8::MAX => false,
        // Codes from the fourth on are 2, 3, 4 and 6.
        LARGEST => codes.iter().all(|codes| codes & 0x44 == 0),
        _ => true,
    };
    scales.iter().zip(blocks.as_chunks().0).position(|pair| !fits(pair))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_a_number_of_f32() {
        let mut blocks = [0xb3; 3 * BLOCK_BYTES];
        assert_eq!(unusable(&[0, 254, 253], &blocks), None);
        assert_eq!(unusable(&[0, 254, 255], &blocks), Some(2));
        for codes in [0x40, 0x04, 0xc0, 0x07] {
            blocks[BLOCK_BYTES + 9] = codes;
            assert_eq!(unusable(&[253, 254, 7], &blocks), Some(1));
            assert_eq!(unusable(&[254, 253, 7], &blocks), None);
        }
    }
}
