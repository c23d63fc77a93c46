//! `phalanx kernels`: the machine code of the CUDA kernels.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use phalanx_kernels::cuda::compile::{ARCHS, build, files};
use phalanx_worker::device::kernel_cache;
use serde_json::json;

use crate::commands::{mib, say, say_json};

/// Makes the machine code of the CUDA kernels.
#[derive(Debug, Subcommand)]
pub enum KernelsCommand {
    /// Compile the CUDA kernels ahead of time, for images and for machines without a compiler. Needs NVRTC, and neither a
    /// GPU nor a driver
    Build(BuildArgs),
}

/// Arguments of `kernels build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// Compute capabilities to compile for, such as `80,90a` [default: all of them]
    #[arg(long, value_name = "ARCHS", value_delimiter = ',', value_parser = ARCHS)]
    arch: Vec<String>,
    /// Where to put the files; workers find them there if PHALANX_KERNEL_CACHE names it [default: the folder that
    /// workers use]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs `phalanx kernels build`.
///
/// # Errors
/// There is no NVRTC, it refuses, or the folder cannot be written.
pub fn run(command: &KernelsCommand) -> Result<ExitCode> {
    let KernelsCommand::Build(BuildArgs { arch, out, json }) = command;
    let folder = out.clone().or_else(kernel_cache).context("this user has no cache folder; give --out")?;
    let archs: Vec<&str> = ARCHS.into_iter().filter(|a| arch.is_empty() || arch.iter().any(|b| a == b)).collect();
    let style = ProgressStyle::with_template("compiling [{bar:30}] {pos}/{len} {msg}")
        .expect("the template is well formed")
        .progress_chars("=> ");
    let bar = ProgressBar::new(archs.iter().map(|arch| files(arch).count() as u64).sum()).with_style(style);
    let built = build(&archs, &folder, |built| {
        bar.set_message(format!("{} for sm_{}", built.file, built.arch));
        bar.inc(1);
    });
    bar.finish_and_clear();
    let built = built?;
    let of = |arch: &str| {
        let cubins = built.iter().filter(|built| built.arch == arch);
        cubins.fold((0_usize, 0_u64), |(files, bytes), built| (files + 1, bytes + built.cubin.len() as u64))
    };
    if *json {
        let archs = archs.iter().map(|&arch| {
            let (files, bytes) = of(arch);
            json!({"arch": arch, "files": files, "bytes": bytes})
        });
        say_json(&json!({"folder": folder, "archs": archs.collect::<Vec<_>>()}))?;
        return Ok(ExitCode::SUCCESS);
    }
    for arch in archs {
        let (files, bytes) = of(arch);
        say(format_args!("sm_{arch:5} {files} files, {:.1} MiB", mib(bytes)))?;
    }
    say(format_args!("in {}; PHALANX_KERNEL_CACHE names it to workers", folder.display()))?;
    Ok(ExitCode::SUCCESS)
}
