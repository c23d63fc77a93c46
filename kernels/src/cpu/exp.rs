//! `e^x` of our own, for the one of libm differs from machine to machine.
//!
//! Algorithm: `x = n ln 2 + r` with integer `n` and `|r| <= ln 2 / 2`; `e^r` by its series up to `r^7` (the rest
//! is below 6e-9); `n` added to the exponent's bits. Only additions, multiplications, fused multiply-adds and
//! bit operations, so a loop over it gives the same bits vectorised or not. Within 1.5 units of the last place.

/// `1.5 * 2^23`: adding it leaves the nearest integer in the lowest bits.
const MAGIC: f32 = 12_582_912.0;
/// `ln 2` rounded to f32.
const LN2_HIGH: f32 = f32::from_bits(0x3f31_7218);
/// What that misses.
const LN2_LOW: f32 = -1.904_654_3e-9;
/// `ln 2^-126`: results below the smallest normal number are zero.
const LEAST: f32 = -87.336_54;
/// `ln 2^128`: results beyond are infinite.
const MOST: f32 = 88.722_83;

/// `e^x`. NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = (1.0f32 / 5040.0).mul_add(r, 1.0 / 720.0);
    let p = p.mul_add(r, 1.0 / 120.0);
    let p = p.mul_add(r, 1.0 / 24.0);
    let p = p.mul_add(r, 1.0 / 6.0);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    // The bits of MAGIC below the ninth are zero, so the shift leaves `n` in the place of the exponent.
    let value = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < LEAST {
        0.0
    } else if x <= MOST {
        value
    } else {
        x + f32::INFINITY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_the_true_value() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -87.3 + 176.0 * (i as f32 / 2_000_000.0);
            let truth = f64::from(x).exp();
            let ulp = f64::from((truth as f32).next_up()) - f64::from(truth as f32);
            let error = ((f64::from(exp(x)) - truth) / ulp).abs();
            if error > worst {
                worst = error;
            }
        }
        assert!(worst < 1.5, "{worst} units of the last place");
    }

    #[test]
    fn the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(f32::MAX), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::from_bits(0x7fc0_01ff)).is_nan());
        assert!(exp(MOST).is_finite() && exp(MOST) > 3.3e38, "{}", exp(MOST));
        assert!(exp(LEAST) > 1.1e-38 && exp(LEAST) < 1.2e-38, "{}", exp(LEAST));
    }
}
