//! `phalanx bench kernels`: each op at gpt-oss's true widths, beside what this machine can do at most.

use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use phalanx_kernels::cpu::ceiling::{Ceilings, Yardstick};
use phalanx_kernels::cpu::{Dense, Experts};
use phalanx_kernels::memory::Packed;
use phalanx_kernels::{
    BLOCK_SIZE, Backend, Cpu, DenseUse, Draw, ExpertShape, HostParts, KernelError, KvLayer, KvShape, PoolShape,
    RopeTable, StepInputs, TokenSource,
};
use phalanx_proto::memory::LOGITS_ROWS_MAX;
use phalanx_proto::{DenseType, Precision};
use serde_json::json;

use crate::cli::DeviceArgs;
use crate::commands::{note, say, say_json};

/// Bytes of weights that an op goes through before it meets the same again: beyond any cache.
const WEIGHT_BYTES: usize = 512 << 20;

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
    /// Only ops whose name contains this
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

const HIDDEN: usize = 2880;
const INTERMEDIATE: usize = 2880;
const HEADS: usize = 64;
const KV_HEADS: usize = 8;
const DIM: usize = 64;
const TOP_K: usize = 4;
const VOCAB: usize = 201_088;
const EXPERT: ExpertShape = ExpertShape { hidden: HIDDEN, intermediate: INTERMEDIATE, limit: 7.0 };

impl Shape {
    const fn experts(self) -> usize {
        match self {
            Self::B20 => 32,
            Self::B120 => 128,
        }
    }
}

/// What bounds an op's arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arithmetic {
    Int8,
    F32,
}

/// An op at a number of rows: how to do it once, and what must move and be done for it.
struct Case {
    name: &'static str,
    rows: usize,
    /// Bytes that must move: each weight once, keys and values, rows in and out.
    bytes: u64,
    /// Two for each multiplication.
    operations: u64,
    arithmetic: Arithmetic,
    run: Box<dyn FnMut(&mut Cpu)>,
    /// Seconds of each round.
    seconds: Vec<f64>,
}

/// Runs `phalanx bench kernels`.
///
/// # Errors
/// The threads cannot be started, or an op fails.
pub fn run(args: &KernelsArgs) -> Result<ExitCode> {
    let device = args.device.device(1)?;
    let mut cpu = device.backend()?;
    let yardstick = Yardstick::new();
    let arithmetic = match device.dense {
        DenseType::Q8 => Arithmetic::Int8,
        DenseType::Bf16 => Arithmetic::F32,
    };
    let experts = match device.precision {
        Precision::Fast => Arithmetic::Int8,
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
            let all = rows().map(|rows| attend(&mut cpu, name, rows, args.context, window));
            cases.extend(all.collect::<Result<Vec<_>>>()?);
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
        int8: median(ceilings.iter().map(|c| c.int8)),
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
            "at most {:.1} GB/s read, {:.0} GOP/s int8, {:.0} GFLOP/s f32",
            ceiling.read / 1e9,
            ceiling.int8 / 1e9,
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
            Arithmetic::Int8 => ceiling.int8,
            Arithmetic::F32 => ceiling.f32,
        };
        let (read, compute) = (bytes / seconds / ceiling.read, operations / seconds / peak);
        if args.json {
            rows.push(json!({
                "op": case.name, "rows": case.rows, "seconds": seconds, "seconds_of_rounds": case.seconds,
                "bytes": case.bytes, "operations": case.operations,
                "read_share": read, "peak_share": compute,
                "arithmetic": if case.arithmetic == Arithmetic::Int8 { "int8" } else { "f32" },
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
            "ceilings": {"read_bytes_s": ceiling.read, "int8_ops_s": ceiling.int8, "f32_ops_s": ceiling.f32},
            "ops": rows,
        }))?;
    }
    Ok(())
}

/// Bytes that look random and are always the same.
fn noise(seed: u64, out: &mut [u8]) {
    let mut state = seed;
    for chunk in out.chunks_mut(8) {
        // Knuth's MMIX generator.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        chunk.copy_from_slice(&(state >> 13).to_le_bytes()[..chunk.len()]);
    }
}

/// Makes bytes such that no number of them is an infinity, NaN or so small that it is dear to compute with.
fn tame(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte = *byte & 0x0f | 0x30);
}

/// Small numbers.
fn numbers(n: usize) -> Vec<f32> {
    let mut bytes = vec![0; n];
    noise(7, &mut bytes);
    bytes.into_iter().map(|byte| (f32::from(byte) - 127.5) / 64.0).collect()
}

/// Packed weights without meaning: speed does not depend on them, as long as none is a NaN.
fn packed(len: usize, seed: u64) -> Result<Packed, KernelError> {
    Packed::filled(len, |out| {
        noise(seed, out);
        tame(out);
        Ok(())
    })
}

fn norm(cpu: &mut Cpu, rows: usize) -> Result<Case> {
    let weight = vec![0x3f; HIDDEN * 2];
    let weight = cpu.vector(phalanx_kernels::memory::Source::memory(&weight))?;
    let (mut x, mut out) = (cpu.rows(rows, HIDDEN), cpu.rows(rows, HIDDEN));
    cpu.write(&mut x, &numbers(rows * HIDDEN));
    Ok(Case {
        name: "norm",
        rows,
        bytes: (rows * HIDDEN * 8) as u64,
        operations: (rows * HIDDEN * 4) as u64,
        arithmetic: Arithmetic::F32,
        run: Box::new(move |cpu| cpu.norm(&x, &weight, 1e-5, &mut out)),
        seconds: Vec::new(),
    })
}

/// Copies of a dense matrix, to be gone through one after the other.
struct Matrices {
    name: &'static str,
    height: usize,
    cols: usize,
    arithmetic: Arithmetic,
    /// Bytes of a copy.
    bytes: usize,
    copies: Rc<[Dense]>,
}

impl Matrices {
    fn new(
        cpu: &mut Cpu,
        name: &'static str,
        height: usize,
        cols: usize,
        arithmetic: Arithmetic,
    ) -> Result<Self, KernelError> {
        let bytes = cpu.dense_bytes(DenseUse::Projection, height, cols);
        let copies = (0..WEIGHT_BYTES.div_ceil(bytes))
            .map(|i| cpu.hold_dense(DenseUse::Projection, height, cols, packed(bytes, i as u64)?))
            .collect::<Result<_, KernelError>>()?;
        Ok(Self { name, height, cols, arithmetic, bytes, copies })
    }

    fn case(&self, cpu: &mut Cpu, rows: usize) -> Case {
        let Self { name, height, cols, arithmetic, bytes, .. } = *self;
        let (mut x, mut out) = (cpu.rows(rows, cols), cpu.rows(rows, height));
        cpu.write(&mut x, &numbers(rows * cols));
        let (copies, mut next) = (Rc::clone(&self.copies), 0);
        Case {
            name,
            rows,
            bytes: (bytes + rows * (cols + height) * 4) as u64,
            operations: 2 * (rows * height * cols) as u64,
            arithmetic,
            run: Box::new(move |cpu| {
                next = (next + 1) % copies.len();
                cpu.project(&x, &copies[next], &mut out);
            }),
            seconds: Vec::new(),
        }
    }
}

/// Each row is a sequence of its own, `context` tokens long.
fn attend(cpu: &mut Cpu, name: &'static str, rows: usize, context: u32, window: Option<u32>) -> Result<Case> {
    let stretch = (context as usize).div_ceil(BLOCK_SIZE);
    // Rows share blocks where their own would not fit: as far apart as a cache is large.
    let tables = rows.min((WEIGHT_BYTES / (stretch * BLOCK_SIZE * KV_HEADS * DIM * 4)).max(1));
    let pool = PoolShape { layers: 1, blocks: tables * stretch };
    let mut kv = cpu.kv(&KvShape { pools: vec![pool], kv_heads: KV_HEADS, head_dim: DIM });
    let layer = KvLayer { pool: 0, layer: 0 };
    let sinks = vec![0x3f; HEADS * 2];
    let sinks = cpu.vector(phalanx_kernels::memory::Source::memory(&sinks))?;
    let rope = RopeTable { inv_freq: vec![0.1; DIM / 2], scale: 1.0 };
    let cols = (HEADS + 2 * KV_HEADS) * DIM;
    let mut qkv = cpu.rows(rows, cols);
    let mut out = cpu.rows(rows, HEADS * DIM);
    let table = |i: usize| ((i * stretch) as u32..((i + 1) * stretch) as u32).collect::<Vec<u32>>();
    let inputs = StepInputs {
        tokens: vec![TokenSource::Given(0); rows],
        positions: vec![context - 1; rows],
        sequences: (0..rows).map(|row| (row % tables) as u32).collect(),
        tables: vec![(0..tables).map(table).collect()],
    };
    let seen = rows as u64 * u64::from(window.unwrap_or(context).min(context));
    let kv_bytes = match cpu.precision() {
        phalanx_kernels::Precision::Exact => 4,
        phalanx_kernels::Precision::Fast => 2,
    };
    cpu.begin(&inputs, &rope);
    cpu.write(&mut qkv, &numbers(rows * cols));
    cpu.rotate_and_store(&mut qkv, &mut kv, layer);
    cpu.finish()?;
    Ok(Case {
        name,
        rows,
        bytes: seen * (2 * KV_HEADS * DIM * kv_bytes) as u64 + (rows * 2 * HEADS * DIM * 4) as u64,
        operations: seen * (4 * HEADS * DIM) as u64,
        arithmetic: Arithmetic::F32,
        run: Box::new(move |cpu| {
            cpu.begin(&inputs, &rope);
            cpu.attend(&qkv, &kv, layer, &sinks, window, &mut out);
        }),
        seconds: Vec::new(),
    })
}

/// A layer's experts.
struct Layer {
    experts: Rc<Experts>,
    count: usize,
    /// Bytes of an expert.
    bytes: usize,
    arithmetic: Arithmetic,
}

impl Layer {
    fn new(cpu: &mut Cpu, count: usize, arithmetic: Arithmetic) -> Result<Self, KernelError> {
        let mut experts = cpu.experts(count, EXPERT);
        let bytes = cpu.expert_bytes(&experts);
        for slot in 0..count {
            cpu.hold_expert(&mut experts, slot, packed(bytes, slot as u64)?)?;
        }
        Ok(Self { experts: Rc::new(experts), count, bytes, arithmetic })
    }

    /// Gate-up, SwiGLU and down of rows whose choices are spread evenly.
    fn case(&self, cpu: &mut Cpu, rows: usize) -> Case {
        drop(cpu.routes(rows, TOP_K));
        let mut work = cpu.work(rows, TOP_K, EXPERT);
        let mut out = cpu.parts(1, rows * TOP_K * cpu.combine_record(HIDDEN));
        // As many steps as go through all weights, so that few rows do not meet the same experts each time.
        let steps = (4 * self.count).div_ceil((rows * TOP_K).min(self.count));
        let mut random = Choices(11);
        let steps: Vec<_> = (0..steps).map(|_| random.records(rows, self.count, cpu.combine_record(HIDDEN))).collect();
        let visited = steps.iter().map(|(_, visited)| *visited).sum::<usize>() as f64 / steps.len() as f64;
        let (experts, mut next) = (Rc::clone(&self.experts), 0);
        Case {
            name: "experts",
            rows,
            bytes: (visited * self.bytes as f64) as u64 + (rows * (1 + TOP_K) * cpu.combine_record(HIDDEN)) as u64,
            operations: 6 * (rows * TOP_K * HIDDEN * INTERMEDIATE) as u64,
            arithmetic: self.arithmetic,
            run: Box::new(move |cpu| {
                next = (next + 1) % steps.len();
                cpu.receive(&steps[next].0, &experts, &mut work);
                cpu.gate_up(&experts, &mut work);
                cpu.down(&experts, &work, &mut out);
            }),
            seconds: Vec::new(),
        }
    }
}

/// Experts chosen by chance, always the same.
struct Choices(u64);

impl Choices {
    fn expert(&mut self, experts: usize) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize % experts) as u32
    }

    /// Records of `rows` rows of `row_bytes`, and how many experts they visit.
    fn records(&mut self, rows: usize, experts: usize, row_bytes: usize) -> (HostParts, usize) {
        let (mut part, mut visited) = (Vec::new(), vec![false; experts]);
        for _ in 0..rows {
            let mut chosen = Vec::new();
            while chosen.len() < TOP_K {
                let expert = self.expert(experts);
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                    visited[expert as usize] = true;
                }
            }
            part.extend(chosen.into_iter().flat_map(u32::to_le_bytes));
            let at = part.len();
            part.resize(at + row_bytes, 0);
            noise(self.0, &mut part[at..]);
            tame(&mut part[at..]);
        }
        (HostParts { by_rank: vec![part] }, visited.into_iter().filter(|&visited| visited).count())
    }
}

fn sample(cpu: &mut Cpu, rows: usize) -> Case {
    cpu.token_slots(rows);
    let mut logits = cpu.rows(rows, VOCAB);
    cpu.write(&mut logits, &numbers(rows * VOCAB));
    let draws: Vec<Draw> =
        (0..rows as u32).map(|slot| Draw { temperature: 1.0, top_p: 0.95, ..Draw::greedy(slot, 1) }).collect();
    Case {
        name: "sample",
        rows,
        bytes: (rows * VOCAB * 4) as u64,
        operations: (rows * VOCAB * 2) as u64,
        arithmetic: Arithmetic::F32,
        run: Box::new(move |cpu| {
            cpu.begin(&StepInputs::default(), &RopeTable { inv_freq: vec![0.1; DIM / 2], scale: 1.0 });
            cpu.sample(&logits, &draws);
        }),
        seconds: Vec::new(),
    }
}
