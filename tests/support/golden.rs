//! The golden fixtures, and how far from them a cell may be.

use std::collections::BTreeMap;
use std::sync::Arc;

use phalanx::local::LocalCell;
use phalanx_model::Checkpoint;
use phalanx_planner::Want;
use phalanx_proto::SeqId;
use safetensors::SafeTensors;
use serde_json::Value;

use super::{fixture, request, run};

/// Of logits computed in f32.
pub(crate) const TOLERANCE: f32 = 2e-4;

/// The tensors and lists of one golden folder.
pub(crate) struct Golden {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) floats: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub(crate) ints: BTreeMap<String, Vec<u32>>,
    pub(crate) greedy: BTreeMap<usize, Vec<u32>>,
    pub(crate) vocab: usize,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
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

    pub(crate) fn prompt(&self, n: usize) -> &[u32] {
        &self.ints[&format!("p{n}.input_ids")]
    }

    /// The 20 largest logits of each of the last positions held, as (position, id, logit).
    pub(crate) fn top(&self, stem: &str, positions: usize) -> Vec<(usize, usize, f32)> {
        let part = if stem == "long" { "_last16" } else { "" };
        let (shape, logits) = &self.floats[&format!("{stem}.top_logits{part}")];
        let ids = &self.ints[&format!("{stem}.top_ids{part}")];
        let first = positions - shape[0];
        let entry = |(i, (&id, &logit)): (usize, (&u32, &f32))| (first + i / shape[1], id as usize, logit);
        ids.iter().zip(logits).enumerate().map(entry).collect()
    }
}

/// Compares logits of every position with what the fixtures hold of them.
pub(crate) fn assert_close(golden: &Golden, stem: &str, logits: &[f32]) {
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

/// Compares a cell with float32, by these prompts and their greedy paths, within the limits of a bf16 engine.
pub(crate) fn assert_like_bf16(golden: &Golden, cell: &mut LocalCell, prompts: &[usize]) {
    let name = golden.checkpoint.name();
    let (mut differences, mut agreed, mut positions) = (Vec::new(), 0, 0);
    for &n in prompts {
        let path = &golden.greedy[&n];
        // Teacher forced along the float32 path.
        let forced: Vec<u32> = golden.prompt(n).iter().chain(&path[..path.len() - 1]).copied().collect();
        let given = run(cell, [request(n as u64, &forced, 0, Want::Logits)]);
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
    println!("{name}: mean difference {mean}, {agreed} of {positions} most likely tokens agree");
    assert!(mean <= 0.1, "{name}: mean difference {mean}");
    assert!(agreed * 10 >= positions * 9, "{name}: {agreed} of {positions} most likely tokens agree");
}
