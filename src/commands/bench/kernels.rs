//! `phalanx bench kernels`: the dear ops at gpt-oss's true widths, beside what this machine can do at most.

mod cases;
mod machine;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use phalanx_kernels::cpu::ceiling::Yardstick;
use phalanx_kernels::cuda;
use phalanx_proto::memory::LOGITS_ROWS_MAX;
use phalanx_proto::{DenseType, Precision};
use phalanx_worker::device::Processor;
use serde_json::json;

use self::cases::{
    Arithmetic, Case, DIM, Does, HEADS, HIDDEN, KV_HEADS, Layer, Matrices, Travels, VOCAB, norm, sample, sequences,
    travel,
};
use self::machine::{Ceiling, Machine, median};
use crate::cli::{BadFlags, DeviceArgs};
use crate::commands::{advance, byte_bar, note, say, say_json};

/// Arguments of `bench kernels`.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Whose widths
    #[arg(long, value_enum, default_value = "20b")]
    shape: Shape,
    /// Rows of a step
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,32,64,512", value_name = "T",
          value_parser = clap::value_parser!(u32).range(1..=8192))]
    rows: Vec<u32>,
    /// Only ops whose name contains one of these: norm, qkv, rotate, attend-full, attend-window, prefill-full, prefill-window,
    /// attention-out, route, dispatch, experts, combine, unembed, sample
    #[arg(long, value_delimiter = ',', value_name = "TEXT,..")]
    only: Vec<String>,
    /// Tokens of context that each row of attend- sees, or the last one of prefill-
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

fn no_op(only: &[String]) -> BadFlags {
    let only = only.join(",");
    BadFlags(format!(
        "no op's name contains {only:?}, or only with fewer rows than these; `phalanx bench kernels --help` names them"
    ))
}

/// Runs `phalanx bench kernels`.
///
/// # Errors
/// The device cannot be used, or an op fails.
pub fn run(args: &KernelsArgs) -> Result<ExitCode> {
    let device = args.device.device(1)?;
    let exact = device.precision == Precision::Exact;
    let what = format!("{}, dense {}", device.precision, device.dense);
    match device.processor {
        Processor::Cpu => {
            let mut cpu = device.cpu()?;
            let dense = if device.dense == DenseType::Q8 { Arithmetic::Q8 } else { Arithmetic::F32 };
            let experts = if exact { Arithmetic::F32 } else { Arithmetic::Mxfp4 };
            let what = format!("{what}, {}, {} threads", cpu.isa().name(), device.threads);
            let yardstick = Yardstick::new();
            let measured = measure_all(args, &mut cpu, (dense, experts), |cpu| Ok(Ceiling::of_cpu(&yardstick, cpu)))?;
            report(args, &what, &measured)?;
        }
        Processor::Cuda { first, .. } => {
            let bar = byte_bar("compiling kernels");
            let mut cuda = device.cuda(&mut |done, total| advance(&bar, done, total))?;
            bar.finish_and_clear();
            let mut yardstick = cuda::ceiling::Yardstick::new(first as usize)?;
            let arithmetic = (Arithmetic::Bf16, Arithmetic::Bf16);
            let measured = measure_all(args, &mut cuda, arithmetic, |_| Ceiling::of_gpu(&mut yardstick))?;
            report(args, &format!("{what}, {}", device.processor), &measured)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What was measured of an op at a number of rows.
struct Measured {
    name: &'static str,
    rows: usize,
    bytes: u64,
    operations: u64,
    arithmetic: Arithmetic,
    /// Seconds of each round.
    seconds: Vec<f64>,
}

/// Measures ops and ceilings in turn. Dense weights and experts are multiplied by these arithmetics.
fn measure_all<B: Machine>(
    args: &KernelsArgs,
    backend: &mut B,
    (dense, experts): (Arithmetic, Arithmetic),
    mut ceiling: impl FnMut(&B) -> Result<Ceiling>,
) -> Result<(Vec<Measured>, Ceiling)> {
    let mut cases = cases(args, backend, dense, experts)?;
    let bar = ProgressBar::new(u64::from(args.rounds) * cases.len() as u64)
        .with_style(ProgressStyle::with_template("measuring [{bar:30}] {pos}/{len} {msg}")?.progress_chars("=> "));
    let (mut ceilings, mut seconds) = (Vec::new(), vec![Vec::new(); cases.len()]);
    for round in 0..=args.rounds {
        for (case, seconds) in cases.iter_mut().zip(&mut seconds) {
            bar.set_message(case.name);
            let once = measure(backend, case)?;
            // The first round warms up.
            if round > 0 {
                seconds.push(once);
                bar.inc(1);
            }
        }
        if round > 0 {
            ceilings.push(ceiling(backend)?);
        }
    }
    bar.finish_and_clear();
    let measured = cases.into_iter().zip(seconds).map(|(case, seconds)| {
        let Case { name, rows, bytes, operations, arithmetic, .. } = case;
        Measured { name, rows, bytes, operations, arithmetic, seconds }
    });
    Ok((measured.collect(), Ceiling::median(&ceilings)))
}

/// The ops that are wanted, with the memory that they work on.
fn cases<B: Machine>(
    args: &KernelsArgs,
    backend: &mut B,
    dense: Arithmetic,
    experts: Arithmetic,
) -> Result<Vec<Case<B>>> {
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| name.contains(only.as_str()));
    let rows = || args.rows.iter().map(|&rows| rows as usize);
    // Logits of more rows than are ever held at once teach nothing.
    let few = || rows().filter(|&rows| rows <= LOGITS_ROWS_MAX as usize);
    let mut cases = Vec::new();
    if wanted("norm") {
        cases.extend(rows().map(|rows| norm(backend, rows)).collect::<Result<Vec<_>>>()?);
    }
    if wanted("qkv") {
        let matrices = Matrices::new(backend, "qkv", (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, dense)?;
        cases.extend(rows().map(|rows| matrices.case(backend, rows)));
    }
    for (name, does) in [
        ("rotate", Does::Rotate),
        ("attend-full", Does::Attend(None)),
        ("attend-window", Does::Attend(Some(128))),
        ("prefill-full", Does::Prefill(None)),
        ("prefill-window", Does::Prefill(Some(128))),
    ] {
        if wanted(name) {
            let fits = |&rows: &usize| !matches!(does, Does::Prefill(_)) || rows <= args.context as usize;
            let one = |rows| sequences(backend, name, does, args.context, rows);
            cases.extend(rows().filter(fits).map(one).collect::<Result<Vec<_>>>()?);
        }
    }
    if wanted("attention-out") {
        let matrices = Matrices::new(backend, "attention-out", HIDDEN, HEADS * DIM, dense)?;
        cases.extend(rows().map(|rows| matrices.case(backend, rows)));
    }
    if ["route", "dispatch", "combine"].into_iter().any(wanted) {
        let router = Matrices::router(backend, args.shape.experts())?;
        if wanted("route") {
            cases.extend(rows().map(|rows| router.routing(backend, rows)));
        }
        for (name, travels) in [("dispatch", Travels::Dispatch), ("combine", Travels::Combine)] {
            if wanted(name) {
                let one = |rows| travel(backend, &router, travels, rows);
                cases.extend(rows().map(one).collect::<Result<Vec<_>>>()?);
            }
        }
    }
    if wanted("experts") {
        let layer = Layer::new(backend, args.shape.experts(), experts)?;
        cases.extend(rows().map(|rows| layer.case(backend, rows)).collect::<Result<Vec<_>>>()?);
    }
    if wanted("unembed") {
        let matrices = Matrices::new(backend, "unembed", VOCAB, HIDDEN, dense)?;
        cases.extend(few().map(|rows| matrices.case(backend, rows)));
    }
    if wanted("sample") {
        cases.extend(few().map(|rows| sample(backend, rows)));
    }
    // What there was no memory for is said here, not in a round.
    backend.finish().context("making what is measured")?;
    if cases.is_empty() { Err(no_op(&args.only).into()) } else { Ok(cases) }
}

/// Seconds of one op: as many in a row as take a while, since a device may have only been told of them when they return.
/// They are handed to it so many at a time that the next are the same again: as graphs, as a step's are.
fn measure<B: Machine>(backend: &mut B, case: &mut Case<B>) -> Result<f64> {
    const WHILE: f64 = 0.03;
    let together = B::together(case.period);
    let (name, rows) = (case.name, case.rows);
    let named = || format!("{name} with {rows} rows");
    let mut times = 1_u32;
    // What begins a step is no part of the op, but for drawing, which is done once a step.
    (case.run)(backend, true);
    backend.finish().with_context(named)?;
    loop {
        let begun = Instant::now();
        for _ in 0..times {
            for _ in 0..together {
                (case.run)(backend, false);
            }
            backend.hand_over()?;
        }
        backend.finish().with_context(named)?;
        let spent = begun.elapsed().as_secs_f64();
        if spent >= WHILE || times >= 1 << 16 {
            return Ok(spent / f64::from(times) / together as f64);
        }
        times = times.saturating_mul(if spent < WHILE / 16.0 { 8 } else { 2 });
    }
}

fn report(args: &KernelsArgs, what: &str, (cases, ceiling): &(Vec<Measured>, Ceiling)) -> Result<()> {
    if !args.json {
        note(what);
        let peaks = ceiling.peaks.iter().map(|(of, peak)| format!(", {:.0} GOP/s {}", peak / 1e9, of.name()));
        note(format_args!("at most {:.1} GB/s{}", ceiling.read / 1e9, peaks.collect::<String>()));
        say(format_args!(
            "{:<14}{:>6}{:>12}{:>11}{:>11}{:>9}{:>9}{:>8}{:>8}",
            "op", "rows", "us", "MB", "MOP", "GB/s", "GOP/s", "% read", "% peak"
        ))?;
    }
    let mut rows = Vec::new();
    for case in cases {
        let seconds = median(case.seconds.iter().copied());
        let (bytes, operations) = (case.bytes as f64, case.operations as f64);
        let peak = ceiling.peak(case.arithmetic);
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
        let mut ceilings = json!({"read_bytes_s": ceiling.read});
        for (of, peak) in &ceiling.peaks {
            ceilings[format!("{}_ops_s", of.name())] = json!(peak);
        }
        say_json(&json!({"device": what, "context": args.context, "ceilings": ceilings, "ops": rows}))?;
    }
    Ok(())
}
