//! The kernels of CUDA devices at the published widths, which are too much for every run under emulation.

use phalanx_kernels::reference::{exchange, linear::linear};
use phalanx_kernels::{Backend, DenseUse, Draw, ExpertShape, HostParts, Stack};

use crate::attention::Sequence;
use crate::compare::close;
use crate::data::{Expert, Random};
use crate::experts::{expected_expert, records, work};
use crate::{cudas, sampling, tolerances};

const HIDDEN: usize = 2880;

#[test]
#[ignore = "full tier: matrices of the published widths, emulated"]
fn published_projections_on_cuda() {
    let mut random = Random(91);
    let (rows, counts) = (5120, [1, 17, 65]);
    let (weight, bias) = (random.tensor(rows * HIDDEN, 0.1), random.tensor(rows, 1.0));
    for make in cudas() {
        let mut b = make.backend();
        let stack = [Stack { weight: weight.source(), bias: Some(bias.source()) }];
        let dense = b.dense(DenseUse::Projection, HIDDEN, &stack).unwrap();
        for count in counts {
            let values = random.numbers(count * HIDDEN);
            let (mut x, mut out) = (b.rows(count, HIDDEN), b.rows(count, rows));
            b.write(&mut x, &values);
            b.project(&x, &dense, &mut out);
            let row = |row: &[f32]| linear(&make.projection.round_f32(row), &weight.values, &bias.values);
            let expected: Vec<f32> = values.chunks(HIDDEN).flat_map(row).collect();
            close(&format!("{}, {count} rows", make.name), rows, &expected, &b.read(&out), tolerances::PROJECT)
                .unwrap();
        }
        b.finish().unwrap();
    }
}

#[test]
#[ignore = "full tier: an expert of the published width, emulated"]
fn published_experts_on_cuda() {
    let mut random = Random(92);
    let shape = ExpertShape { hidden: HIDDEN, intermediate: HIDDEN, limit: 7.0 };
    let expert = Expert::random(&mut random, HIDDEN, HIDDEN);
    for make in cudas() {
        for count in [1, 41] {
            let rows: Vec<f32> = random.numbers(count * HIDDEN).iter().map(|x| x * 0.2).collect();
            let mut received = HostParts::new(1);
            received.by_rank[0] = records(make.precision, &vec![vec![0]; count], &rows);
            let wire = |bytes: &[u8]| exchange::from_wire(make.precision, bytes);
            let expected = wire(&exchange::to_wire(make.precision, &rows));
            let expected = expected.chunks(HIDDEN).flat_map(|row| expected_expert(make.expert, &expert, 7.0, row));
            let got = wire(&work(&make, shape, &[Some(&expert)], 1, &received).by_rank[0]);
            let expected: Vec<f32> = expected.collect();
            let tolerance = tolerances::expert(make.precision);
            close(&format!("{}, {count} rows", make.name), HIDDEN, &expected, &got, tolerance).unwrap();
        }
    }
}

#[test]
#[ignore = "full tier: the published heads over a long past, emulated"]
fn published_heads_on_cuda() {
    for make in cudas() {
        Sequence::new([64, 8, 64], None, 0, 700).check(&make, 70);
        Sequence::new([64, 8, 64], Some(128), 0, 300).check(&make, 1);
    }
}

#[test]
#[ignore = "full tier: the published vocabulary, emulated"]
fn published_vocabulary_on_cuda() {
    let vocab = 201_088;
    let draw = |i: u32| Draw {
        temperature: 1.0,
        top_k: [0, 50, 0, 1000][i as usize % 4],
        top_p: [1.0, 1.0, 0.9, 0.95][i as usize % 4],
        seed: 5,
        logprobs: Some(20),
        ..Draw::greedy(0, i)
    };
    let draws: Vec<Draw> = (0..8).map(draw).collect();
    let logits: Vec<f32> = Random(93).numbers(draws.len() * vocab).iter().map(|x| x * 9.0).collect();
    for make in cudas() {
        let drawn = sampling::sampled(&make, &logits, &draws);
        for ((logits, draw), drawn) in logits.chunks(vocab).zip(&draws).zip(drawn) {
            sampling::check(&make.name, logits, draw, drawn.token);
            assert_eq!(drawn.top.len(), 20);
        }
    }
}
