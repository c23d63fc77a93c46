//! Matrices that stay packed in MXFP4 and are decoded in registers.
//!
//! Layout: tiles of 16 output rows, `[tile][cols / 32]` blocks of four vectors of codes and one of scale bytes (in
//! an array of their own, so that codes stay on cache lines), the last tile padded. Dword `v` of row `r` holds
//! columns `8v..8v + 8`: nibble `2j` is column `8v + j`, nibble `2j + 1` is column `8v + 4 + j`. So the low nibbles
//! of its bytes are four neighbouring columns, the high nibbles the next four, as the int8 dot product wants them.
//!
//! Order of the sums, a lane being an output row:
//! - f32 operand: within a block `p`, from zero, one fused multiply-add of code value and `x` a column, ascending;
//!   then `sum = scale * p + sum`, fused, blocks ascending.
//! - int8 operand: the block's dot product is an exact integer `d`; then `sum = (scale * x_scale) * d + sum`, fused.

use super::dense::need;
use super::lanes::{CODE_OFFSET, LANES, Lanes};
use super::threads::Threads;
use crate::memory::{Aligned, Source};
use crate::{KernelError, bf16};

/// Columns of a block.
pub(super) const BLOCK: usize = 32;
/// Dwords of codes in a block of a row.
const DWORDS: usize = 4;
/// Bytes of codes that a thread reads before it gives their pages back.
const PIECE_BYTES: usize = 1 << 20;

/// The codes of a block of a tile.
type Codes = [[u32; LANES]; DWORDS];

/// A packed matrix with its bias.
#[derive(Debug)]
pub(super) struct Mxfp4 {
    rows: usize,
    cols: usize,
    /// `[tile][cols / 32][4][16]`
    codes: Aligned<u32>,
    /// `[tile][cols / 32][16]`
    scales: Aligned<u8>,
    /// `[tile * 16]`
    bias: Aligned<f32>,
}

impl Mxfp4 {
    /// Packs blocks `[rows, cols / 32, 16]` and scales `[rows, cols / 32]`.
    pub(super) fn pack(
        threads: &Threads,
        [rows, cols]: [usize; 2],
        [blocks, scales, bias]: [Source<'_>; 3],
        [blocks_name, scales_name, bias_name]: [&'static str; 3],
    ) -> Result<Self, KernelError> {
        let width = cols / BLOCK;
        need(blocks_name, blocks.bytes().len(), rows * width * 16)?;
        need(scales_name, scales.bytes().len(), rows * width)?;
        need(bias_name, bias.bytes().len(), rows * 2)?;
        let tiles = rows.div_ceil(LANES);
        let mut this = Self {
            rows,
            cols,
            codes: Aligned::zeroed(tiles * width * DWORDS * LANES),
            scales: Aligned::zeroed(tiles * width * LANES),
            bias: Aligned::zeroed(tiles * LANES),
        };
        for (out, value) in this.bias.iter_mut().zip(bf16::values(bias.bytes())) {
            *out = value;
        }
        let bad = pack_scales(scales.bytes(), width, &mut this.scales);
        let tile = width * DWORDS * LANES;
        let piece = (PIECE_BYTES / (4 * tile).max(1)).max(1);
        threads.each_chunk(&mut this.codes, piece * tile, usize::MAX, |i, out| {
            let first = i * piece * LANES;
            let last = rows.min(first + out.len() / (width * DWORDS));
            let source = blocks.slice(first * width * 16..last * width * 16).expect("the rows lie within the tensor");
            pack_codes(source.bytes(), width, out);
            source.release();
        });
        [blocks, scales, bias].iter().for_each(Source::release);
        match bad {
            Some(index) => Err(KernelError::Scale { what: scales_name, index }),
            None => Ok(this),
        }
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    pub(super) const fn cols(&self) -> usize {
        self.cols
    }

    /// Tiles of 16 rows.
    pub(super) fn tiles(&self) -> usize {
        self.bias.len() / LANES
    }

    /// The biases of a tile.
    #[inline(always)]
    pub(super) fn bias(&self, tile: usize) -> &[f32; LANES] {
        &self.bias.as_chunks().0[tile]
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.codes.bytes() + self.scales.bytes() + self.bias.bytes()
    }

    /// Codes and scales of a tile, `[cols / 32]`.
    #[inline(always)]
    fn tile(&self, tile: usize) -> (&[Codes], &[[u8; LANES]]) {
        let width = self.cols / BLOCK;
        let codes = self.codes[tile * width * DWORDS * LANES..(tile + 1) * width * DWORDS * LANES].as_chunks().0;
        (codes.as_chunks().0, self.scales[tile * width * LANES..(tile + 1) * width * LANES].as_chunks().0)
    }
}

/// Lays out the codes of whole tiles; `source` ends where the matrix ends.
fn pack_codes(source: &[u8], width: usize, out: &mut [u32]) {
    let dwords = source.as_chunks::<4>().0;
    for (row, dwords) in dwords.chunks_exact((width * DWORDS).max(1)).enumerate() {
        let tile = &mut out[row / LANES * width * DWORDS * LANES..];
        for (out, dword) in tile.as_chunks_mut::<LANES>().0.iter_mut().zip(dwords) {
            let columns = u32::from_le_bytes(*dword);
            out[row % LANES] = spread(columns & 0xffff) | spread(columns >> 16) << 4;
        }
    }
}

/// Four nibbles to the low nibbles of four bytes.
const fn spread(nibbles: u32) -> u32 {
    let pairs = (nibbles | nibbles << 8) & 0x00ff_00ff;
    (pairs | pairs << 4) & 0x0f0f_0f0f
}

/// Lays out scale bytes; returns the index of one that is no number.
fn pack_scales(source: &[u8], width: usize, out: &mut [u8]) -> Option<usize> {
    for (row, scales) in source.chunks_exact(width.max(1)).enumerate() {
        let tile = &mut out[row / LANES * width * LANES..];
        for (out, scale) in tile.as_chunks_mut::<LANES>().0.iter_mut().zip(scales) {
            out[row % LANES] = *scale;
        }
    }
    source.iter().position(|&scale| scale == u8::MAX)
}

/// 32 numbers rounded to int8: `x[c]` is about `2 * half_scale * q[c]`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Int8Block {
    /// `q`, four to a number, little endian.
    quads: [i32; 8],
    /// Half of `max |x| / 127`: codes are looked up as twice their value.
    half_scale: f32,
    /// `-12 * sum q`, which undoes the offset of the looked-up codes.
    correction: i32,
}

/// Numbers of a row as a matrix takes them.
pub(super) trait Operand: Copy + Default + Send + Sync {
    /// Columns that one element holds.
    const COLUMNS: usize;

    /// Makes elements of 32 numbers.
    fn from_block(x: &[f32; BLOCK], out: &mut [Self]);

    /// For each of `TILES` tiles from `tile` on and each row `x[t]`, the 16 dot products, without bias.
    fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
        l: L,
        matrix: &Mxfp4,
        tile: usize,
        x: [&[Self]; TOKENS],
    ) -> [[L::F; TOKENS]; TILES];
}

/// Exact: the numbers themselves.
impl Operand for f32 {
    const COLUMNS: usize = 1;

    #[inline(always)]
    fn from_block(x: &[f32; BLOCK], out: &mut [Self]) {
        out.copy_from_slice(x);
    }

    #[inline(always)]
    fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
        l: L,
        matrix: &Mxfp4,
        tile: usize,
        x: [&[Self]; TOKENS],
    ) -> [[L::F; TOKENS]; TILES] {
        let width = matrix.cols / BLOCK;
        let tiles: [_; TILES] = std::array::from_fn(|i| matrix.tile(tile + i));
        let x: [&[[f32; BLOCK]]; TOKENS] = x.map(|x| x.as_chunks().0);
        check_lengths(width, &tiles, &x);
        let mut sums = [[l.splat(0.0); TOKENS]; TILES];
        for b in 0..width {
            for i in 0..TILES {
                // SAFETY: every slice has `width` elements, checked above.
                let (codes, scales) = unsafe { (tiles[i].0.get_unchecked(b), tiles[i].1.get_unchecked(b)) };
                let mut products = [l.splat(0.0); TOKENS];
                for (v, codes) in codes.iter().enumerate() {
                    let codes = l.load_codes(codes);
                    for c in 0..8 {
                        let nibble = if c < 4 { 2 * c } else { 2 * (c - 4) + 1 };
                        let value = l.code_value(codes, nibble as u32);
                        for t in 0..TOKENS {
                            // SAFETY: as above.
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
        sums
    }
}

/// Fast: int8 a block.
impl Operand for Int8Block {
    const COLUMNS: usize = BLOCK;

    #[inline(always)]
    fn from_block(x: &[f32; BLOCK], out: &mut [Self]) {
        // As bits, so that NaN is the largest and not lost.
        let largest = f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)));
        let scale = largest / 127.0;
        let mut bytes = [0i8; BLOCK];
        // Too small to divide by: the block is as good as zero.
        if scale >= f32::MIN_POSITIVE {
            for (byte, x) in bytes.iter_mut().zip(x) {
                *byte = (x / scale).round_ties_even() as i8;
            }
        }
        let half_scale = if scale < f32::MIN_POSITIVE { 0.0 } else { scale * 0.5 };
        let quads = bytes.as_chunks::<4>().0;
        out[0] = Self {
            quads: std::array::from_fn(|i| i32::from_le_bytes(quads[i].map(i8::cast_unsigned))),
            half_scale,
            correction: -CODE_OFFSET * bytes.iter().map(|&q| i32::from(q)).sum::<i32>(),
        };
    }

    #[inline(always)]
    fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
        l: L,
        matrix: &Mxfp4,
        tile: usize,
        x: [&[Self]; TOKENS],
    ) -> [[L::F; TOKENS]; TILES] {
        let width = matrix.cols / BLOCK;
        let tiles: [_; TILES] = std::array::from_fn(|i| matrix.tile(tile + i));
        check_lengths(width, &tiles, &x);
        let mut sums = [[l.splat(0.0); TOKENS]; TILES];
        for b in 0..width {
            for i in 0..TILES {
                // SAFETY: every slice has `width` elements, checked above.
                let (codes, scales) = unsafe { (tiles[i].0.get_unchecked(b), tiles[i].1.get_unchecked(b)) };
                let mut bytes = [l.splat_i32(0); 2 * DWORDS];
                for v in 0..DWORDS {
                    let codes = l.load_codes(&codes[v]);
                    bytes[2 * v] = l.code_bytes(codes, false);
                    bytes[2 * v + 1] = l.code_bytes(codes, true);
                }
                let scale = l.scales(scales);
                for t in 0..TOKENS {
                    // SAFETY: as above.
                    let x = unsafe { x[t].get_unchecked(b) };
                    let mut dot = l.splat_i32(x.correction);
                    for (bytes, quad) in bytes.iter().zip(&x.quads) {
                        dot = l.dot(dot, *bytes, l.splat_i32(*quad));
                    }
                    let scale = l.mul(scale, l.splat(x.half_scale));
                    sums[i][t] = l.fma(scale, l.to_f32(dot), sums[i][t]);
                }
            }
        }
        sums
    }
}

/// Panics unless every slice has `width` elements.
#[inline(always)]
fn check_lengths<T>(width: usize, tiles: &[(&[Codes], &[[u8; LANES]])], x: &[&[T]]) {
    assert!(tiles.iter().all(|(codes, scales)| codes.len() == width && scales.len() == width), "whole tiles");
    assert!(x.iter().all(|x| x.len() == width), "whole rows");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(x: [f32; BLOCK]) -> Int8Block {
        let mut out = [Int8Block::default()];
        Int8Block::from_block(&x, &mut out);
        out[0]
    }

    fn bytes(block: &Int8Block) -> Vec<i8> {
        block.quads.iter().flat_map(|quad| quad.to_le_bytes().map(u8::cast_signed)).collect()
    }

    #[test]
    fn int8_takes_the_nearest_of_127_steps() {
        let mut x = [0.0; BLOCK];
        x[..6].copy_from_slice(&[254.0, -254.0, 3.0, 5.0, -1.0, 2.1]);
        let block = rounded(x);
        assert_eq!(bytes(&block)[..7], [127, -127, 2, 2, 0, 1, 0]);
        assert_eq!(block.half_scale, 1.0);
        assert_eq!(block.correction, -12 * 5);
    }

    #[test]
    fn int8_does_not_hide_what_is_no_number() {
        let mut x = [1.0; BLOCK];
        x[7] = f32::NAN;
        assert!(rounded(x).half_scale.is_nan());
        x[7] = f32::NEG_INFINITY;
        assert_eq!(rounded(x).half_scale, f32::INFINITY);
    }

    #[test]
    fn int8_takes_the_smallest_numbers_for_zero() {
        for tiny in [0.0, f32::from_bits(1), f32::MIN_POSITIVE] {
            let block = rounded([tiny; BLOCK]);
            assert_eq!((block.quads, block.half_scale, block.correction), ([0; 8], 0.0, 0));
        }
    }

    #[test]
    fn codes_are_laid_out_four_columns_to_the_low_nibbles() {
        // Column `c` holds code `c`, so the first dword's nibbles are its columns' numbers.
        let source = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut out = [0; DWORDS * LANES];
        pack_codes(&source, 1, &mut out);
        assert_eq!((out[0], out[LANES]), (0x7362_5140, 0xfbea_d9c8));
    }
}
