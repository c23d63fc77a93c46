//! Routing, exchange and the experts.

use std::ops::Range;

use phalanx_kernels::reference::{exchange, linear::linear, mxfp4, router, swiglu::swiglu};
use phalanx_kernels::{
    DenseUse, ExpertShape, HostParts, KernelError, NO_SLOT, Precision, Stack, StepInputs, TokenSource,
};

use crate::compare::{close, same};
use crate::data::{Expert, Random, Tensor, rope_table};
use crate::operand::Operand;
use crate::rows::COUNTS;
use crate::{Make, Tested, tolerances};

/// What an expert should make of a row, before the wire.
pub(crate) fn expected_expert(operand: Operand, expert: &Expert, limit: f32, x: &[f32]) -> Vec<f32> {
    let multiply = |x: &[f32], blocks: &[u8], scales: &[u8], bias: &[f32]| -> Vec<f32> {
        let weight = mxfp4::decode(blocks, scales);
        let x = operand.round(x);
        let rows = weight.chunks(x.len()).zip(bias);
        rows.map(|(row, &b)| (row.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>() + f64::from(b)) as f32).collect()
    };
    let y = multiply(x, &expert.gate_up_blocks, &expert.gate_up_scales, &expert.gate_up_bias.values);
    let activations = swiglu(&y, limit);
    multiply(&activations, &expert.down_blocks, &expert.down_scales, &expert.down_bias.values)
}

pub(crate) fn step(rows: usize) -> StepInputs {
    StepInputs {
        tokens: vec![TokenSource::Given(0); rows],
        positions: vec![0; rows],
        sequences: vec![0; rows],
        tables: Vec::new(),
    }
}

/// The (experts, weights) that a backend chooses for logits that are the rows themselves.
fn chosen<B: Tested>(make: &Make<B>, logits: &[f32], experts: usize, top_k: usize) -> Vec<Vec<(u32, f32)>> {
    let hidden = experts.max(top_k).next_multiple_of(2);
    // The unit matrix as router.
    let unit: Vec<f32> = (0..experts * hidden).map(|i| f32::from(u8::from(i / hidden == i % hidden))).collect();
    let padded: Vec<f32> = logits
        .chunks(experts)
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, hidden - experts)))
        .collect();
    routed(make, &padded, &Tensor::new(&unit), None, [experts, hidden, top_k])
}

/// The same for rows and a router.
fn routed<B: Tested>(
    make: &Make<B>,
    rows: &[f32],
    weight: &Tensor,
    bias: Option<&Tensor>,
    [experts, hidden, top_k]: [usize; 3],
) -> Vec<Vec<(u32, f32)>> {
    let n = rows.len() / hidden;
    let mut b = make.backend();
    let stack = [Stack { weight: weight.source(), bias: bias.map(Tensor::source) }];
    let router = b.dense(DenseUse::Router, hidden, &stack).unwrap();
    let mut routes = b.routes(n, top_k);
    let mut x = b.rows(n, hidden);
    b.begin(&step(n), &rope_table(8));
    b.write(&mut x, rows);
    b.route(&x, &router, &mut routes);
    // Every expert on this rank: the record's slots tell the choice.
    let places: Vec<(u32, u32)> = (0..experts as u32).map(|expert| (0, expert)).collect();
    let places = b.places(&places);
    let record = b.dispatch_record(top_k, hidden);
    let mut parts = b.parts(1, n * top_k * record);
    b.dispatch(&x, &routes, &places, &mut parts);
    let slots: Vec<Vec<u32>> = b.download(&parts).by_rank[0]
        .chunks(record)
        .map(|bytes| exchange::parse(make.precision, bytes, top_k).0)
        .collect();
    // Unit rows as results: column k of the residual becomes the k-th weight.
    let mut results = HostParts::new(1);
    for i in 0..n * top_k {
        let row: Vec<f32> = (0..hidden).map(|column| f32::from(u8::from(column == i % top_k))).collect();
        results.by_rank[0].extend(exchange::to_wire(make.precision, &row));
    }
    b.write(&mut x, &vec![0.0; n * hidden]);
    let results = b.upload(&results);
    b.combine(&results, &routes, &places, &mut x);
    let weights = b.read(&x);
    b.finish().unwrap();
    slots
        .iter()
        .zip(weights.chunks(hidden))
        .map(|(slots, weights)| slots.iter().copied().zip(weights.iter().copied()).collect())
        .collect()
}

pub(crate) fn routes<B: Tested>(make: &Make<B>) {
    // Also all of them, more than a warp has lanes, and more than its lanes keep at once.
    for (experts, top_k) in [(4, 4), (8, 1), (32, 4), (128, 4), (5, 3), (48, 48), (160, 5)] {
        let mut logits: Vec<f32> = Random(11).numbers(70 * experts).iter().map(|x| x * 6.0).collect();
        // Equals: all, and two at the border of the choice.
        logits[..experts].fill(0.5);
        logits[experts..2 * experts].fill(-1.0);
        logits[2 * experts - 1] = 3.0;
        let got = chosen(make, &logits, experts, top_k);
        assert_eq!(got.len(), 70);
        for (row, (logits, got)) in logits.chunks(experts).zip(got).enumerate() {
            let expected = router::route(logits, top_k);
            let what = format!("{}, {top_k} of {experts}, row {row}", make.name);
            let (experts, weights): (Vec<u32>, Vec<f32>) = expected.into_iter().unzip();
            let (got_experts, got_weights): (Vec<u32>, Vec<f32>) = got.into_iter().unzip();
            assert_eq!(got_experts, experts, "{what}");
            close(&what, top_k, &weights, &got_weights, tolerances::ROUTE).unwrap();
        }
    }
}

/// A row's choice is the same bits beside any number of others, also where columns are more than one turn of a kernel, and
/// as close to the reference as sums in f32.
pub(crate) fn routes_any_number_of_rows<B: Tested>(make: &Make<B>) {
    let shape @ [experts, hidden, top_k] = [40, 1104, 4];
    let mut random = Random(15);
    let (weight, bias) = (random.tensor(experts * hidden, 0.05), random.tensor(experts, 0.5));
    // Fast kernels for few rows take up to 1024.
    let values = random.numbers(1030 * hidden);
    let bits = |rows: &[Vec<(u32, f32)>]| -> Vec<Vec<(u32, u32)>> {
        rows.iter().map(|row| row.iter().map(|&(expert, weight)| (expert, weight.to_bits())).collect()).collect()
    };
    let all = routed(make, &values, &weight, Some(&bias), shape);
    for (row, (values, got)) in values.chunks(hidden).zip(&all).enumerate().step_by(37) {
        let expected = router::route(&linear(values, &weight.values, &bias.values), top_k);
        let what = format!("{}, row {row}", make.name);
        let (experts, weights): (Vec<u32>, Vec<f32>) = expected.into_iter().unzip();
        let (got_experts, got_weights): (Vec<u32>, Vec<f32>) = got.iter().copied().unzip();
        assert_eq!(got_experts, experts, "{what}");
        close(&what, top_k, &weights, &got_weights, tolerances::ROUTE).unwrap();
    }
    for count in COUNTS.into_iter().chain([1024, 1025]) {
        let got = routed(make, &values[..count * hidden], &weight, Some(&bias), shape);
        assert_eq!(bits(&got), bits(&all[..count]), "{}, {count} rows", make.name);
    }
}

/// Numbers that are none, or too large, spoil the choice of their own row.
pub(crate) fn routes_beside_what_is_no_number<B: Tested>(make: &Make<B>) {
    let shape @ [experts, hidden, _] = [40, 64, 4];
    let mut random = Random(16);
    let weight = random.tensor(experts * hidden, 1.0);
    let mut values = random.numbers(9 * hidden);
    let expected = routed(make, &values, &weight, None, shape);
    let nan = f32::from_bits(0x7f80_0001);
    for (row, number) in [(1, f32::INFINITY), (4, f32::NEG_INFINITY), (7, f32::NAN), (8, nan)] {
        values[row * hidden + 5 * row] = number;
    }
    let got = routed(make, &values, &weight, None, shape);
    for (row, (got, expected)) in got.iter().zip(&expected).enumerate() {
        if [1, 4, 7, 8].contains(&row) {
            assert!(got.iter().all(|(_, weight)| weight.is_nan()), "{}, row {row}: {got:?}", make.name);
        } else {
            assert_eq!(got, expected, "{}, row {row}", make.name);
        }
    }
}

/// Routes by logits that are chosen so that rank 1 gets nothing, rank 2 one row, rank 0 all.
pub(crate) fn dispatches<B: Tested>(make: &Make<B>) {
    // Entries of one turn of a kernel's warps, and of several.
    for n in [5, 700] {
        dispatches_rows(make, n);
    }
}

fn dispatches_rows<B: Tested>(make: &Make<B>, n: usize) {
    let (hidden, experts, top_k) = (32, 6, 2);
    let mut b = make.backend();
    let mut random = Random(12);
    let unit: Vec<f32> = (0..experts * hidden).map(|i| f32::from(u8::from(i / hidden == i % hidden))).collect();
    let unit = Tensor::new(&unit);
    let router = b.dense(DenseUse::Router, hidden, &[Stack { weight: unit.source(), bias: None }]).unwrap();
    let values: Vec<f32> = random.numbers(n * hidden);
    let mut values = values;
    // Experts 0 and 1 for every row, 0 and 5 for row 3.
    for (row, values) in values.chunks_mut(hidden).enumerate() {
        values[..experts].copy_from_slice(&[9.0, if row == 3 { 1.0 } else { 8.0 }, 0.0, 0.0, 0.0, 4.0]);
    }
    let table = [(0, 7), (0, 3), (1, 0), (1, 1), (2, 0), (2, 5)];
    let places = b.places(&table);
    let mut routes = b.routes(n, top_k);
    let mut x = b.rows(n, hidden);
    let mut parts = b.parts(3, n * 2 * b.dispatch_record(top_k, hidden));
    for _ in 0..2 {
        // Twice: buffers are used again.
        b.begin(&step(n), &rope_table(8));
        b.write(&mut x, &values);
        b.route(&x, &router, &mut routes);
        b.dispatch(&x, &routes, &places, &mut parts);
        let mut expected = HostParts::new(3);
        for (row, values) in values.chunks(hidden).enumerate() {
            let chosen = if row == 3 { [(0, 7), (2, 5)] } else { [(0, 7), (0, 3)] };
            for (rank, part) in (0..).zip(&mut expected.by_rank) {
                part.extend(exchange::record(make.precision, values, &chosen, rank).into_iter().flatten());
            }
        }
        let parts = b.download(&parts);
        assert_eq!(parts, expected, "{}", make.name);
        assert_eq!(parts.by_rank[1], [], "nothing for a rank whose experts nobody chose");
        assert_eq!(parts.by_rank[0].len(), n * b.dispatch_record(top_k, hidden), "a row goes to a rank once");
        b.finish().unwrap();
    }
}

/// Records for slots, `[n, K]`, with their rows.
pub(crate) fn records(precision: Precision, slots: &[Vec<u32>], rows: &[f32]) -> Vec<u8> {
    let hidden = rows.len() / slots.len().max(1);
    let record = |(slots, row): (&Vec<u32>, &[f32])| {
        let slots = slots.iter().flat_map(|slot| slot.to_le_bytes());
        slots.chain(exchange::to_wire(precision, row)).collect::<Vec<u8>>()
    };
    slots.iter().zip(rows.chunks(hidden.max(1))).flat_map(record).collect()
}

/// Runs experts on what ranks sent; returns what goes back.
pub(crate) fn work<B: Tested>(
    make: &Make<B>,
    shape: ExpertShape,
    experts: &[Option<&Expert>],
    top_k: usize,
    received: &HostParts,
) -> HostParts {
    try_work(make, shape, experts, top_k, received).unwrap()
}

/// The same where it may fail.
pub(crate) fn try_work<B: Tested>(
    make: &Make<B>,
    shape: ExpertShape,
    experts: &[Option<&Expert>],
    top_k: usize,
    received: &HostParts,
) -> Result<HostParts, KernelError> {
    let mut b = make.backend();
    let rows = received.by_rank.iter().map(|part| part.len() / b.dispatch_record(top_k, shape.hidden)).sum();
    let ranks = received.by_rank.len();
    let mut loaded = b.experts(experts.len(), shape);
    for (slot, expert) in experts.iter().enumerate() {
        if let Some(expert) = expert {
            b.load_expert(&mut loaded, slot, &expert.source()).unwrap();
        }
    }
    let _routes = b.routes(0, top_k);
    let mut work = b.work(rows, top_k, shape);
    let mut out = b.parts(ranks, rows * top_k * b.combine_record(shape.hidden));
    b.begin(&step(0), &rope_table(8));
    let received = b.upload(received);
    b.receive(&received, &loaded, &mut work);
    b.gate_up(&loaded, &mut work);
    b.down(&loaded, &work, &mut out);
    b.finish()?;
    Ok(b.download(&out))
}

pub(crate) fn works_for_every_rank<B: Tested>(make: &Make<B>) {
    let top_k = 3;
    // A block, several groups of tiles, half a group at the end.
    for (hidden, intermediate) in [(32, 32), (64, 96), (96, 160), (160, 64)] {
        let shape = ExpertShape { hidden, intermediate, limit: 7.0 };
        let mut random = Random(13);
        let made: Vec<Expert> = (0..4).map(|_| Expert::random(&mut random, hidden, intermediate)).collect();
        // Slot 2 is empty; slot 4 has an expert that nobody chooses; slot 0 has many rows, slot 3 few.
        let experts = [Some(&made[0]), Some(&made[1]), None, Some(&made[2]), Some(&made[3])];
        let counts = [1, 0, 21];
        let mut received = HostParts::new(counts.len());
        let mut expected = HostParts::new(counts.len());
        for (rank, &count) in counts.iter().enumerate() {
            let rows: Vec<f32> = random.numbers(count * hidden);
            let slots: Vec<Vec<u32>> = (0..count)
                .map(|row| match row % 7 {
                    0 => vec![1, NO_SLOT, 0],
                    3 => vec![NO_SLOT, 3, NO_SLOT],
                    _ => vec![NO_SLOT, 0, 1],
                })
                .collect();
            received.by_rank[rank] = records(make.precision, &slots, &rows);
            for (slots, row) in slots.iter().zip(rows.chunks(hidden)) {
                let row = exchange::from_wire(make.precision, &exchange::to_wire(make.precision, row));
                for expert in slots.iter().filter_map(|&slot| experts.get(slot as usize).copied().flatten()) {
                    let result = expected_expert(make.expert, expert, 7.0, &row);
                    expected.by_rank[rank].extend(exchange::to_wire(make.precision, &result));
                }
            }
        }
        let got = work(make, shape, &experts, top_k, &received);
        for (rank, (expected, got)) in expected.by_rank.iter().zip(&got.by_rank).enumerate() {
            let what = format!("{}, {hidden} to {intermediate}, results for rank {rank}", make.name);
            let [expected, got] = [expected, got].map(|bytes| exchange::from_wire(make.precision, bytes));
            close(&what, hidden, &expected, &got, tolerances::expert(make.precision)).unwrap();
        }
    }
}

/// A row's result is the same bits beside any number of others, alone in its slot or not: kernels for few and for many
/// rows, chunks that are full and such that are not. A block of columns is left over at the end, or not.
pub(crate) fn works_on_any_number_of_rows<B: Tested>(make: &Make<B>) {
    for (hidden, intermediate) in [(96, 64), (1184, 32)] {
        let shape = ExpertShape { hidden, intermediate, limit: 7.0 };
        let mut random = Random(15);
        let made = [(); 2].map(|()| Expert::random(&mut random, hidden, intermediate));
        let experts = [Some(&made[0]), None, Some(&made[1])];
        let most = if hidden == 96 { 261 } else { 33 };
        let rows = random.numbers(most * hidden);
        let run = |rows: &[f32]| {
            // Every third row goes to the other expert.
            let slots: Vec<Vec<u32>> =
                (0..rows.len() / hidden).map(|row| vec![if row % 3 == 2 { 2 } else { 0 }]).collect();
            let mut received = HostParts::new(1);
            received.by_rank[0] = records(make.precision, &slots, rows);
            let got = work(make, shape, &experts, 1, &received);
            exchange::from_wire(make.precision, &got.by_rank[0])
        };
        let all = run(&rows);
        for count in [1, 2, 3, 11, 12, 13, 32, 33, 96, 97, 110, 192, 193, 200].into_iter().filter(|&count| count < most)
        {
            let what = format!("{}, {hidden} to {intermediate}, {count} of {most} rows", make.name);
            same(&what, hidden, &all[..count * hidden], &run(&rows[..count * hidden])).unwrap();
        }
        let row = exchange::from_wire(make.precision, &exchange::to_wire(make.precision, &rows[..hidden]));
        let expected = expected_expert(make.expert, &made[0], 7.0, &row);
        close(&make.name, hidden, &expected, &all[..hidden], tolerances::expert(make.precision)).unwrap();
    }
}

/// With a row or two for each of many experts, as when a few sequences are decoded, a row's results are those that it has
/// beside many.
pub(crate) fn works_on_many_slots<B: Tested>(make: &Make<B>) {
    let shape @ ExpertShape { hidden, intermediate, .. } = ExpertShape { hidden: 96, intermediate: 288, limit: 7.0 };
    let mut random = Random(18);
    let made: Vec<_> = (0..40).map(|_| Expert::random(&mut random, hidden, intermediate)).collect();
    let experts: Vec<_> = made.iter().map(Some).collect();
    let rows = random.numbers(400 * hidden);
    let run = |count: usize| {
        let slots: Vec<_> = (0..count).map(|row| vec![(row * 7 % 39) as u32]).collect();
        let mut received = HostParts::new(1);
        received.by_rank[0] = records(make.precision, &slots, &rows[..count * hidden]);
        exchange::from_wire(make.precision, &work(make, shape, &experts, 1, &received).by_rank[0])
    };
    let all = run(400);
    for count in [1, 9, 64, 80] {
        let what = format!("{}, {count} of 400 rows", make.name);
        same(&what, hidden, &all[..count * hidden], &run(count)).unwrap();
    }
    for row in [0, 63] {
        let input = &rows[row * hidden..(row + 1) * hidden];
        let input = exchange::from_wire(make.precision, &exchange::to_wire(make.precision, input));
        let expected = expected_expert(make.expert, &made[row * 7 % 39], 7.0, &input);
        let got = &all[row * hidden..(row + 1) * hidden];
        close(&make.name, hidden, &expected, got, tolerances::expert(make.precision)).unwrap();
    }
}

/// A row's results are the same bits and go to the same place, however many records come: so few that every warp or every
/// block of a GPU lists them for itself, the most of these, and more.
pub(crate) fn works_on_few_and_on_many_records<B: Tested>(make: &Make<B>) {
    let (hidden, top_k) = (32, 2);
    let shape = ExpertShape { hidden, intermediate: 32, limit: 7.0 };
    let mut random = Random(16);
    let made = [(); 3].map(|()| Expert::random(&mut random, hidden, 32));
    let experts = [Some(&made[0]), None, Some(&made[1]), Some(&made[2])];
    let rows = random.numbers(516 * hidden);
    let slots = |row: usize| match row % 5 {
        0 => vec![3, 0],
        1 => vec![NO_SLOT, 2],
        2 => vec![NO_SLOT; 2],
        3 => vec![0, NO_SLOT],
        _ => vec![0, 2],
    };
    // Rank 0 has the first rows up to 216, rank 2 a number of the last 300.
    let run = |first: usize, last: usize| {
        let mut received = HostParts::new(3);
        for (rank, range) in [(0, 0..first), (2, 216..216 + last)] {
            let slots: Vec<Vec<u32>> = range.clone().map(slots).collect();
            received.by_rank[rank] = records(make.precision, &slots, &rows[range.start * hidden..range.end * hidden]);
        }
        work(make, shape, &experts, top_k, &received).by_rank
    };
    let bytes = |range: Range<usize>| {
        let items = range.flat_map(slots).filter(|&slot| slot != NO_SLOT).count();
        items * hidden * if make.precision == Precision::Exact { 4 } else { 2 }
    };
    let all = run(216, 300);
    let few = [(0, 0), (0, 1), (1, 0), (3, 5), (0, 16), (6, 10), (6, 11), (7, 10)];
    let many = [0, 1, 40, 295, 296, 297].map(|last| (216, last));
    for (first, last) in few.into_iter().chain(many) {
        let got = run(first, last);
        let what = format!("{}, {first} and {last} rows", make.name);
        assert!(got[0] == all[0][..bytes(0..first)] && got[1].is_empty(), "{what}");
        assert!(got[2] == all[2][..bytes(216..216 + last)], "{what}");
    }
    let row =
        exchange::from_wire(make.precision, &exchange::to_wire(make.precision, &rows[215 * hidden..216 * hidden]));
    let expected = expected_expert(make.expert, &made[2], 7.0, &row);
    let got = exchange::from_wire(make.precision, &all[0]);
    // Row 215 chose slots 3 and 0, and is the last of its rank.
    let got = &got[got.len() - 2 * hidden..got.len() - hidden];
    close(&make.name, hidden, &expected, got, tolerances::expert(make.precision)).unwrap();
}

/// An expert whose gate-up ignores its input and gives these pairs, and whose down is a multiple of the unit matrix.
fn expert_of_pairs(pairs: &[(f32, f32); 32], down_scale: u8) -> Expert {
    let bias: Vec<f32> = pairs.iter().flat_map(|&(gate, up)| [gate, up]).collect();
    // Code 2 is one.
    let mut down_blocks = vec![0; 32 * 16];
    (0..32).for_each(|i| down_blocks[i * 16 + i / 2] = if i % 2 == 0 { 0x02 } else { 0x20 });
    Expert {
        gate_up_blocks: vec![0; 64 * 16],
        gate_up_scales: vec![127; 64],
        gate_up_bias: Tensor::new(&bias),
        down_blocks,
        down_scales: vec![down_scale; 32],
        down_bias: Tensor::new(&[0.0; 32]),
    }
}

pub(crate) fn clamps<B: Tested>(make: &Make<B>) {
    let shape = ExpertShape { hidden: 32, intermediate: 32, limit: 7.0 };
    // Each activation in an expert of its own block's making: alone beside zeros, so that int8 keeps it.
    for pair in [(8.0, 0.0), (-8.0, 0.0), (1.0, 9.0), (1.0, -9.0), (7.0, 7.0), (-50.0, 3.0), (1e30, 1e30), (0.0, 5.0)] {
        let mut pairs = [(0.0, 0.0); 32];
        pairs[5] = pair;
        let expert = expert_of_pairs(&pairs, 127);
        let mut received = HostParts::new(1);
        received.by_rank[0] = records(make.precision, &[vec![0]], &[1.0; 32]);
        let got = work(make, shape, &[Some(&expert)], 1, &received);
        let got = exchange::from_wire(make.precision, &got.by_rank[0]);
        let expected = swiglu(&expert.gate_up_bias.values, 7.0);
        let tolerance = tolerances::expert(make.precision);
        close(&format!("{}, pair {pair:?}", make.name), 32, &expected, &got, tolerance).unwrap();
    }
}

pub(crate) fn scales_at_both_ends<B: Tested>(make: &Make<B>) {
    let shape = ExpertShape { hidden: 32, intermediate: 32, limit: 7.0 };
    // 2^-127 is a denormal number; 2^127 is the largest scale.
    for (gate, scale) in [(7.0, 0), (7.0, 1), (1e-30, 254), (1e-30, 253)] {
        let mut pairs = [(0.0, 0.0); 32];
        pairs[9] = (gate, 6.0);
        let expert = expert_of_pairs(&pairs, scale);
        let mut received = HostParts::new(1);
        received.by_rank[0] = records(make.precision, &[vec![0]], &[1.0; 32]);
        let got = work(make, shape, &[Some(&expert)], 1, &received);
        let got = exchange::from_wire(make.precision, &got.by_rank[0]);
        let row = [1.0; 32];
        let expected = expected_expert(make.expert, &expert, 7.0, &row);
        assert!(expected[9] != 0.0 && expected[9].is_finite());
        let tolerance = tolerances::expert(make.precision);
        close(&format!("{}, scale {scale}", make.name), 32, &expected, &got, tolerance).unwrap();
    }
}

pub(crate) fn combines<B: Tested>(make: &Make<B>) {
    // As above.
    for n in [9, 400] {
        combines_rows(make, n);
    }
}

fn combines_rows<B: Tested>(make: &Make<B>, n: usize) {
    let (hidden, experts, top_k) = (96, 4, 3);
    let mut b = make.backend();
    let mut random = Random(14);
    let router_weight = random.tensor(experts * hidden, 1.0);
    let router = b.dense(DenseUse::Router, hidden, &[Stack { weight: router_weight.source(), bias: None }]).unwrap();
    let table = [(1, 0), (0, 1), (1, 1), (2, 0)];
    let places = b.places(&table);
    let mut routes = b.routes(n, top_k);
    let mut x = b.rows(n, hidden);
    let values = random.numbers(n * hidden);
    b.begin(&step(n), &rope_table(8));
    b.write(&mut x, &values);
    b.route(&x, &router, &mut routes);
    let mut returned = HostParts::new(3);
    let mut expected = Vec::new();
    for row in values.chunks(hidden) {
        let mut sum: Vec<f64> = row.iter().copied().map(f64::from).collect();
        for (expert, weight) in router::route(&linear(row, &router_weight.values, &[0.0; 4]), top_k) {
            let result = exchange::to_wire(make.precision, &random.numbers(hidden));
            let result_values = exchange::from_wire(make.precision, &result);
            sum.iter_mut().zip(result_values).for_each(|(sum, y)| *sum += f64::from(weight) * f64::from(y));
            returned.by_rank[table[expert as usize].0 as usize].extend(result);
        }
        expected.extend(sum.iter().map(|&sum| sum as f32));
    }
    let whole = b.upload(&returned);
    b.combine(&whole, &routes, &places, &mut x);
    close(&make.name, hidden, &expected, &b.read(&x), tolerances::COMBINE + tolerances::ROUTE).unwrap();
    b.finish().unwrap();
    // A result too few or too many is an error, and nothing is added.
    let before = b.read(&x);
    for change in [|part: &mut Vec<u8>| part.truncate(part.len() - 1), |part: &mut Vec<u8>| part.push(0)] {
        let mut damaged = returned.clone();
        change(&mut damaged.by_rank[1]);
        let damaged = b.upload(&damaged);
        b.combine(&damaged, &routes, &places, &mut x);
        let error = b.finish().unwrap_err();
        assert!(error.to_string().starts_with("rank 1 sent"), "{error}");
        same(&make.name, hidden, &before, &b.read(&x)).unwrap();
    }
}
