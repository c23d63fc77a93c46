//! The model against the golden fixtures: `exact` within 2e-4 of float32 transformers at every position that the
//! fixtures hold, greedy paths token for token; `fast` within the limits of a bf16 engine; and one set of bits for
//! every number of workers, chunk and company.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use phalanx_model::Checkpoint;
use phalanx_planner::Want;
use phalanx_proto::{DenseType, SeqId};
use safetensors::SafeTensors;
use serde_json::Value;
use support::{Setup, bits, fixture, request, run};

const TOLERANCE: f32 = 2e-4;

/// The tensors and lists of one golden folder.
struct Golden {
    checkpoint: Arc<Checkpoint>,
    floats: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    ints: BTreeMap<String, Vec<u32>>,
    greedy: BTreeMap<usize, Vec<u32>>,
    vocab: usize,
}

impl Golden {
    fn open(name: &str) -> Self {
        let dir = fixture(name);
        let raw = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let (mut floats, mut ints) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in SafeTensors::deserialize(&raw).unwrap().tensors() {
            let words = tensor.data().chunks_exact(4).map(|b| <[u8; 4]>::try_from(b).unwrap());
            match tensor.dtype() {
                safetensors::Dtype::F32 => {
                    floats.insert(name, (tensor.shape().to_vec(), words.map(f32::from_le_bytes).collect()));
                }
                _ => {
                    ints.insert(name, words.map(u32::from_le_bytes).collect());
                }
            }
        }
        let doc: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let ids =
            |v: &Value| v.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect();
        let prompts = doc["prompts"].as_object().unwrap();
        let greedy = prompts.iter().map(|(n, p)| (n.parse().unwrap(), ids(&p["greedy_f32"]))).collect();
        let checkpoint = Arc::new(Checkpoint::open(&dir).unwrap());
        let vocab = checkpoint.config().vocab as usize;
        Self { checkpoint, floats, ints, greedy, vocab }
    }

    fn prompt(&self, n: usize) -> &[u32] {
        &self.ints[&format!("p{n}.input_ids")]
    }

    /// The 20 largest logits of each of the last positions held, as (position, id, logit).
    fn top(&self, stem: &str, positions: usize) -> Vec<(usize, usize, f32)> {
        let part = if stem == "long" { "_last16" } else { "" };
        let (shape, logits) = &self.floats[&format!("{stem}.top_logits{part}")];
        let ids = &self.ints[&format!("{stem}.top_ids{part}")];
        let first = positions - shape[0];
        let entry = |(i, (&id, &logit)): (usize, (&u32, &f32))| (first + i / shape[1], id as usize, logit);
        ids.iter().zip(logits).enumerate().map(entry).collect()
    }
}

/// Compares logits of every position with what the fixtures hold of them.
fn assert_close(golden: &Golden, stem: &str, logits: &[f32]) {
    let positions = logits.len() / golden.vocab;
    let last = &logits[logits.len() - golden.vocab..];
    for (id, (ours, theirs)) in last.iter().zip(&golden.floats[&format!("{stem}.last_logits")].1).enumerate() {
        assert!((ours - theirs).abs() <= TOLERANCE, "{stem} last position, id {id}: {ours} is not {theirs}");
    }
    for (position, id, theirs) in golden.top(stem, positions) {
        let ours = logits[position * golden.vocab + id];
        assert!((ours - theirs).abs() <= TOLERANCE, "{stem} position {position}, id {id}: {ours} is not {theirs}");
    }
}

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
        let mut cell = setup.start(&golden.checkpoint);
        let (mut differences, mut agreed, mut positions) = (Vec::new(), 0, 0);
        for (&n, path) in &golden.greedy {
            // Teacher forced along the float32 path.
            let forced: Vec<u32> = golden.prompt(n).iter().chain(&path[..path.len() - 1]).copied().collect();
            let given = run(&mut cell, [request(n as u64, &forced, 0, Want::Logits)]);
            let logits = &given.logits[&SeqId(n as u64)];
            let top = golden.top(&format!("p{n}"), n);
            differences.extend(top.iter().map(|&(p, id, theirs)| (logits[p * golden.vocab + id] - theirs).abs()));
            let argmax = |p: usize| {
                let row = &logits[p * golden.vocab..(p + 1) * golden.vocab];
                (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
            };
            let best = top.iter().step_by(20).map(|&(p, id, _)| (p, id));
            let path = path.iter().enumerate().skip(1).map(|(i, &id)| (n - 1 + i, id as usize));
            for (position, id) in best.chain(path) {
                positions += 1;
                agreed += usize::from(argmax(position) == id);
            }
        }
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        println!(
            "{name}, dense {}: mean difference {mean}, {agreed} of {positions} most likely tokens agree",
            setup.dense
        );
        assert!(mean <= 0.1, "{name}: mean difference {mean}");
        assert!(agreed * 10 >= positions * 9, "{name}: {agreed} of {positions} most likely tokens agree");
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
