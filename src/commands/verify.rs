//! `phalanx verify`: proves that a model gives the same bits in every layout.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use phalanx_model::{Checkpoint, checkpoint, nano};
use phalanx_planner::{Event, Request, Want};
use phalanx_proto::{DenseType, Limits, Precision, Sampling, SeqId};
use phalanx_worker::device::{Choice, DeviceRequest, Probe, Processor, choose_device};
use serde_json::json;

use crate::cli::{DenseArg, DeviceArgs, PrecisionArg};
use crate::commands::model::{LogitsHash, request};
use crate::commands::{note, say, say_json, start_cell};
use crate::local::{CellOptions, LocalCell};

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// `nano`, a checkpoint directory, a model id in the local Hugging Face cache, or `synth:20b`, `synth:120b` for random
    /// weights
    #[arg(long, default_value = nano::SPEC)]
    model: String,
    /// Numbers of workers to compare
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4",
          value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: Vec<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What to compute on: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, env = "PHALANX_DEVICE", value_name = "DEVICE", default_value_t)]
    device: DeviceRequest,
    /// On CPUs: threads in all [default: all cores]
    #[arg(long, env = "PHALANX_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
}

/// Lengths of the fixed prompts.
const PROMPTS: [u32; 4] = [1, 17, 70, 150];
/// Tokens generated after each.
const GENERATED: u32 = 12;

/// What may be rounded; the last on CPUs only.
const ARITHMETICS: [(PrecisionArg, DenseArg); 3] =
    [(PrecisionArg::Exact, DenseArg::Bf16), (PrecisionArg::Fast, DenseArg::Bf16), (PrecisionArg::Fast, DenseArg::Q8)];

/// How the prompts are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One after the other, each in one piece.
    Whole,
    /// One after the other, in pieces of so many rows.
    Chunks(u32),
    /// All at once.
    Together,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole => f.pad("alone, whole"),
            Self::Chunks(rows) => f.pad(&format!("alone, chunks of {rows}")),
            Self::Together => f.pad("beside others"),
        }
    }
}

const WAYS: [Way; 4] = [Way::Whole, Way::Chunks(16), Way::Chunks(5), Way::Together];

/// What the prompts gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Outcome {
    /// Hash over the logits of every position of every prompt.
    logits: String,
    /// Greedy tokens of every prompt.
    greedy: Vec<u32>,
    /// Seeded tokens of every prompt.
    seeded: Vec<u32>,
}

/// Runs `phalanx verify`.
///
/// # Errors
/// The model does not open, or a step fails. A broken promise is exit code 1.
pub fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let choice = choose_device(args.device, Probe::take)?;
    let checkpoint = Arc::new(checkpoint::open(&args.model)?);
    let mut broken = 0;
    let mut rows = Vec::new();
    if !args.json {
        note(&choice);
        say(format_args!(
            "{:<10}{:<6}{:>8}  {:<22}{:>8}{:>8}{:>8}",
            "precision", "dense", "workers", "way", "logits", "greedy", "seeded"
        ))?;
    }
    let known = |&&(_, dense): &&(_, DenseArg)| dense == DenseArg::Bf16 || choice.processor == Processor::Cpu;
    for &(precision, dense) in ARITHMETICS.iter().filter(known) {
        let mut base: Option<Outcome> = None;
        for &workers in &args.workers {
            let mut cell = cell(&checkpoint, workers, &choice, precision, dense, args.threads)?;
            let mut next_seq = 0;
            for way in WAYS {
                let outcome = outcome(&mut cell, checkpoint.config().vocab, way, &mut next_seq)?;
                let base = base.get_or_insert_with(|| outcome.clone());
                let equal =
                    [outcome.logits == base.logits, outcome.greedy == base.greedy, outcome.seeded == base.seeded];
                broken += equal.iter().filter(|&&e| !e).count();
                let (precision, dense) = (Precision::from(precision), DenseType::from(dense));
                if args.json {
                    rows.push(json!({
                        "precision": precision.to_string(), "dense": dense.to_string(), "workers": workers,
                        "way": way.to_string(), "logits_equal": equal[0], "greedy_equal": equal[1], "seeded_equal": equal[2],
                        "bits_sha256": outcome.logits,
                    }));
                } else {
                    let [l, g, s] = equal.map(|e| if e { "same" } else { "OTHER" });
                    let (precision, dense) = (precision.to_string(), dense.to_string());
                    say(format_args!("{precision:<10}{dense:<6}{workers:>8}  {way:<22}{l:>8}{g:>8}{s:>8}"))?;
                }
            }
        }
    }
    if args.json {
        say_json(&json!({"model": checkpoint.name(), "equal": broken == 0, "rows": rows}))?;
    } else if broken == 0 {
        say("every layout gives the same bits")?;
    } else {
        say(format_args!("{broken} comparisons differ: the promise is broken; do not serve with this build"))?;
    }
    Ok(if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn cell(
    checkpoint: &Arc<Checkpoint>,
    workers: u32,
    choice: &Choice,
    precision: PrecisionArg,
    dense: DenseArg,
    threads: Option<u32>,
) -> Result<LocalCell> {
    let tokens: u32 = PROMPTS.iter().map(|prompt| prompt + GENERATED + Limits::BLOCK_SIZE).sum();
    let args = DeviceArgs {
        device: DeviceRequest::Auto,
        precision,
        dense: Some(dense),
        threads,
        pin: None,
        no_weight_cache: false,
        isa: None,
    };
    let device = args.device_on(choice, workers)?;
    let seqs_max = u32::try_from(PROMPTS.len()).unwrap_or(u32::MAX);
    let limits = Limits::new(checkpoint.config(), seqs_max, 256, tokens);
    start_cell(checkpoint, &CellOptions { workers, device, limits })
}

/// Fixed prompts spread over the vocabulary.
fn prompts(vocab: u32) -> Vec<Vec<u32>> {
    let id = |n: u32| (n.wrapping_mul(2_654_435_761) >> 7) % vocab;
    PROMPTS.iter().map(|&len| (0..len).map(|i| id(len * 1000 + i)).collect()).collect()
}

fn outcome(cell: &mut LocalCell, vocab: u32, way: Way, next_seq: &mut u64) -> Result<Outcome> {
    cell.set_chunk_max(if let Way::Chunks(rows) = way { rows } else { u32::MAX });
    let seeded = Sampling { temperature: 1.0, top_p: 0.95, seed: 17, ..Sampling::GREEDY };
    let mut logits = BTreeMap::<SeqId, LogitsHash>::new();
    let mut tokens = BTreeMap::<SeqId, Vec<u32>>::new();
    let mut run = |requests: Vec<Request>| -> Result<()> {
        for batch in if way == Way::Together { vec![requests] } else { requests.into_iter().map(|r| vec![r]).collect() }
        {
            for request in batch {
                cell.submit(request)?;
            }
            cell.run(|event| match event {
                Event::Logits { seq, logits: l } => logits.entry(seq).or_default().add(&l),
                Event::Token { seq, token, .. } => tokens.entry(seq).or_default().push(token.0),
                Event::Started { .. } | Event::Finished { .. } => {}
            })?;
        }
        Ok(())
    };
    let prompts = prompts(vocab);
    let first = *next_seq;
    let ids = |n: u64| (first + n * prompts.len() as u64..).zip(&prompts);
    run(ids(0).map(|(seq, prompt)| request(seq, prompt, 0, Want::Logits)).collect())?;
    run(ids(1).map(|(seq, prompt)| request(seq, prompt, GENERATED, Want::Tokens)).collect())?;
    run(ids(2)
        .map(|(seq, prompt)| Request { sampling: seeded, ..request(seq, prompt, GENERATED, Want::Tokens) })
        .collect())?;
    *next_seq += 3 * prompts.len() as u64;
    let of = |n| ids(n).flat_map(|(seq, _)| tokens.get(&SeqId(seq)).cloned().unwrap_or_default()).collect();
    let hashes: Vec<String> = logits.into_values().map(LogitsHash::hex).collect();
    Ok(Outcome { logits: hashes.join(" "), greedy: of(1), seeded: of(2) })
}
