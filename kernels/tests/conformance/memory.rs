//! What is allocated is what the shapes say.

use phalanx_kernels::{ExpertShape, Isa, KvShape, PoolShape, Precision, Stack};

use crate::data::{Expert, Random};
use crate::{Tested, cpu, cudas};

/// Tiles have 16 rows; a bias is f32; 32 MXFP4 weights are 17 bytes. A slot of experts is `slot` bytes beside them, and
/// keys and values of a position and head are `kv` numbers.
fn weights_and_kv_have_their_planned_size(mut b: impl Tested, slot: u64, kv: u64, kv_bytes: u64) {
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
        held.push(b.dense(48, &[Stack { weight: weight.source(), bias: None }]).unwrap());
        assert_eq!(grown(b.allocated()), (rows.next_multiple_of(16) * (48 * 2 + 4)) as u64);
    }
    let shape = ExpertShape { hidden: 96, intermediate: 32, limit: 7.0 };
    let mut experts = b.experts(2, shape);
    for slot in [0, 1, 1] {
        b.load_expert(&mut experts, slot, &Expert::random(&mut random, 96, 32).source()).unwrap();
    }
    assert_eq!(grown(b.allocated()), 2 * (64 * (3 * 17 + 4) + 96 * (17 + 4) + slot));
    let pools = vec![PoolShape { layers: 2, blocks: 3 }, PoolShape { layers: 1, blocks: 5 }];
    let _kv = b.kv(&KvShape { pools, kv_heads: 2, head_dim: 24 });
    assert_eq!(grown(b.allocated()), (2 * 3 + 5) * 16 * 2 * kv * kv_bytes);
    let _rows = b.rows(7, 96);
    assert_eq!(grown(b.allocated()), 7 * 96 * 4);
}

/// Values are padded to whole lanes.
#[test]
fn on_cpus() {
    for (precision, kv_bytes) in [(Precision::Exact, 4), (Precision::Fast, 2)] {
        weights_and_kv_have_their_planned_size(cpu(Isa::Portable, precision, 1), 0, 24 + 32, kv_bytes);
    }
}

/// A slot has six addresses and a mark.
#[test]
fn on_cuda_devices() {
    for make in cudas() {
        let kv_bytes = if make.precision == Precision::Exact { 4 } else { 2 };
        weights_and_kv_have_their_planned_size(make.backend(), 6 * 8 + 4, 24 + 24, kv_bytes);
    }
}
