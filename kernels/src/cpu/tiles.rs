//! Matrices in tiles of 16 output rows: what all weight formats have in common.
//!
//! A tile is `[cols / 32]` blocks, then 16 biases in f32. Blocks whose scales fill a cache line are a cluster: that line, then
//! their codes. The last cluster has a whole line and fewer codes; the last block of columns and the last tile are padded with
//! zeros. So a product with one row reads a matrix line by line from its first byte to its last, which is the one way to have
//! all that memory gives: a processor asks ahead of a single ascending stream by itself, and no further once there are two.
//! Where many rows take their time over a cluster, one that follows is asked for as a whole. A lane is an output row.

use std::marker::PhantomData;

use super::dense::need;
use super::lanes::{LANES, Lanes};
use crate::memory::{LINE, Packed, Plain, Source, view, view_mut};
use crate::threads::{Disjoint, Threads};
use crate::{KernelError, bf16};

/// Columns of a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a source that a thread reads before it gives their pages back.
const PIECE_BYTES: usize = 1 << 20;

/// How far ahead of its use memory is asked for, in bytes.
const AHEAD: usize = 8 << 10;

/// How the weights of a matrix are held.
pub(super) trait Format: Sized + Send + Sync + 'static {
    /// Codes of 16 rows by 32 columns.
    type Codes: Plain;
    /// Their scales.
    type Scales: Plain;
    /// Rows up to which a product is so quick that the processor's own asking ahead keeps up, if led on by a line a cluster.
    const QUICK: usize;
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
pub(super) struct Tile<'a, F> {
    /// Codes and scales, padded.
    weights: &'a [u8],
    format: PhantomData<fn() -> F>,
}

impl<F> Clone for Tile<'_, F> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Tile<'_, F> {}

/// Blocks of a row.
pub(super) const fn blocks(cols: usize) -> usize {
    cols.div_ceil(BLOCK)
}

/// Blocks whose scales share a cache line.
pub(super) const fn cluster<F: Format>() -> usize {
    match size_of::<F::Scales>() {
        0 => 1,
        scales => LINE / scales,
    }
}

/// Bytes of that line.
const fn scale_line<F: Format>() -> usize {
    cluster::<F>() * size_of::<F::Scales>()
}

/// Bytes of the codes and scales of so many blocks, padded.
const fn weight_bytes<F: Format>(blocks: usize) -> usize {
    blocks.div_ceil(cluster::<F>()) * scale_line::<F>() + blocks * size_of::<F::Codes>()
}

impl<F: Format> Tiles<F> {
    const fn tile_bytes(cols: usize) -> usize {
        weight_bytes::<F>(blocks(cols)) + LANES * size_of::<f32>()
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
    fn tile_of(&self, tile: usize) -> (&[u8], &[u8]) {
        let bytes = Self::tile_bytes(self.cols);
        self.packed[tile * bytes..(tile + 1) * bytes].split_at(weight_bytes::<F>(blocks(self.cols)))
    }

    /// Codes and scales of a tile.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> Tile<'_, F> {
        Tile { weights: self.tile_of(tile).0, format: PhantomData }
    }

    /// Codes and scales of neighbouring tiles from `first` on.
    #[inline(always)]
    pub(super) fn some<const TILES: usize>(&self, first: usize) -> [Tile<'_, F>; TILES] {
        // No closure: see `Bytes::bytes` of q8.
        let mut tiles = [self.tile(first); TILES];
        for (i, tile) in tiles.iter_mut().enumerate() {
            *tile = self.tile(first + i);
        }
        tiles
    }

    /// The biases of a tile.
    #[inline(always)]
    pub(super) fn bias(&self, tile: usize) -> &[f32; LANES] {
        &view(self.tile_of(tile).1)[0]
    }
}

impl<F: Format> Tile<'_, F> {
    /// Panics unless the tile has `blocks` blocks; then [`Tile::cluster`] may be called for each [`cluster`] of them.
    #[inline(always)]
    pub(super) fn check(&self, blocks: usize) {
        assert!(self.weights.len() == weight_bytes::<F>(blocks), "whole tiles");
        assert!(self.weights.as_ptr().addr().is_multiple_of(LINE), "tiles begin on a cache line");
    }

    /// The blocks from `first` on, which begin a cluster, for the product with so many rows.
    ///
    /// # Safety
    /// `first` is a multiple of [`cluster`] below the number of blocks, see [`Tile::check`].
    #[inline(always)]
    pub(super) unsafe fn cluster<L: Lanes>(&self, l: L, first: usize, rows: usize) -> Cluster<'_, F> {
        let bytes = scale_line::<F>() + cluster::<F>() * size_of::<F::Codes>();
        // SAFETY: by the caller's promise the cluster begins within the tile.
        let start = unsafe { self.weights.as_ptr().add(first / cluster::<F>() * bytes) };
        let lines = if rows > F::QUICK { bytes / LINE } else { 1 };
        for line in 0..lines {
            l.prefetch(start.wrapping_add(AHEAD + line * LINE));
        }
        Cluster { start, tile: PhantomData }
    }
}

/// Blocks that share a line of scales.
pub(super) struct Cluster<'a, F> {
    start: *const u8,
    tile: PhantomData<&'a Tile<'a, F>>,
}

impl<F: Format> Cluster<'_, F> {
    /// Codes and scales of block `i`.
    ///
    /// # Safety
    /// The tile has this block of the cluster, and `i` is below [`cluster`].
    #[inline(always)]
    pub(super) unsafe fn block(&self, i: usize) -> (&F::Codes, &F::Scales) {
        // SAFETY: by the caller's promise these bytes lie within the tile; they begin at a multiple of their type's size from
        // a cache line, so they are aligned; every pattern is a value of a plain type.
        unsafe {
            let scales = self.start.add(i * size_of::<F::Scales>());
            let codes = self.start.add(scale_line::<F>() + i * size_of::<F::Codes>());
            (&*codes.cast(), &*scales.cast())
        }
    }
}

/// Codes and scales of a tile's blocks, ascending, to be written.
fn blocks_mut<F: Format>(weights: &mut [u8]) -> impl Iterator<Item = (&mut F::Codes, &mut F::Scales)> {
    let line = scale_line::<F>();
    weights.chunks_mut(line + cluster::<F>() * size_of::<F::Codes>()).flat_map(move |cluster| {
        let (scales, codes) = cluster.split_at_mut(line);
        view_mut(codes).iter_mut().zip(view_mut(scales))
    })
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

/// Packs parts one under the other. `block` writes a block of a row of a part into its lane of a tile; it gets the row within
/// the part, the block, its bytes, at most `block_bytes`, where it puts codes and scale, and the lane.
pub(super) fn pack<F: Format>(
    threads: &Threads,
    cols: usize,
    parts: &[Part<'_>],
    out: &mut [u8],
    block_bytes: usize,
    block: impl Fn([usize; 2], &[u8], &mut F::Codes, &mut F::Scales, usize) + Sync,
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
        for part in parts {
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
                let (weights, biases) = tile.split_at_mut(weight_bytes::<F>(blocks(cols)));
                let values = source.bytes()[i * width..(i + 1) * width].chunks(block_bytes);
                for (b, (values, (codes, scales))) in values.zip(blocks_mut::<F>(weights)).enumerate() {
                    block([index - part.first, b], values, codes, scales, lane);
                }
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
