//! Workers as child processes of this one. They end with it, however it ends.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Arg, CommandFactory};
use phalanx_wire::ClusterToken;
use phalanx_worker::device::Device;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::cli::{Cli, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE};

/// Longest wait for a worker to open its model and listen.
const START_WAIT: Duration = Duration::from_secs(60);
/// Longest wait for a worker to end by itself before it is killed.
const STOP_WAIT: Duration = Duration::from_secs(2);
/// Longest announcement of a worker, in bytes.
const ANNOUNCEMENT_BYTES_MAX: u64 = 4096;

/// Running workers of this machine. Dropping them kills them.
#[derive(Debug)]
pub struct Children {
    children: Vec<Child>,
    addresses: Vec<SocketAddr>,
}

impl Children {
    /// Starts `count` workers and waits until each listens.
    ///
    /// # Errors
    /// A worker does not start; its own words are on standard error.
    pub async fn start(count: u32, model: &str, device: &Device, log: &str, token: &ClusterToken) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's file to start workers")?;
        let variables = worker_variables();
        let mut starting = Vec::new();
        for worker in 0..count {
            let device = device.of(worker);
            let mut command = Command::new(&program);
            // What is meant for this process, an address for instance, is not meant for all of them.
            for variable in &variables {
                command.env_remove(variable);
            }
            command
                .args(["worker", "--child", "--log", log, "--model", model])
                .args(["--device", &device.processor.to_string()])
                .args(["--precision", &device.precision.to_string(), "--dense", &device.dense.to_string()])
                .args(["--threads", &device.threads.to_string(), "--exchange", &device.exchange.to_string()])
                .env(TOKEN_VARIABLE, token.reveal())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .process_group(0)
                .kill_on_drop(true);
            if let Some(first) = device.pin {
                command.arg(format!("--pin={first}"));
            }
            if !device.weight_cache {
                command.arg("--no-weight-cache");
            }
            if let Some(isa) = device.isa {
                command.args(["--isa", isa.name()]);
            }
            starting.push(command.spawn().context("cannot start a worker")?);
        }
        let mut workers = Self { children: Vec::new(), addresses: Vec::new() };
        for mut child in starting {
            let announced = tokio::time::timeout(START_WAIT, announcement(&mut child)).await;
            let address = match announced.context("a worker does not say where it listens") {
                Ok(Ok(address)) => address,
                // One that ends by itself has said why, and its exit code is ours.
                Ok(Err(error)) | Err(error) => return Err(exited(&mut child).await.unwrap_or(error)),
            };
            workers.addresses.push(address);
            workers.children.push(child);
        }
        Ok(workers)
    }

    /// Where the workers listen.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Ends every worker and waits until it is gone.
    pub async fn stop(mut self) {
        for child in &mut self.children {
            // Its end is what a child waits for.
            drop(child.stdin.take());
        }
        for mut child in self.children {
            if tokio::time::timeout(STOP_WAIT, child.wait()).await.is_err() {
                drop(child.kill().await);
            }
        }
    }
}

/// A worker that ended before it listened.
#[derive(Debug, thiserror::Error)]
#[error("a worker did not start")]
pub struct WorkerExited {
    /// Its exit code.
    pub code: u8,
}

/// The variables that a worker takes for flags.
fn worker_variables() -> Vec<OsString> {
    let cli = Cli::command();
    let worker = cli.find_subcommand("worker").into_iter().flat_map(clap::Command::get_arguments);
    let flags = worker.filter_map(Arg::get_env).map(OsStr::to_owned);
    flags.chain([TOKEN_VARIABLE.into(), TOKEN_FILE_VARIABLE.into()]).collect()
}

async fn exited(child: &mut Child) -> Option<anyhow::Error> {
    let status = tokio::time::timeout(STOP_WAIT, child.wait()).await.ok()?.ok()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Some(WorkerExited { code }.into())
}

async fn announcement(child: &mut Child) -> Result<SocketAddr> {
    use tokio::io::AsyncReadExt;
    let stdout = child.stdout.as_mut().ok_or_else(|| anyhow!("a worker has no standard output"))?;
    let mut line = String::new();
    BufReader::new(stdout.take(ANNOUNCEMENT_BYTES_MAX)).read_line(&mut line).await?;
    let value: serde_json::Value = serde_json::from_str(&line).context("a worker announced itself strangely")?;
    let address = value["address"].as_str().context("a worker announced no address")?;
    address.parse().context("a worker announced a strange address")
}
