//! The numeric contract, bit for bit: a row's result depends on the row, its prefix and the weights, never on how
//! many rows there are, how a sequence is cut into steps, how many threads work or which instructions they use.

use phalanx_kernels::{Isa, Precision};

use crate::compare::{close, same};
use crate::layer::{Layers, Row, VOCAB};
use crate::rows::COUNTS;
use crate::{Make, PRECISIONS, Tested, make_cpu, references};

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
    for (precision, reference) in PRECISIONS.into_iter().zip(references()) {
        let run = |isa, threads| Layers::new(&make_cpu(isa, precision, threads), 100).step(&rows);
        let expected = run(Isa::Portable, 1);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let what = format!("{} {precision:?} with {threads} threads against portable", isa.name());
                same(&what, VOCAB, &expected, &run(isa, threads)).unwrap();
            }
        }
        let tolerance = if precision == Precision::Exact { 1e-4 } else { 5e-2 };
        let reference = Layers::new(&reference, 100).step(&rows);
        close(&format!("{precision:?} against the reference"), VOCAB, &reference, &expected, tolerance).unwrap();
    }
}
