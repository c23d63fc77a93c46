//! How much the backend makes for itself beside what it is asked for: a pure function of the largest step.

use super::arena::ALIGNMENT;
use super::choose::{HALVES_BYTES, PARTIALS_BYTES_MAX, route_chunks, route_sums};
use super::device::grown;
use super::exchange::entries_bytes;
use super::inputs::STRIDE;
use super::sample::{DRAW, DRAWN, DRAWS_BYTES, EDIT, ROWS, TOP, rows_bytes};
use super::status;
use crate::{BLOCK_SIZE, SEGMENT};

/// The largest step of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScratchShape {
    /// `T`, rows of a step.
    pub rows: usize,
    /// Sequences of a step; a step names each with its block table.
    pub sequences: usize,
    /// Positions of a sequence.
    pub positions: usize,
    /// KV pools.
    pub pools: usize,
    /// Columns of the widest rows that are projected: `H`, or `Nq*D`.
    pub projected: usize,
    /// `Nq`.
    pub heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// `E`.
    pub experts: usize,
    /// `K`.
    pub top_k: usize,
    /// Expert slots of a layer on this rank.
    pub slots: usize,
    /// Ranks of an exchange, this one included.
    pub ranks: usize,
    /// `V`.
    pub vocab: usize,
    /// Rows drawn from at once, and gathered for it.
    pub logits_rows: usize,
    /// Rows drawn from in a step.
    pub sampled: usize,
    /// Token slots.
    pub token_slots: usize,
    /// Edits of a draw.
    pub edits: usize,
    /// Likely tokens reported of a draw.
    pub logprobs: usize,
}

impl ScratchShape {
    /// Bytes of a step's inputs.
    pub(super) fn inputs(&self) -> usize {
        let row = 4 * 4 + 2 * 2 * 4 + 2 * (self.head_dim / 2) * 4;
        let table = self.positions.div_ceil(BLOCK_SIZE).next_multiple_of(STRIDE) * 4;
        // Every part begins at a multiple of 16.
        self.rows * row + self.pools * (self.sequences * table + 16) + 8 * 16
    }

    /// Bytes of draws that wait to be drawn: those of a launch, or of the largest one.
    pub(super) fn draws(&self) -> usize {
        let words = self.vocab.div_ceil(64);
        DRAWS_BYTES.max(DRAW + self.edits * EDIT + words * 8 + 4 * 16).max(self.logits_rows * 4 + 16)
    }

    /// Bytes of router logits.
    pub(super) fn router_logits(&self) -> usize {
        route_sums(self.rows) * self.experts * 4
    }

    /// Bytes of where a step's entries lie.
    pub(super) const fn entries(&self) -> usize {
        entries_bytes(self.rows * self.top_k, self.ranks)
    }

    /// Bytes of the router's tickets.
    pub(super) const fn router_tickets(&self) -> usize {
        route_chunks(self.rows) * 4
    }

    /// Bytes of attention by single segments or chunks.
    pub(super) fn partials(&self) -> usize {
        let row = self.heads.saturating_mul(self.positions.div_ceil(SEGMENT)).saturating_mul((2 + self.head_dim) * 4);
        self.rows.saturating_mul(row).min(PARTIALS_BYTES_MAX)
    }

    /// Bytes of rounded rows before a projection, in groups of up to 256.
    pub(super) fn pieces(&self) -> usize {
        self.rows.max(1).next_multiple_of(256) * self.projected.next_multiple_of(16) * 2
    }

    /// Bytes of what is kept of rows that are drawn from.
    pub(super) fn weights(&self) -> usize {
        rows_bytes(self.logits_rows.min(ROWS), self.vocab)
    }
}

/// An upper bound of the bytes that a backend makes for itself in steps within these bounds, token slots included and
/// borders of buffers included: what is held beyond rows, routes, parts, work, KV and weights.
#[must_use]
pub fn scratch_bytes(shape: &ScratchShape) -> u64 {
    let reserved = [
        shape.inputs(),
        shape.draws(),
        shape.router_logits(),
        shape.entries(),
        shape.router_tickets(),
        shape.partials(),
        shape.pieces(),
        shape.weights(),
        (shape.slots + 1) * 4,
        (shape.slots + 2) * 4,
        shape.ranks * 16,
    ];
    let reserved: u64 = reserved.into_iter().map(|bytes| aligned(grown(bytes))).sum();
    // Every launch of draws has two buffers for what was drawn.
    let drawn = shape.sampled * (DRAWN + shape.logprobs.min(shape.vocab) * TOP + 2 * ALIGNMENT);
    reserved + drawn as u64 + aligned(HALVES_BYTES) + aligned(status::BYTES) + aligned(shape.token_slots * 4)
}

/// Bytes of device memory that hold `bytes` in `buffers` buffers, each of which begins on a border.
#[must_use]
pub const fn arena_bytes(bytes: u64, buffers: u64) -> u64 {
    bytes + buffers * ALIGNMENT as u64
}

const fn aligned(bytes: usize) -> u64 {
    bytes.next_multiple_of(ALIGNMENT) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// gpt-oss-120b on one rank.
    fn large() -> ScratchShape {
        ScratchShape {
            rows: 8192,
            sequences: 256,
            positions: 131_072,
            pools: 2,
            projected: 4096,
            heads: 64,
            head_dim: 64,
            experts: 128,
            top_k: 4,
            slots: 128,
            ranks: 1,
            vocab: 201_088,
            logits_rows: 32,
            sampled: 256,
            token_slots: 256,
            edits: 131_072,
            logprobs: 20,
        }
    }

    #[test]
    fn a_small_share_of_a_device_is_scratch() {
        let bytes = scratch_bytes(&large());
        assert!((340 << 20..420 << 20).contains(&bytes), "{bytes}");
        let least = DRAWS_BYTES * 5 / 4 + HALVES_BYTES + (64 << 10);
        assert!(scratch_bytes(&ScratchShape::default()) < least as u64);
    }

    #[test]
    fn more_of_anything_never_needs_less() {
        let least = scratch_bytes(&large());
        let more: [fn(&mut ScratchShape); 17] = [
            |s| s.rows *= 2,
            |s| s.sequences += 1,
            |s| s.positions += 16,
            |s| s.pools += 1,
            |s| s.projected += 16,
            |s| s.heads += 1,
            |s| s.head_dim += 2,
            |s| s.experts += 1,
            |s| s.top_k += 1,
            |s| s.slots += 100,
            |s| s.ranks += 100,
            |s| s.vocab += 64,
            |s| s.logits_rows += 1,
            |s| s.sampled += 1,
            |s| s.token_slots += 100,
            |s| s.edits += 1,
            |s| s.logprobs += 1,
        ];
        for (i, more) in more.into_iter().enumerate() {
            let mut shape = large();
            more(&mut shape);
            assert!(scratch_bytes(&shape) >= least, "{i}");
        }
    }
}
