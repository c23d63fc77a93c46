//! What must hold after every decision. Used by debug assertions and by property tests.

use std::collections::BTreeSet;

use phalanx_proto::{BlockId, Rank};

use crate::engine::{Engine, RankState};
use crate::sequence::{Home, State};

/// Checks every invariant.
///
/// # Errors
/// The first that does not hold, in words.
pub fn check(engine: &Engine) -> Result<(), String> {
    for (rank, state) in (0..).map(Rank).zip(&engine.ranks) {
        every_block_has_one_owner(
            engine,
            rank,
            state,
            "full",
            |s| s.full.iter().collect(),
            |h| h.full.blocks().collect(),
        )?;
        every_block_has_one_owner(
            engine,
            rank,
            state,
            "window",
            |s| s.window.iter().collect(),
            |h| h.window.blocks().collect(),
        )?;
        sequences_are_bounded(engine, rank, state)?;
    }
    every_sequence_is_in_one_place(engine)
}

fn homes(engine: &Engine, rank: Rank) -> impl Iterator<Item = &Home> {
    engine.sequences.values().filter_map(move |sequence| match &sequence.state {
        State::Running(home) if home.rank == rank => Some(home),
        _ => None,
    })
}

/// No block is owned twice, none is lost.
fn every_block_has_one_owner(
    engine: &Engine,
    rank: Rank,
    state: &RankState,
    pool: &str,
    free: impl Fn(&RankState) -> Vec<BlockId>,
    held: impl Fn(&Home) -> Vec<BlockId>,
) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for block in free(state).into_iter().chain(homes(engine, rank).flat_map(held)) {
        if !seen.insert(block) {
            return Err(format!("rank {rank} {pool} block {block} has two owners"));
        }
    }
    let total = if pool == "full" { state.full.total() } else { state.window.total() } as usize;
    if seen.len() == total { Ok(()) } else { Err(format!("rank {rank} lost {} {pool} blocks", total - seen.len())) }
}

/// A rank holds no more sequences than its limits allow.
fn sequences_are_bounded(engine: &Engine, rank: Rank, state: &RankState) -> Result<(), String> {
    let (running, max) = (state.running.len(), engine.config.limits.seqs_max as usize);
    if running > max { Err(format!("rank {rank} holds {running} sequences of {max}")) } else { Ok(()) }
}

/// Every sequence waits once or runs once.
fn every_sequence_is_in_one_place(engine: &Engine) -> Result<(), String> {
    for (seq, sequence) in &engine.sequences {
        let waits = engine.waiting.iter().filter(|&w| w == seq).count();
        let runs = engine.ranks.iter().flat_map(|rank| &rank.running).filter(|&r| r == seq).count();
        let expected = match &sequence.state {
            State::Waiting => (1, 0),
            State::Running(_) => (0, 1),
        };
        if (waits, runs) != expected {
            return Err(format!("sequence {seq} waits {waits} times and runs {runs} times"));
        }
        if let State::Running(home) = &sequence.state
            && home.computed > sequence.len()
        {
            return Err(format!("sequence {seq} has computed {} of {} tokens", home.computed, sequence.len()));
        }
    }
    let listed = engine.waiting.iter().chain(engine.ranks.iter().flat_map(|rank| &rank.running));
    match listed.into_iter().find(|seq| !engine.sequences.contains_key(seq)) {
        Some(seq) => Err(format!("sequence {seq} is listed but does not exist")),
        None => Ok(()),
    }
}
