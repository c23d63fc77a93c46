//! Damaged bytes are errors, never panics.

use phalanx_kernels::memory::{Packed, Source};
use phalanx_kernels::reference::exchange;
use phalanx_kernels::{DenseUse, ExpertShape, HostParts, KernelError, NO_SLOT, Stack};

use crate::data::{Expert, Random, rope_table};
use crate::experts::{records, step, work};
use crate::plans::trusts;
use crate::{Make, Tested};

pub(crate) fn refuses_damaged_tensors<B: Tested>(make: &Make<B>) {
    let mut b = make.backend();
    let is_size = |error: KernelError| matches!(error, KernelError::Size { .. });
    let bytes = [0; 100];
    assert!(is_size(b.vector(Source::memory(&bytes[..3])).err().unwrap()));
    let short = Stack { weight: Source::memory(&bytes[..99]), bias: None };
    assert!(is_size(b.dense(DenseUse::Projection, 10, &[short]).err().unwrap()));
    let bias = Stack { weight: Source::memory(&bytes), bias: Some(Source::memory(&bytes[..8])) };
    assert!(is_size(b.dense(DenseUse::Projection, 10, &[bias]).err().unwrap()));

    let shape = ExpertShape { hidden: 64, intermediate: 32, limit: 7.0 };
    let good = Expert::random(&mut Random(31), 64, 32);
    let mut experts = b.experts(1, shape);
    let damages: [fn(&mut Expert); 6] = [
        |e| e.gate_up_blocks.truncate(100),
        |e| e.gate_up_scales.push(1),
        |e| e.gate_up_bias.bytes.truncate(7),
        |e| e.down_blocks.clear(),
        |e| e.down_scales.truncate(1),
        |e| e.down_bias.bytes.push(0),
    ];
    for damage in damages {
        let mut bad = good.clone();
        damage(&mut bad);
        assert!(is_size(b.load_expert(&mut experts, 0, &bad.source()).unwrap_err()), "{}", make.name);
    }
    let mut bad = good.clone();
    bad.down_scales[37] = 255;
    assert_eq!(
        b.load_expert(&mut experts, 0, &bad.source()),
        Err(KernelError::Scale { what: "down_proj_scales of an expert", index: 37 })
    );
    b.load_expert(&mut experts, 0, &good.source()).unwrap();
}

/// Packed bytes and the room for them have the size that the backend names.
pub(crate) fn refuses_packed_bytes_of_another_size<B: Tested>(make: &Make<B>) {
    let mut b = make.backend();
    let is_size = |error: KernelError| matches!(error, KernelError::Size { .. });
    let packed = |bytes: usize| Packed::filled(bytes, |_| Ok::<(), KernelError>(())).unwrap();
    let tensor = Random(33).tensor(40 * 48, 1.0);
    let stack = [Stack { weight: tensor.source(), bias: None }];
    let shape = ExpertShape { hidden: 64, intermediate: 32, limit: 7.0 };
    let expert = Expert::random(&mut Random(34), 64, 32);
    let mut experts = b.experts(1, shape);
    for change in [-1, 1] {
        for used in [DenseUse::Projection, DenseUse::Router] {
            let bytes = b.dense_bytes(used, 40, 48).saturating_add_signed(change);
            assert!(is_size(b.pack_dense(used, 48, &stack, &mut vec![0; bytes]).unwrap_err()), "{}", make.name);
            assert!(is_size(b.hold_dense(used, 40, 48, packed(bytes)).err().unwrap()), "{}", make.name);
        }
        let bytes = b.expert_bytes(&experts).saturating_add_signed(change);
        assert!(is_size(b.pack_expert(&experts, &expert.source(), &mut vec![0; bytes]).unwrap_err()), "{}", make.name);
        assert!(is_size(b.hold_expert(&mut experts, 0, packed(bytes)).unwrap_err()), "{}", make.name);
    }
    if !trusts(make) {
        let bytes = packed(b.expert_bytes(&experts));
        let error = b.hold_expert(&mut experts, 1, bytes).unwrap_err();
        assert_eq!(error, KernelError::Plan { what: "expert slot", index: 1, len: 1 }, "{}", make.name);
        assert!(matches!(b.load_expert(&mut experts, 1, &expert.source()), Err(KernelError::Plan { .. })));
    }
    b.finish().unwrap();
}

pub(crate) fn refuses_damaged_records<B: Tested>(make: &Make<B>) {
    // So few that every warp of a GPU lists them for itself, and more.
    for times in [1, 5] {
        refuses_damaged_records_among(make, times);
    }
}

fn refuses_damaged_records_among<B: Tested>(make: &Make<B>, times: usize) {
    let shape = ExpertShape { hidden: 32, intermediate: 32, limit: 7.0 };
    let mut random = Random(32);
    let expert = Expert::random(&mut random, 32, 32);
    let rows = random.numbers(2 * 32);
    let good = records(make.precision, &[vec![0, NO_SLOT], vec![NO_SLOT, 0]], &rows).repeat(times);
    let mut received = HostParts::new(1);
    received.by_rank[0].clone_from(&good);
    let expected = work(make, shape, &[Some(&expert)], 2, &received).by_rank.remove(0);

    let empty = records(make.precision, &[vec![1, NO_SLOT]], &rows[..32]);
    let beyond = records(make.precision, &[vec![0, 77]], &rows[..32]);
    for (bad, what) in [
        (good.repeat(4), "more rows than a step may have"),
        (good[..good.len() - 1].to_vec(), "a part that is not made of whole records"),
        (vec![1, 2, 3], "a part that is not made of whole records"),
        (empty.repeat(4 * times + 1), "a row for an expert slot that is empty"),
        (beyond, "a row for an expert slot that is empty"),
    ] {
        if what.starts_with("more rows") && trusts(make) {
            continue;
        }
        let mut b = make.backend();
        let mut experts = b.experts(2, shape);
        b.load_expert(&mut experts, 0, &expert.source()).unwrap();
        let _routes = b.routes(0, 2);
        let mut work = b.work(8 * times, 2, shape);
        let mut out = b.parts(4, 8 * times * 2 * b.combine_record(32));
        b.begin(&step(0), &rope_table(8));
        // The last is wrong too, but the first to be is named.
        let received = b.upload(&HostParts { by_rank: vec![good.clone(), bad, good.clone(), vec![1]] });
        b.receive(&received, &experts, &mut work);
        b.gate_up(&experts, &mut work);
        b.down(&experts, &work, &mut out);
        assert_eq!(b.finish(), Err(KernelError::Received { rank: 1, what }), "{}", make.name);
        // The rows of the other ranks are as ever.
        let out = b.download(&out);
        let wire = |bytes: &[u8]| exchange::from_wire(make.precision, bytes);
        assert_eq!(
            out.by_rank.iter().map(|part| wire(part)).collect::<Vec<_>>(),
            [wire(&expected), vec![], wire(&expected), vec![]]
        );
    }
}
