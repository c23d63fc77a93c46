//! Ops on rows: embedding, gathering, norm, projections.

use phalanx_kernels::reference::{linear::linear, q8, rms_norm::rms_norm};
use phalanx_kernels::{DenseFormat, DenseUse, Draw, Stack, StepInputs, TokenSource};

use crate::compare::{close, same};
use crate::data::{Random, rope_table};
use crate::{Make, Tested, tolerances};

/// Row counts around what kernels work on at once.
pub(crate) const COUNTS: [usize; 9] = [1, 2, 7, 8, 9, 16, 17, 64, 65];

pub(crate) fn embeds_given_and_sampled_tokens<B: Tested>(make: &Make<B>) {
    let (vocab, hidden) = (50, 24);
    let mut b = make.backend();
    let table = Random(1).tensor(vocab * hidden, 1.0);
    let embedding = b.embedding(hidden, table.embedding()).unwrap();
    b.token_slots(3);
    let mut x = b.rows(4, hidden);
    let mut logits = b.rows(1, vocab);
    let mut one_hot = vec![0.0; vocab];
    one_hot[37] = 1.0;
    b.begin(&StepInputs::default(), &rope_table(8));
    b.write(&mut logits, &one_hot);
    b.sample(&logits, &[Draw::greedy(2, 0)]);
    b.set_token(0, 49);
    let first = b.end();
    let tokens = vec![TokenSource::Given(0), TokenSource::Sampled(2), TokenSource::Given(49), TokenSource::Sampled(0)];
    let inputs = StepInputs { tokens, positions: vec![0; 4], sequences: vec![0; 4], tables: Vec::new() };
    b.begin(&inputs, &rope_table(8));
    b.embed(&embedding, &mut x);
    let expected: Vec<f32> =
        [0, 37, 49, 49].iter().flat_map(|t| &table.values[t * hidden..(t + 1) * hidden]).copied().collect();
    same(&make.name, hidden, &expected, &b.read(&x)).unwrap();
    let second = b.end();
    assert_eq!(b.result(first).unwrap()[0].token, 37);
    assert_eq!(b.result(second).unwrap(), [], "a step begins without samples");
}

pub(crate) fn gathers<B: Tested>(make: &Make<B>) {
    let mut b = make.backend();
    let values = Random(2).numbers(5 * 24);
    let (mut x, mut out) = (b.rows(5, 24), b.rows(3, 24));
    b.write(&mut x, &values);
    for rows in [vec![], vec![4], vec![3, 0, 3]] {
        b.gather(&x, &rows, &mut out);
        let expected: Vec<f32> = rows.iter().flat_map(|&row| &values[row as usize * 24..][..24]).copied().collect();
        same(&make.name, 24, &expected, &b.read(&out)).unwrap();
    }
    b.finish().unwrap();
}

pub(crate) fn norms<B: Tested>(make: &Make<B>) {
    // Less than a vector, a vector, a tail, the published width, more than a block of a kernel keeps.
    for hidden in [1, 15, 16, 24, 96, 2880, 3300] {
        let mut b = make.backend();
        let mut random = Random(3);
        let weight = random.tensor(hidden, 2.0);
        let values: Vec<f32> = random.numbers(5 * hidden).iter().map(|x| x * 30.0).collect();
        let weights = b.vector(weight.source()).unwrap();
        let (mut x, mut out) = (b.rows(5, hidden), b.rows(5, hidden));
        b.write(&mut x, &values);
        b.norm(&x, &weights, 1e-5, &mut out);
        let expected: Vec<f32> = values.chunks(hidden).flat_map(|row| rms_norm(row, &weight.values, 1e-5)).collect();
        let what = format!("{}, width {hidden}", make.name);
        close(&what, hidden, &expected, &b.read(&out), tolerances::NORM).unwrap();
        // Zero rows are divided by the epsilon, not by zero.
        b.write(&mut x, &vec![0.0; hidden]);
        b.norm(&x, &weights, 1e-5, &mut out);
        let got = b.read(&out);
        assert!(got.len() == hidden && got.iter().all(|&x| x == 0.0), "{what}: {got:?}");
        b.finish().unwrap();
    }
}

/// Output and input widths: one row, whole tiles, partial tiles, partial groups of tiles.
const SHAPES: [(usize, usize); 8] =
    [(1, 2), (16, 32), (17, 34), (80, 64), (1000, 48), (512, 32), (33, 2880), (130, 90)];

/// Rows times a matrix, both rounded as the backend does.
fn projected<B>(make: &Make<B>, x: &[f32], cols: usize, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let weight: Vec<f64> = match make.dense {
        DenseFormat::Bf16 => weight.iter().copied().map(f64::from).collect(),
        DenseFormat::Q8 => weight.chunks(cols).flat_map(q8::round).collect(),
    };
    x.chunks(cols).flat_map(|row| linear(&make.projection.round(row), &weight, bias)).collect()
}

pub(crate) fn projects<B: Tested>(make: &Make<B>) {
    for (rows, cols) in SHAPES {
        for count in [0].into_iter().chain(COUNTS) {
            // The dear combinations teach nothing more.
            if rows * cols * count > 600_000 {
                continue;
            }
            let mut b = make.backend();
            let mut random = Random(4);
            let (weight, bias) = (random.tensor(rows * cols, 1.0), random.tensor(rows, 1.0));
            let values = random.numbers(count * cols);
            let stack = [Stack { weight: weight.source(), bias: Some(bias.source()) }];
            let dense = b.dense(DenseUse::Projection, cols, &stack).unwrap();
            let (mut x, mut out) = (b.rows(count, cols), b.rows(count, rows));
            b.write(&mut x, &values);
            b.project(&x, &dense, &mut out);
            let expected = projected(make, &values, cols, &weight.values, &bias.values);
            let what = format!("{}, {count} rows of {cols} to {rows}", make.name);
            close(&what, rows, &expected, &b.read(&out), tolerances::PROJECT).unwrap();
            b.finish().unwrap();
        }
    }
}

/// A row's projection is the same bits beside any number of others, also where columns make several turns of a ring.
pub(crate) fn projects_any_number_of_rows<B: Tested>(make: &Make<B>) {
    let (rows, cols, most) = (70, 1002, 140);
    let mut b = make.backend();
    let mut random = Random(7);
    let (weight, bias) = (random.tensor(rows * cols, 1.0), random.tensor(rows, 1.0));
    let values = random.numbers(most * cols);
    let stack = [Stack { weight: weight.source(), bias: Some(bias.source()) }];
    let dense = b.dense(DenseUse::Projection, cols, &stack).unwrap();
    let (mut x, mut out) = (b.rows(most, cols), b.rows(most, rows));
    let mut project = |count: usize| {
        b.write(&mut x, &values[..count * cols]);
        b.project(&x, &dense, &mut out);
        b.read(&out)
    };
    let all = project(most);
    for count in COUNTS.into_iter().chain([128, 129]) {
        let what = format!("{}, {count} of {most} rows", make.name);
        same(&what, rows, &all[..count * rows], &project(count)).unwrap();
    }
    b.finish().unwrap();
}

pub(crate) fn stacks_matrices<B: Tested>(make: &Make<B>) {
    // Borders of the stacked matrices fall inside tiles.
    let (heights, cols) = ([24, 5, 1, 40], 32);
    let mut b = make.backend();
    let mut random = Random(5);
    let weights = heights.map(|rows| random.tensor(rows * cols, 1.0));
    let biases = heights.map(|rows| random.tensor(rows, 1.0));
    let stack: Vec<Stack<'_>> = weights
        .iter()
        .zip(&biases)
        .enumerate()
        .map(|(i, (weight, bias))| Stack { weight: weight.source(), bias: (i != 1).then(|| bias.source()) })
        .collect();
    let dense = b.dense(DenseUse::Projection, cols, &stack).unwrap();
    let values = random.numbers(3 * cols);
    let (mut x, mut out) = (b.rows(3, cols), b.rows(3, 70));
    b.write(&mut x, &values);
    b.project(&x, &dense, &mut out);
    let all: Vec<f32> = weights.iter().flat_map(|weight| weight.values.clone()).collect();
    let bias: Vec<f32> = biases
        .iter()
        .enumerate()
        .flat_map(|(i, bias)| if i == 1 { vec![0.0; bias.values.len()] } else { bias.values.clone() })
        .collect();
    let expected = projected(make, &values, cols, &all, &bias);
    close(&make.name, 70, &expected, &b.read(&out), tolerances::PROJECT).unwrap();
    b.finish().unwrap();
}

pub(crate) fn adds_a_projection<B: Tested>(make: &Make<B>) {
    let (rows, cols) = (40, 48);
    for count in [1, 9] {
        let mut b = make.backend();
        let mut random = Random(6);
        let (weight, bias) = (random.tensor(rows * cols, 1.0), random.tensor(rows, 1.0));
        let (values, before) = (random.numbers(count * cols), random.numbers(count * rows));
        let dense = b
            .dense(DenseUse::Projection, cols, &[Stack { weight: weight.source(), bias: Some(bias.source()) }])
            .unwrap();
        let (mut x, mut out, mut residual) = (b.rows(count, cols), b.rows(count, rows), b.rows(count, rows));
        b.write(&mut x, &values);
        b.write(&mut residual, &before);
        b.project(&x, &dense, &mut out);
        b.project_add(&x, &dense, &mut residual);
        let expected: Vec<f32> = b.read(&out).iter().zip(&before).map(|(y, before)| before + y).collect();
        same(&make.name, rows, &expected, &b.read(&residual)).unwrap();
        b.finish().unwrap();
    }
}
