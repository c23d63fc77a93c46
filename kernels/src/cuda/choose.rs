//! Which kernel an op takes and how it is cut into blocks: pure functions of shapes.
//!
//! A choice never changes bits: the kernels of an op add in the same order, however blocks share a sum. In fast
//! precision every token count takes `mma`, in exact none does.

mod attention;
mod dense;
mod experts;

pub(super) use attention::{
    CHUNK, DIM_MAX, MANY_ROWS, PARTIALS_BYTES_MAX, TILE_ROWS, attention_exact, attention_fast, rope, tiling,
};
pub(super) use dense::{DenseWgmma, HALVES_BYTES, dense, dense_wgmma, route, route_chunks, route_sums};
pub(super) use experts::{ExpertLaunches, ExpertMatrix, SLOTS_MAX, experts, experts_wgmma, receive};

use super::ops::Op;

/// A kernel, its blocks and its shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice<A> {
    pub(super) op: Op<A>,
    pub(super) grid: [u32; 3],
    pub(super) shared: u32,
}

/// Rows of a tile of a matrix.
const TILE: u32 = 16;
/// Tokens of a block of the narrow kernels.
const NARROW: u32 = 8;
/// Tokens and row tiles of a block of the wide kernel.
const WIDE: [u32; 2] = [64, 8];
/// Partial sums of eight segments of a tile.
const PARTIALS_BYTES: u32 = 8 * TILE * NARROW * 4;
/// Tokens whose columns are staged, 64 and 8 for padding.
const STAGED_BYTES: u32 = WIDE[0] * (64 + 8) * 2;
/// Shared memory that a block can have on Hopper.
pub(super) const SHARED_MAX: u32 = 227 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;

    #[test]
    fn only_hopper_multiplies_by_warpgroups() {
        use crate::cuda::Family;
        assert_eq!(Family::of((9, 0)), Family::Wgmma);
        for capability in [(8, 0), (8, 6), (8, 9), (10, 0), (10, 3), (12, 0), (12, 1)] {
            assert_eq!(Family::of(capability), Family::Mma, "{capability:?}");
        }
    }

    #[test]
    fn nothing_needs_more_shared_memory_than_every_device_has() {
        let experts = experts(Precision::Fast, ExpertMatrix::Down, 64, 1).shared;
        let shared = [dense(true, 1, 1).shared, dense(false, 64, 64).shared, experts];
        assert!(shared.iter().all(|&bytes| bytes <= 48 << 10), "{shared:?}");
    }
}
