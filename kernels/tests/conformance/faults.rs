//! The suite sees faults: a comparison with something slightly wrong must fail at the tolerances in use.

use phalanx_kernels::{ExpertShape, HostParts, Isa, Precision};

use crate::attention::Sequence;
use crate::compare::close;
use crate::data::{Expert, Random};
use crate::experts::{expected_expert, records, work};
use crate::{Make, make_cpu, tolerances};

/// A name and what it does.
type Fault<T> = (&'static str, fn(&mut T));

fn make(precision: Precision) -> Make<phalanx_kernels::Cpu> {
    make_cpu(Isa::detect(), precision, 1)
}

/// Compares the right expert's results with those of a wrong one.
fn compare_experts(precision: Precision, wrong: fn(&mut Expert), limit: f32) -> Result<(), String> {
    let shape = ExpertShape { hidden: 96, intermediate: 64, limit: 7.0 };
    let mut random = Random(61);
    let right = Expert::random(&mut random, 96, 64);
    let row: Vec<f32> = random.numbers(96).iter().map(|x| x * 4.0).collect();
    let mut received = HostParts::new(1);
    received.by_rank[0] = records(precision, &[vec![0]], &row);
    let got = work(&make(precision), shape, &[Some(&right)], 1, &received);
    let wire = |bytes: &[u8]| phalanx_kernels::reference::exchange::from_wire(precision, bytes);
    let row = wire(&phalanx_kernels::reference::exchange::to_wire(precision, &row));
    let mut other = right.clone();
    wrong(&mut other);
    let expected = expected_expert(make(precision).expert, &other, limit, &row);
    close("experts", 96, &expected, &wire(&got.by_rank[0]), tolerances::expert(precision))
}

#[test]
fn faults_in_experts_are_seen() {
    for precision in crate::PRECISIONS {
        compare_experts(precision, |_| (), 7.0).unwrap();
        let faults: [Fault<Expert>; 6] = [
            ("nibbles swapped", |e| e.gate_up_blocks.iter_mut().for_each(|b| *b = b.rotate_left(4))),
            ("nibbles of down swapped", |e| e.down_blocks.iter_mut().for_each(|b| *b = b.rotate_left(4))),
            ("one scale off by one", |e| e.down_scales[6] += 1),
            ("blocks in another order", |e| e.gate_up_blocks.chunks_mut(48).for_each(|row| row.rotate_left(16))),
            ("gates and ups swapped", |e| e.gate_up_bias.values.chunks_mut(2).for_each(|pair| pair.swap(0, 1))),
            ("no bias of down", |e| e.down_bias.values.fill(0.0)),
        ];
        for (name, fault) in faults {
            assert!(compare_experts(precision, fault, 7.0).is_err(), "{precision:?}: {name} is not seen");
        }
        assert!(compare_experts(precision, |_| (), 6.5).is_err(), "{precision:?}: another clamp is not seen");
    }
}

#[test]
fn faults_in_attention_are_seen() {
    for precision in crate::PRECISIONS {
        let make = make(precision);
        let sequence = || Sequence::new([4, 2, 16], Some(20), 0, 70);
        let got = sequence().run(&make, 70);
        let compare =
            |wrong: &Sequence| close("", 64, &wrong.expected(precision, &got.qkv), &got.out, tolerances::ATTEND);
        compare(&sequence()).unwrap();
        let faults: [Fault<Sequence>; 4] = [
            ("a window longer by one", |s| s.window = Some(21)),
            ("a window shorter by one", |s| s.window = Some(19)),
            ("no sink", |s| s.sinks.values.fill(-1e30)),
            ("sinks in another order", |s| s.sinks.values.swap(0, 1)),
        ];
        for (name, fault) in faults {
            let mut wrong = sequence();
            fault(&mut wrong);
            assert!(compare(&wrong).is_err(), "{precision:?}: {name} is not seen");
        }
        let other = if precision == Precision::Exact { Precision::Fast } else { Precision::Exact };
        let other = sequence().expected(other, &got.qkv);
        assert!(
            close("", 64, &other, &got.out, tolerances::ATTEND).is_err(),
            "{precision:?}: KV of the other precision"
        );
    }
}
