//! Weights as the kernels read them: pure functions from a checkpoint's bytes to a device's.
//!
//! A packed matrix or expert is one byte string whose length follows from the shape, so that it can be kept in a file and
//! copied to a device as it is.
//! Layouts are stated at the heads of `csrc/dense.cu` and `csrc/experts.cu`.

use std::ops::Range;

use crate::cpu::need;
use crate::memory::Source;
use crate::{ExpertShape, ExpertSource, KernelError, Stack, bf16};

/// Changes whenever packed bytes change.
pub(super) const LAYOUT: u32 = 3;

/// Rows of a tile, and columns of a tile of a dense matrix.
const TILE: usize = 16;
/// Columns of an MXFP4 block.
const BLOCK: usize = 32;
/// Sections begin at multiples of this.
const ALIGNMENT: usize = 16;

/// Where the parts of a packed dense matrix `[rows, cols]` lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DenseLayout {
    /// bf16 `[row tiles, column tiles, 32 lanes, 8]`
    pub(super) weights: Range<usize>,
    /// f32 `[row tiles * 16]`
    pub(super) bias: Range<usize>,
}

impl DenseLayout {
    pub(super) const fn new(rows: usize, cols: usize) -> Self {
        let weights = rows.div_ceil(TILE) * cols.div_ceil(TILE) * TILE * TILE * 2;
        let bias = rows.div_ceil(TILE) * TILE * 4;
        Self { weights: 0..weights, bias: weights..weights + bias }
    }
}

/// Bytes of a packed matrix `[rows, cols]`.
pub(super) const fn dense_bytes(rows: usize, cols: usize) -> usize {
    DenseLayout::new(rows, cols).bias.end
}

/// Packs matrices `[rows, cols]`, one under the other, into all of `out`.
pub(super) fn pack_dense(cols: usize, stack: &[Stack<'_>], out: &mut [u8]) -> Result<(), KernelError> {
    let rows = stack.iter().map(|matrix| matrix.rows(cols)).sum::<Result<_, _>>()?;
    let layout = DenseLayout::new(rows, cols);
    need("the room for a packed matrix", out.len(), layout.bias.end)?;
    out.fill(0);
    let (weights, biases) = out.split_at_mut(layout.bias.start);
    let mut row = 0;
    for matrix in stack {
        let source = matrix.weight.bytes();
        let here = source.len().checked_div(2 * cols).unwrap_or(0);
        for (i, values) in source.chunks_exact((cols * 2).max(1)).enumerate() {
            for (column, value) in values.as_chunks::<2>().0.iter().enumerate() {
                let at = dense_element(cols, row + i, column);
                weights[at * 2..at * 2 + 2].copy_from_slice(value);
            }
        }
        if let Some(bias) = matrix.bias {
            for (i, value) in bf16::values(bias.bytes()).enumerate() {
                biases[(row + i) * 4..(row + i + 1) * 4].copy_from_slice(&value.to_le_bytes());
            }
            bias.release();
        }
        matrix.weight.release();
        row += here;
    }
    Ok(())
}

/// Place of a number among a packed matrix's: lane `4g + t` of a tile holds rows `g` and `g + 8`, columns `2t`,
/// `2t + 1`, `2t + 8` and `2t + 9`, as mma's registers do.
const fn dense_element(cols: usize, row: usize, column: usize) -> usize {
    let tile = row / TILE * cols.div_ceil(TILE) + column / TILE;
    let (r, k) = (row % TILE, column % TILE);
    let lane = r % 8 * 4 + k % 8 / 2;
    let register = r / 8 + 2 * (k / 8);
    tile * TILE * TILE + lane * 8 + register * 2 + k % 2
}

/// Where the parts of a packed expert lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExpertLayout {
    pub(super) gate_up: MatrixLayout,
    pub(super) down: MatrixLayout,
    /// Bytes in all.
    pub(super) bytes: usize,
}

/// Where the parts of a packed MXFP4 matrix lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MatrixLayout {
    /// `[row tiles, blocks, 32 lanes, 2]` words of sixteen codes
    pub(super) codes: Range<usize>,
    /// `[row tiles, blocks, 8, 2]`: rows `g` and `g + 8` beside each other
    pub(super) scales: Range<usize>,
    /// f32 `[row tiles * 16]`
    pub(super) bias: Range<usize>,
}

impl MatrixLayout {
    fn new(start: usize, rows: usize, cols: usize) -> Self {
        let codes = start..start + rows * cols / 2;
        let scales = codes.end..(codes.end + rows * cols / BLOCK).next_multiple_of(ALIGNMENT);
        let bias = scales.end..(scales.end + rows * 4).next_multiple_of(ALIGNMENT);
        Self { codes, scales, bias }
    }
}

impl ExpertLayout {
    pub(super) fn new(shape: ExpertShape) -> Self {
        let gate_up = MatrixLayout::new(0, 2 * shape.intermediate, shape.hidden);
        let down = MatrixLayout::new(gate_up.bias.end, shape.hidden, shape.intermediate);
        let bytes = down.bias.end;
        Self { gate_up, down, bytes }
    }
}

/// Packs an expert into all of `out`.
pub(super) fn pack_expert(shape: ExpertShape, source: &ExpertSource<'_>, out: &mut [u8]) -> Result<(), KernelError> {
    let ExpertShape { hidden, intermediate, .. } = shape;
    need("the width of an expert's input", hidden % BLOCK, 0)?;
    need("the width of an expert", intermediate % BLOCK, 0)?;
    let layout = ExpertLayout::new(shape);
    need("the room for a packed expert", out.len(), layout.bytes)?;
    out.fill(0);
    // Tiles of eight activations: their gates and then their ups.
    let gate_up_row = |row: usize| row / 16 * 16 + row % 2 * 8 + row % 16 / 2;
    pack_matrix(
        [2 * intermediate, hidden],
        [source.gate_up_blocks, source.gate_up_scales, source.gate_up_bias],
        ["gate_up_proj_blocks of an expert", "gate_up_proj_scales of an expert", "gate_up_proj_bias of an expert"],
        gate_up_row,
        &layout.gate_up,
        out,
    )?;
    pack_matrix(
        [hidden, intermediate],
        [source.down_blocks, source.down_scales, source.down_bias],
        ["down_proj_blocks of an expert", "down_proj_scales of an expert", "down_proj_bias of an expert"],
        |row| row,
        &layout.down,
        out,
    )
}

fn pack_matrix(
    [rows, cols]: [usize; 2],
    [blocks, scales, bias]: [Source<'_>; 3],
    [blocks_name, scales_name, bias_name]: [&'static str; 3],
    place: impl Fn(usize) -> usize,
    layout: &MatrixLayout,
    out: &mut [u8],
) -> Result<(), KernelError> {
    let width = cols / BLOCK;
    need(blocks_name, blocks.bytes().len(), rows * width * 16)?;
    need(scales_name, scales.bytes().len(), rows * width)?;
    need(bias_name, bias.bytes().len(), rows * 2)?;
    if let Some(index) = scales.bytes().iter().position(|&scale| scale == u8::MAX) {
        return Err(KernelError::Scale { what: scales_name, index });
    }
    for (row, codes) in blocks.bytes().chunks_exact((width * 16).max(1)).enumerate() {
        let row = place(row);
        for (block, codes) in codes.as_chunks::<16>().0.iter().enumerate() {
            for lane in 0..4 {
                // Columns 2t, 2t + 1 and 2t + 8, 2t + 9 of a half are its bytes t and t + 4.
                let pairs = [0, 1].map(|half| [codes[half * 8 + lane], codes[half * 8 + lane + 4]]);
                let at = layout.codes.start + ((row / TILE * width + block) * 32 + row % 8 * 4 + lane) * 8;
                let words = &mut out[at..at + 8];
                let bits = u64::from_le_bytes(words.try_into().expect("eight bytes"));
                words.copy_from_slice(&(bits | spread(row % TILE / 8, pairs)).to_le_bytes());
            }
        }
    }
    for (row, bytes) in scales.bytes().chunks_exact(width.max(1)).enumerate() {
        let row = place(row);
        for (block, &scale) in bytes.iter().enumerate() {
            out[layout.scales.start + (row / TILE * width + block) * TILE + row % 8 * 2 + row % TILE / 8] = scale;
        }
    }
    for (row, value) in bf16::values(bias.bytes()).enumerate() {
        let at = layout.bias.start + place(row) * 4;
        out[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    [blocks, scales, bias].iter().for_each(Source::release);
    Ok(())
}

/// Bits by which a word is turned to the right for registers 0 to 3 of each half.
const TURNS: [[u32; 4]; 2] = [[0, 4, 10, 8], [2, 6, 12, 14]];
/// What the fourth registers take from the left word; the rest is the right one's.
const LEFT_OF_BOTH: u32 = 0x6030_6030;

/// The codes of a row in a lane's two words, the left one below: of each half registers `row` and `row + 2`, two elements
/// each (low nibble first). A word, turned, has an element's sign and magnitude where a bf16 has its sign and its lowest
/// exponent and highest fraction bits, element 1 in the upper half.
fn spread(row: usize, pairs: [[u8; 2]; 2]) -> u64 {
    let mut words = 0;
    for (half, pairs) in pairs.into_iter().enumerate() {
        for (register, pair) in [row, row + 2].into_iter().zip(pairs) {
            for element in 0..2 {
                let code = u32::from(pair) >> (4 * element) & 15;
                let bits = (code >> 3 << 15 | (code & 7) << 6) << (16 * element);
                let bits = bits.rotate_left(TURNS[half][register]);
                let [left, right] = match (register, half) {
                    (3, _) => [bits & LEFT_OF_BOTH, bits & !LEFT_OF_BOTH],
                    (_, 0) => [bits, 0],
                    _ => [0, bits],
                };
                words |= u64::from(left) | u64::from(right) << 32;
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_tile_is_laid_out_as_mma_reads_it() {
        // Lane 4g + t: rows g and g + 8, columns 2t, 2t + 1, then the same rows at 2t + 8.
        assert_eq!(dense_element(32, 0, 0), 0);
        assert_eq!(dense_element(32, 0, 1), 1);
        assert_eq!(dense_element(32, 8, 0), 2);
        assert_eq!(dense_element(32, 0, 8), 4);
        assert_eq!(dense_element(32, 8, 9), 7);
        assert_eq!(dense_element(32, 0, 2), 8);
        assert_eq!(dense_element(32, 1, 0), 32);
        assert_eq!(dense_element(32, 0, 16), 256);
        assert_eq!(dense_element(32, 16, 0), 512);
    }

    #[test]
    fn every_number_has_a_place_of_its_own() {
        for (rows, cols) in [(16, 16), (5, 18), (40, 33)] {
            let mut places: Vec<usize> = (0..rows * cols).map(|i| dense_element(cols, i / cols, i % cols)).collect();
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), rows * cols);
            assert!(places.iter().all(|at| at * 2 < DenseLayout::new(rows, cols).weights.end));
        }
    }

    #[test]
    fn codes_of_a_lane_lie_as_the_kernel_reads_them() {
        // Row g: codes 1 and 10 (magnitude 2, negative) in register 0 of the left half, as they are; 3 and 4 in register 2,
        // whose elements lie in the other half of the word, six bits down.
        let left = 1 << 6 | (1 << 15 | 2 << 6) << 16 | 3 << 16 | 4;
        assert_eq!(spread(0, [[0xa1, 0x43], [0, 0]]), left);
        // Row g + 8: code 15 in register 3 of the right half, of which one bit alone is in the right word.
        assert_eq!(spread(1, [[0, 0], [0, 0x0f]]), 1 << 29 | 3 << 20 | 1 << 22 << 32);
    }

    #[test]
    fn codes_of_two_words_do_not_overlap() {
        let words = [0, 1].map(|row| spread(row, [[0xff; 2]; 2]));
        assert_eq!((words[0] & words[1], words[0] | words[1]), (0, u64::MAX));
    }

    #[test]
    fn parts_of_an_expert_do_not_overlap() {
        let layout = ExpertLayout::new(ExpertShape { hidden: 96, intermediate: 32, limit: 7.0 });
        let (gate_up, down) = (&layout.gate_up, &layout.down);
        let parts = [&gate_up.codes, &gate_up.scales, &gate_up.bias, &down.codes, &down.scales, &down.bias];
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start && pair[0].start < pair[0].end));
        assert!(parts.iter().all(|part| part.start % ALIGNMENT == 0));
        assert_eq!(layout.bytes, 64 * (3 * 17 + 4) + 96 * (17 + 4));
    }
}
