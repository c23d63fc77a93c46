//! `phalanx coordinator`: a server whose workers run already.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::cli::{BadFlags, EngineArgs, LimitArgs, TokenArgs};
use crate::commands::say;
use crate::commands::serve::{ApiArgs, cells};
use crate::server::{self, Server, ServerOptions};

/// Arguments of `coordinator`.
#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    /// Address of a worker; once for each, in the order of their ranks
    #[arg(
        long = "worker",
        env = "PHALANX_WORKER_ADDRESSES",
        value_name = "HOST:PORT",
        required = true,
        value_delimiter = ','
    )]
    workers: Vec<String>,
    /// Cells: the workers are divided evenly, the first ones to the first cell
    #[arg(long, env = "PHALANX_REPLICAS", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    replicas: u32,
    /// Where to listen for HTTP
    #[arg(long, env = "PHALANX_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    #[command(flatten)]
    api: ApiArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    token: TokenArgs,
}

/// Runs `phalanx coordinator`.
///
/// # Errors
/// A worker cannot be reached or refuses, the address is taken, or every cell has failed.
pub fn run(args: CoordinatorArgs) -> Result<ExitCode> {
    let runtime = server::runtime()?;
    runtime.block_on(async {
        let (count, replicas) = (args.workers.len(), args.replicas as usize);
        if !count.is_multiple_of(replicas) {
            let uneven = "cannot be divided evenly among";
            let why = format!("{count} workers {uneven} {replicas} cells; name a multiple of {replicas}");
            return Err(BadFlags(why).into());
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = args.workers.iter().find(|worker| !names.insert(*worker)) {
            return Err(BadFlags(format!("the worker at {twice} is named twice; name each worker once")).into());
        }
        let workers = count / replicas;
        let options = ServerOptions {
            cells: args.workers.chunks(workers).map(<[String]>::to_vec).collect(),
            listen: args.listen,
            api: args.api,
            limits: args.limits,
            engine: args.engine,
            token: args.token.read()?,
        };
        let server = tokio::select! {
            server = Server::start(options) => server.context("the server does not start")?,
            code = server::interrupted() => return Ok(ExitCode::from(code)),
        };
        let cells = cells(args.replicas, u32::try_from(workers).unwrap_or(u32::MAX));
        say(format_args!("{} on http://{}/v1, {cells}", server.model(), server.address()))?;
        let asked = server::asked_to_end(server.failed()).await;
        server.drain(server::interrupted()).await;
        asked.map(|()| ExitCode::SUCCESS)
    })
}
