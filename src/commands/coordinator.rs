//! `phalanx coordinator`: a server whose workers run already.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::cli::{LimitArgs, TokenArgs};
use crate::commands::say;
use crate::commands::serve::ApiArgs;
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
    /// Where to listen for HTTP
    #[arg(long, env = "PHALANX_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    #[command(flatten)]
    api: ApiArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    token: TokenArgs,
}

/// Runs `phalanx coordinator`.
///
/// # Errors
/// A worker cannot be reached or refuses, or the address is taken.
pub fn run(args: CoordinatorArgs) -> Result<ExitCode> {
    let runtime = server::runtime()?;
    runtime.block_on(async {
        let count = args.workers.len();
        let options = ServerOptions {
            workers: args.workers,
            listen: args.listen,
            api: args.api,
            limits: args.limits,
            token: args.token.read()?,
        };
        let server = tokio::select! {
            server = Server::start(options) => server.context("the server does not start")?,
            code = server::interrupted() => return Ok(ExitCode::from(code)),
        };
        say(format_args!("{} on http://{}/v1, {count} workers", server.model(), server.address()))?;
        server::interrupted().await;
        server.drain().await;
        Ok(ExitCode::SUCCESS)
    })
}
