//! `phalanx serve`: a server with workers of its own on this machine.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use phalanx_coordinator::api::ApiKeys;
use phalanx_coordinator::harmony::ReasoningEffort;
use phalanx_model::nano;

use crate::cli::{DeviceArgs, EngineArgs, ExchangeArgs, LimitArgs, TokenArgs};
use crate::commands::{note, say};
use crate::server::{self, LocalOptions, LocalServer};

/// What the HTTP API says and to whom.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "API")]
pub struct ApiArgs {
    /// The model's name in requests [default: the checkpoint's name]
    #[arg(long, env = "PHALANX_SERVED_MODEL_NAME", value_name = "NAME", value_parser = name)]
    pub served_model_name: Option<String>,
    /// Who the model is told to be [default: harmony's own sentence]
    #[arg(long, env = "PHALANX_MODEL_IDENTITY", value_name = "SENTENCE")]
    pub model_identity: Option<String>,
    /// Today, as the model is told: YYYY-MM-DD [default: it is told no date, so that prefixes stay the same]
    #[arg(long, env = "PHALANX_CURRENT_DATE", value_name = "DATE", value_parser = date)]
    pub current_date: Option<String>,
    /// How much the model thinks where a request does not say [default: medium]
    #[arg(long, env = "PHALANX_REASONING_EFFORT", value_parser = ["none", "low", "medium", "high"])]
    pub reasoning_effort: Option<String>,
    /// Keys, one of which every request must bear, separated by commas [default: none is asked for]
    #[arg(long, env = "PHALANX_API_KEYS", hide_env_values = true, value_name = "KEYS", value_delimiter = ',',
          value_parser = name)]
    pub api_keys: Vec<String>,
    /// Seconds that running requests may go on after a stop is asked for; being asked again ends them [default: 30]
    #[arg(long, env = "PHALANX_DRAIN_SECONDS", value_name = "S", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub drain_seconds: Option<u64>,
}

fn name(text: &str) -> Result<String, String> {
    let name = text.trim();
    if name.is_empty() {
        Err("it is empty; leave it out, or give at least one".to_owned())
    } else {
        Ok(name.to_owned())
    }
}

fn date(text: &str) -> Result<String, String> {
    let parts: Vec<Option<u32>> = text.split('-').map(|part| part.parse().ok()).collect();
    let is_date = match parts[..] {
        [Some(year), Some(month), Some(day)] => {
            let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            let days = match month {
                2 if is_leap => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (1..=12).contains(&month) && (1..=days).contains(&day) && format!("{year:04}-{month:02}-{day:02}") == text
        }
        _ => false,
    };
    if is_date { Ok(text.to_owned()) } else { Err("it is no day; give it as in 2025-12-31".to_owned()) }
}

impl ApiArgs {
    /// The keys asked for.
    #[must_use]
    pub fn keys(&self) -> ApiKeys {
        ApiKeys::new(&self.api_keys)
    }

    /// How much the model thinks where a request does not say.
    #[must_use]
    pub fn effort(&self) -> ReasoningEffort {
        match self.reasoning_effort.as_deref() {
            Some("none") => ReasoningEffort::None,
            Some("low") => ReasoningEffort::Low,
            Some("high") => ReasoningEffort::High,
            _ => ReasoningEffort::Medium,
        }
    }
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// `nano`, a checkpoint directory, a model id in the local Hugging Face cache, or `synth:20b`, `synth:120b` for random
    /// weights
    #[arg(long, env = "PHALANX_MODEL", default_value = nano::SPEC)]
    model: String,
    /// Workers that share the experts of a cell
    #[arg(long, env = "PHALANX_WORKERS", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Cells, each with the whole model on workers of its own
    #[arg(long, env = "PHALANX_REPLICAS", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    replicas: u32,
    /// Where to listen for HTTP
    #[arg(long, env = "PHALANX_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    #[command(flatten)]
    api: ApiArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    exchange: ExchangeArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    token: TokenArgs,
}

/// How many of what, in words.
pub fn cells(replicas: u32, workers: u32) -> String {
    match replicas {
        1 => format!("{workers} workers"),
        _ => format!("{replicas} cells of {workers} workers"),
    }
}

/// Runs `phalanx serve`.
///
/// # Errors
/// A worker does not start, or the address is taken.
pub fn run(args: ServeArgs, log: &str) -> Result<ExitCode> {
    let runtime = server::runtime()?;
    runtime.block_on(async {
        let choice = args.device.choose()?;
        note(&choice);
        let device = args.device.device_on(&choice, args.workers * args.replicas)?;
        let device = args.exchange.on(device)?;
        let options = LocalOptions {
            model: args.model,
            workers: args.workers,
            replicas: args.replicas,
            device,
            log: log.to_owned(),
            limits: args.limits,
            engine: args.engine,
            listen: args.listen,
            api: args.api,
            token: args.token.read()?,
        };
        let server = tokio::select! {
            server = LocalServer::start(options) => server.context("the server does not start")?,
            code = server::interrupted() => return Ok(ExitCode::from(code)),
        };
        let cells = cells(args.replicas, args.workers);
        say(format_args!("{} on http://{}/v1, {cells}", server.model(), server.address()))?;
        server::interrupted().await;
        server.drain(server::interrupted()).await;
        Ok(ExitCode::SUCCESS)
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::{Cli, Command};

    #[test]
    fn keys_may_have_spaces_between_them() {
        let cli = Cli::try_parse_from(["phalanx", "serve", "--api-keys", "one, two"]);
        let Ok(Cli { command: Command::Serve(args), .. }) = cli else { panic!("{cli:?}") };
        assert_eq!(args.api.api_keys, ["one", "two"]);
    }
}
