//! What is allocated is what the shapes say.

use phalanx_kernels::{Backend, DenseFormat, DenseUse, ExpertShape, Isa, KvShape, PoolShape, Stack};

use crate::data::{Expert, Random};
use crate::{KINDS, cpu};

/// Tiles have 16 rows; columns come by 32; a bias is f32. 32 weights are 17 bytes in MXFP4, 34 in q8; a tile's are padded
/// to 64 bytes.
#[test]
fn weights_and_kv_have_their_planned_size() {
    for (kind, kv_bytes) in KINDS.into_iter().zip([4, 2, 2]) {
        let mut b = cpu(Isa::Portable, kind, 1);
        let mut random = Random(51);
        let mut last = 0;
        let mut grown = |b: &phalanx_kernels::Cpu| {
            let grown = b.allocated() - last;
            last = b.allocated();
            grown
        };
        for rows in [512, 1000, 80, 1] {
            let weight = random.tensor(rows * 48, 1.0);
            let block = if kind.1 == DenseFormat::Q8 { 34 } else { 64 };
            for (used, block) in [(DenseUse::Router, 64), (DenseUse::Projection, block)] {
                b.dense(used, 48, &[Stack { weight: weight.source(), bias: None }]).unwrap();
                assert_eq!(grown(&b), (rows.next_multiple_of(16) * (2 * block + 4)) as u64);
            }
        }
        let shape = ExpertShape { hidden: 96, intermediate: 32, limit: 7.0 };
        let mut experts = b.experts(2, shape);
        for slot in [0, 1, 1] {
            b.load_expert(&mut experts, slot, &Expert::random(&mut random, 96, 32).source()).unwrap();
        }
        assert_eq!(grown(&b), 2 * (64 * (3 * 17 + 1 + 4) + 96 * (17 + 3 + 4)));
        let pools = vec![PoolShape { layers: 2, blocks: 3 }, PoolShape { layers: 1, blocks: 5 }];
        let _kv = b.kv(&KvShape { pools, kv_heads: 2, head_dim: 24 });
        assert_eq!(grown(&b), (2 * 3 + 5) * 16 * 2 * (24 + 32) * kv_bytes);
        let _rows = b.rows(7, 96);
        assert_eq!(grown(&b), 7 * 96 * 4);
    }
}
