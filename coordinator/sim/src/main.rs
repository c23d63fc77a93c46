//! The command behind `cargo xtask sim`.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use phalanx_sim::campaign::campaign;
use phalanx_sim::faults::{Failure, reduce, run};
use phalanx_sim::scenario::Scenario;

const USAGE: &str = "\
Usage: cargo xtask sim [--seeds N] [--first S]
       cargo xtask sim --seed S [--trace] [--reduce]

Runs the planner in virtual time, in a small random world for each seed, where streams break, results are repeated
and clients leave. Everything that must hold is checked after every call.

  --seeds N   how many seeds (10000)
  --first S   the first of them (0)
  --seed S    this one alone
  --trace     print what happened
  --reduce    leave out requests and faults for as long as something still fails

Exit status: 0 all well, 1 a seed failed, 2 the command line was not understood.
";

#[derive(Default)]
struct Options {
    seeds: Option<u64>,
    first: Option<u64>,
    seed: Option<u64>,
    trace: bool,
    reduce: bool,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options::default();
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().ok_or_else(|| format!("{word} needs a number"))?;
            value.parse().map(Some).map_err(|_| format!("{word} needs a number, not `{value}`"))
        };
        match word.as_str() {
            "--seeds" => options.seeds = number()?,
            "--first" => options.first = number()?,
            "--seed" => options.seed = number()?,
            "--trace" => options.trace = true,
            "--reduce" => options.reduce = true,
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("`{word}` is not an option")),
        }
    }
    let (many, one) = (options.seeds.is_some() || options.first.is_some(), options.seed.is_some());
    if many && one {
        return Err("--seed stands for itself: leave --seeds and --first out".into());
    }
    if (options.trace || options.reduce) && !one {
        return Err("--trace and --reduce need --seed".into());
    }
    Ok(Some(options))
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprint!("error: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // A panic of the engine is a failure of its seed, and told with it.
    std::panic::set_hook(Box::new(|_| {}));
    let well = match options.seed {
        Some(seed) => one(seed, &options),
        None => many(options.first.unwrap_or(0), options.seeds.unwrap_or(10_000)),
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(seed: u64, options: &Options) -> bool {
    let mut scenario = Scenario::of(seed);
    if options.reduce {
        scenario = reduce(&scenario, |scenario| run(scenario, false).is_err());
    }
    if options.trace {
        println!("{scenario:#?}");
    }
    match run(&scenario, options.trace) {
        Ok(seen) => {
            println!("seed {seed} is well: {seen:?}");
            true
        }
        Err(Failure { why, log }) => {
            log.iter().for_each(|line| println!("{line}"));
            println!("seed {seed} fails: {why}");
            false
        }
    }
}

fn many(first: u64, seeds: u64) -> bool {
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let shows = std::io::stderr().is_terminal();
    let bar = |done: u64| {
        if shows && (done.is_multiple_of(64) || done == seeds) {
            let filled = (done * 40 / seeds.max(1)) as usize;
            eprint!("\r[{:<40}] {done}/{seeds} seeds, {} s", "#".repeat(filled), begun.elapsed().as_secs());
            // A bar that cannot be shown is no reason to stop.
            std::io::stderr().flush().ok();
        }
    };
    let outcome = campaign(first..first.saturating_add(seeds), threads, |seed| run(&Scenario::of(seed), false), bar);
    if shows {
        eprintln!();
    }
    match outcome {
        Ok(seen) => {
            println!("{seeds} seeds are well in {:.0} s: {seen:?}", begun.elapsed().as_secs_f64());
            true
        }
        Err((seed, Failure { why, .. })) => {
            println!("seed {seed} fails: {why}\nReproduce: cargo xtask sim --seed {seed} --trace --reduce");
            false
        }
    }
}
