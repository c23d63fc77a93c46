//! What each rank does in the next step: decode rows first, then prefill chunks in the order of arrival, within a
//! budget of rows for each rank.
//!
//= arXiv:2403.02310 (Sarathi-Serve)

use phalanx_proto::{
    Admission, BlockGrant, Outputs, Pool, Position, Rank, Rows, SeqId, Start, StepHeader, StepPlan, Tokens,
};

use crate::blocks::stretches;
use crate::engine::{Engine, Flight, Want};
use crate::router::{self, Load};
use crate::sequence::{Home, Sequence, State};

/// Plans the next step, or nothing if no rank has a row to compute.
pub(crate) fn step(engine: &mut Engine) -> Option<Vec<StepPlan>> {
    place_waiting(engine);
    let fence = engine.fence.next();
    let mut plans = Vec::with_capacity(engine.ranks.len());
    let mut asked = Vec::with_capacity(engine.ranks.len());
    for rank in (0..engine.config.ranks).map(Rank) {
        let rows = rows_of_rank(engine, rank);
        let wanted = rows.iter().filter(|rows| rows.outputs != Outputs::None);
        asked.push(Some(wanted.map(|rows| rows.seq).collect()));
        let admit = admissions(engine, &rows);
        plans.push(StepPlan { rows, admit, ..StepPlan::default() });
    }
    if plans.iter().all(|plan| plan.rows.is_empty()) {
        return None;
    }
    let count = |plan: &StepPlan| u32::try_from(plan.row_count()).expect("rows are bounded by the limits");
    let rows_of_rank: Vec<u32> = plans.iter().map(count).collect();
    for (plan, rank) in plans.iter_mut().zip(&mut engine.ranks) {
        let (deadline_ms, applied) = (engine.config.deadline_ms, engine.fence.step);
        plan.header = StepHeader { fence, deadline_ms, applied, rows_of_rank: rows_of_rank.clone() };
        plan.release = std::mem::take(&mut rank.release);
    }
    engine.fence = fence;
    engine.flight = Some(Flight { fence, asked });
    Some(plans)
}

/// Gives waiting sequences a rank, first come first served, for as long as the first of them fits somewhere.
fn place_waiting(engine: &mut Engine) {
    while let Some(&seq) = engine.waiting.front() {
        let len = engine.sequences[&seq].len();
        let loads: Vec<Load> = (0..engine.config.ranks).map(|rank| load(engine, Rank(rank), len)).collect();
        let Some(chosen) = router::choose(&loads) else { return };
        engine.waiting.pop_front();
        engine.ranks[chosen].running.push(seq);
        let rank = Rank(u32::try_from(chosen).expect("ranks are bounded by the layout"));
        let home = Home {
            rank,
            computed: 0,
            admitted: false,
            sampled: false,
            full: Default::default(),
            window: Default::default(),
        };
        engine.sequences.get_mut(&seq).expect("it waits, so it exists").state = State::Running(home);
    }
}

fn load(engine: &Engine, rank: Rank, len: u32) -> Load {
    let limits = &engine.config.limits;
    let state = &engine.ranks[rank.index()];
    // Blocks that sequences already there will take to finish their prompts.
    let (mut prefill, mut claimed) = (0, 0);
    for seq in &state.running {
        let sequence = &engine.sequences[seq];
        if let State::Running(home) = &sequence.state {
            prefill += sequence.len() - home.computed;
            claimed += home.full.missing(0, sequence.len().div_ceil(limits.block_size)).count();
        }
    }
    let seqs = u32::try_from(state.running.len()).expect("bounded by seqs_max");
    let need = claimed + (len + 1).div_ceil(limits.block_size) as usize;
    Load { seqs, prefill, fits: seqs < limits.seqs_max && (need <= state.full.len() || seqs == 0) }
}

/// The rows of one rank: first those of sequences that only lack their next token, then prompts.
fn rows_of_rank(engine: &mut Engine, rank: Rank) -> Vec<Rows> {
    let mut budget = engine.config.limits.step_rows_max;
    let mut rows: Vec<Rows> = Vec::new();
    for decoding in [true, false] {
        for seq in engine.ranks[rank.index()].running.clone() {
            // It may have been preempted for an older one.
            let Some((start, len)) = pending(engine, seq) else { continue };
            if budget == 0 || (len - start == 1) != decoding {
                continue;
            }
            let end = start + (len - start).min(budget).min(engine.config.chunk_max);
            let Some(grants) = take_blocks(engine, rank, seq, start, end, &rows) else { continue };
            budget -= end - start;
            rows.push(run(engine, seq, start, end, grants));
        }
    }
    rows
}

/// Tokens `start..len` of a running sequence that are to be computed.
fn pending(engine: &Engine, seq: SeqId) -> Option<(u32, u32)> {
    let sequence = engine.sequences.get(&seq)?;
    match &sequence.state {
        State::Running(home) if home.computed < sequence.len() => Some((home.computed, sequence.len())),
        _ => None,
    }
}

/// Takes the blocks for positions `start..end`. While there are too few, the youngest sequence of the rank that
/// has no row in this step yet gives its own back. `None` if even that is not enough for now.
fn take_blocks(
    engine: &mut Engine,
    rank: Rank,
    seq: SeqId,
    start: u32,
    end: u32,
    planned: &[Rows],
) -> Option<Vec<BlockGrant>> {
    loop {
        if let Some(grants) = try_take(engine, rank, seq, start, end) {
            return Some(grants);
        }
        let in_step = |other: SeqId| planned.iter().any(|rows| rows.seq == other);
        let victim = engine.ranks[rank.index()].running.iter().rev().copied().find(|&other| !in_step(other))?;
        if victim == seq && engine.ranks[rank.index()].running.len() == 1 {
            // Alone on the rank and still too little: the limits do not hold one context. Refused at start-up.
            return None;
        }
        engine.preempt(victim);
        if victim == seq {
            return None;
        }
    }
}

fn try_take(engine: &mut Engine, rank: Rank, seq: SeqId, start: u32, end: u32) -> Option<Vec<BlockGrant>> {
    let (window, limits) = (engine.config.window, engine.config.limits);
    let state = &mut engine.ranks[rank.index()];
    let State::Running(home) = &mut engine.sequences.get_mut(&seq)?.state else { return None };
    let (first, last) = stretches(Pool::Window, start, end, window, &limits);
    home.window.give_back_before(first, &mut state.window);
    if home.window.missing(first, last).count() > state.window.len() {
        return None;
    }
    let (from, to) = stretches(Pool::Full, start, end, window, &limits);
    let mut grants = home.full.take(Pool::Full, from, to, &mut state.full)?;
    grants.extend(home.window.take(Pool::Window, first, last, &mut state.window)?);
    Some(grants)
}

/// The run of rows `start..end` of a sequence, which count as computed from now on.
fn run(engine: &mut Engine, seq: SeqId, start: u32, end: u32, grants: Vec<BlockGrant>) -> Rows {
    let sequence = engine.sequences.get_mut(&seq).expect("it runs, so it exists");
    let len = sequence.len();
    let State::Running(home) = &mut sequence.state else { unreachable!("its rows were just planned") };
    home.computed = end;
    let (start, tokens) = if home.sampled {
        (Start::AfterPrevious, Tokens::Previous)
    } else {
        (Start::At(Position(start)), Tokens::Given(sequence.tokens[start as usize..end as usize].to_vec()))
    };
    let outputs = match sequence.request.want {
        Want::Logits => Outputs::AllLogits,
        Want::Tokens if end == len && sequence.request.max_tokens > 0 => Outputs::Sample,
        Want::Tokens => Outputs::None,
    };
    home.sampled = outputs == Outputs::Sample;
    Rows { seq, start, tokens, outputs, grants }
}

/// Sequences of the step that their rank has not been told of.
fn admissions(engine: &mut Engine, rows: &[Rows]) -> Vec<Admission> {
    let mut admit = Vec::new();
    for rows in rows {
        let sequence: &mut Sequence = engine.sequences.get_mut(&rows.seq).expect("it has rows, so it exists");
        if let State::Running(home) = &mut sequence.state
            && !std::mem::replace(&mut home.admitted, true)
        {
            admit.push(Admission::new(rows.seq, sequence.request.sampling));
        }
    }
    admit
}
