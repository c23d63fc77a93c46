//! `phalanx chat`: asks a model, on a small cluster of its own or on a running server.

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use phalanx_model::nano;
use serde_json::{Value, json};

use crate::cli::{DeviceArgs, EngineArgs, LOOPBACK_ANY_PORT, LimitArgs};
use crate::client::{self, ChatClient, Piece};
use crate::commands::colours;
use crate::commands::serve::ApiArgs;
use crate::server::{self, LocalServer};

/// Arguments of `chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// What to ask; without it, a conversation line by line
    prompt: Option<String>,
    /// Ask this server instead of starting a cluster, for example http://127.0.0.1:8000
    #[arg(long, env = "PHALANX_URL", value_name = "URL", value_parser = client::url)]
    url: Option<String>,
    /// The key for the server
    #[arg(long, env = "PHALANX_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// `nano`, a checkpoint directory, a model id in the local Hugging Face cache, or `synth:20b`, `synth:120b` for random
    /// weights; with --url a served name
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Workers that share the experts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// How much the model thinks
    #[arg(long, value_parser = ["none", "low", "medium", "high"])]
    effort: Option<String>,
    /// Instructions for the model
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Runs `phalanx chat`.
///
/// # Errors
/// The cluster does not start, or the server refuses.
pub fn run(args: ChatArgs, log: &str) -> Result<ExitCode> {
    if let Some(url) = &args.url {
        let client = ChatClient::connect(url, args.api_key.clone(), args.model.clone())?;
        converse(&client, &args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = server::runtime()?;
    let options = server::LocalOptions {
        model: args.model.clone().unwrap_or_else(|| nano::SPEC.to_owned()),
        workers: args.workers,
        replicas: 1,
        device: args.device.device(args.workers)?,
        log: log.to_owned(),
        limits: args.limits,
        engine: EngineArgs::default(),
        listen: LOOPBACK_ANY_PORT.parse().expect("it is an address"),
        api: ApiArgs::default(),
        token: None,
    };
    let server = runtime.block_on(LocalServer::start(options))?;
    let url = format!("http://{}", server.address());
    // The conversation is on a thread of its own, so that an interrupt is heard at any moment.
    let (done, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let talk = ChatClient::connect(&url, None, None).and_then(|client| converse(&client, &args));
        // Nobody waits any more after an interrupt.
        drop(done.send(talk));
    });
    runtime.block_on(async move {
        let outcome = tokio::select! {
            talk = ended => talk.map_err(anyhow::Error::from).and_then(|talk| talk.map(|()| ExitCode::SUCCESS)),
            code = server::interrupted() => Ok(ExitCode::from(code)),
        };
        server.stop_now().await;
        outcome
    })
}

fn converse(client: &ChatClient, args: &ChatArgs) -> Result<()> {
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    if let Some(prompt) = &args.prompt {
        return ask(client, args, &mut messages, prompt);
    }
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        writeln!(std::io::stdout(), "{} on this line; an empty line or Ctrl-D ends the conversation", client.model())?;
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            write!(std::io::stdout(), "> ")?;
            std::io::stdout().flush()?;
        }
        let Some(line) = lines.next().transpose()? else { return Ok(()) };
        if line.trim().is_empty() {
            return Ok(());
        }
        ask(client, args, &mut messages, &line)?;
    }
}

/// Asks once and prints the answer as it comes: thinking dimmed, then the answer, then how fast.
fn ask(client: &ChatClient, args: &ChatArgs, messages: &mut Vec<Value>, prompt: &str) -> Result<()> {
    messages.push(json!({"role": "user", "content": prompt}));
    let (dim, plain) = if colours(&std::io::stdout()) { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
    let mut out = std::io::stdout().lock();
    let mut answer = String::new();
    let mut thinking = false;
    let mut first: Option<Instant> = None;
    let mut tokens = 0;
    client.chat(messages, args.effort.as_deref(), |piece| {
        if !matches!(piece, Piece::Usage { .. }) {
            first.get_or_insert_with(Instant::now);
        }
        match piece {
            Piece::Reasoning(text) => {
                thinking = true;
                write!(out, "{dim}{text}{plain}")?;
            }
            Piece::Content(text) => {
                if std::mem::take(&mut thinking) {
                    writeln!(out)?;
                }
                answer.push_str(&text);
                write!(out, "{text}")?;
            }
            Piece::Usage { completion_tokens } => tokens = completion_tokens,
        }
        Ok(out.flush()?)
    })?;
    let seconds = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
    // The first token's own time is prefill.
    let rate = if seconds > 0.0 && tokens > 1 { (tokens - 1) as f64 / seconds } else { 0.0 };
    writeln!(out, "\n{dim}{tokens} tokens, {rate:.1} tokens/s{plain}")?;
    messages.push(json!({"role": "assistant", "content": answer}));
    Ok(())
}
