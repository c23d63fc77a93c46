//! The numeric contract, bit for bit: a row's result depends on the row, its prefix and the weights, never on how
//! many rows there are, how a sequence is cut into steps, how many threads work or which instructions they use.

use phalanx_kernels::cuda::Family;
use phalanx_kernels::{Backend, DenseFormat, DenseUse, ExpertShape, HostParts, Isa, Precision, Stack};

use crate::attention::Sequence;
use crate::compare::{close, same};
use crate::data::{Expert, Random};
use crate::experts::{records, work};
use crate::layer::{Layers, Row, VOCAB};
use crate::rows::COUNTS;
use crate::{KINDS, Make, Tested, cudas, gpus, make_cpu, references};

fn token(sequence: u32, position: u32) -> u32 {
    (position * 37 + sequence * 11 + 5) % VOCAB as u32
}

fn row(sequence: u32, position: u32) -> Row {
    (sequence, position, token(sequence, position))
}

/// Logits of `n` positions of a sequence, each in a step of its own.
fn one_by_one<B: Tested>(make: &Make<B>, sequence: u32, n: u32) -> Vec<f32> {
    let mut layers = Layers::new(make, 1);
    (0..n).flat_map(|position| layers.step(&[row(sequence, position)])).collect()
}

/// Alone, a sequence's first token gives the same as beside any number of others, at any place.
pub(crate) fn rows_alone_or_together<B: Tested>(make: &Make<B>) {
    let mut alone: Vec<Vec<f32>> = Vec::new();
    for sequence in 0..8 {
        alone.push(one_by_one(make, sequence, 9));
    }
    for count in COUNTS {
        // Eight sequences' rows in turn: (sequence, position) in the order of position.
        let rows: Vec<Row> = (0..count as u32).map(|i| row(i % 8, i / 8)).collect();
        let got = Layers::new(make, count).step(&rows);
        for (got, &(sequence, position, _)) in got.chunks(VOCAB).zip(&rows) {
            let expected = &alone[sequence as usize][position as usize * VOCAB..][..VOCAB];
            let what = format!("{}, {count} rows, sequence {sequence}, position {position}", make.name);
            same(&what, VOCAB, expected, got).unwrap();
        }
    }
}

/// Steps of one row, of a whole prompt, and cut at every kind of border, give the same rows.
pub(crate) fn chunks_of_any_size<B: Tested>(make: &Make<B>) {
    const LENGTH: u32 = 90;
    let expected = one_by_one(make, 3, LENGTH);
    // Within and at borders of blocks (16), segments (64) and the window (20).
    for cuts in [vec![], vec![1], vec![16, 32], vec![15, 17, 63], vec![64], vec![20, 21, 65, 89]] {
        let mut layers = Layers::new(make, LENGTH as usize);
        let mut got = Vec::new();
        let borders: Vec<u32> = [0].into_iter().chain(cuts).chain([LENGTH]).collect();
        for border in borders.windows(2) {
            let rows: Vec<Row> = (border[0]..border[1]).map(|position| row(3, position)).collect();
            // Another sequence decodes beside it.
            let beside = row(5, 0);
            let all: Vec<Row> = rows.iter().copied().chain((rows.len() < 64).then_some(beside)).collect();
            let logits = layers.step(&all);
            got.extend_from_slice(&logits[..rows.len() * VOCAB]);
        }
        same(&format!("{}, steps at {borders:?}", make.name), VOCAB, &expected, &got).unwrap();
    }
}

/// A step without rows leaves all as it was; the rank then only serves its experts.
pub(crate) fn steps_without_rows<B: Tested>(make: &Make<B>) {
    let mut layers = Layers::new(make, 4);
    let expected = one_by_one(make, 1, 2);
    let mut got = layers.step(&[row(1, 0)]);
    assert_eq!(layers.step(&[]), [], "{}", make.name);
    got.extend(layers.step(&[row(1, 1)]));
    same(&make.name, VOCAB, &expected, &got).unwrap();
}

/// All instruction sets and any number of threads give the same bits, close to the reference.
#[test]
fn instruction_sets_and_threads_agree() {
    let rows: Vec<Row> = (0..80).map(|position| row(2, position)).chain((0..20).map(|p| row(6, p))).collect();
    for (kind, reference) in KINDS.into_iter().zip(references()) {
        let (precision, dense) = kind;
        let run = |isa, threads| Layers::new(&make_cpu(isa, kind, threads), 100).step(&rows);
        let expected = run(Isa::Portable, 1);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let what = format!("{} {precision:?} {dense:?} with {threads} threads against portable", isa.name());
                same(&what, VOCAB, &expected, &run(isa, threads)).unwrap();
            }
        }
        let tolerance = if precision == Precision::Exact { 1e-4 } else { 5e-2 };
        let reference = Layers::new(&reference, 100).step(&rows);
        close(&format!("{precision:?} against the reference"), VOCAB, &reference, &expected, tolerance).unwrap();
    }
}

/// Root of the mean square of the differences, as a part of the numbers'.
fn distance(expected: &[f32], got: &[f32]) -> f64 {
    assert_eq!(expected.len(), got.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let differences: f64 = expected.iter().zip(got).map(|(e, g)| square(e - g)).sum();
    (differences / expected.iter().map(|&e| square(e)).sum::<f64>()).sqrt()
}

/// Exact: number by number. Fast: CUDA rounds other numbers than the reference, to bf16 before every matrix instead of to
/// int8 before the experts'. So it is held against the exact result, and must be no further from it than the reference's
/// rounding is.
#[test]
fn cuda_is_close_to_the_reference() {
    let rows: Vec<Row> = (0..80).map(|position| row(2, position)).chain((0..20).map(|p| row(6, p))).collect();
    let [exact, fast, _] = references();
    let [exact, fast] = [exact, fast].map(|reference| Layers::new(&reference, 100).step(&rows));
    for make in cudas() {
        let got = Layers::new(&make, 100).step(&rows);
        match make.precision {
            Precision::Exact => close(&make.name, VOCAB, &exact, &got, 1e-4).unwrap(),
            Precision::Fast => {
                let [allowed, distance] = [&fast, &got].map(|logits| distance(&exact, logits));
                assert!(distance <= allowed, "{}: {distance} from exact, the reference {allowed}", make.name);
            }
        }
    }
}

/// In exact precision, attention and the experts add in the same orders on CPUs and on CUDA devices, with the same `exp`:
/// so they give the same bits.
#[test]
fn exact_attention_and_experts_are_the_same_on_cpus_and_on_cuda() {
    let cpu = make_cpu(Isa::detect(), (Precision::Exact, DenseFormat::Bf16), 2);
    for cuda in cudas().iter().filter(|make| make.precision == Precision::Exact) {
        for window in [None, Some(20)] {
            for chunk in [90, 1] {
                let sequence = Sequence::new([18, 2, 24], window, 0, 90);
                let [expected, got] = [sequence.run(&cpu, chunk), sequence.run(cuda, chunk)];
                let what = format!("{}, window {window:?}, {chunk} rows at once", cuda.name);
                same(&format!("{what}, rotated"), 22 * 24, &expected.qkv, &got.qkv).unwrap();
                same(&what, 18 * 24, &expected.out, &got.out).unwrap();
            }
        }
        let shape = ExpertShape { hidden: 96, intermediate: 160, limit: 7.0 };
        let mut random = Random(81);
        let expert = Expert::random(&mut random, 96, 160);
        let mut received = HostParts::new(1);
        received.by_rank[0] = records(Precision::Exact, &vec![vec![0]; 21], &random.numbers(21 * 96));
        let expected = work(&cpu, shape, &[Some(&expert)], 1, &received);
        assert_eq!(work(cuda, shape, &[Some(&expert)], 1, &received), expected, "{}", cuda.name);
    }
}

/// Hopper's dense kernels, for few rows and for many, whole or in halves that meet, add in one order. Which kernels these
/// shapes take is said beside `choose::dense_wgmma`.
#[test]
fn dense_matrices_on_hopper_are_added_in_one_order_on_cuda() {
    let small: &[(usize, usize, &[usize])] = &[(1000, 70, &[3, 20, 64, 100, 300]), (70, 1002, &[3, 20, 200, 300, 600])];
    let published: &[(usize, usize, &[usize])] =
        &[(5120, 2880, &[1, 64, 128, 256, 512]), (2880, 4096, &[8, 9, 64, 128, 256])];
    let on_gpu = gpus().is_some();
    for make in cudas().iter().filter(|make| make.backend().family() == Family::Wgmma) {
        for &(rows, cols, counts) in small.iter().chain(if on_gpu { published } else { &[] }) {
            let mut b = make.backend();
            let mut random = Random(82);
            let (weight, bias) = (random.tensor(rows * cols, 1.0), random.tensor(rows, 1.0));
            let values = random.numbers(counts[counts.len() - 1] * cols);
            let dense = b
                .dense(DenseUse::Projection, cols, &[Stack { weight: weight.source(), bias: Some(bias.source()) }])
                .unwrap();
            let mut project = |count: usize| {
                let (mut x, mut out) = (b.rows(count, cols), b.rows(count, rows));
                b.write(&mut x, &values[..count * cols]);
                b.project(&x, &dense, &mut out);
                b.read(&out)
            };
            let all = project(counts[counts.len() - 1]);
            for &count in counts {
                let what = format!("{}, {count} rows of [{rows}, {cols}]", make.name);
                same(&what, rows, &all[..count * rows], &project(count)).unwrap();
            }
        }
    }
}
