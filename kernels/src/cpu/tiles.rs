//! Matrices in tiles of 16 output rows: what all weight formats have in common.
//!
//! A tile is one stretch of memory: `[cols / 32]` blocks of codes, then their scales, padded to a cache line, then 16
//! biases in f32. The last block of columns and the last tile are padded with zeros. So a product with one row goes
//! through the matrix from its first byte to its last. A lane is an output row.

use std::marker::PhantomData;

use super::dense::need;
use super::lanes::{LANES, Lanes};
use super::threads::{Disjoint, Threads};
use crate::memory::{LINE, Packed, Plain, Source, view, view_mut};
use crate::{KernelError, bf16};

/// Columns of a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a source that a thread reads before it gives their pages back.
const PIECE_BYTES: usize = 1 << 20;
/// How far ahead of its use memory is asked for, in bytes: the processor itself looks no further than a page.
const AHEAD: usize = 32 << 10;

/// How the weights of a matrix are held.
pub(super) trait Format: Sized + Send + Sync + 'static {
    /// Codes of 16 rows by 32 columns.
    type Codes: Plain;
    /// Their scales.
    type Scales: Plain;
}

/// A packed matrix `[rows, cols]` with its bias.
#[derive(Debug)]
pub(super) struct Tiles<F> {
    rows: usize,
    cols: usize,
    packed: Packed,
    format: PhantomData<fn() -> F>,
}

/// One tile.
pub(super) struct Tile<'a, F: Format> {
    /// `[cols / 32]`
    codes: &'a [F::Codes],
    /// `[cols / 32]`
    scales: &'a [F::Scales],
}

/// Blocks of a row.
pub(super) const fn blocks(cols: usize) -> usize {
    cols.div_ceil(BLOCK)
}

impl<F: Format> Tiles<F> {
    /// Bytes of a tile's codes and scales, padded.
    const fn weight_bytes(cols: usize) -> usize {
        (blocks(cols) * (size_of::<F::Codes>() + size_of::<F::Scales>())).next_multiple_of(LINE)
    }

    const fn tile_bytes(cols: usize) -> usize {
        Self::weight_bytes(cols) + LANES * size_of::<f32>()
    }

    /// Bytes of a packed matrix.
    pub(super) const fn bytes_of(rows: usize, cols: usize) -> usize {
        rows.div_ceil(LANES) * Self::tile_bytes(cols)
    }

    /// A matrix of bytes that [`pack`] wrote.
    pub(super) fn new(rows: usize, cols: usize, packed: Packed) -> Result<Self, KernelError> {
        need("a packed matrix", packed.len(), Self::bytes_of(rows, cols))?;
        Ok(Self { rows, cols, packed, format: PhantomData })
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    pub(super) const fn cols(&self) -> usize {
        self.cols
    }

    /// Tiles of 16 rows.
    pub(super) const fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.packed.len() as u64
    }

    #[inline(always)]
    fn tile_of(&self, tile: usize) -> &[u8] {
        let bytes = Self::tile_bytes(self.cols);
        &self.packed[tile * bytes..(tile + 1) * bytes]
    }

    /// Codes and scales of a tile.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> Tile<'_, F> {
        let (codes, scales) = self.tile_of(tile).split_at(blocks(self.cols) * size_of::<F::Codes>());
        Tile { codes: view(codes), scales: &view(scales)[..blocks(self.cols)] }
    }

    /// The biases of a tile.
    #[inline(always)]
    pub(super) fn bias(&self, tile: usize) -> &[f32; LANES] {
        &view(&self.tile_of(tile)[Self::weight_bytes(self.cols)..])[0]
    }
}

impl<F: Format> Tile<'_, F> {
    /// Panics unless the tile has `blocks` blocks; then [`Tile::block`] may be called for each.
    #[inline(always)]
    pub(super) fn check(&self, blocks: usize) {
        assert!(self.codes.len() == blocks && self.scales.len() == blocks, "whole tiles");
    }

    /// Codes and scales of a block; asks for what comes a while after.
    ///
    /// # Safety
    /// `b` is below the number of blocks, see [`Tile::check`].
    #[inline(always)]
    pub(super) unsafe fn block<L: Lanes>(&self, l: L, b: usize) -> (&F::Codes, &F::Scales) {
        // SAFETY: the caller's promise.
        let (codes, scales) = unsafe { (self.codes.get_unchecked(b), self.scales.get_unchecked(b)) };
        let ahead = std::ptr::from_ref(codes).cast::<u8>().wrapping_add(AHEAD);
        for line in 0..size_of::<F::Codes>() / LINE {
            l.prefetch(ahead.wrapping_add(line * LINE));
        }
        (codes, scales)
    }
}

/// A matrix to be packed, and the row at which it begins among those stacked with it.
pub(super) struct Part<'a> {
    /// First row.
    pub(super) first: usize,
    /// Rows.
    pub(super) rows: usize,
    /// What holds the weights, `[rows, ..]`.
    pub(super) weights: Source<'a>,
    /// bf16 `[rows]`.
    pub(super) bias: Option<Source<'a>>,
}

/// Packs parts one under the other. `row` writes a row of a part into its lane of a tile; it gets the part, the row
/// within the part, the bytes of that row of the weights, the tile's codes and scales, and the lane.
pub(super) fn pack<F: Format>(
    threads: &Threads,
    cols: usize,
    parts: &[Part<'_>],
    out: &mut [u8],
    row: impl Fn(usize, usize, &[u8], &mut [F::Codes], &mut [F::Scales], usize) + Sync,
) -> Result<(), KernelError> {
    let rows = parts.iter().map(|part| part.rows).sum::<usize>();
    need("the room for a packed matrix", out.len(), Tiles::<F>::bytes_of(rows, cols))?;
    let tile_bytes = Tiles::<F>::tile_bytes(cols);
    let out = Disjoint::new(out);
    let tiles = rows.div_ceil(LANES);
    // Whole tiles, of about as many bytes as are read before they are given back.
    let stride = (PIECE_BYTES / tile_bytes.max(1)).max(1);
    threads.each(tiles.div_ceil(stride), usize::MAX, |piece| {
        let piece = piece * stride..tiles.min((piece + 1) * stride);
        for (p, part) in parts.iter().enumerate() {
            let here = (piece.start * LANES).max(part.first)..(piece.end * LANES).min(part.first + part.rows);
            if here.is_empty() {
                continue;
            }
            let width = part.weights.bytes().len().checked_div(part.rows).unwrap_or(0);
            let bytes = (here.start - part.first) * width..(here.end - part.first) * width;
            let source = part.weights.slice(bytes).expect("the rows lie within the part");
            let bias = part.bias.map(|bias| bf16::values(bias.bytes()));
            let mut bias = bias.into_iter().flatten().skip(here.start - part.first);
            for (i, index) in here.clone().enumerate() {
                let (tile, lane) = (index / LANES, index % LANES);
                // SAFETY: pieces differ in their tiles; within a piece each part is dropped before the next.
                let tile = unsafe { out.slice(tile * tile_bytes..(tile + 1) * tile_bytes) };
                let (weights, biases) = tile.split_at_mut(Tiles::<F>::weight_bytes(cols));
                let (codes, scales) = weights.split_at_mut(blocks(cols) * size_of::<F::Codes>());
                let scales = &mut view_mut(scales)[..blocks(cols)];
                let values = &source.bytes()[i * width..(i + 1) * width];
                row(p, index - part.first, values, view_mut(codes), scales, lane);
                view_mut::<[f32; LANES]>(biases)[0][lane] = bias.next().unwrap_or(0.0);
            }
            source.release();
        }
    });
    for part in parts {
        part.weights.release();
        if let Some(bias) = part.bias {
            bias.release();
        }
    }
    Ok(())
}
