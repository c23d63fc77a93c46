//! f16 as keys and values are kept in: they need precision more than range.

use half::f16;

/// The nearest f16, the even one of two; what is finite stays finite.
pub(crate) fn narrow(value: f32) -> u16 {
    let largest = f16::MAX.to_f32();
    let value = if value.is_finite() { value.clamp(-largest, largest) } else { value };
    f16::from_f32(value).to_bits()
}

/// Exact.
pub(crate) fn widen(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_finite_stays_finite_and_the_nearest_is_kept() {
        for (value, kept) in [
            (1.0 + 1.0 / 2048.0, 1.0),
            (1.0 + 3.0 / 2048.0, 1.0 + 2.0 / 1024.0),
            (-65_520.0, -65_504.0),
            (1e30, 65_504.0),
            (3e-8, 5.960_464_5e-8),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(widen(narrow(value)), kept, "{value}");
        }
        assert!(widen(narrow(f32::NAN)).is_nan());
    }
}
