//! Randomness as a function of where it is used: no state, so a step can be repeated.

/// A number in `[0, 1)` with 53 bits, a function of the request's seed, the choice and the token's position.
///
/// Each argument is folded in by one round of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64 bits.
#[must_use]
pub fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    let key = split_mix(split_mix(seed) ^ u64::from(choice));
    (split_mix(key ^ u64::from(position)) >> 11) as f64 / (1u64 << 53) as f64
}

/// One step of SplitMix64.
const fn split_mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // The first outputs of the published generator from seed 0 and 1234567.
        assert_eq!(split_mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(split_mix(1_234_567), 6_457_827_717_110_365_317);
    }

    #[test]
    fn every_argument_matters_and_the_mean_is_a_half() {
        let mean = (0..4096).map(|i| uniform(7, 0, i)).sum::<f64>() / 4096.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        let u = uniform(1, 2, 3);
        assert!(u != uniform(2, 2, 3) && u != uniform(1, 3, 3) && u != uniform(1, 2, 4) && u != uniform(1, 3, 2));
    }
}
