//! `phalanx model`: looks into checkpoints, makes them, and runs them without a server.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use phalanx_model::checkpoint;
use phalanx_model::checkpoint::inspect::Inspection;
use phalanx_model::synth::{self, Shape};
use phalanx_model::{Checkpoint, CheckpointError, nano};
use phalanx_planner::{Event, Request, Want};
use phalanx_proto::{BackendReport, Layout, Limits, MemoryPlan, ModelConfig, Placement, SeqId, TokenId};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::cli::{DeviceArgs, LimitArgs, PromptArgs};
use crate::commands::{advance, byte_bar, mib, say, say_json, start_cell};
use crate::local::CellOptions;

/// Looks into checkpoints, makes them, and runs them without a server.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Show a checkpoint's shapes, bytes, memory plan for each worker, and every defect
    Inspect(InspectArgs),
    /// Write a checkpoint of random weights in the genuine format
    Synth(SynthArgs),
    /// Write the embedded demo model as a full checkpoint directory
    Export(ExportArgs),
    /// Print the logits after a prompt, and a hash over the logits of every position
    Logits(LogitsArgs),
    /// Continue a prompt with the most likely tokens; end-of-text does not stop it
    Generate(GenerateArgs),
}

/// Arguments of `model inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// `nano`, a checkpoint directory, or a model id in the local Hugging Face cache
    #[arg(default_value = nano::SPEC)]
    model: String,
    /// Workers to plan the memory for
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Arguments of `model synth`.
#[derive(Debug, Args)]
pub struct SynthArgs {
    /// `120b`, `20b`, or a config.json
    #[arg(long, value_name = "SHAPE")]
    shape: Shape,
    /// Layers instead of the shape's own
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    layers: Option<u32>,
    /// The same seed gives the same bytes
    #[arg(long)]
    seed: u64,
    /// Where to write; must not exist or be empty
    dir: PathBuf,
}

/// Arguments of `model export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The embedded model
    #[arg(value_parser = [nano::SPEC])]
    model: String,
    /// Where to write; must not exist or be empty
    dir: PathBuf,
}

/// Which model, and on how many workers.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// `nano`, a checkpoint directory, or a model id in the local Hugging Face cache
    #[arg(long, default_value = nano::SPEC)]
    pub model: String,
    /// Workers that share the experts
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How they compute
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `model logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Rows computed at once
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    chunk: u32,
    /// Also write the logits of every position to a file: raw f32, little endian, one position after the other
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

/// Arguments of `model generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Tokens to generate
    #[arg(long, value_name = "N")]
    max_tokens: u32,
}

/// Runs `phalanx model`.
///
/// # Errors
/// See each subcommand.
pub fn run(command: ModelCommand) -> Result<ExitCode> {
    match command {
        ModelCommand::Inspect(args) => inspect(&args),
        ModelCommand::Synth(args) => synth(&args),
        ModelCommand::Export(args) => {
            nano::export(&args.dir)?;
            say(format_args!("{}: the full checkpoint of {}", args.dir.display(), args.model))?;
            Ok(ExitCode::SUCCESS)
        }
        ModelCommand::Logits(args) => logits(&args),
        ModelCommand::Generate(args) => generate(&args),
    }
}

/// The memory plan of every rank.
fn memory_plans(
    config: &ModelConfig,
    workers: u32,
    limits: &Limits,
    report: &BackendReport,
) -> Result<Vec<MemoryPlan>> {
    let layout = Layout::new(workers, 0)?;
    let layers = u32::try_from(config.layers.len()).context("too many layers")?;
    let placement = Placement::contiguous(layers, config.experts, layout);
    Ok(layout.ranks().map(|rank| MemoryPlan::new(config, layout, &placement, rank, limits, report)).collect())
}

fn inspect(args: &InspectArgs) -> Result<ExitCode> {
    let checkpoint = match checkpoint::open(&args.model) {
        Ok(checkpoint) => checkpoint,
        Err(error) if std::path::Path::new(&args.model).is_dir() => return inspect_defective(args, error),
        Err(error) => return Err(error.into()),
    };
    let config = checkpoint.config();
    let limits = args.limits.limits(config);
    let report = args.device.device(args.workers)?.look(&checkpoint)?;
    let plans = memory_plans(config, args.workers, &limits, &report.backend)?;
    let inspection = Inspection::of(&checkpoint);
    if args.json {
        let mut value = serde_json::to_value(&inspection)?;
        value["workers"] = json!(args.workers);
        value["memory"] = plans.iter().map(plan_json).collect();
        say_json(&value)?;
    } else {
        say_inspection(&inspection)?;
        say(format_args!("memory of each of {} workers (MiB):", args.workers))?;
        for plan in &plans {
            say(format_args!("  rank {}: {:.1}", plan.rank, mib(plan.total().0)))?;
            for (what, bytes) in &plan.uses {
                say(format_args!("    {:<16}{:>10.1}", what.name(), mib(bytes.0)))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn plan_json(plan: &MemoryPlan) -> serde_json::Value {
    let uses: BTreeMap<&str, u64> = plan.uses.iter().map(|(what, bytes)| (what.name(), bytes.0)).collect();
    json!({"rank": plan.rank.0, "total_bytes": plan.total().0, "uses": uses})
}

/// Shows what can be seen of a checkpoint that does not open, and all its defects.
fn inspect_defective(args: &InspectArgs, error: CheckpointError) -> Result<ExitCode> {
    let (inspection, _) = Inspection::of_directory(std::path::Path::new(&args.model));
    if args.json {
        say_json(&serde_json::to_value(&inspection)?)?;
    } else {
        say_inspection(&inspection)?;
    }
    Err(anyhow::Error::new(error))
}

fn say_inspection(inspection: &Inspection) -> Result<()> {
    say(&inspection.name)?;
    if let Some(model) = &inspection.model {
        let context = model.context;
        say(format_args!(
            "  {} layers ({} with a window of {}), context {context}",
            model.layers, model.sliding_layers, model.window
        ))?;
        say(format_args!(
            "  hidden {}, {} query and {} key-value heads of {}",
            model.hidden, model.heads, model.kv_heads, model.head_dim
        ))?;
        say(format_args!(
            "  {} experts of {}, {} for a token; vocabulary {}",
            model.experts, model.intermediate, model.experts_per_token, model.vocab
        ))?;
        say(format_args!(
            "  {:.2} B parameters, {:.2} B of them active for a token",
            model.parameters as f64 / 1e9,
            model.active_parameters as f64 / 1e9
        ))?;
        let bytes = &model.bytes;
        say("bytes (MiB):")?;
        for (what, bytes) in [
            ("attention", bytes.attention),
            ("router", bytes.router),
            ("experts", bytes.experts),
            ("norms", bytes.norms),
            ("embedding", bytes.embedding),
            ("unembedding", bytes.unembedding),
            ("total", bytes.total),
        ] {
            say(format_args!("    {what:<16}{:>10.1}", mib(bytes)))?;
        }
    }
    for file in &inspection.files {
        say(format_args!("file {} {:.1} MiB", file.name, mib(file.bytes)))?;
    }
    say(format_args!("{} tensors (--json lists them)", inspection.tensors.len()))?;
    for name in &inspection.unused {
        say(format_args!("not part of the model: {name}"))?;
    }
    for defect in &inspection.defects {
        say(format_args!("defect: {defect}"))?;
    }
    Ok(())
}

fn synth(args: &SynthArgs) -> Result<ExitCode> {
    let bar = byte_bar("writing");
    synth::write(&args.shape, args.layers, args.seed, &args.dir, &mut |done, total| advance(&bar, done, total))?;
    bar.finish_and_clear();
    say(format_args!("{}: random weights, seed {}", args.dir.display(), args.seed))?;
    Ok(ExitCode::SUCCESS)
}

/// Opens the model and starts a cell just large enough for one request.
fn cell_for(run: &RunArgs, tokens: usize, rows: u32) -> Result<(Arc<Checkpoint>, crate::local::LocalCell)> {
    let checkpoint = Arc::new(checkpoint::open(&run.model)?);
    let tokens = u32::try_from(tokens).unwrap_or(u32::MAX).min(checkpoint.config().context);
    let limits = Limits::new(checkpoint.config(), 1, rows.min(tokens.max(1)), tokens);
    let device = run.device.device(run.workers)?;
    let cell = start_cell(&checkpoint, &CellOptions { workers: run.workers, device, limits })?;
    Ok((checkpoint, cell))
}

/// A greedy request that nothing stops.
#[must_use]
pub fn request(seq: u64, prompt: &[u32], max_tokens: u32, want: Want) -> Request {
    let prompt = prompt.iter().map(|&id| TokenId(id)).collect();
    Request { want, ..Request::greedy(SeqId(seq), prompt, max_tokens) }
}

/// The hash over raw f32 logits, little endian.
#[derive(Clone, Default)]
pub struct LogitsHash(Sha256);

impl LogitsHash {
    /// Adds the logits of further positions.
    pub fn add(&mut self, logits: &[f32]) {
        for chunk in logits.chunks(4096) {
            let bytes: Vec<u8> = chunk.iter().flat_map(|l| l.to_le_bytes()).collect();
            self.0.update(&bytes);
        }
    }

    /// The hash in hexadecimal.
    #[must_use]
    pub fn hex(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

fn logits(args: &LogitsArgs) -> Result<ExitCode> {
    let prompt = &args.prompt.prompt_ids;
    let (checkpoint, mut cell) = cell_for(&args.run, prompt.len(), args.chunk)?;
    cell.submit(request(1, prompt, 0, Want::Logits))?;
    let vocab = checkpoint.config().vocab as usize;
    let mut hash = LogitsHash::default();
    let mut last = Vec::new();
    let named = |path: &PathBuf| format!("cannot write {}", path.display());
    let mut save = match &args.save {
        Some(path) => Some((path, BufWriter::new(File::create(path).with_context(|| named(path))?))),
        None => None,
    };
    let mut written = Ok(());
    cell.run(|event| {
        if let Event::Logits { logits, .. } = event {
            hash.add(&logits);
            if let Some((_, file)) = save.as_mut().filter(|_| written.is_ok()) {
                written = logits.iter().try_for_each(|logit| file.write_all(&logit.to_le_bytes()));
            }
            last = logits[logits.len() - vocab..].to_vec();
        }
    })?;
    if let Some((path, mut file)) = save {
        written.and_then(|()| file.flush()).with_context(|| named(path))?;
    }
    let hash = hash.hex();
    if args.run.json {
        say_json(&json!({"last_logits": last, "bits_sha256": hash}))?;
    } else {
        let mut order: Vec<usize> = (0..last.len()).collect();
        order.sort_by(|&a, &b| last[b].total_cmp(&last[a]).then(a.cmp(&b)));
        for id in order.into_iter().take(10) {
            say(format_args!("{id:>8} {:.5}", last[id]))?;
        }
        say(format_args!("sha256 over all positions: {hash}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn generate(args: &GenerateArgs) -> Result<ExitCode> {
    let prompt = &args.prompt.prompt_ids;
    let tokens = prompt.len().saturating_add(args.max_tokens as usize);
    let (_, mut cell) = cell_for(&args.run, tokens, 256)?;
    cell.submit(request(1, prompt, args.max_tokens, Want::Tokens))?;
    let mut ids = Vec::new();
    cell.run(|event| {
        if let Event::Token { token, .. } = event {
            ids.push(token.0);
        }
    })?;
    if args.run.json {
        say_json(&json!({"token_ids": ids}))?;
    } else {
        let text: Vec<String> = ids.iter().map(u32::to_string).collect();
        say(text.join(","))?;
    }
    Ok(ExitCode::SUCCESS)
}
