//! The suite sees faults: a comparison with something slightly wrong must fail at the tolerances in use.

use phalanx_kernels::cuda::{Emulated, Fault as Planted};
use phalanx_kernels::reference::linear::linear;
use phalanx_kernels::{Backend, DenseFormat, DenseUse, ExpertShape, HostParts, Isa, Precision, Stack};

use crate::attention::Sequence;
use crate::compare::close;
use crate::data::{Expert, Random};
use crate::experts::{expected_expert, records, try_work, work};
use crate::operand::Operand;
use crate::{HOPPER, Make, Tested, make_cpu, make_cuda, tolerances};

/// A name and what it does.
type Fault<T> = (&'static str, fn(&mut T));

fn make(precision: Precision) -> Make<phalanx_kernels::Cpu> {
    make_cpu(Isa::detect(), (precision, DenseFormat::Bf16), 1)
}

/// Compares the right expert's results with those of a wrong one.
fn compare_experts<B: Tested>(make: &Make<B>, wrong: fn(&mut Expert), limit: f32) -> Result<(), String> {
    let precision = make.precision;
    let shape = ExpertShape { hidden: 96, intermediate: 64, limit: 7.0 };
    let mut random = Random(61);
    let right = Expert::random(&mut random, 96, 64);
    let row: Vec<f32> = random.numbers(96).iter().map(|x| x * 4.0).collect();
    let mut received = HostParts::new(1);
    received.by_rank[0] = records(precision, &[vec![0]], &row);
    let got = work(make, shape, &[Some(&right)], 1, &received);
    let wire = |bytes: &[u8]| phalanx_kernels::reference::exchange::from_wire(precision, bytes);
    let row = wire(&phalanx_kernels::reference::exchange::to_wire(precision, &row));
    let mut other = right.clone();
    wrong(&mut other);
    let expected = expected_expert(make.expert, &other, limit, &row);
    close("experts", 96, &expected, &wire(&got.by_rank[0]), tolerances::expert(precision))
}

#[test]
fn faults_in_experts_are_seen() {
    for precision in crate::PRECISIONS {
        let make = make(precision);
        compare_experts(&make, |_| (), 7.0).unwrap();
        let faults: [Fault<Expert>; 6] = [
            ("nibbles swapped", |e| e.gate_up_blocks.iter_mut().for_each(|b| *b = b.rotate_left(4))),
            ("nibbles of down swapped", |e| e.down_blocks.iter_mut().for_each(|b| *b = b.rotate_left(4))),
            ("one scale off by one", |e| e.down_scales[6] += 1),
            ("blocks in another order", |e| e.gate_up_blocks.chunks_mut(48).for_each(|row| row.rotate_left(16))),
            ("gates and ups swapped", |e| e.gate_up_bias.values.chunks_mut(2).for_each(|pair| pair.swap(0, 1))),
            ("no bias of down", |e| e.down_bias.values.fill(0.0)),
        ];
        for (name, fault) in faults {
            assert!(compare_experts(&make, fault, 7.0).is_err(), "{precision:?}: {name} is not seen");
        }
        assert!(compare_experts(&make, |_| (), 6.5).is_err(), "{precision:?}: another clamp is not seen");
    }
}

#[test]
fn faults_in_attention_are_seen() {
    for precision in [Precision::Exact, Precision::Fast] {
        let make = make(precision);
        let sequence = || Sequence::new([4, 2, 16], Some(20), 0, 70);
        let got = sequence().run(&make, 70);
        let attend = tolerances::attend(make.attention);
        let compare =
            |wrong: &Sequence| close("", 64, &wrong.expected(make.keys, make.attention, &got.qkv), &got.out, attend);
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
        let other = sequence().expected(Operand::of_cpu_keys(other), make.attention, &got.qkv);
        assert!(close("", 64, &other, &got.out, attend).is_err(), "{precision:?}: KV of the other precision");
    }
}

/// Attention of a device against the reference.
fn compare_attention(device: Emulated, precision: Precision, window: Option<u32>) -> Result<(), String> {
    let make = make_cuda(device, precision);
    let attend = tolerances::attend(make.attention);
    // All rows at once, which takes one walk over the segments, and one by one, which takes the other.
    for chunk in [70, 1] {
        let sequence = Sequence::new([4, 2, 64], window, 0, 70);
        let got = sequence.run(&make, chunk);
        close("attention", 256, &sequence.expected(make.keys, make.attention, &got.qkv), &got.out, attend)?;
    }
    Ok(())
}

/// Kernels with a fault in them fail the checks that the right ones pass.
#[test]
fn faults_in_kernels_are_seen() {
    let (right, planted) = (Emulated::default(), |fault| Emulated { fault: Some(fault), ..Emulated::default() });
    for precision in crate::PRECISIONS {
        let experts = |device| compare_experts(&make_cuda(device, precision), |_| (), 7.0);
        experts(right).unwrap();
        assert!(experts(planted(Planted::Nibbles)).is_err(), "{precision:?}: swapped nibbles are not seen");
        for window in [None, Some(20)] {
            compare_attention(right, precision, window).unwrap();
            let barrier = compare_attention(planted(Planted::Barrier), precision, window);
            assert!(barrier.is_err(), "{precision:?}, window {window:?}: a missing barrier is not seen");
        }
        let window = compare_attention(planted(Planted::Window), precision, Some(20));
        assert!(window.is_err(), "{precision:?}: a window longer by one is not seen");
    }
}

/// Experts on Hopper as wide as several turns of a ring; what breaks a rule of an instruction is an error, and the rest
/// makes other numbers.
fn hopper_experts(device: Emulated) -> Result<(), String> {
    let (hidden, intermediate) = (1184, 64);
    let make = make_cuda(device, Precision::Fast);
    let shape = ExpertShape { hidden, intermediate, limit: 7.0 };
    let mut random = Random(62);
    let expert = Expert::random(&mut random, hidden, intermediate);
    let rows = random.numbers(9 * hidden);
    let mut received = HostParts::new(1);
    received.by_rank[0] = records(Precision::Fast, &vec![vec![0]; 9], &rows);
    // As many rows for a slot as the kernels for 32 items take, in which faults are planted.
    let got = try_work(&make, shape, &[Some(&expert)], 1, &received).map_err(|error| error.to_string())?;
    let wire = |bytes: &[u8]| phalanx_kernels::reference::exchange::from_wire(Precision::Fast, bytes);
    let expected: Vec<f32> = rows
        .chunks(hidden)
        .flat_map(|row| expected_expert(make.expert, &expert, 7.0, &make.expert.round_f32(row)))
        .collect();
    close("experts", hidden, &expected, &wire(&got.by_rank[0]), tolerances::expert(Precision::Fast))
}

/// Two projections on Hopper, one after the other, as wide as several turns of a ring.
fn hopper_dense(device: Emulated, count: usize) -> Result<(), String> {
    let (rows, cols) = (65, 4000);
    let make = make_cuda(device, Precision::Fast);
    let mut b = make.backend();
    let mut random = Random(63);
    let (weight, values) = (random.tensor(rows * cols, 1.0), random.numbers(2 * count * cols));
    let dense = b.dense(DenseUse::Projection, cols, &[Stack { weight: weight.source(), bias: None }]).unwrap();
    let (mut x, mut out) = (b.rows(count, cols), b.rows(count, rows));
    let got = [0, 1].map(|which| {
        b.write(&mut x, &values[which * count * cols..][..count * cols]);
        // Added to nothing: what is written twice shows.
        b.write(&mut out, &vec![0.0; count * rows]);
        b.project_add(&x, &dense, &mut out);
        b.read(&out)
    });
    b.finish().map_err(|error| error.to_string())?;
    let weight: Vec<f64> = weight.values.iter().copied().map(f64::from).collect();
    let bias = vec![0.0; rows];
    let expected: Vec<f32> =
        values.chunks(cols).flat_map(|row| linear(&make.projection.round(row), &weight, &bias)).collect();
    close("a projection", rows, &expected, &got.concat(), tolerances::PROJECT)
}

#[test]
fn faults_in_hoppers_kernels_are_seen() {
    for count in [3, 40] {
        hopper_dense(HOPPER, count).unwrap();
        for fault in [Planted::Wait, Planted::Fence, Planted::Registers, Planted::Meet] {
            let seen = hopper_dense(Emulated { fault: Some(fault), ..HOPPER }, count);
            assert!(seen.is_err(), "{fault:?} is not seen with {count} tokens");
        }
    }
    // Eight tokens stay where they are: of a stage that is left nothing is read.
    assert!(hopper_dense(Emulated { fault: Some(Planted::Early), ..HOPPER }, 40).is_err(), "not seen with 40 tokens");
    hopper_experts(HOPPER).unwrap();
    for fault in [
        Planted::Nibbles,
        Planted::Wait,
        Planted::Phase,
        Planted::Stage,
        Planted::Stride,
        Planted::Fence,
        Planted::Registers,
        Planted::Early,
        Planted::Meet,
    ] {
        let seen = hopper_experts(Emulated { fault: Some(fault), ..HOPPER });
        assert!(seen.is_err(), "{fault:?} is not seen");
    }
}
