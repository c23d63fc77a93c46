//! Matrices that stay packed in MXFP4 and are decoded in registers.
//!
//! A block of a tile is four vectors of codes and one of scale bytes. Dword `v` of row `r` holds columns `8v..8v + 8`:
//! nibble `2j` is column `8v + j`, nibble `2j + 1` is column `8v + 4 + j`. So the low nibbles of its bytes are four
//! neighbouring columns, the high nibbles the next four, as the int8 dot product wants them.
//!
//! A scale byte of 254, which [`Lanes::steps`] does not reach, becomes 253 and its codes twice what they were: those that have
//! no double make numbers that f32 does not have.
//!
//! Order of the sums with an f32 operand, a lane being an output row: within a block `p`, from zero, one fused
//! multiply-add of code value and `x` a column, ascending; then `sum = scale * p + sum`, fused, blocks ascending.

use super::dense::need;
use super::int8::{Bytes, Int8Block, Multiply, QUADS};
use super::lanes::{LANES, Lanes};
use super::tiles::{self, BLOCK, Format, Part, Tiles, blocks, cluster};
use crate::KernelError;
use crate::memory::Source;
use crate::threads::Threads;

/// The largest scale byte that stands for a number.
const LARGEST: u8 = 254;
/// The code of twice the value of each, or 16 where there is none.
const DOUBLED: [u8; 16] = [0, 2, 4, 5, 6, 7, 16, 16, 8, 10, 12, 13, 14, 15, 16, 16];
/// Dwords of codes in a block of a row.
const DWORDS: usize = 4;

/// The format of the experts.
#[derive(Debug)]
pub(super) struct Mxfp4;

impl Format for Mxfp4 {
    type Codes = [[u32; LANES]; DWORDS];
    type Scales = [u8; LANES];
    const QUICK: usize = 1;
}

/// Packs blocks `[rows, cols / 32, 16]` and scales `[rows, cols / 32]`.
pub(super) fn pack(
    threads: &Threads,
    [rows, cols]: [usize; 2],
    [blocks, scales, bias]: [Source<'_>; 3],
    [blocks_name, scales_name, bias_name]: [&'static str; 3],
    out: &mut [u8],
) -> Result<(), KernelError> {
    let width = cols / BLOCK;
    need(blocks_name, blocks.bytes().len(), rows * width * 16)?;
    need(scales_name, scales.bytes().len(), rows * width)?;
    need(bias_name, bias.bytes().len(), rows * 2)?;
    let fits = |(&scale, codes): (&u8, &[u8; BLOCK / 2])| match scale {
        u8::MAX => false,
        LARGEST => {
            codes.iter().all(|codes| [codes & 0x0f, codes >> 4].into_iter().all(|code| DOUBLED[code as usize] < 16))
        }
        _ => true,
    };
    let (all_scales, all_codes) = (scales.bytes(), blocks.bytes().as_chunks().0);
    if let Some(index) = all_scales.iter().zip(all_codes).position(|pair| !fits(pair)) {
        return Err(KernelError::Scale { what: scales_name, index });
    }
    let part = Part { first: 0, rows, weights: blocks, bias: Some(bias) };
    tiles::pack::<Mxfp4>(threads, cols, &[part], out, BLOCK / 2, |[row, b], bytes, codes, scale, lane| {
        let largest = scales.bytes()[row * width + b] == LARGEST;
        for (out, dword) in codes.iter_mut().zip(bytes.as_chunks::<4>().0) {
            let columns = u32::from_le_bytes(if largest { dword.map(doubled) } else { *dword });
            out[lane] = spread(columns & 0xffff) | spread(columns >> 16) << 4;
        }
        scale[lane] = scales.bytes()[row * width + b].min(LARGEST - 1);
    })?;
    scales.release();
    Ok(())
}

/// Two codes of twice the value each.
const fn doubled(codes: u8) -> u8 {
    DOUBLED[(codes & 0x0f) as usize] | DOUBLED[(codes >> 4) as usize] << 4
}

/// Four nibbles to the low nibbles of four bytes.
const fn spread(nibbles: u32) -> u32 {
    let pairs = (nibbles | nibbles << 8) & 0x00ff_00ff;
    (pairs | pairs << 4) & 0x0f0f_0f0f
}

impl Multiply<f32> for Mxfp4 {
    const UNPACKED: bool = false;

    #[inline(always)]
    fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
        l: L,
        matrix: &Tiles<Self>,
        tile: usize,
        x: [&[f32]; TOKENS],
    ) -> [[L::F; TOKENS]; TILES] {
        let width = blocks(matrix.cols());
        let tiles = matrix.some::<TILES>(tile);
        tiles.iter().for_each(|tile| tile.check(width));
        let x: [&[[f32; BLOCK]]; TOKENS] = x.map(|x| x.as_chunks().0);
        assert!(x.iter().all(|x| x.len() == width), "whole rows");
        let mut sums = [[l.splat(0.0); TOKENS]; TILES];
        for first in (0..width).step_by(cluster::<Self>()) {
            // SAFETY: every tile has `width` blocks, checked above.
            let weights: [_; TILES] = std::array::from_fn(|i| unsafe { tiles[i].cluster(l, first, TOKENS) });
            for b in first..width.min(first + cluster::<Self>()) {
                for i in 0..TILES {
                    // SAFETY: as above.
                    let (codes, scales) = unsafe { weights[i].block(b - first) };
                    let mut products = [l.splat(0.0); TOKENS];
                    for (v, codes) in codes.iter().enumerate() {
                        let codes = l.load_codes(codes);
                        for c in 0..8 {
                            let nibble = if c < 4 { 2 * c } else { 2 * (c - 4) + 1 };
                            let value = l.code_value(codes, nibble as u32);
                            for t in 0..TOKENS {
                                // SAFETY: every row has `width` blocks, checked above.
                                let x = unsafe { x[t].get_unchecked(b) };
                                products[t] = l.fma(value, l.splat(x[8 * v + c]), products[t]);
                            }
                        }
                    }
                    let scale = l.scales(scales);
                    for t in 0..TOKENS {
                        sums[i][t] = l.fma(scale, products[t], sums[i][t]);
                    }
                }
            }
        }
        sums
    }
}

impl Bytes for Mxfp4 {
    #[inline(always)]
    fn bytes<L: Lanes>(l: L, codes: &Self::Codes) -> [L::I; QUADS] {
        let mut bytes = [l.splat_i32(0); QUADS];
        for v in 0..DWORDS {
            let codes = l.load_codes(&codes[v]);
            bytes[2 * v] = l.code_bytes(codes, false);
            bytes[2 * v + 1] = l.code_bytes(codes, true);
        }
        bytes
    }

    #[inline(always)]
    fn scales<L: Lanes>(l: L, scales: &Self::Scales) -> L::F {
        l.steps(scales)
    }

    #[inline(always)]
    fn dot<L: Lanes>(l: L, acc: L::I, bytes: L::I, x: L::I) -> L::I {
        l.dot(acc, bytes, x)
    }

    #[inline(always)]
    fn begin<L: Lanes>(l: L, steps: L::F, x: &Int8Block) -> L::I {
        l.count_from(steps, x.code_correction())
    }

    #[inline(always)]
    fn end<L: Lanes>(l: L, count: L::I, steps: L::F, x: &Int8Block, sum: L::F) -> L::F {
        l.fma(l.counted(count, steps), l.splat(x.step_scale()), sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_laid_out_four_columns_to_the_low_nibbles() {
        // Column `c` holds code `c`, so the first dword's nibbles are its columns' numbers.
        let blocks = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0];
        let sources = [&blocks[..], &[7], &[0x80, 0x3f]].map(Source::memory);
        let packed = crate::memory::Packed::filled(Tiles::<Mxfp4>::bytes_of(1, 32), |out| {
            pack(&Threads::new(1, None).unwrap(), [1, 32], sources, ["blocks", "scales", "bias"], out)
        });
        let packed = packed.unwrap();
        let dword = |i: usize| u32::from_le_bytes(packed[i..i + 4].try_into().unwrap());
        assert_eq!((packed[0], dword(64), dword(128)), (7, 0x7362_5140, 0xfbea_d9c8));
        assert_eq!(dword(320), 1f32.to_bits());
    }
}
