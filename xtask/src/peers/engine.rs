//! One turn of one engine: everything it is asked in a round.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::floor::Dense;
use super::json::Json;
use super::machine::Ticks;
use super::options::{Case, Options};
use super::program::{BusyCore, Program, WAIT};

/// Decode and prefill are measured with this prompt.
pub(crate) const SOLO: Load = Load { prompt: 512, generate: 32, batch: 1 };
pub(crate) const BATCHED: Load = Load { prompt: 16, generate: 16, batch: 8 };
pub(crate) const BUSY: Load = Load { prompt: 16, generate: 24, batch: 1 };

/// Sequences at once, tokens of each prompt, tokens generated after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) prompt: u32,
    pub(crate) generate: u32,
    pub(crate) batch: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Phalanx,
    Llama,
    Ik,
}

impl Engine {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Engine::Phalanx => "Phalanx",
            Engine::Llama => "llama.cpp",
            Engine::Ik => "ik_llama.cpp",
        }
    }
}

/// A figure that a turn gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    /// GB/s of MXFP4 weights, for one token.
    Vector,
    /// GOP/s with MXFP4 weights, for 64 tokens an expert.
    Matrix,
    /// Tokens a second.
    Decode,
    /// Tokens a second.
    Prefill,
    /// Tokens a second, with another process on one core.
    Busy,
    /// Tokens a second of all sequences together.
    Batched,
    /// Seconds.
    FirstToken,
}

impl Metric {
    pub(crate) const ALL: [Metric; 7] = [
        Metric::Vector,
        Metric::Matrix,
        Metric::Decode,
        Metric::Prefill,
        Metric::Busy,
        Metric::Batched,
        Metric::FirstToken,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Metric::Vector => "mxfp4_gb_s",
            Metric::Matrix => "mxfp4_gop_s",
            Metric::Decode => "decode",
            Metric::Prefill => "prefill",
            Metric::Busy => "busy_decode",
            Metric::Batched => "batched_decode",
            Metric::FirstToken => "first_token_s",
        }
    }
}

/// What runs, and on what.
pub(crate) struct Setup {
    pub(crate) phalanx: PathBuf,
    pub(crate) llama: PathBuf,
    pub(crate) ik: Option<PathBuf>,
    pub(crate) scripts: PathBuf,
    pub(crate) hf: PathBuf,
    pub(crate) gguf: PathBuf,
    pub(crate) logs: PathBuf,
    pub(crate) threads: u32,
    pub(crate) dense: Dense,
}

/// How one measurement went beside its figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Noise {
    /// Share of the machine that other programs took.
    pub(crate) others: f64,
    /// Involuntary context switches.
    pub(crate) involuntary: f64,
}

/// The figures of one turn.
#[derive(Clone, Debug, Default)]
pub(crate) struct Turn {
    pub(crate) figures: Vec<(Metric, f64)>,
    /// Of every measurement on the otherwise free machine.
    pub(crate) noise: Vec<Noise>,
    pub(crate) peak_gb: f64,
    /// GOP/s that the processor can do at most in int8, as measured in this turn.
    pub(crate) int8_gop_s: Option<f64>,
    /// Its version and what it was built for, as it says itself.
    pub(crate) about: Option<Json>,
}

impl Turn {
    pub(crate) fn figure(&self, metric: Metric) -> Option<f64> {
        self.figures.iter().find(|(found, _)| *found == metric).map(|(_, value)| *value)
    }

    /// Takes what a run under `load` said.
    fn take(&mut self, load: Load, said: &Said) -> Result<(), String> {
        let decode = said.report.number("tg_tok_s")?;
        match load {
            SOLO => {
                self.figures.push((Metric::Decode, decode));
                self.figures.push((Metric::Prefill, said.report.number("pp_tok_s")?));
            }
            BATCHED => self.figures.push((Metric::Batched, decode)),
            _ => self.figures.push((Metric::Busy, decode)),
        }
        if load != BUSY {
            self.noise.push(said.noise);
        }
        self.peak_gb = self.peak_gb.max(said.peak_gb);
        Ok(())
    }
}

/// A report, and what it cost.
struct Said {
    report: Json,
    noise: Noise,
    peak_gb: f64,
}

impl Said {
    fn new(report: Json, usage: &Json, before: Ticks) -> Result<Said, String> {
        let others = Ticks::now().taken_by_others(before, usage.number("cpu_s")?);
        let noise = Noise { others, involuntary: usage.number("involuntary")? };
        Ok(Said { report, noise, peak_gb: usage.number("peak_gb")? })
    }
}

/// The loads that the wanted cases need.
fn loads(options: &Options) -> Vec<Load> {
    let wants = |cases: &[Case]| cases.iter().any(|case| options.wants(*case));
    let mut loads = Vec::new();
    // A core's share is told by the decode speed of a free machine.
    loads.extend(wants(&[Case::Decode, Case::Prefill, Case::Busy]).then_some(SOLO));
    loads.extend(wants(&[Case::Batched]).then_some(BATCHED));
    loads.extend(wants(&[Case::Busy]).then_some(BUSY));
    loads
}

/// One turn.
pub(crate) fn turn(engine: Engine, setup: &Setup, options: &Options) -> Result<Turn, String> {
    let mut turn = match engine {
        Engine::Phalanx => phalanx(setup, options)?,
        Engine::Llama | Engine::Ik => peer(engine, setup, options)?,
    };
    if options.wants(Case::Kernels) {
        kernels(engine, setup, &mut turn)?;
    }
    Ok(turn)
}

/// The kernels of those that can be asked for them: the experts of one layer of 20b width.
fn kernels(engine: Engine, setup: &Setup, turn: &mut Turn) -> Result<(), String> {
    let threads = setup.threads.to_string();
    let run = |command: &mut Command, log: &str| -> Result<Json, String> {
        let lines = Program::start(command, &setup.logs.join(log))?.finish()?;
        Json::parse(&lines.join("\n")).map_err(|error| format!("kernels of {}: {error}", engine.name()))
    };
    match engine {
        Engine::Phalanx if has_kernels(&setup.phalanx) => {
            let mut command = Command::new(&setup.phalanx);
            command.args(["bench", "kernels", "--json", "--only", "experts", "--rows", "1,512", "--rounds", "1"]);
            let report = run(command.args(["--threads", &threads]), "phalanx.log")?;
            let (figures, peak) = phalanx_kernels(&report)?;
            turn.figures.extend(figures);
            turn.int8_gop_s = Some(peak);
        }
        Engine::Llama => {
            let mut command = Command::new(&setup.llama);
            command.arg(setup.scripts.join("ops.py")).args(["--threads", &threads]);
            let report = run(command.env("PYTHONDONTWRITEBYTECODE", "1"), "llama.log")?;
            let key = format!("{threads}_threads");
            let speeds = report.get(&key).ok_or_else(|| format!("ops.py says nothing of `{key}`"))?;
            turn.figures.push((Metric::Vector, speeds.number("gemv_gb_s")?));
            turn.figures.push((Metric::Matrix, speeds.number("gemm_gop_s")?));
        }
        Engine::Phalanx | Engine::Ik => {}
    }
    Ok(())
}

/// From the report of `phalanx bench kernels`: with 512 rows, each of 32 experts has 64 if each row visits 4.
/// Also the peak of the experts' instruction, in GOP/s.
fn phalanx_kernels(report: &Json) -> Result<([(Metric, f64); 2], f64), String> {
    let Some(Json::List(ops)) = report.get("ops") else { return Err("`bench kernels` lists no `ops`".into()) };
    let per_second = |rows: f64, what: &str| {
        let found = ops.iter().find(|op| op.text("op") == Ok("experts") && op.number("rows") == Ok(rows));
        let op = found.ok_or_else(|| format!("`bench kernels` has no experts with {rows} rows"))?;
        Ok::<f64, String>(op.number(what)? / op.number("seconds")? / 1e9)
    };
    let figures = [(Metric::Vector, per_second(1.0, "bytes")?), (Metric::Matrix, per_second(512.0, "operations")?)];
    let peak = report.get("ceilings").ok_or("`bench kernels` names no `ceilings`")?.number("mxfp4_ops_s")?;
    Ok((figures, peak / 1e9))
}

/// Whether this phalanx measures its kernels.
pub(crate) fn has_kernels(phalanx: &Path) -> bool {
    help_mentions(phalanx, &["bench"], "kernels")
}

fn phalanx(setup: &Setup, options: &Options) -> Result<Turn, String> {
    let mut turn = Turn::default();
    for load in loads(options) {
        let busy = if load == BUSY { Some(BusyCore::start()?) } else { None };
        let (prompt, generate, batch) = (load.prompt.to_string(), load.generate.to_string(), load.batch.to_string());
        let mut arguments = vec!["bench", "offline", "--json", "--prompt-len", &prompt, "--gen-len", &generate];
        arguments.extend(["--batch", &batch]);
        let before = Ticks::now();
        let (report, usage) = setup.phalanx_json(&arguments, true)?;
        drop(busy);
        turn.take(load, &Said::new(report, &usage, before)?)?;
    }
    if options.wants(Case::FirstToken) {
        let ids: Vec<String> = (0..16).map(|id: u32| id.to_string()).collect();
        let ids = ids.join(",");
        let arguments = ["model", "generate", "--json", "--prompt-ids", &ids, "--max-tokens", "1"];
        let before = Ticks::now();
        let (report, usage) = setup.phalanx_json(&arguments, true)?;
        turn.figures.push((Metric::FirstToken, usage.number("first_line_s")?));
        turn.noise.push(Said::new(report, &usage, before)?.noise);
    }
    Ok(turn)
}

fn peer(engine: Engine, setup: &Setup, options: &Options) -> Result<Turn, String> {
    let mut turn = Turn::default();
    let (mut program, about) = setup.peer(engine)?;
    if options.wants(Case::FirstToken) {
        turn.figures.push((Metric::FirstToken, about.number("first_token_s")?));
    }
    turn.about = Some(about);
    for load in loads(options) {
        let busy = if load == BUSY { Some(BusyCore::start()?) } else { None };
        let before = Ticks::now();
        let report = program.ask(&format!("bench {} {} {}", load.prompt, load.generate, load.batch))?;
        drop(busy);
        let said = Said::new(report.clone(), &report, before)?;
        turn.take(load, &said)?;
    }
    program.finish()?;
    Ok(turn)
}

impl Setup {
    /// A peer, loaded, and what it says of itself.
    pub(crate) fn peer(&self, engine: Engine) -> Result<(Program, Json), String> {
        let (python, word) = match (engine, &self.ik) {
            (Engine::Ik, Some(python)) => (python, "ik"),
            (Engine::Ik, None) => return Err("ik_llama.cpp was left out".into()),
            (Engine::Llama | Engine::Phalanx, _) => (&self.llama, "llama"),
        };
        let mut command = Command::new(python);
        command.arg(self.scripts.join("peer.py")).arg(word).arg(&self.gguf);
        command.args(["--threads", &self.threads.to_string()]).env("PYTHONDONTWRITEBYTECODE", "1");
        let program = Program::start(&mut command, &self.logs.join(format!("{word}.log")))?;
        let about = program.answer()?;
        Ok((program, about))
    }

    /// Runs phalanx on the checkpoint; its report and what `usage.py` adds. `dense`: with the dense weights as agreed,
    /// not as they are in the checkpoint.
    pub(crate) fn phalanx_json(&self, arguments: &[&str], dense: bool) -> Result<(Json, Json), String> {
        let mut command = Command::new(&self.llama);
        command.arg(self.scripts.join("usage.py")).arg(WAIT.as_secs().to_string()).arg(&self.phalanx);
        command.args(arguments).arg("--model").arg(&self.hf).args(["--threads", &self.threads.to_string()]);
        if dense && takes_dense(&self.phalanx, &arguments[..2]) {
            command.args(["--dense", self.dense.name()]);
        }
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        let mut lines = Program::start(&mut command, &self.logs.join("phalanx.log"))?.finish()?;
        let usage = lines.pop().ok_or("usage.py says nothing")?;
        let wrong = |error| format!("{}: {error}", self.phalanx.display());
        Ok((Json::parse(&lines.join("\n")).map_err(wrong)?, Json::parse(&usage)?))
    }
}

/// Whether a command of phalanx lets the type of dense weights be chosen.
pub(crate) fn takes_dense(phalanx: &Path, command: &[&str]) -> bool {
    help_mentions(phalanx, command, "--dense")
}

/// Whether the help of a command of phalanx has such a word.
pub(crate) fn help_mentions(phalanx: &Path, command: &[&str], word: &str) -> bool {
    let help = Command::new(phalanx).args(command).arg("--help").output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).split_whitespace().any(|found| found == word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_read_from_the_report_of_the_kernels() {
        let report = r#"{"ceilings":{"read_bytes_s":3e10,"mxfp4_ops_s":9e11,"q8_ops_s":8e11,"f32_ops_s":2e11},"ops":[
            {"op":"norm","rows":1,"seconds":1,"bytes":1,"operations":1},
            {"op":"experts","rows":1,"seconds":0.001,"bytes":50000000,"operations":1},
            {"op":"experts","rows":512,"seconds":0.25,"bytes":1,"operations":100000000000}]}"#;
        let (figures, peak) = phalanx_kernels(&Json::parse(report).unwrap()).unwrap();
        assert_eq!((figures, peak), ([(Metric::Vector, 50.0), (Metric::Matrix, 400.0)], 900.0));
        let lacks = Json::parse(&report.replace("512", "511")).unwrap();
        assert!(phalanx_kernels(&lacks).unwrap_err().contains("512 rows"));
        assert!(phalanx_kernels(&Json::Null).is_err());
    }

    #[test]
    fn a_core_taken_is_measured_beside_a_free_machine() {
        let wanted = |words: &[&str]| loads(&Options::parse(words).unwrap());
        assert_eq!(wanted(&["--only", "c5"]), [SOLO, BUSY]);
        assert_eq!(wanted(&["--only", "c6,c8"]), [BATCHED]);
        assert_eq!(wanted(&["--only", "c1,c7"]), []);
        assert_eq!(wanted(&[]), [SOLO, BATCHED, BUSY]);
    }
}
