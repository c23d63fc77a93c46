//! `phalanx bench offline`: the engine without HTTP.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use phalanx_model::{checkpoint, nano};
use phalanx_planner::{Event, Want};
use phalanx_proto::{Limits, Phase};
use phalanx_worker::device::memory_peak;
use serde_json::{Value, json};

use crate::cli::{BadFlags, DeviceArgs};
use crate::commands::model::request;
use crate::commands::{say, say_json, start_cell};
use crate::local::{CellOptions, LocalCell, Totals};

/// Arguments of `bench offline`.
#[derive(Debug, Args)]
pub struct OfflineArgs {
    /// `nano`, a checkpoint directory, a model id in the local Hugging Face cache, or `synth:20b`, `synth:120b` for random
    /// weights made in memory (`synth:20b:4` for 4 layers)
    #[arg(long, default_value = nano::SPEC)]
    model: String,
    /// Tokens of each prompt: for all batches, or as many numbers as batches
    #[arg(long, value_name = "P,..", default_value = "128", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    prompt_len: Vec<u32>,
    /// Tokens generated after each prompt
    #[arg(long, value_name = "G", default_value_t = 32, value_parser = clap::value_parser!(u32).range(3..=1 << 20))]
    gen_len: u32,
    /// Sequences at once; several numbers are measured one after the other, with one load
    #[arg(long, value_name = "B,..", default_value = "1", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: Vec<u32>,
    /// Workers that share the experts
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: u32,
    /// Rows of a worker in one step
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    step_rows: u32,
    /// Print a line of JSON for each batch
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What is measured at once.
#[derive(Clone, Copy, Debug)]
struct Batch {
    seqs: u32,
    prompt_len: u32,
    gen_len: u32,
}

impl OfflineArgs {
    fn batches(&self) -> Result<Vec<Batch>, BadFlags> {
        let (batches, prompts) = (self.batch.len(), self.prompt_len.len());
        if prompts != 1 && prompts != batches {
            let given = format!("{prompts} lengths of prompts are given for {batches} batches");
            return Err(BadFlags(format!("{given}: give one, or one for each batch")));
        }
        let (largest, rows) = (self.batch.iter().max().copied().unwrap_or(0), self.step_rows);
        if largest.div_ceil(self.workers) > rows {
            let given = format!("{largest} sequences do not decode side by side in steps of {rows} rows");
            return Err(BadFlags(format!("{given}: raise --step-rows or lower --batch")));
        }
        let lengths = self.prompt_len.iter().cycle();
        let batch = |(&seqs, &prompt_len)| Batch { seqs, prompt_len, gen_len: self.gen_len };
        Ok(self.batch.iter().zip(lengths).map(batch).collect())
    }
}

/// Runs `phalanx bench offline`.
///
/// # Errors
/// The model does not open, or a step fails.
pub fn run(args: &OfflineArgs) -> Result<ExitCode> {
    let batches = args.batches()?;
    let begun = Instant::now();
    let checkpoint = Arc::new(checkpoint::open(&args.model)?);
    let (config, largest) = (checkpoint.config(), |of: fn(&Batch) -> u32| batches.iter().map(of).max().unwrap_or(0));
    let limits = Limits::new(config, largest(|batch| batch.seqs), args.step_rows, largest(Batch::tokens));
    let device = args.device.device(args.workers)?;
    let mut cell = start_cell(&checkpoint, &CellOptions { workers: args.workers, device, limits })?;
    let load_s = begun.elapsed().as_secs_f64();
    if !args.json {
        say(format_args!("load     {load_s:>10.2} s"))?;
    }
    let mut first_id = 0;
    for batch in batches {
        let measured = batch.measure(&mut cell, first_id, config.vocab)?;
        first_id += u64::from(batch.seqs);
        let rss_gb = memory_peak().0 as f64 / 1e9;
        if args.json {
            let mut line = json!({
                "model": checkpoint.name(), "prompt_len": batch.prompt_len, "gen_len": batch.gen_len,
                "batch": batch.seqs, "workers": args.workers, "threads_per_worker": device.threads,
                "load_s": load_s, "rss_gb": rss_gb,
            });
            line.as_object_mut().expect("made as one").append(&mut measured.json());
            say_json(&line)?;
        } else {
            measured.say(batch)?;
        }
    }
    if !args.json {
        say(format_args!("memory   {:>10.2} GB at most", memory_peak().0 as f64 / 1e9))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Some steps.
#[derive(Debug)]
struct Stretch {
    tokens: u32,
    seconds: f64,
    /// What the cell counted in them.
    totals: Totals,
}

impl Stretch {
    fn tokens_per_second(&self) -> f64 {
        f64::from(self.tokens) / self.seconds
    }

    fn rows_per_step(&self) -> f64 {
        f64::from(self.tokens) / self.totals.steps as f64
    }

    fn step_ms(&self) -> f64 {
        self.seconds * 1e3 / self.totals.steps as f64
    }
}

#[derive(Debug)]
struct Measured {
    prefill: Stretch,
    decode: Stretch,
}

impl Batch {
    /// Tokens that there must be room for.
    fn tokens(&self) -> u32 {
        (self.prompt_len + self.gen_len).next_multiple_of(Limits::BLOCK_SIZE).saturating_mul(self.seqs)
    }

    fn measure(self, cell: &mut LocalCell, first_id: u64, vocab: u32) -> Result<Measured> {
        let Self { seqs, prompt_len, gen_len } = self;
        let prompt = |seq: u32| -> Vec<u32> {
            (0..prompt_len).map(|i| ((seq * 7919 + i).wrapping_mul(2_654_435_761) >> 7) % vocab).collect()
        };
        for seq in 0..seqs {
            cell.submit(request(first_id + u64::from(seq), &prompt(seq), gen_len, Want::Tokens))?;
        }
        // Prefill: every prompt up to its first token.
        cell.hold_answers(true);
        cell.take_totals();
        let begun = Instant::now();
        cell.run(|_| ())?;
        let seconds = begun.elapsed().as_secs_f64();
        let prefill = Stretch { tokens: prompt_len.saturating_mul(seqs), seconds, totals: cell.take_totals() };

        // Decode: all sequences side by side, to the end.
        cell.hold_answers(false);
        let (begun, mut tokens) = (Instant::now(), 0);
        cell.run(|event| tokens += u32::from(matches!(event, Event::Token { .. })))?;
        let seconds = begun.elapsed().as_secs_f64();
        Ok(Measured { prefill, decode: Stretch { tokens, seconds, totals: cell.take_totals() } })
    }
}

impl Measured {
    fn json(&self) -> serde_json::Map<String, Value> {
        let Self { prefill, decode } = self;
        let mut exchange = prefill.totals.exchange;
        exchange += decode.totals.exchange;
        let phases: serde_json::Map<_, _> = Phase::ALL
            .into_iter()
            .map(|phase| (phase.name().to_owned(), json!(decode.totals.phases.get(phase))))
            .collect();
        let fields = [
            ("pp_tok_s", json!(prefill.tokens_per_second())),
            ("tg_tok_s", json!(decode.tokens_per_second())),
            ("prefill_steps", json!(prefill.totals.steps)),
            ("prefill_step_ms", json!(prefill.step_ms())),
            ("decode_steps", json!(decode.totals.steps)),
            ("decode_step_ms", json!(decode.step_ms())),
            ("decode_rows_per_step", json!(decode.rows_per_step())),
            ("decode_phase_us", phases.into()),
            (
                "exchange",
                json!({
                    "dispatch_rows": exchange.dispatch_rows, "combine_rows": exchange.combine_rows,
                    "bytes_sent": exchange.bytes_sent,
                }),
            ),
        ];
        fields.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
    }

    fn say(&self, Batch { seqs, prompt_len, .. }: Batch) -> Result<()> {
        say(format_args!("batch {seqs}, prompts of {prompt_len}"))?;
        for (what, stretch) in [("prefill", &self.prefill), ("decode ", &self.decode)] {
            let (speed, steps, step_ms) = (stretch.tokens_per_second(), stretch.totals.steps, stretch.step_ms());
            say(format_args!("{what}  {speed:>10.1} tokens/s, {steps} steps of {step_ms:.3} ms"))?;
        }
        Ok(())
    }
}
