//! Products in int8: operands rounded to 127 steps per block of 32, and the order of the sums over them.
//!
//! A lane is an output row. A block's dot product is an exact integer `d`, whatever instructions compute it; then, for q8,
//! `sum = (scale * x_scale) * d + sum` and, for MXFP4, whose scales are powers of two, `sum = x_scale * (d * scale) + sum`,
//! fused, blocks ascending.

use std::ops::Range;

use super::lanes::{CODE_OFFSET, Lanes};
use super::tiles::{BLOCK, Cluster, Format, Tiles, blocks, cluster};

/// Byte vectors of a block: four columns each.
pub(super) const QUADS: usize = BLOCK / 4;

/// `1.5 * 2^23`: a number of up to `2^22` added to it is rounded to an integer.
const ROUNDING: f32 = 12_582_912.0;

/// Unsigned weights of [`super::q8`] are the signed ones plus this.
pub(super) const Q8_OFFSET: i32 = 128;

/// 32 numbers rounded to int8: `x[c]` is about `2 * half_scale * q[c]`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Int8Block {
    /// `q`, four to a number, little endian.
    quads: [i32; QUADS],
    /// Half of `max |x| / 127`: weights are held as twice their value.
    half_scale: f32,
    /// `-12 * sum q`, which undoes the offset of looked-up MXFP4 codes.
    code_correction: i32,
    /// `-128 * sum q`, which undoes the offset of q8 weights.
    q8_correction: i32,
    /// `2^22 * half_scale`, since [`Lanes::steps`] are so much smaller than scales. Infinite for numbers above `2^112`.
    step_scale: f32,
}

// As the memory plan has it.
const _: () = assert!(size_of::<Int8Block>() == 48);

impl Int8Block {
    pub(super) const fn half_scale(&self) -> f32 {
        self.half_scale
    }

    pub(super) const fn step_scale(&self) -> f32 {
        self.step_scale
    }

    pub(super) const fn code_correction(&self) -> i32 {
        self.code_correction
    }

    pub(super) const fn q8_correction(&self) -> i32 {
        self.q8_correction
    }
}

/// Numbers of a row as a matrix takes them.
pub(super) trait Operand: Copy + Default + Send + Sync {
    /// Columns that one element holds.
    const COLUMNS: usize;

    /// Makes elements of 32 numbers.
    fn from_block(x: &[f32; BLOCK], out: &mut [Self]);
}

/// Exact: the numbers themselves.
impl Operand for f32 {
    const COLUMNS: usize = 1;

    #[inline(always)]
    fn from_block(x: &[f32; BLOCK], out: &mut [Self]) {
        out.copy_from_slice(x);
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
        let mut bytes = [0u8; BLOCK];
        // Too small to divide by: the block is as good as zero.
        if scale >= f32::MIN_POSITIVE {
            for (byte, x) in bytes.iter_mut().zip(x) {
                // The sum is rounded to an integer, ties to even, whose lowest byte is that of the quotient. A cast would
                // be looked at for every byte whether it fits, one by one.
                *byte = (x / scale + ROUNDING).to_bits() as u8;
            }
        }
        let half_scale = if scale < f32::MIN_POSITIVE { 0.0 } else { scale * 0.5 };
        let quads = bytes.as_chunks::<4>().0;
        let sum = bytes.iter().map(|&q| i32::from(q.cast_signed())).sum::<i32>();
        out[0] = Self {
            quads: std::array::from_fn(|i| i32::from_le_bytes(quads[i])),
            half_scale,
            code_correction: -CODE_OFFSET * sum,
            q8_correction: -Q8_OFFSET * sum,
            step_scale: half_scale * (1 << 22) as f32,
        };
    }
}

/// A row as operands; the last block is filled up with zeros.
#[inline(always)]
pub(super) fn to_operand<O: Operand>(row: &[f32], out: &mut [O]) {
    let (whole, rest) = row.as_chunks::<BLOCK>();
    let mut out = out.chunks_mut(BLOCK / O::COLUMNS);
    for (x, out) in whole.iter().zip(&mut out) {
        O::from_block(x, out);
    }
    if let (false, Some(out)) = (rest.is_empty(), out.next()) {
        let mut x = [0.0; BLOCK];
        x[..rest.len()].copy_from_slice(rest);
        O::from_block(&x, out);
    }
}

/// A matrix of this format times rows of `O`.
pub(super) trait Multiply<O>: Format {
    /// Whether a block of weights is held in registers while rows pass by, so that one tile at a time fills them.
    const UNPACKED: bool;

    /// For each of `TILES` tiles from `tile` on and each row `x[t]`, the 16 dot products, without bias.
    fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
        l: L,
        matrix: &Tiles<Self>,
        tile: usize,
        x: [&[O]; TOKENS],
    ) -> [[L::F; TOKENS]; TILES];
}

/// Work on rows that is done for several at once.
pub(super) trait ByRows {
    /// Rows `at..at + N`.
    fn rows<L: Lanes, const N: usize>(&self, l: L, at: usize);

    /// Rows `range`, as many at once as there are registers for; the last few together.
    #[inline(always)]
    fn all_rows<L: Lanes>(&self, l: L, range: Range<usize>) {
        let mut at = range.start;
        while L::WIDE && at + 8 <= range.end {
            self.rows::<L, 8>(l, at);
            at += 8;
        }
        // More than four would not fit the registers of the narrow.
        while !L::WIDE && at + 4 <= range.end {
            self.rows::<L, 4>(l, at);
            at += 4;
        }
        match range.end - at {
            7 if L::WIDE => self.rows::<L, 7>(l, at),
            6 if L::WIDE => self.rows::<L, 6>(l, at),
            5 if L::WIDE => self.rows::<L, 5>(l, at),
            4 => self.rows::<L, 4>(l, at),
            3 => self.rows::<L, 3>(l, at),
            2 => self.rows::<L, 2>(l, at),
            1 => self.rows::<L, 1>(l, at),
            _ => {}
        }
    }
}

/// A format whose weights are, or become, unsigned bytes.
pub(super) trait Bytes: Format {
    /// Unsigned bytes of a block: vector `v` holds columns `4v..4v + 4` of each row.
    fn bytes<L: Lanes>(l: L, codes: &Self::Codes) -> [L::I; QUADS];
    /// What of a block's scales is needed for each row of `x`.
    fn scales<L: Lanes>(l: L, scales: &Self::Scales) -> L::F;
    /// What a block's dot product begins with: the offset that made the bytes unsigned is undone.
    fn begin<L: Lanes>(l: L, scales: L::F, x: &Int8Block) -> L::I;
    /// `acc +` the products of four of these bytes and four signed bytes.
    fn dot<L: Lanes>(l: L, acc: L::I, bytes: L::I, x: L::I) -> L::I;
    /// `sum +` what a block's dot product amounts to.
    fn end<L: Lanes>(l: L, dot: L::I, scales: L::F, x: &Int8Block, sum: L::F) -> L::F;
}

impl<F: Bytes> Multiply<Int8Block> for F {
    const UNPACKED: bool = true;

    #[inline(always)]
    fn sums<L: Lanes, const TILES: usize, const TOKENS: usize>(
        l: L,
        matrix: &Tiles<Self>,
        tile: usize,
        x: [&[Int8Block]; TOKENS],
    ) -> [[L::F; TOKENS]; TILES] {
        let width = blocks(matrix.cols());
        let tiles = matrix.some::<TILES>(tile);
        tiles.iter().for_each(|tile| tile.check(width));
        assert!(x.iter().all(|x| x.len() == width), "whole rows");
        let mut sums = [[l.splat(0.0); TOKENS]; TILES];
        for first in (0..width).step_by(cluster::<F>()) {
            // SAFETY: every tile has `width` blocks, checked above.
            let weights: [_; TILES] = std::array::from_fn(|i| unsafe { tiles[i].cluster(l, first, TOKENS) });
            if first + cluster::<F>() <= width {
                // A number of blocks that the compiler knows, so that nothing is left of the loop.
                for i in 0..cluster::<F>() {
                    // SAFETY: so many blocks are there, of weights and of every row.
                    unsafe { add_block(l, &weights, i, x, first + i, &mut sums) };
                }
            } else {
                for i in 0..width - first {
                    // SAFETY: as above.
                    unsafe { add_block(l, &weights, i, x, first + i, &mut sums) };
                }
            }
        }
        sums
    }
}

/// Adds the products of block `i` of a cluster, which is block `b` of the rows.
///
/// # Safety
/// The clusters have this block, and the rows too.
#[inline(always)]
unsafe fn add_block<F: Bytes, L: Lanes, const TILES: usize, const TOKENS: usize>(
    l: L,
    weights: &[Cluster<'_, F>; TILES],
    i: usize,
    x: [&[Int8Block]; TOKENS],
    b: usize,
    sums: &mut [[L::F; TOKENS]; TILES],
) {
    for (weights, sums) in weights.iter().zip(sums) {
        // SAFETY: by the caller's promise.
        let (codes, scales) = unsafe { weights.block(i) };
        let bytes = F::bytes(l, codes);
        let scales = F::scales(l, scales);
        for t in 0..TOKENS {
            // SAFETY: by the caller's promise.
            let x = unsafe { x[t].get_unchecked(b) };
            let mut dot = F::begin(l, scales, x);
            for (bytes, quad) in bytes.iter().zip(&x.quads) {
                dot = F::dot(l, dot, *bytes, l.splat_i32(*quad));
            }
            sums[t] = F::end(l, dot, scales, x, sums[t]);
        }
    }
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
        assert_eq!((block.code_correction, block.q8_correction), (-12 * 5, -128 * 5));
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
            assert_eq!((block.quads, block.half_scale, block.code_correction), ([0; 8], 0.0, 0));
        }
    }
}
