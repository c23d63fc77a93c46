//! `phalanx bench kernels`: the dear ops at gpt-oss's true widths, beside what this machine can do at most.

mod cases;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use phalanx_kernels::cpu::ceiling::{Ceilings, Yardstick};
use phalanx_kernels::{Backend, Cpu};
use phalanx_proto::memory::LOGITS_ROWS_MAX;
use phalanx_proto::{DenseType, Precision};
use phalanx_worker::device::DeviceRequest;
use serde_json::json;

use self::cases::{Arithmetic, Case, DIM, HEADS, HIDDEN, KV_HEADS, Layer, Matrices, Sequences, VOCAB, norm, sample};
use crate::cli::DeviceArgs;
use crate::commands::{note, say, say_json};

/// Arguments of `bench kernels`.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Whose widths
    #[arg(long, value_enum, default_value = "20b")]
    shape: Shape,
    /// Rows of a step
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,32,64,512", value_name = "T",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    rows: Vec<u32>,
    /// Only ops whose name contains this: norm, qkv, attend-full, attend-window, attention-out, experts, unembed, sample
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Tokens of context that each row of attention sees
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    context: u32,
    /// Rounds; each measures every op and every ceiling once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// A published model's widths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shape {
    /// gpt-oss-20b
    #[value(name = "20b")]
    B20,
    /// gpt-oss-120b
    #[value(name = "120b")]
    B120,
}

impl Shape {
    const fn experts(self) -> usize {
        match self {
            Self::B20 => 32,
            Self::B120 => 128,
        }
    }
}

/// No op has such a name.
#[derive(Debug, thiserror::Error)]
#[error("no op's name contains {0:?}, or only with fewer rows than these; `phalanx bench kernels --help` names them")]
struct NoOp(String);

/// GPUs are not measured.
#[derive(Debug, thiserror::Error)]
#[error("`phalanx bench kernels` measures CPUs: leave --device out or give cpu; `phalanx bench offline` takes GPUs")]
struct OnlyCpus;

/// Runs `phalanx bench kernels`.
///
/// # Errors
/// The threads cannot be started, or an op fails.
pub fn run(args: &KernelsArgs) -> Result<ExitCode> {
    if let DeviceRequest::Cuda(_) = args.device.device {
        return Err(OnlyCpus.into());
    }
    let device = DeviceArgs { device: DeviceRequest::Cpu, ..args.device }.device(1)?;
    let mut cpu = device.cpu()?;
    let yardstick = Yardstick::new();
    let arithmetic = match device.dense {
        DenseType::Q8 => Arithmetic::Q8,
        DenseType::Bf16 => Arithmetic::F32,
    };
    let experts = match device.precision {
        Precision::Fast => Arithmetic::Mxfp4,
        Precision::Exact => Arithmetic::F32,
    };
    let wanted = |name: &str| name.contains(&args.only);
    let rows = || args.rows.iter().map(|&rows| rows as usize);
    // Logits of more rows than are ever held at once teach nothing.
    let few = || rows().filter(|&rows| rows <= LOGITS_ROWS_MAX as usize);
    let mut cases = Vec::new();
    if wanted("norm") {
        cases.extend(rows().map(|rows| norm(&mut cpu, rows)).collect::<Result<Vec<_>>>()?);
    }
    if wanted("qkv") {
        let matrices = Matrices::new(&mut cpu, "qkv", (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, arithmetic)?;
        cases.extend(rows().map(|rows| matrices.case(&mut cpu, rows)));
    }
    for (name, window) in [("attend-full", None), ("attend-window", Some(128))] {
        if wanted(name) {
            let sequences = Sequences::new(&mut cpu, name, args.context, window)?;
            cases.extend(rows().map(|rows| sequences.case(&mut cpu, rows)));
        }
    }
    if wanted("attention-out") {
        let matrices = Matrices::new(&mut cpu, "attention-out", HIDDEN, HEADS * DIM, arithmetic)?;
        cases.extend(rows().map(|rows| matrices.case(&mut cpu, rows)));
    }
    if wanted("experts") {
        let layer = Layer::new(&mut cpu, args.shape.experts(), experts)?;
        cases.extend(rows().map(|rows| layer.case(&mut cpu, rows)));
    }
    if wanted("unembed") {
        let matrices = Matrices::new(&mut cpu, "unembed", VOCAB, HIDDEN, arithmetic)?;
        cases.extend(few().map(|rows| matrices.case(&mut cpu, rows)));
    }
    if wanted("sample") {
        cases.extend(few().map(|rows| sample(&mut cpu, rows)));
    }
    if cases.is_empty() {
        return Err(NoOp(args.only.clone()).into());
    }
    let bar = ProgressBar::new(u64::from(args.rounds) * cases.len() as u64)
        .with_style(ProgressStyle::with_template("measuring [{bar:30}] {pos}/{len} {msg}")?.progress_chars("=> "));
    let mut ceilings = Vec::new();
    for round in 0..=args.rounds {
        for case in &mut cases {
            bar.set_message(case.name);
            let seconds = measure(&mut cpu, case)?;
            // The first round warms up.
            if round > 0 {
                case.seconds.push(seconds);
                bar.inc(1);
            }
        }
        if round > 0 {
            ceilings.push(yardstick.measure(&cpu));
        }
    }
    bar.finish_and_clear();
    let ceiling = Ceilings {
        read: median(ceilings.iter().map(|c| c.read)),
        mxfp4: median(ceilings.iter().map(|c| c.mxfp4)),
        q8: median(ceilings.iter().map(|c| c.q8)),
        f32: median(ceilings.iter().map(|c| c.f32)),
    };
    report(args, &cpu, &cases, ceiling, device.threads, &device.dense.to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// Seconds of one op: as many in a row as take a while.
fn measure(cpu: &mut Cpu, case: &mut Case) -> Result<f64> {
    const WHILE: f64 = 0.03;
    let begun = Instant::now();
    let mut times = 0;
    loop {
        (case.run)(cpu);
        times += 1;
        let spent = begun.elapsed().as_secs_f64();
        if spent >= WHILE {
            cpu.finish().with_context(|| format!("{} with {} rows", case.name, case.rows))?;
            return Ok(spent / f64::from(times));
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(args: &KernelsArgs, cpu: &Cpu, cases: &[Case], ceiling: Ceilings, threads: u32, dense: &str) -> Result<()> {
    let (isa, precision) = (cpu.isa().name(), Precision::from(args.device.precision).to_string());
    if !args.json {
        note(format_args!("{precision}, dense {dense}, {isa}, {threads} threads"));
        note(format_args!(
            "at most {:.1} GB/s read, {:.0} GOP/s mxfp4, {:.0} GOP/s q8, {:.0} GFLOP/s f32",
            ceiling.read / 1e9,
            ceiling.mxfp4 / 1e9,
            ceiling.q8 / 1e9,
            ceiling.f32 / 1e9
        ));
        say(format_args!(
            "{:<14}{:>6}{:>12}{:>11}{:>11}{:>9}{:>9}{:>8}{:>8}",
            "op", "rows", "us", "MB", "MOP", "GB/s", "GOP/s", "% read", "% peak"
        ))?;
    }
    let mut rows = Vec::new();
    for case in cases {
        let seconds = median(case.seconds.iter().copied());
        let (bytes, operations) = (case.bytes as f64, case.operations as f64);
        let peak = match case.arithmetic {
            Arithmetic::Mxfp4 => ceiling.mxfp4,
            Arithmetic::Q8 => ceiling.q8,
            Arithmetic::F32 => ceiling.f32,
        };
        let (read, compute) = (bytes / seconds / ceiling.read, operations / seconds / peak);
        if args.json {
            rows.push(json!({
                "op": case.name, "rows": case.rows, "seconds": seconds, "seconds_of_rounds": case.seconds,
                "bytes": case.bytes, "operations": case.operations,
                "read_share": read, "peak_share": compute,
                "arithmetic": case.arithmetic.name(),
            }));
        } else {
            say(format_args!(
                "{:<14}{:>6}{:>12.1}{:>11.2}{:>11.1}{:>9.1}{:>9.1}{:>8.0}{:>8.0}",
                case.name,
                case.rows,
                seconds * 1e6,
                bytes / 1e6,
                operations / 1e6,
                bytes / seconds / 1e9,
                operations / seconds / 1e9,
                read * 100.0,
                compute * 100.0
            ))?;
        }
    }
    if args.json {
        say_json(&json!({
            "isa": isa, "threads": threads, "precision": precision, "dense": dense, "context": args.context,
            "ceilings": {"read_bytes_s": ceiling.read, "mxfp4_ops_s": ceiling.mxfp4, "q8_ops_s": ceiling.q8, "f32_ops_s": ceiling.f32},
            "ops": rows,
        }))?;
    }
    Ok(())
}
