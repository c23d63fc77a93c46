//! What must hold after every decision. Used by debug assertions, by property tests and by the simulator.

use std::collections::{BTreeMap, BTreeSet};

use phalanx_proto::{BlockId, Rank};

use crate::engine::{Engine, RankState};
use crate::prefix::NodeId;
use crate::sequence::{Home, State};

/// Checks every invariant.
///
/// # Errors
/// The first that does not hold, in words.
pub fn check(engine: &Engine) -> Result<(), String> {
    for (rank, state) in (0..).map(Rank).zip(&engine.ranks) {
        let of_rank = |broken: String| format!("rank {rank}: {broken}");
        every_block_has_one_owner(engine, rank, state).map_err(of_rank)?;
        the_cache_knows_its_users(engine, rank, state).map_err(of_rank)?;
        sums_are_right(engine, rank, state).map_err(of_rank)?;
        state.memory.cache.check().map_err(of_rank)?;
    }
    every_sequence_is_in_one_place(engine)?;
    steps_are_bounded(engine)
}

fn homes(engine: &Engine, rank: Rank) -> impl Iterator<Item = &Home> {
    engine.sequences.values().filter_map(move |sequence| match &sequence.state {
        State::Running(home) if home.rank == rank => Some(home),
        _ => None,
    })
}

/// No block is owned twice, none is lost.
fn every_block_has_one_owner(engine: &Engine, rank: Rank, state: &RankState) -> Result<(), String> {
    let memory = &state.memory;
    let own_full = homes(engine, rank).flat_map(|home| home.table.full()).filter(|h| h.node.is_none()).map(|h| h.block);
    let cached_full = memory.cache.nodes().map(|(_, node)| node.full);
    let full: Vec<BlockId> = memory.full.iter().chain(own_full).chain(cached_full).collect();
    once("full", full, memory.full.total())?;
    let own_window = homes(engine, rank).flat_map(|home| home.table.window()).filter(|w| w.2).map(|w| w.1);
    let cached_window = memory.cache.nodes().filter_map(|(_, node)| node.window);
    let window: Vec<BlockId> = memory.window.iter().chain(own_window).chain(cached_window).collect();
    once("window", window, memory.window.total())
}

fn once(pool: &str, blocks: Vec<BlockId>, total: u32) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    if let Some(twice) = blocks.iter().find(|block| !seen.insert(**block)) {
        return Err(format!("{pool} block {twice} has two owners"));
    }
    if seen.len() == total as usize { Ok(()) } else { Err(format!("{} of {total} {pool} blocks exist", seen.len())) }
}

/// A cached block has as many users as sequences that hold it, and what they hold is what is cached.
fn the_cache_knows_its_users(engine: &Engine, rank: Rank, state: &RankState) -> Result<(), String> {
    let nodes: BTreeMap<NodeId, _> = state.memory.cache.nodes().collect();
    let (mut users, mut window_users) = (BTreeMap::<NodeId, u32>::new(), BTreeMap::<NodeId, u32>::new());
    for home in homes(engine, rank) {
        for held in home.table.full() {
            let Some(id) = held.node else { continue };
            let Some(node) = nodes.get(&id) else { return Err(format!("{id:?} is held and not cached")) };
            if node.full != held.block {
                return Err(format!("{id:?} is block {}, and held as {}", node.full, held.block));
            }
            *users.entry(id).or_default() += 1;
        }
        for (stretch, block, own) in home.table.window() {
            let id = home.table.full().get(stretch as usize).and_then(|held| held.node);
            match id {
                Some(id) if !own && nodes.get(&id).and_then(|node| node.window) == Some(block) => {
                    *window_users.entry(id).or_default() += 1;
                }
                _ if own => {}
                _ => return Err(format!("window block {block} is neither owned nor cached")),
            }
        }
    }
    for (id, node) in nodes {
        let counted = (users.get(&id).copied().unwrap_or(0), window_users.get(&id).copied().unwrap_or(0));
        if counted != (node.users, node.window_users) {
            return Err(format!("{id:?} has {counted:?} users and counts {:?}", (node.users, node.window_users)));
        }
    }
    Ok(())
}

/// What is kept so that it need not be counted is what counting gives.
fn sums_are_right(engine: &Engine, rank: Rank, state: &RankState) -> Result<(), String> {
    let (running, max) = (state.running(), engine.config.limits.seqs_max as usize);
    if running > max {
        return Err(format!("{running} sequences of {max}"));
    }
    let (mut tokens, mut claimed) = ([0; 2], 0);
    for (class, seq) in &state.prefilling {
        let Some(sequence) = engine.sequences.get(seq) else { continue };
        if let State::Running(home) = &sequence.state {
            tokens[*class as usize] += u64::from(sequence.len() - home.planned);
            claimed += u64::from(home.claim);
        }
    }
    if (tokens, claimed) != (state.prefill_tokens, state.claimed) {
        let counted = (state.prefill_tokens, state.claimed);
        return Err(format!("{tokens:?} tokens to read and {claimed} blocks to take, counted as {counted:?}"));
    }
    if !engine.by_load.contains(&(state.weighed, rank.0)) || engine.by_load.len() != engine.ranks.len() {
        return Err("it has lost its place among the ranks".to_owned());
    }
    Ok(())
}

/// Every sequence waits once or runs once.
fn every_sequence_is_in_one_place(engine: &Engine) -> Result<(), String> {
    let mut places: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for key in engine.queue.iter() {
        places.entry(key).or_default().push(None);
    }
    for (rank, state) in (0..).map(Rank).zip(&engine.ranks) {
        for key in state.decoding.iter().chain(&state.prefilling) {
            places.entry(*key).or_default().push(Some(rank));
        }
    }
    for (seq, sequence) in &engine.sequences {
        let expected = match &sequence.state {
            State::Waiting => None,
            State::Running(home) => Some(home.rank),
        };
        if places.remove(&sequence.key()) != Some(vec![expected]) {
            return Err(format!("sequence {seq} is not where it should be, or more than once"));
        }
        if let State::Running(home) = &sequence.state
            && !(home.applied <= home.planned && home.planned <= sequence.len() + home.sampling)
        {
            let (applied, planned) = (home.applied, home.planned);
            return Err(format!("sequence {seq} of {} has planned {planned}, applied {applied}", sequence.len()));
        }
    }
    places.first_key_value().map_or(Ok(()), |(key, _)| Err(format!("{key:?} is listed but does not exist")))
}

/// No more steps are under way than may be.
fn steps_are_bounded(engine: &Engine) -> Result<(), String> {
    let (steps, depth) = (engine.flights.len(), engine.config.depth.max(1) as usize);
    if steps > depth { Err(format!("{steps} steps are under way of {depth}")) } else { Ok(()) }
}
