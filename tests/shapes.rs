//! Checkpoints of other dimensions, layer orders, top-k, eps and limits: the fast backend against the reference, which
//! computes every op as the papers state it, in f64.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::sync::Arc;

use phalanx_kernels::DenseFormat;
use phalanx_kernels::Precision;
use phalanx_kernels::reference::Reference;
use phalanx_model::packed::Stored;
use phalanx_model::synth::{self, Shape};
use phalanx_model::{Checkpoint, GptOss};
use phalanx_planner::Want;
use phalanx_proto::{
    Admission, BlockGrant, BlockId, Fence, Layout, Limits, Outputs, Placement, Pool, Position, Rank, Rows, Sampling,
    SeqId, Start, StepHeader, StepPlan, TokenId, Tokens,
};
use phalanx_worker::collectives::local;
use phalanx_worker::runner::Runner;
use serde_json::{Value, json};
use support::{Setup, bits, request, run};

/// A small configuration with `changes`.
fn config(changes: &Value) -> Value {
    let text = std::fs::read_to_string(support::fixture("tiny-a").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Logits of every position by the reference backend.
fn reference(checkpoint: &Arc<Checkpoint>, prompt: &[u32]) -> Vec<f32> {
    let config = checkpoint.config();
    let rows = u32::try_from(prompt.len()).unwrap();
    let limits = Limits::new(config, 1, rows, rows);
    let layout = Layout::new(1, 0).unwrap();
    let placement = Placement::contiguous(u32::try_from(config.layers.len()).unwrap(), config.experts, layout);
    let backend = Reference::new(Precision::Exact, DenseFormat::Bf16);
    let model =
        GptOss::load(backend, Stored { checkpoint, packed: None }, &placement, Rank(0), 1, &limits, &mut |_, _| ())
            .unwrap();
    let collectives = local::group(1).remove(0);
    let mut runner = Runner::new(model, collectives, limits, Fence::default());
    let grant = |pool, index| BlockGrant { pool, index, block: BlockId(index) };
    let blocks = rows.div_ceil(limits.block_size);
    let plan = StepPlan {
        header: StepHeader {
            fence: Fence::default().next(),
            deadline_ms: 60_000,
            rows_of_rank: vec![rows],
            ..StepHeader::default()
        },
        admit: vec![Admission::new(SeqId(1), Sampling::GREEDY)],
        rows: vec![Rows {
            seq: SeqId(1),
            start: Start::At(Position(0)),
            tokens: Tokens::Given(prompt.iter().map(|&id| TokenId(id)).collect()),
            outputs: Outputs::AllLogits,
            grants: (0..blocks).flat_map(|i| [grant(Pool::Full, i), grant(Pool::Window, i)]).collect(),
        }],
        ..StepPlan::default()
    };
    runner.run(&plan, &()).unwrap().rows.remove(0).logits
}

#[test]
fn other_shapes_are_computed_as_the_reference_does() {
    let sliding_last = json!(["full_attention", "full_attention", "sliding_attention"]);
    let all_sliding = json!(["sliding_attention", "sliding_attention"]);
    let cases = [
        ("another order of layers", json!({"num_hidden_layers": 3, "layer_types": sliding_last})),
        ("sliding layers alone", json!({"num_hidden_layers": 2, "layer_types": all_sliding, "sliding_window": 5})),
        ("one expert for a token", json!({"num_experts_per_tok": 1, "experts_per_token": 1})),
        ("all experts for a token", json!({"num_local_experts": 6, "num_experts_per_tok": 6, "experts_per_token": 6})),
        ("an odd number of experts", json!({"num_local_experts": 13})),
        ("a large eps", json!({"rms_norm_eps": 0.01})),
        ("a tight clamp", json!({"swiglu_limit": 0.5})),
        ("heads of 24", json!({"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 3})),
        ("one key-value head", json!({"head_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 1})),
        ("a wide model of narrow experts", json!({"hidden_size": 160, "intermediate_size": 32})),
        ("another theta", json!({"rope_theta": 10000})),
        (
            "rounded bounds of the ramp",
            json!({"head_dim": 64, "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 64,
            "rope_type": "yarn", "truncate": true}}),
        ),
        ("an odd vocabulary", json!({"vocab_size": 487})),
    ];
    for (what, changes) in cases {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shape.json");
        std::fs::write(&file, config(&changes).to_string()).unwrap();
        let to = dir.path().join("model");
        synth::write(&Shape::Config(file), None, 7, &to, &mut |_, _| ()).unwrap();
        let checkpoint = Arc::new(Checkpoint::open(&to).unwrap());
        let vocab = checkpoint.config().vocab;
        let prompt: Vec<u32> = (0..70u32).map(|i| (i * 131 + 7) % vocab).collect();
        let expected = reference(&checkpoint, &prompt);

        let mut all = Vec::new();
        for workers in [1, 3] {
            let mut cell = Setup::exact(workers).start(&checkpoint);
            cell.set_chunk_max(if workers == 1 { 256 } else { 9 });
            let given = run(&mut cell, [request(1, &prompt, 0, Want::Logits)]);
            all.push(given.logits[&SeqId(1)].clone());
        }
        assert!(bits(&all[0]) == bits(&all[1]), "{what}: three workers in chunks of 9 give other bits than one");
        assert_eq!(all[0].len(), expected.len());
        for (i, (ours, theirs)) in all[0].iter().zip(&expected).enumerate() {
            let (position, id) = (i / vocab as usize, i % vocab as usize);
            assert!((ours - theirs).abs() <= 2e-4, "{what}: position {position}, id {id}: {ours} is not {theirs}");
        }
    }
}
