//! `phalanx bench`: measures speed.

pub mod kernels;
pub mod offline;
pub mod report;
pub mod request;
pub mod serve;
pub mod workload;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

/// Measures speed.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Each op at true widths, beside what this machine can do at most
    Kernels(kernels::KernelsArgs),
    /// The engine without HTTP: prefill and decode of a batch
    Offline(offline::OfflineArgs),
    /// Any server that speaks OpenAI's API: requests one after the other, or as they come
    Serve(serve::ServeBenchArgs),
}

/// Runs `phalanx bench`.
///
/// # Errors
/// See each subcommand.
pub fn run(command: BenchCommand) -> Result<ExitCode> {
    match command {
        BenchCommand::Kernels(args) => kernels::run(&args),
        BenchCommand::Offline(args) => offline::run(&args),
        BenchCommand::Serve(args) => serve::run(args),
    }
}
