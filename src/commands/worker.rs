//! `phalanx worker`: holds a share of a model and does what a coordinator says.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use phalanx_model::{checkpoint, nano};
use phalanx_wire::token::check_listener;
use phalanx_worker::collectives::tcp::Listener;
use phalanx_worker::host::ModelHost;
use phalanx_worker::{process, service};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{DeviceArgs, ExchangeArgs, LOOPBACK_ANY_PORT, TokenArgs};
use crate::commands::{note, say, say_json};
use crate::server;

/// Arguments of `worker`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// `nano`, a checkpoint directory, a model id in the local Hugging Face cache, or `synth:20b`, `synth:120b` for random
    /// weights; only this worker's experts are read from it
    #[arg(long, env = "PHALANX_MODEL", default_value = nano::SPEC)]
    model: String,
    /// Where to listen for the coordinator
    #[arg(long, env = "PHALANX_WORKER_LISTEN", value_name = "ADDR", default_value = LOOPBACK_ANY_PORT)]
    listen: SocketAddr,
    /// Where to listen for other workers [default: any port of the address of --listen]
    #[arg(long, env = "PHALANX_WORKER_DATA_LISTEN", value_name = "ADDR")]
    data_listen: Option<SocketAddr>,
    /// Announce the address as JSON, and end when standard input ends
    #[arg(long, hide = true)]
    child: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    exchange: ExchangeArgs,
    #[command(flatten)]
    token: TokenArgs,
}

/// Runs `phalanx worker`.
///
/// # Errors
/// The model does not open, or the address may not or cannot be listened on.
pub fn run(args: WorkerArgs) -> Result<ExitCode> {
    let token = args.token.read()?;
    let data_listen = args.data_listen.unwrap_or_else(|| SocketAddr::new(args.listen.ip(), 0));
    for address in [args.listen, data_listen] {
        check_listener(address, token.as_ref())?;
    }
    let choice = args.device.choose()?;
    let checkpoint = Arc::new(checkpoint::open(&args.model)?);
    let data = Listener::bind(data_listen, token.as_ref().map(phalanx_wire::ClusterToken::bytes))
        .with_context(|| format!("cannot listen on {data_listen}"))?;
    let device = args.exchange.on(args.device.device_on(&choice, 1)?)?;
    let host = ModelHost::new(checkpoint, device, data)?;
    let runtime = server::runtime()?;
    runtime.block_on(async {
        let listen = args.listen;
        let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;
        if args.child {
            say_json(&json!({"address": address.to_string()}))?;
            // A supervisor that ends the parent signals the whole group, and requests are to be finished first: the
            // parent says when. Handled once, the signals do nothing any more.
            drop((signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?));
            service::serve(listener, host, token, process::parent_gone()?).await?;
        } else {
            say(format_args!("worker of {} on {address}; give it to `phalanx coordinator --worker`", args.model))?;
            note(&choice);
            let ended = async {
                server::interrupted().await;
            };
            service::serve(listener, host, token, ended).await?;
        }
        Ok(ExitCode::SUCCESS)
    })
}
