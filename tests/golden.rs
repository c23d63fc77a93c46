//! The model against the golden fixtures: `exact` within 2e-4 of float32 transformers at every position that the
//! fixtures hold, greedy paths token for token; `fast` within the limits of a bf16 engine; and one set of bits for
//! every number of workers, chunk and company.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use phalanx_planner::Want;
use phalanx_proto::{DenseType, SeqId};
use support::golden::{Golden, TOLERANCE, assert_close, assert_like_bf16};
use support::{Setup, bits, request, run};

fn exact_logits_match(name: &str) {
    let golden = Golden::open(name);
    let mut cell = Setup::exact(1).start(&golden.checkpoint);
    for (seq, &n) in (0..).zip(golden.greedy.keys()) {
        let given = run(&mut cell, [request(seq, golden.prompt(n), 0, Want::Logits)]);
        assert_close(&golden, &format!("p{n}"), &given.logits[&SeqId(seq)]);
    }
    let trace = &golden.floats["trace.logits"].1;
    let given = run(&mut cell, [request(99, golden.prompt(33), 0, Want::Logits)]);
    for (i, (ours, theirs)) in given.logits[&SeqId(99)].iter().zip(trace).enumerate() {
        let (position, id) = (i / golden.vocab, i % golden.vocab);
        assert!((ours - theirs).abs() <= TOLERANCE, "trace position {position}, id {id}: {ours} is not {theirs}");
    }
}

#[test]
fn exact_logits_match_tiny_a() {
    exact_logits_match("tiny-a");
}

#[test]
fn exact_logits_match_tiny_b() {
    exact_logits_match("tiny-b");
}

#[test]
fn exact_logits_match_beyond_the_original_context() {
    let golden = Golden::open("tiny-a");
    let mut cell = Setup { step_rows: 512, ..Setup::exact(2) }.start(&golden.checkpoint);
    let given = run(&mut cell, [request(1, &golden.ints["long.input_ids"], 0, Want::Logits)]);
    assert_close(&golden, "long", &given.logits[&SeqId(1)]);
}

#[test]
fn exact_greedy_paths_match() {
    for name in ["tiny-a", "tiny-b"] {
        let golden = Golden::open(name);
        let mut cell = Setup::exact(2).start(&golden.checkpoint);
        let requests = golden
            .greedy
            .iter()
            .map(|(&n, path)| request(n as u64, golden.prompt(n), u32::try_from(path.len()).unwrap(), Want::Tokens));
        let given = run(&mut cell, requests);
        for (&n, path) in &golden.greedy {
            assert_eq!(&given.tokens[&SeqId(n as u64)], path, "{name} prompt of {n}");
        }
    }
}

/// Fast, with dense weights as they are.
fn bf16() -> Setup {
    Setup { dense: DenseType::Bf16, ..Setup::fast(1) }
}

#[test]
fn fast_stays_within_the_limits_of_a_bf16_engine() {
    for (name, setup) in
        [("tiny-a", Setup::fast(1)), ("tiny-b", Setup::fast(1)), ("tiny-a", bf16()), ("tiny-b", bf16())]
    {
        let golden = Golden::open(name);
        let prompts: Vec<usize> = golden.greedy.keys().copied().collect();
        assert_like_bf16(&golden, &mut setup.start(&golden.checkpoint), &prompts);
    }
}

#[test]
fn the_bits_do_not_depend_on_workers_chunks_threads_or_company() {
    for name in ["tiny-a", "tiny-b"] {
        let golden = Golden::open(name);
        for precision in [Setup::exact(1), Setup::fast(1), bf16()] {
            let lengths = [1, 7, 33, 100];
            let requests = |first: u64| {
                (first..)
                    .zip(lengths)
                    .map(|(seq, n)| request(seq, golden.prompt(n), 0, Want::Logits))
                    .collect::<Vec<_>>()
            };
            let mut base: Option<Vec<Vec<u32>>> = None;
            for (workers, threads) in [(1, 1), (1, 3), (2, 1), (3, 2), (4, 1), (8, 1)] {
                let mut cell = Setup { workers, threads, ..precision }.start(&golden.checkpoint);
                let mut first = 0;
                for (chunk, together) in [(256, false), (256, true), (16, false), (5, true)] {
                    cell.set_chunk_max(chunk);
                    let mut given = support::Given::default();
                    if together {
                        given = run(&mut cell, requests(first));
                    } else {
                        for request in requests(first) {
                            given.logits.extend(run(&mut cell, [request]).logits);
                        }
                    }
                    let ours: Vec<Vec<u32>> = given.logits.values().map(|l| bits(l)).collect();
                    assert_eq!(ours.len(), lengths.len());
                    let base = base.get_or_insert_with(|| ours.clone());
                    assert!(ours == *base, "{name}, {workers} workers, chunks of {chunk}, together {together}");
                    first += 10;
                }
            }
        }
    }
}
