//! The rounds: the machine's ceilings, then every engine once, in an order that rotates.

use super::engine::{Engine, Metric, Turn, turn};
use super::machine::read_gb_s;
use super::options::Options;
use super::ready::Ready;
use super::stats::rotated;

/// One round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Round {
    /// GB/s read by 1 thread and by as many as the engines have.
    pub(crate) read_gb_s: Vec<(u32, f64)>,
    pub(crate) turns: Vec<(Engine, Turn)>,
    pub(crate) load_average: String,
}

impl Round {
    /// The most that can be read in this round.
    pub(crate) fn ceiling(&self) -> Option<f64> {
        self.read_gb_s.iter().map(|(_, speed)| *speed).reduce(f64::max)
    }

    /// The most int8 arithmetic that could be done in this round, if anyone measured it.
    pub(crate) fn int8_gop_s(&self) -> Option<f64> {
        self.turns.iter().find_map(|(_, turn)| turn.int8_gop_s)
    }

    pub(crate) fn figure(&self, engine: Engine, metric: Metric) -> Option<f64> {
        self.turns.iter().find(|(found, _)| *found == engine).and_then(|(_, turn)| turn.figure(metric))
    }
}

/// Runs all rounds, or until an error; `done` has those that are complete, and `keep` is told after each.
pub(crate) fn rounds(
    ready: &Ready,
    options: &Options,
    engines: &[Engine],
    done: &mut Vec<Round>,
    mut keep: impl FnMut(&[Round]) -> Result<(), String>,
) -> Result<(), String> {
    let begun = std::time::Instant::now();
    for number in 0..options.rounds as usize {
        done.push(round(ready, options, &rotated(engines, number))?);
        keep(done)?;
        let left = options.rounds as usize - done.len();
        let minutes = begun.elapsed().as_secs_f64() / 60.0 / done.len() as f64 * left as f64;
        println!("round {} of {} is done; about {minutes:.0} minutes are left", done.len(), options.rounds);
    }
    Ok(())
}

fn round(ready: &Ready, options: &Options, order: &[Engine]) -> Result<Round, String> {
    let mut round = Round { load_average: super::machine::load_average(), ..Round::default() };
    let mut threads = vec![1, ready.setup.threads];
    threads.dedup();
    for threads in threads {
        round.read_gb_s.push((threads, read_gb_s(&ready.membw, threads)?));
    }
    for engine in order {
        let turn = turn(*engine, &ready.setup, options)?;
        let figures: Vec<String> =
            turn.figures.iter().map(|(metric, value)| format!("{} {value:.1}", metric.name())).collect();
        println!("  {:<13} {}", engine.name(), figures.join("  "));
        round.turns.push((*engine, turn));
    }
    Ok(round)
}
