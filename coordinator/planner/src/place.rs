//! Which rank a waiting sequence is given, and who gives way to it there.

use phalanx_proto::{Rank, SeqId};

use crate::engine::{Class, Engine};
use crate::prefix::Match;
use crate::queue::Key;
use crate::sequence::{Home, State};

/// The least loaded ranks that are looked at for a place.
const CANDIDATES: usize = 4;

/// Gives waiting sequences a rank, for as long as who is next fits somewhere.
pub(crate) fn all_waiting(engine: &mut Engine) {
    while !engine.queue.is_empty() {
        let [first, second] = engine.queue.offers();
        let its_turn = first.is_some_and(|offer| offer.its_turn);
        let placed = first.is_some_and(|offer| one(engine, offer.key, its_turn));
        let second = second.filter(|_| first.is_some_and(|offer| offer.may_pass));
        if !placed && second.is_none_or(|offer| !one(engine, offer.key, false)) {
            return;
        }
    }
}

/// What a rank has for a sequence that waits.
enum Room {
    /// All it needs: what is to be done there before its next token, and what is cached of it.
    Free(u64, Match),
    /// All it needs, once batch sequences have given way.
    OfBatch,
    /// Too little.
    None,
}

/// Gives a sequence a rank: of those least loaded and the one that has seen most of its prompt, the one where least
/// is to be done before its next token. An interactive sequence may take the place of batch sequences.
fn one(engine: &mut Engine, (_, seq): Key, its_turn: bool) -> bool {
    let seen = engine.sequences[&seq].seen_by;
    let least = engine.by_load.iter().take(CANDIDATES).map(|(_, rank)| *rank);
    let mut candidates: Vec<u32> = least.chain(seen).collect();
    candidates.sort_unstable();
    candidates.dedup();
    let mut best: Option<(u64, u32, Match)> = None;
    let mut of_batch: Option<(u64, u32)> = None;
    for rank in candidates {
        engine.work.touch();
        match room(engine, seq, Rank(rank)) {
            Room::Free(cost, found) => {
                if best.as_ref().is_none_or(|(least, ..)| cost < *least) {
                    best = Some((cost, rank, found));
                }
            }
            Room::OfBatch => {
                let load = (engine.ranks[rank as usize].weighed, rank);
                of_batch = Some(of_batch.map_or(load, |least| least.min(load)));
            }
            Room::None => {}
        }
    }
    if let Some((_, rank, found)) = best {
        engine.place(seq, Rank(rank), &found, its_turn);
        return true;
    }
    of_batch.is_some_and(|(_, rank)| evict_batch(engine, seq, Rank(rank)))
}

/// Whether a sequence fits on a rank. A rank takes new prompts only while it has less to read before them than one step
/// holds, so that planning looks at few.
fn room(engine: &mut Engine, seq: SeqId, rank: Rank) -> Room {
    let (limits, state) = (&engine.config.limits, &engine.ranks[rank.index()]);
    let class = engine.sequences[&seq].key().0;
    let reads_enough = state.reads_before(class) >= u64::from(limits.step_rows_max);
    if reads_enough || (state.refused == Some(seq) && !state.memory.returned && state.running() > 0) {
        return Room::None;
    }
    let (found, need) = needs(engine, seq, rank);
    let state = &engine.ranks[rank.index()];
    if fits(engine, state.running(), need + state.claimed, state.memory.available()) {
        let cached = found.nodes.len() as u64 * u64::from(engine.config.limits.block_size);
        return Room::Free(state.weighed + u64::from(engine.sequences[&seq].len()) - cached, found);
    }
    if class == Class::Interactive {
        // Blocks that cool may do: nobody is driven out before they are there, and it is looked at again then.
        if state.memory.full.cooling() > 0 {
            return Room::None;
        }
        if fits_without_batch(engine, rank, &found, need) {
            return Room::OfBatch;
        }
    }
    let state = &mut engine.ranks[rank.index()];
    (state.refused, state.memory.returned) = (Some(seq), false);
    Room::None
}

/// What is cached of a sequence on a rank, and how many more blocks it takes there before its next token.
fn needs(engine: &mut Engine, seq: SeqId, rank: Rank) -> (Match, u64) {
    let (config, sequence) = (&engine.config, &engine.sequences[&seq]);
    let size = config.limits.block_size;
    let found = engine.ranks[rank.index()].memory.cache.find(&sequence.tokens, &sequence.hashes, size, config.window);
    engine.work.touch_all(found.nodes.len());
    let need = u64::from((sequence.len() + 1).div_ceil(size)) - found.nodes.len() as u64 + u64::from(found.idle);
    (found, need)
}

/// Whether one more sequence fits beside `running` others, if so many blocks are needed and so many are to be had.
const fn fits(engine: &Engine, running: usize, needed: u64, available: usize) -> bool {
    running == 0 || (running < engine.config.limits.seqs_max as usize && needed <= available as u64)
}

/// Whether a sequence of which `found` is cached, and which takes `need` more blocks, fits once the batch sequences of
/// the rank are gone.
fn fits_without_batch(engine: &mut Engine, rank: Rank, found: &Match, need: u64) -> bool {
    let state = &engine.ranks[rank.index()];
    let batch = (Class::Batch, SeqId(0))..;
    let keys = state.decoding.range(batch.clone()).chain(state.prefilling.range(batch));
    let home = |key: &Key| match &engine.sequences.get(&key.1)?.state {
        State::Running(home) => Some(home),
        State::Waiting => None,
    };
    let homes: Vec<&Home> = keys.filter_map(home).collect();
    let (given, held) = state.memory.held_only_by(homes.iter().map(|home| &home.table), found);
    let claimed = state.claimed - homes.iter().map(|home| u64::from(home.claim)).sum::<u64>();
    let fits = fits(engine, state.running() - homes.len(), need + claimed, state.memory.available() + given);
    let any = !homes.is_empty();
    engine.work.touch_all(held);
    any && fits
}

/// Sends batch sequences of a rank back to the queue, the last first, until a sequence fits that does without them.
/// Blocks that cool may do as well: then it waits for those.
fn evict_batch(engine: &mut Engine, seq: SeqId, rank: Rank) -> bool {
    while engine.ranks[rank.index()].memory.full.cooling() == 0 {
        let state = &engine.ranks[rank.index()];
        let Some(&(Class::Batch, victim)) = state.decoding.last().max(state.prefilling.last()) else { break };
        engine.work.touch();
        engine.preempt(victim);
        let (found, need) = needs(engine, seq, rank);
        let state = &engine.ranks[rank.index()];
        if fits(engine, state.running(), need + state.claimed, state.memory.available()) {
            engine.place(seq, rank, &found, false);
            return true;
        }
    }
    false
}
