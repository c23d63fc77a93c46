//! What users may say on the command line. `--help` is meant to be enough.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use phalanx_coordinator::workers::{CellError, PLANS_AHEAD_MAX, WorkerError};
use phalanx_kernels::cpu::Isa;
use phalanx_model::{CheckpointError, LoadError};
use phalanx_planner::EngineConfig;
use phalanx_proto::{ConfigError, DenseType, Limits, MemoryRefused, ModelConfig, NumericsId, Precision};
use phalanx_wire::{ClusterToken, TokenError};
use phalanx_worker::collectives::nccl::ExchangeRequest;
use phalanx_worker::device::{
    Choice, Device, DeviceError, DeviceRequest, DriverGpus, Probe, Processor, choose_device, cores,
};
use sha2::{Digest, Sha256};

use crate::children::WorkerExited;
use crate::commands;

/// Exit code of a checkpoint or layout that cannot be used, as of a wrong flag.
const EXIT_INPUT: u8 = 2;

/// Serves OpenAI's gpt-oss models on a cluster of workers that share the experts.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// What to log to standard error: error, warn, info, debug, trace, or a filter such as `phalanx=debug`
    #[arg(long, global = true, env = "PHALANX_LOG", default_value = "warn", value_name = "FILTER")]
    pub log: String,
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Chat with a model: starts a small cluster on this machine, or uses a running server (--url)
    Chat(commands::chat::ChatArgs),
    /// Serve a model over HTTP with workers started on this machine
    Serve(commands::serve::ServeArgs),
    /// Serve a model over HTTP with workers that run already, on this or other machines
    Coordinator(commands::coordinator::CoordinatorArgs),
    /// Hold a share of a model and do what a coordinator says
    Worker(commands::worker::WorkerArgs),
    /// Look into checkpoints, make them, and run them without a server
    #[command(subcommand)]
    Model(commands::model::ModelCommand),
    /// Prove that a model gives the same bits in every layout
    Verify(commands::verify::VerifyArgs),
    /// Say what this machine offers, and what is missing
    Doctor(commands::doctor::DoctorArgs),
    /// Make the machine code of the CUDA kernels
    #[command(subcommand)]
    Kernels(commands::kernels::KernelsCommand),
    /// Measure speed
    #[command(subcommand)]
    Bench(commands::bench::BenchCommand),
}

/// How much is rounded on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// f32 activations and KV: the oracle
    Exact,
    /// Rows rounded to int8 for the experts (and dense weights in q8), keys and values in 16 bits: the default
    Fast,
}

impl From<PrecisionArg> for Precision {
    fn from(arg: PrecisionArg) -> Self {
        match arg {
            PrecisionArg::Exact => Self::Exact,
            PrecisionArg::Fast => Self::Fast,
        }
    }
}

/// How dense weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DenseArg {
    /// As in the checkpoint
    Bf16,
    /// int8 with a scale per 32 weights: about half the memory to hold and to read
    Q8,
}

impl From<DenseArg> for DenseType {
    fn from(arg: DenseArg) -> Self {
        match arg {
            DenseArg::Bf16 => Self::Bf16,
            DenseArg::Q8 => Self::Q8,
        }
    }
}

/// Flags that do not fit each other, or name nothing that can be used; in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadFlags(pub String);

/// Dense weights cannot be held in q8.
#[derive(Debug, thiserror::Error)]
pub enum NoQ8 {
    /// Exact means that nothing is rounded.
    #[error("--dense q8 (or PHALANX_DENSE) rounds weights, which --precision exact rules out; leave one of them out")]
    Exact,
    /// GPUs have kernels for bf16 only.
    #[error(
        "--dense q8 (or PHALANX_DENSE) is for CPUs, GPUs hold dense weights in bf16; leave it out or give --device cpu"
    )]
    Gpu,
}

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IsaArg {
    /// Any processor
    Portable,
    /// AVX2, FMA and F16C
    Avx2,
    /// AVX-512
    Avx512,
    /// AVX-512 with VNNI
    Avx512Vnni,
    /// AVX-512 with VNNI and VBMI
    Avx512Vbmi,
}

impl From<IsaArg> for Isa {
    fn from(arg: IsaArg) -> Self {
        match arg {
            IsaArg::Portable => Self::Portable,
            IsaArg::Avx2 => Self::Avx2,
            IsaArg::Avx512 => Self::Avx512,
            IsaArg::Avx512Vnni => Self::Avx512Vnni,
            IsaArg::Avx512Vbmi => Self::Avx512Vbmi,
        }
    }
}

/// How workers compute.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Computing")]
pub struct DeviceArgs {
    /// What to compute on: `auto` takes GPUs where they can be used and else CPUs, `cpu`, `cuda` for all GPUs in turn,
    /// or `cuda:N` for one; `phalanx doctor` says what there is
    #[arg(long, env = "PHALANX_DEVICE", value_name = "DEVICE", default_value_t)]
    pub device: DeviceRequest,
    /// How much is rounded on the way
    #[arg(long, env = "PHALANX_PRECISION", value_enum, default_value = "fast")]
    pub precision: PrecisionArg,
    /// How attention and unembedding weights are held [default: on CPUs q8 with fast, else bf16]
    #[arg(long, env = "PHALANX_DENSE", value_enum)]
    pub dense: Option<DenseArg>,
    /// On CPUs: threads in all, divided among the workers of this machine [default: all cores]
    #[arg(long, env = "PHALANX_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// On CPUs: bind each thread to a core, from the one of this number on among those there are to use (and around again)
    #[arg(long, env = "PHALANX_PIN", value_name = "FIRST", num_args = 0..=1, require_equals = true,
          default_missing_value = "0",
          value_parser = clap::value_parser!(u32).range(..=4096))]
    pub pin: Option<u32>,
    /// Pack the weights anew at every start, instead of keeping them packed beside the model or in the user's cache
    #[arg(long, env = "PHALANX_NO_WEIGHT_CACHE", value_parser = FalseyValueParser::new())]
    pub no_weight_cache: bool,
    /// On CPUs: use this instruction set instead of the best there is; the bits are the same
    #[arg(long, env = "PHALANX_ISA", value_enum)]
    pub isa: Option<IsaArg>,
}

impl DeviceArgs {
    /// What to compute on, by what this machine has.
    ///
    /// # Errors
    /// What is asked for cannot be used.
    pub fn choose(&self) -> Result<Choice, DeviceError> {
        let choice = choose_device(self.device, Probe::take)?;
        tracing::info!("{choice}");
        Ok(choice)
    }

    /// The device that `workers` workers of this machine share.
    ///
    /// # Errors
    /// What is asked for cannot be used, or flags contradict each other.
    pub fn device(&self, workers: u32) -> anyhow::Result<Device> {
        Ok(self.device_on(&self.choose()?, workers)?)
    }

    /// The device that `workers` workers of this machine share, by a choice made before.
    ///
    /// # Errors
    /// [`NoQ8`].
    pub fn device_on(&self, choice: &Choice, workers: u32) -> Result<Device, NoQ8> {
        let threads = self.threads.unwrap_or_else(cores);
        let gpu = choice.processor != Processor::Cpu;
        let dense = match (self.precision, self.dense) {
            (PrecisionArg::Exact, Some(DenseArg::Q8)) => return Err(NoQ8::Exact),
            (_, Some(DenseArg::Q8)) if gpu => return Err(NoQ8::Gpu),
            (PrecisionArg::Fast, None) if !gpu => DenseType::Q8,
            (_, None) => DenseType::Bf16,
            (_, Some(dense)) => dense.into(),
        };
        Ok(Device {
            processor: choice.processor,
            precision: self.precision.into(),
            dense,
            threads: (threads / workers.max(1)).max(1),
            pin: self.pin,
            weight_cache: !self.no_weight_cache,
            isa: self.isa.map(Into::into),
            gpus: &DriverGpus,
            exchange: ExchangeRequest::Auto,
        })
    }
}

/// How workers reach each other.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Computing")]
pub struct ExchangeArgs {
    /// What carries rows between GPUs: `auto` takes NCCL where all workers can and else TCP, `tcp`, `nccl`, or `nccl-graphs`,
    /// which enqueues the exchanges of small steps with all else (not yet run on several GPUs)
    #[arg(long, env = "PHALANX_EXCHANGE", value_name = "TRANSPORT", default_value_t)]
    pub exchange: ExchangeRequest,
}

impl ExchangeArgs {
    /// `device` with the transport asked for.
    ///
    /// # Errors
    /// It has no use for that.
    pub fn on(&self, device: Device) -> Result<Device, BadFlags> {
        if self.exchange.insists_on_nccl() && device.processor == Processor::Cpu {
            let asked = self.exchange;
            return Err(BadFlags(format!("--exchange {asked} is for GPUs; leave it out, or give --device cuda")));
        }
        Ok(Device { exchange: self.exchange, ..device })
    }
}

/// How much a worker takes at once.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Tokens of context that each worker has KV memory for
    #[arg(long, env = "PHALANX_KV_TOKENS", value_name = "N", default_value_t = 32_768,
          value_parser = clap::value_parser!(u32).range(16..=1 << 28))]
    pub kv_tokens: u32,
    /// Sequences on a worker at once
    #[arg(long, env = "PHALANX_SEQS_MAX", value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub seqs_max: u32,
    /// Rows of a worker in one step
    #[arg(long, env = "PHALANX_STEP_ROWS", value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub step_rows: u32,
}

impl LimitArgs {
    /// The limits for a model.
    #[must_use]
    pub fn limits(&self, model: &ModelConfig) -> Limits {
        Limits::new(model, self.seqs_max, self.step_rows, self.kv_tokens)
    }
}

/// How requests share the workers.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub struct EngineArgs {
    /// Requests that may wait in a cell; more are refused with 429
    #[arg(long, env = "PHALANX_QUEUE_REQUESTS", value_name = "N", default_value_t = Self::QUEUE_REQUESTS,
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub queue_requests: u32,
    /// Tokens of prompts that may wait in a cell; more are refused with 429
    #[arg(long, env = "PHALANX_QUEUE_TOKENS", value_name = "N", default_value_t = Self::QUEUE_TOKENS,
          value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub queue_tokens: u64,
    /// Steps that may be under way at once: the next is planned before the last is back
    #[arg(long, env = "PHALANX_DEPTH", value_name = "N", default_value_t = Self::DEPTH,
          value_parser = clap::value_parser!(u32).range(1..=PLANS_AHEAD_MAX as i64))]
    pub depth: u32,
    /// Rows of one request in one step at most [default: as many as a step has]
    #[arg(long, env = "PHALANX_CHUNK", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub chunk: Option<u32>,
    /// Compute every prompt anew, even if it begins like an earlier one
    #[arg(long, env = "PHALANX_NO_PREFIX_CACHE", value_parser = FalseyValueParser::new())]
    pub no_prefix_cache: bool,
    /// Lost workers of a cell for whose experts the others keep room. Cells do not outlive a lost worker yet, so room
    /// kept is room lost
    #[arg(long, env = "PHALANX_SURVIVE", value_name = "N", default_value_t = 0)]
    pub survive: u32,
}

impl Default for EngineArgs {
    fn default() -> Self {
        Self {
            queue_requests: Self::QUEUE_REQUESTS,
            queue_tokens: Self::QUEUE_TOKENS,
            depth: Self::DEPTH,
            chunk: None,
            no_prefix_cache: false,
            survive: 0,
        }
    }
}

impl EngineArgs {
    const QUEUE_REQUESTS: u32 = 1024;
    const QUEUE_TOKENS: u64 = 4 << 20;
    const DEPTH: u32 = 2;

    /// The configuration of a cell's engine.
    #[must_use]
    pub fn config(&self, model: &ModelConfig, limits: Limits, ranks: u32, numerics: &NumericsId) -> EngineConfig {
        EngineConfig {
            queue_max: self.queue_requests as usize,
            queue_tokens_max: self.queue_tokens,
            depth: self.depth,
            chunk_max: self.chunk.unwrap_or(limits.step_rows_max).min(limits.step_rows_max),
            prefix_cache: !self.no_prefix_cache,
            numerics: numerics_salt(numerics),
            ..EngineConfig::new(model, limits, ranks)
        }
    }
}

/// A number that stands for an arithmetic: the first bytes of its name's SHA-256.
fn numerics_salt(numerics: &NumericsId) -> u64 {
    let digest = Sha256::digest(numerics.0.as_bytes());
    digest.iter().take(8).fold(0, |salt, byte| salt << 8 | u64::from(*byte))
}

/// A port of the system's choice on this machine.
pub const LOOPBACK_ANY_PORT: &str = "127.0.0.1:0";

/// Holds the cluster token.
pub const TOKEN_VARIABLE: &str = "PHALANX_CLUSTER_TOKEN";
/// Names the file that holds it.
pub const TOKEN_FILE_VARIABLE: &str = "PHALANX_CLUSTER_TOKEN_FILE";

/// Where a cluster token comes from. Either flag wins over both variables, so clap reads flags alone.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Security")]
pub struct TokenArgs {
    /// The secret that coordinator and workers share; workers need it beyond loopback. At least 16 characters [env:
    /// PHALANX_CLUSTER_TOKEN]
    #[arg(long, value_name = "TOKEN")]
    pub cluster_token: Option<String>,
    /// A file with the secret [env: PHALANX_CLUSTER_TOKEN_FILE]
    #[arg(long, value_name = "FILE", conflicts_with = "cluster_token")]
    pub cluster_token_file: Option<PathBuf>,
}

impl TokenArgs {
    /// The secret, if there is one.
    ///
    /// # Errors
    /// It is too short, its file cannot be read, or both variables are set.
    pub fn read(&self) -> anyhow::Result<Option<ClusterToken>> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let token = match (&self.cluster_token, &self.cluster_token_file) {
            (Some(token), _) => ClusterToken::parse(token)?,
            (None, Some(file)) => ClusterToken::from_file(file)?,
            (None, None) => match (set(TOKEN_VARIABLE), set(TOKEN_FILE_VARIABLE)) {
                (Some(_), Some(_)) => {
                    let both =
                        format!("{TOKEN_VARIABLE} and {TOKEN_FILE_VARIABLE} are both set; leave one of them out");
                    return Err(BadFlags(both).into());
                }
                (Some(token), None) => ClusterToken::parse(&token.to_string_lossy())?,
                (None, Some(file)) => ClusterToken::from_file(Path::new(&file))?,
                (None, None) => return Ok(None),
            },
        };
        Ok(Some(token))
    }
}

/// A prompt as token ids.
#[derive(Clone, Debug, Args)]
pub struct PromptArgs {
    /// Token ids of the prompt, separated by commas
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS", hide_possible_values = true)]
    pub prompt_ids: Vec<u32>,
}

/// Reads the command line and does what it says.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    init_log(&cli.log);
    let done = match cli.command {
        Command::Chat(args) => commands::chat::run(args, &cli.log),
        Command::Serve(args) => commands::serve::run(args, &cli.log),
        Command::Coordinator(args) => commands::coordinator::run(args),
        Command::Worker(args) => commands::worker::run(args),
        Command::Model(command) => commands::model::run(command),
        Command::Verify(args) => commands::verify::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Kernels(command) => commands::kernels::run(&command),
        Command::Bench(command) => commands::bench::run(command),
    };
    match done {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            commands::complain(&error);
            exit_code(&error)
        }
    }
}

/// A worker's own exit code if one did not start, else by whether the input is at fault.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.chain().find_map(|cause| cause.downcast_ref::<WorkerExited>()) {
        Some(exited) => ExitCode::from(exited.code.max(1)),
        None if is_bad_input(error) => ExitCode::from(EXIT_INPUT),
        None => ExitCode::FAILURE,
    }
}

/// Whether the input is at fault rather than the run.
fn is_bad_input(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<BadFlags>()
            || cause.is::<CheckpointError>()
            || cause.is::<ConfigError>()
            || cause.is::<MemoryRefused>()
            || cause.is::<NoQ8>()
            || cause.is::<DeviceError>()
            || cause.is::<LoadError>()
            || cause.is::<TokenError>()
            || cause.is::<phalanx_planner::Refused>()
            || cause.downcast_ref().is_some_and(|error| matches!(error, CellError::Layout(_) | CellError::Twice { .. }))
            || cause.downcast_ref().is_some_and(|error| matches!(error, WorkerError::Address { .. }))
    })
}

/// Whether the reader of our output has gone, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(broken))
}

fn init_log(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_else(|error| {
        commands::complain(&anyhow::anyhow!("--log {filter} is not understood ({error}); using `warn`"));
        tracing_subscriber::EnvFilter::new("warn")
    });
    let ansi = commands::colours(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
}
