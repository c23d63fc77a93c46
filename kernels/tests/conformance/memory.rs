//! What is allocated is what the shapes say.

use phalanx_kernels::{DenseFormat, DenseUse, ExpertShape, Isa, KvShape, PoolShape, Precision, Stack};

use crate::data::{Expert, Random};
use crate::{KINDS, Tested, cpu, cudas};

/// Bytes of what a backend holds.
struct Sizes {
    /// A row of a router and of a projection, 48 columns and a bias each.
    router: u64,
    projection: u64,
    /// A slot with an expert of `[96, 32]`.
    expert: u64,
    /// Keys and values of a position and head.
    kv: u64,
}

/// Tiles have 16 rows.
fn weights_and_kv_have_their_planned_size(mut b: impl Tested, sizes: &Sizes) {
    let mut random = Random(51);
    let mut last = b.allocated();
    let mut grown = |now: u64| {
        let grown = now - last;
        last = now;
        grown
    };
    let mut held = Vec::new();
    for rows in [512, 1000, 80, 1] {
        let weight = random.tensor(rows * 48, 1.0);
        for (used, row) in [(DenseUse::Router, sizes.router), (DenseUse::Projection, sizes.projection)] {
            held.push(b.dense(used, 48, &[Stack { weight: weight.source(), bias: None }]).unwrap());
            assert_eq!(grown(b.allocated()), rows.next_multiple_of(16) as u64 * row);
        }
    }
    let shape = ExpertShape { hidden: 96, intermediate: 32, limit: 7.0 };
    let mut experts = b.experts(2, shape);
    for slot in [0, 1, 1] {
        b.load_expert(&mut experts, slot, &Expert::random(&mut random, 96, 32).source()).unwrap();
    }
    assert_eq!(grown(b.allocated()), 2 * sizes.expert);
    let pools = vec![PoolShape { layers: 2, blocks: 3 }, PoolShape { layers: 1, blocks: 5 }];
    let _kv = b.kv(&KvShape { pools, kv_heads: 2, head_dim: 24 });
    assert_eq!(grown(b.allocated()), (2 * 3 + 5) * 16 * 2 * sizes.kv);
    let _rows = b.rows(7, 96);
    assert_eq!(grown(b.allocated()), 7 * 96 * 4);
}

/// Columns come by 32; 32 weights are 17 bytes in MXFP4, 34 in q8, and a tile's are padded to 64 bytes. Values are
/// padded to whole lanes.
#[test]
fn on_cpus() {
    for (kind, kv_bytes) in KINDS.into_iter().zip([4, 2, 2]) {
        let block = if kind.1 == DenseFormat::Q8 { 34 } else { 64 };
        let sizes = Sizes {
            router: 2 * 64 + 4,
            projection: 2 * block + 4,
            expert: 64 * (3 * 17 + 1 + 4) + 96 * (17 + 3 + 4),
            kv: (24 + 32) * kv_bytes,
        };
        weights_and_kv_have_their_planned_size(cpu(Isa::Portable, kind, 1), &sizes);
    }
}

/// A slot has six addresses and a mark beside its expert.
#[test]
fn on_cuda_devices() {
    for make in cudas() {
        let kv_bytes = if make.precision == Precision::Exact { 4 } else { 2 };
        let sizes = Sizes {
            router: 2 * 48 + 4,
            projection: 2 * 48 + 4,
            expert: 64 * (3 * 17 + 4) + 96 * (17 + 4) + 6 * 8 + 4,
            kv: (24 + 24) * kv_bytes,
        };
        weights_and_kv_have_their_planned_size(make.backend(), &sizes);
    }
}
