//! `phalanx bench offline`: the engine without HTTP.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use phalanx_model::{checkpoint, nano};
use phalanx_planner::{Event, Want};
use phalanx_proto::{Limits, Phase};
use phalanx_worker::device::memory_peak;
use serde_json::json;

use crate::cli::DeviceArgs;
use crate::commands::model::request;
use crate::commands::{say, say_json, start_cell};
use crate::local::CellOptions;

/// Arguments of `bench offline`.
#[derive(Debug, Args)]
pub struct OfflineArgs {
    /// `nano`, a checkpoint directory, a model id in the local Hugging Face cache, or `synth:20b`, `synth:120b` for random
    /// weights made in memory (`synth:20b:4` for 4 layers)
    #[arg(long, default_value = nano::SPEC)]
    model: String,
    /// Tokens of each prompt
    #[arg(long, value_name = "P", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_len: u32,
    /// Tokens generated after each prompt
    #[arg(long, value_name = "G", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    gen_len: u32,
    /// Sequences at once
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Workers that share the experts
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: u32,
    /// Rows of a worker in one step
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    step_rows: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs `phalanx bench offline`.
///
/// # Errors
/// The model does not open, or a step fails.
pub fn run(args: &OfflineArgs) -> Result<ExitCode> {
    let begun = Instant::now();
    let checkpoint = Arc::new(checkpoint::open(&args.model)?);
    let tokens = (args.prompt_len + args.gen_len).next_multiple_of(Limits::BLOCK_SIZE).saturating_mul(args.batch);
    let limits = Limits::new(checkpoint.config(), args.batch, args.step_rows, tokens);
    let device = args.device.device(args.workers)?;
    let mut cell = start_cell(&checkpoint, &CellOptions { workers: args.workers, device, limits })?;
    let load_s = begun.elapsed().as_secs_f64();

    let vocab = checkpoint.config().vocab;
    let prompt = |seq: u32| -> Vec<u32> {
        (0..args.prompt_len).map(|i| ((seq * 7919 + i).wrapping_mul(2_654_435_761) >> 7) % vocab).collect()
    };
    // Prefill: every prompt up to its first token.
    for seq in 0..args.batch {
        cell.submit(request(u64::from(seq), &prompt(seq), 1, Want::Tokens))?;
    }
    let begun = Instant::now();
    cell.run(|_| ())?;
    let pp_tok_s = f64::from(args.prompt_len * args.batch) / begun.elapsed().as_secs_f64();

    // Decode: from the moment when every sequence has its first token.
    for seq in 0..args.batch {
        cell.submit(request(u64::from(args.batch + seq), &prompt(seq), args.gen_len, Want::Tokens))?;
    }
    let mut missing: BTreeSet<u64> = (0..u64::from(args.batch)).map(|seq| u64::from(args.batch) + seq).collect();
    cell.run_while(|event| {
        if let Event::Token { seq, .. } = event {
            missing.remove(&seq.0);
        }
        !missing.is_empty()
    })?;
    // What is counted from here on is decoding alone.
    let (before, begun, mut decoded) = (cell.totals(), Instant::now(), 0u32);
    cell.run(|event| decoded += u32::from(matches!(event, Event::Token { .. })))?;
    let decode_s = begun.elapsed().as_secs_f64();
    let tg_tok_s = f64::from(decoded) / decode_s;
    let rss_gb = memory_peak().0 as f64 / 1e9;
    let totals = cell.totals();
    let phases: serde_json::Map<String, serde_json::Value> = Phase::ALL
        .into_iter()
        .map(|phase| (phase.name().to_owned(), json!(totals.phases.get(phase) - before.phases.get(phase))))
        .collect();
    if args.json {
        say_json(&json!({
            "pp_tok_s": pp_tok_s, "tg_tok_s": tg_tok_s, "load_s": load_s, "rss_gb": rss_gb,
            "model": checkpoint.name(), "prompt_len": args.prompt_len, "gen_len": args.gen_len, "batch": args.batch,
            "workers": args.workers, "threads_per_worker": device.threads,
            "exchange": {
                "dispatch_rows": totals.exchange.dispatch_rows, "combine_rows": totals.exchange.combine_rows,
                "bytes_sent": totals.exchange.bytes_sent,
            },
            "decode_steps": totals.steps - before.steps, "decode_phase_us": phases,
        }))?;
    } else {
        say(format_args!("load     {load_s:>10.2} s"))?;
        say(format_args!("prefill  {pp_tok_s:>10.1} tokens/s"))?;
        say(format_args!("decode   {tg_tok_s:>10.1} tokens/s"))?;
        say(format_args!("memory   {rss_gb:>10.2} GB at most"))?;
    }
    Ok(ExitCode::SUCCESS)
}
