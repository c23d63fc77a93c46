//! Weights as the kernels read them: pure functions from a checkpoint's bytes to a device's.
//!
//! A packed matrix or expert is one byte string whose length follows from the shape, so that it can be kept in a file and
//! copied to a device as it is.
//! Layouts are stated at the heads of `csrc/dense.cu` and `csrc/experts.cu`.

use std::ops::Range;

use crate::cpu::need;
use crate::memory::Source;
use crate::threads::Threads;
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
pub(super) fn pack_dense(
    threads: &Threads,
    cols: usize,
    stack: &[Stack<'_>],
    out: &mut [u8],
) -> Result<(), KernelError> {
    let count = stack.iter().map(|matrix| matrix.rows(cols)).sum::<Result<usize, _>>()?;
    let layout = DenseLayout::new(count, cols);
    need("the room for a packed matrix", out.len(), layout.bias.end)?;
    let (weights, biases) = out.split_at_mut(layout.bias.start);
    let mut rows = Vec::with_capacity(count);
    biases.fill(0);
    for matrix in stack {
        if let Some(bias) = matrix.bias {
            put(bf16::values(bias.bytes()), &mut biases[rows.len() * 4..]);
        }
        rows.extend(matrix.weight.bytes().chunks_exact((cols * 2).max(1)));
    }
    let tile_bytes = cols.div_ceil(TILE) * TILE * TILE * 2;
    threads.each_chunk(weights, tile_bytes, count.saturating_mul(cols), |tile, out| {
        let rows = &rows[tile * TILE..];
        pack_dense_rows(&rows[..rows.len().min(TILE)], out);
    });
    for matrix in stack {
        matrix.weight.release();
        matrix.bias.iter().for_each(Source::release);
    }
    Ok(())
}

/// Packs rows, a tile's at most, into the tiles `[column tiles, 32 lanes, 8]` of a dense matrix: lane `4g + t` holds rows
/// `g` and `g + 8`, columns `2t`, `2t + 1`, `2t + 8` and `2t + 9`, as mma's registers do.
fn pack_dense_rows(rows: &[&[u8]], out: &mut [u8]) {
    /// Two neighbouring numbers.
    const PAIR: usize = 4;
    const ROW: usize = TILE * 2;
    for (column, tile) in out.as_chunks_mut::<{ TILE * ROW }>().0.iter_mut().enumerate() {
        let of_row = |row: usize| {
            let values = rows.get(row).map_or(&[][..], |row| &row[column * ROW..row.len().min((column + 1) * ROW)]);
            let mut whole = [0; ROW];
            whole[..values.len()].copy_from_slice(values);
            whole
        };
        for (g, lanes) in tile.as_chunks_mut::<{ 16 * PAIR }>().0.iter_mut().enumerate() {
            let (upper, lower) = (of_row(g), of_row(g + 8));
            let (upper, lower) = (upper.as_chunks::<PAIR>().0, lower.as_chunks::<PAIR>().0);
            for (t, lane) in lanes.as_chunks_mut::<{ 4 * PAIR }>().0.iter_mut().enumerate() {
                let registers = [upper[t], lower[t], upper[t + 4], lower[t + 4]];
                lane.copy_from_slice(registers.as_flattened());
            }
        }
    }
}

/// Numbers as the device reads them.
fn put(values: impl Iterator<Item = f32>, out: &mut [u8]) {
    for (value, out) in values.zip(out.as_chunks_mut().0) {
        *out = value.to_le_bytes();
    }
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
pub(super) fn pack_expert(
    threads: &Threads,
    shape: ExpertShape,
    source: &ExpertSource<'_>,
    out: &mut [u8],
) -> Result<(), KernelError> {
    let ExpertShape { hidden, intermediate, .. } = shape;
    // So tiles are whole and nothing lies between the parts.
    need("the width of an expert's input", hidden % BLOCK, 0)?;
    need("the width of an expert", intermediate % BLOCK, 0)?;
    let layout = ExpertLayout::new(shape);
    need("the room for a packed expert", out.len(), layout.bytes)?;
    let work = 3 * intermediate * hidden;
    let (gate_up, down) = out.split_at_mut(layout.gate_up.bias.end);
    // Tiles of eight activations: their gates and then their ups.
    let mut tiles = tiles(
        [2 * intermediate, hidden],
        [source.gate_up_blocks, source.gate_up_scales, source.gate_up_bias],
        ["gate_up_proj_blocks of an expert", "gate_up_proj_scales of an expert", "gate_up_proj_bias of an expert"],
        |row| row % 8 * 2 + row / 8,
        gate_up,
    )?;
    tiles.extend(self::tiles(
        [hidden, intermediate],
        [source.down_blocks, source.down_scales, source.down_bias],
        ["down_proj_blocks of an expert", "down_proj_scales of an expert", "down_proj_bias of an expert"],
        |row| row,
        down,
    )?);
    threads.each_chunk(&mut tiles, 1, work, |_, tiles| {
        tiles.iter_mut().for_each(Tile::pack);
    });
    source.parts().iter().for_each(Source::release);
    Ok(())
}

/// Sixteen rows of an MXFP4 matrix, and where they go.
struct Tile<'a> {
    /// Which of these rows is the packed tile's first, second, ...
    order: [usize; TILE],
    /// `[16, blocks, 16]`
    blocks: &'a [u8],
    /// `[16, blocks]`
    scales: &'a [u8],
    /// bf16 `[16]`
    bias: &'a [u8],
    /// `[blocks, 32 lanes, 2]` words
    codes_out: &'a mut [u8],
    /// `[blocks, 16]`
    scales_out: &'a mut [u8],
    /// f32 `[16]`
    bias_out: &'a mut [u8],
}

/// The tiles of a matrix `[rows, cols]` that is packed into all of `out`. `source` says which row of sixteen comes where.
fn tiles<'a>(
    [rows, cols]: [usize; 2],
    [blocks, scales, bias]: [Source<'a>; 3],
    [blocks_name, scales_name, bias_name]: [&'static str; 3],
    source: impl Fn(usize) -> usize,
    out: &'a mut [u8],
) -> Result<Vec<Tile<'a>>, KernelError> {
    let [blocks, scales, bias] = [blocks.bytes(), scales.bytes(), bias.bytes()];
    let width = cols / BLOCK;
    need(blocks_name, blocks.len(), rows * width * 16)?;
    need(scales_name, scales.len(), rows * width)?;
    need(bias_name, bias.len(), rows * 2)?;
    if let Some(index) = crate::scales::unusable(scales, blocks) {
        return Err(KernelError::Scale { what: scales_name, index });
    }
    let (codes_out, out) = out.split_at_mut(blocks.len());
    let (scales_out, bias_out) = out.split_at_mut(scales.len());
    let tile = |((((blocks, scales), bias), (codes_out, scales_out)), bias_out)| Tile {
        order: std::array::from_fn(&source),
        blocks,
        scales,
        bias,
        codes_out,
        scales_out,
        bias_out,
    };
    let [of_blocks, of_scales] = [TILE * width * 16, TILE * width].map(|bytes| bytes.max(1));
    let sources = blocks.chunks(of_blocks).zip(scales.chunks(of_scales)).zip(bias.chunks(TILE * 2));
    let places = codes_out.chunks_mut(of_blocks).zip(scales_out.chunks_mut(of_scales));
    Ok(sources.zip(places).zip(bias_out.chunks_mut(TILE * 4)).map(tile).collect())
}

impl Tile<'_> {
    fn pack(&mut self) {
        let width = self.scales.len() / TILE;
        let blocks = self.blocks.as_chunks::<16>().0;
        let rows = self.order.map(|row| &blocks[row * width..(row + 1) * width]);
        for (block, words) in self.codes_out.as_chunks_mut::<{ 64 * 4 }>().0.iter_mut().enumerate() {
            for (g, words) in words.as_chunks_mut::<{ 8 * 4 }>().0.iter_mut().enumerate() {
                let (upper, lower) = (&rows[g][block], &rows[g + 8][block]);
                for (lane, words) in words.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    let mut bits = 0;
                    for (half, spread) in SPREAD.iter().enumerate() {
                        // Columns 2t, 2t + 1 and 2t + 8, 2t + 9 of a half are its bytes t and t + 4.
                        let first = half * 8 + lane;
                        let pairs = [upper[first], lower[first], upper[first + 4], lower[first + 4]];
                        bits |= (0..4).fold(0, |bits, register| bits | spread[register][usize::from(pairs[register])]);
                    }
                    *words = bits.to_le_bytes();
                }
            }
        }
        self.pack_scales();
        let bias: Vec<f32> = bf16::values(self.bias).collect();
        put(self.order.iter().map(|&row| bias[row]), self.bias_out);
    }

    fn pack_scales(&mut self) {
        let width = self.scales.len() / TILE;
        let rows = self.order.map(|row| &self.scales[row * width..(row + 1) * width]);
        for (block, out) in self.scales_out.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            *out = std::array::from_fn(|i| rows[i % 2 * 8 + i / 2][block]);
        }
    }
}

/// [`spread`] of every pair of codes, for each register of each half.
static SPREAD: [[[u64; 256]; 4]; 2] = {
    let mut table = [[[0; 256]; 4]; 2];
    let mut at = 0;
    while at < 2 * 4 * 256 {
        let (half, register, pair) = (at / 1024, at / 256 % 4, at % 256);
        table[half][register][pair] = spread(half, register, pair as u32);
        at += 1;
    }
    table
};

/// Bits by which a word is turned to the right for registers 0 to 3 of each half.
const TURNS: [[u32; 4]; 2] = [[0, 4, 10, 8], [2, 6, 12, 14]];
/// What the fourth registers take from the left word; the rest is the right one's.
const LEFT_OF_BOTH: u32 = 0x6030_6030;

/// The codes of a register of a half in a lane's two words, the left one below: two elements (low nibble first) of row `g`
/// (registers 0 and 2) or `g + 8`. A word, turned, has an element's sign and magnitude where a bf16 has its sign and its
/// lowest exponent and highest fraction bits, element 1 in the upper half.
const fn spread(half: usize, register: usize, pair: u32) -> u64 {
    let mut bits = 0;
    let mut element = 0;
    while element < 2 {
        let code = pair >> (4 * element) & 15;
        bits |= (code >> 3 << 15 | (code & 7) << 6) << (16 * element);
        element += 1;
    }
    let bits = bits.rotate_left(TURNS[half][register]);
    let (left, right) = match (register, half) {
        (3, _) => (bits & LEFT_OF_BOTH, bits & !LEFT_OF_BOTH),
        (_, 0) => (bits, 0),
        _ => (0, bits),
    };
    left as u64 | (right as u64) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    /// Place of a number among a packed matrix's.
    fn dense_element(cols: usize, row: usize, column: usize) -> usize {
        let tile = row / TILE * cols.div_ceil(TILE) + column / TILE;
        let (r, k) = (row % TILE, column % TILE);
        let lane = r % 8 * 4 + k % 8 / 2;
        let register = r / 8 + 2 * (k / 8);
        tile * TILE * TILE + lane * 8 + register * 2 + k % 2
    }

    fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
        (0..len as u32).map(|i| (uniform(seed, 0, i) * 255.0) as u8).collect()
    }

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
    fn every_number_of_stacked_matrices_has_its_place_and_the_rest_is_zero() {
        for (stack, cols) in
            [(&[16][..], 16), (&[5], 18), (&[40, 7, 1], 33), (&[64, 8, 8], 80), (&[3, 0], 2), (&[0], 5)]
        {
            let rows: usize = stack.iter().sum();
            let weights = random_bytes(rows as u64, rows * cols * 2);
            let biases = random_bytes(1, rows * 2);
            let mut first = 0;
            let matrices: Vec<Stack<'_>> = stack
                .iter()
                .enumerate()
                .map(|(i, here)| {
                    let part = first..first + here;
                    first = part.end;
                    let weight = Source::memory(&weights[part.start * cols * 2..part.end * cols * 2]);
                    // The second has no bias.
                    let bias = (i != 1).then(|| Source::memory(&biases[part.start * 2..part.end * 2]));
                    Stack { weight, bias }
                })
                .collect();
            let layout = DenseLayout::new(rows, cols);
            let mut expected = vec![0; layout.bias.end];
            for row in 0..rows {
                for column in 0..cols {
                    let (from, to) = ((row * cols + column) * 2, dense_element(cols, row, column) * 2);
                    expected[to..to + 2].copy_from_slice(&weights[from..from + 2]);
                }
                if stack.len() < 2 || !(stack[0]..stack[0] + stack[1]).contains(&row) {
                    let to = layout.bias.start + row * 4;
                    expected[to + 2..to + 4].copy_from_slice(&biases[row * 2..row * 2 + 2]);
                }
            }
            for threads in [1, 3] {
                let threads = Threads::new(threads, None).unwrap();
                let mut out = vec![0xff; layout.bias.end];
                pack_dense(&threads, cols, &matrices, &mut out).unwrap();
                assert!(out == expected, "{stack:?} x {cols}");
            }
        }
    }

    /// Codes, scales and biases of a matrix, one by one to their places.
    fn expected_matrix(
        [rows, cols]: [usize; 2],
        [blocks, scales, bias]: [&[u8]; 3],
        place: impl Fn(usize) -> usize,
        layout: &MatrixLayout,
        out: &mut [u8],
    ) {
        for source in 0..rows {
            let row = place(source);
            for column in (0..cols).step_by(2) {
                let (tile, r) = (row / TILE, row % TILE);
                let (block, k) = (column / BLOCK, column % BLOCK);
                let (half, lane, register) = (k / 16, r % 8 * 4 + k % 8 / 2, r / 8 + k % 16 / 8 * 2);
                let words = spread(half, register, u32::from(blocks[(source * cols + column) / 2])).to_le_bytes();
                let at = layout.codes.start + ((tile * cols / BLOCK + block) * 32 + lane) * 8;
                out[at..at + 8].iter_mut().zip(words).for_each(|(out, byte)| *out |= byte);
                let at = layout.scales.start + (tile * cols / BLOCK + block) * TILE + r % 8 * 2 + r / 8;
                out[at] = scales[source * cols / BLOCK + block];
            }
            let at = layout.bias.start + row * 4;
            out[at + 2..at + 4].copy_from_slice(&bias[source * 2..source * 2 + 2]);
        }
    }

    #[test]
    fn every_code_scale_and_bias_of_an_expert_has_its_place() {
        for (hidden, intermediate) in [(32, 32), (96, 64), (160, 96)] {
            let shape = ExpertShape { hidden, intermediate, limit: 7.0 };
            let parts = |rows: usize, cols: usize| {
                let scales = random_bytes(2, rows * cols / 32).iter().map(|scale| scale % 254).collect();
                [random_bytes(1, rows * cols / 2), scales, random_bytes(3, rows * 2)]
            };
            let (gate_up, down) = (parts(2 * intermediate, hidden), parts(hidden, intermediate));
            let [[gate_up_blocks, gate_up_scales, gate_up_bias], [down_blocks, down_scales, down_bias]] =
                [&gate_up, &down].map(|parts| parts.each_ref().map(|part| Source::memory(part)));
            let source =
                ExpertSource { gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias };
            let layout = ExpertLayout::new(shape);
            let mut expected = vec![0; layout.bytes];
            // Gates and ups alternate; packed, eight gates come before their ups.
            let place = |row: usize| row / 16 * 16 + row % 2 * 8 + row % 16 / 2;
            let matrix = gate_up.each_ref().map(Vec::as_slice);
            expected_matrix([2 * intermediate, hidden], matrix, place, &layout.gate_up, &mut expected);
            let matrix = down.each_ref().map(Vec::as_slice);
            expected_matrix([hidden, intermediate], matrix, |row| row, &layout.down, &mut expected);
            for threads in [1, 3] {
                let threads = Threads::new(threads, None).unwrap();
                let mut out = vec![0xff; layout.bytes];
                pack_expert(&threads, shape, &source, &mut out).unwrap();
                assert!(out == expected, "{hidden} x {intermediate}");
            }
        }
    }

    #[test]
    fn codes_of_a_lane_lie_as_the_kernel_reads_them() {
        // Row g: codes 1 and 10 (magnitude 2, negative) in register 0 of the left half, as they are; 3 and 4 in register 2,
        // whose elements lie in the other half of the word, six bits down.
        let left = 1 << 6 | (1 << 15 | 2 << 6) << 16 | 3 << 16 | 4;
        assert_eq!(spread(0, 0, 0xa1) | spread(0, 2, 0x43), left);
        // Row g + 8: code 15 in register 3 of the right half, of which one bit alone is in the right word.
        assert_eq!(spread(1, 3, 0x0f), 1 << 29 | 3 << 20 | 1 << 22 << 32);
    }

    #[test]
    fn codes_of_two_words_do_not_overlap() {
        let words: Vec<u64> = (0..8).map(|at| spread(at / 4, at % 4, 0xff)).collect();
        assert_eq!(words.iter().map(|bits| bits.count_ones()).sum::<u32>(), u64::BITS);
        assert_eq!(words.iter().fold(0, |all, bits| all | bits), u64::MAX);
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
