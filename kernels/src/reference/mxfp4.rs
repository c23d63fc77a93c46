//! The formats of expert weights and of their activations.

/// Columns of a block.
pub const BLOCK: usize = 32;

/// `blocks: [rows, cols / 32, 16]` and `scales: [rows, cols / 32]` to `[rows, cols]`. Byte `b` of a block holds
/// columns `2b` (low nibble) and `2b + 1`; a scale byte `s` means `2^(s - 127)`. In f64, where no value overflows.
//= OCP Microscaling Formats 1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0)
#[must_use]
pub fn decode(blocks: &[u8], scales: &[u8]) -> Vec<f64> {
    let nibbles = |&byte: &u8| [byte & 15, byte >> 4];
    let block = |(block, &scale): (&[u8], &u8)| -> Vec<f64> {
        let scale = (f64::from(scale) - 127.0).exp2();
        block.iter().flat_map(nibbles).map(|code| value(code) * scale).collect()
    };
    blocks.chunks_exact(BLOCK / 2).zip(scales).flat_map(block).collect()
}

/// One sign bit, two bits of exponent with bias 1, one bit of mantissa.
fn value(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
    let magnitude =
        if exponent == 0 { mantissa * 0.5 } else { (1.0 + mantissa * 0.5) * f64::from(exponent - 1).exp2() };
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// `x: [n]` as int8 sees it: each block of 32 is rounded to multiples of `max |x| / 127`, the even one of two.
#[must_use]
pub fn round_to_int8(x: &[f32]) -> Vec<f64> {
    let block = |block: &[f32]| -> Vec<f64> {
        let scale = block.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
        let round = |&x: &f32| if scale < f32::MIN_POSITIVE { 0.0 } else { f64::from((x / scale).round_ties_even()) };
        block.iter().map(|x| round(x) * f64::from(scale)).collect()
    };
    x.chunks(BLOCK).flat_map(block).collect()
}
