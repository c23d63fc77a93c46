//! What each rank does in the next step: first the sequences that only lack their next token, then prompts in chunks, by
//! class and order of arrival, within a budget of rows for each rank.
//!
//! Ranks march in lockstep, so a step is as long as its fullest rank's: what is read of prompts is levelled, no rank
//! reads more than the mean of what there is to read (or a [`LEVEL_SHARE`]th of a step, whichever is more). Chunks are
//! such that a step is over long before its deadline, as far as is known what it takes.
//!
//= arXiv:2403.02310 (Sarathi-Serve)

use phalanx_proto::{
    Admission, BlockGrant, History, Outputs, Position, Rank, Rows, Start, StepHeader, StepId, StepPlan, Tokens,
};

use crate::blocks::Short;
use crate::cost::{RankShape, StepShape};
use crate::engine::{Asked, Class, Engine, Flight, Want};
use crate::place;
use crate::queue::Key;
use crate::sequence::{Home, Pending, Sequence, State, span};

/// A rank may always fill this part of a step with prompts, however little the others have to read.
pub const LEVEL_SHARE: u32 = 4;
/// This part of the rows that a rank has for prompts is for those of batch requests, while it reads any: interactive
/// ones that come without end do not keep them, and the blocks they hold, for ever.
pub const BATCH_SHARE: u32 = 8;

/// Plans the next step, or nothing if no rank has a row to compute.
pub(crate) fn step(engine: &mut Engine) -> Option<Vec<StepPlan>> {
    place::all_waiting(engine);
    engine.backed_up = !engine.queue.is_empty();
    let fence = engine.fence.next();
    let prefill: u64 = engine.ranks.iter().map(|rank| rank.reads_before(Class::Batch)).sum();
    let mean = prefill.div_ceil(u64::from(engine.config.ranks.max(1)));
    let level = u32::try_from(mean).unwrap_or(u32::MAX).max(engine.config.limits.step_rows_max.div_ceil(LEVEL_SHARE));
    let mut plans = Vec::with_capacity(engine.ranks.len());
    let mut asked = Vec::with_capacity(engine.ranks.len());
    let mut shape = StepShape::default();
    for rank in (0..engine.config.ranks).map(Rank) {
        engine.work.touch();
        let budget = engine.config.limits.step_rows_max;
        let mut of_rank = OfRank::new(rank, fence.step, budget);
        of_rank.decode(engine);
        of_rank.prefill(engine, level);
        plans.push(of_rank.plan);
        asked.push(Some(of_rank.asked));
        shape.0.push(of_rank.shape);
    }
    if plans.iter().all(|plan| plan.rows.is_empty()) {
        return None;
    }
    let count = |plan: &StepPlan| u32::try_from(plan.row_count()).expect("rows are bounded by the limits");
    let rows_of_rank: Vec<u32> = plans.iter().map(count).collect();
    let (most, sum) = (rows_of_rank.iter().max().copied().unwrap_or(0), rows_of_rank.iter().sum::<u32>());
    engine.imbalance = f64::from(most) * rows_of_rank.len() as f64 / f64::from(sum);
    let (deadline_ms, expected) = match &engine.pace {
        Some(pace) => (pace.deadline(&shape), pace.cost().phases(&shape)),
        None => (engine.config.deadline_ms, Vec::new()),
    };
    for (plan, rank) in plans.iter_mut().zip(&mut engine.ranks) {
        let applied = engine.applied;
        plan.header = StepHeader { fence, deadline_ms, applied, rows_of_rank: rows_of_rank.clone() };
        plan.release = std::mem::take(&mut rank.release);
        if !std::mem::replace(&mut rank.has_tables, true) {
            plan.tables.clone_from(&engine.config.tables);
        }
    }
    engine.work.step(sum);
    engine.fence = fence;
    engine.flights.push_back(Flight { fence, asked, expected });
    Some(plans)
}

/// The plan of one rank while it is made.
struct OfRank {
    rank: Rank,
    step: StepId,
    plan: StepPlan,
    asked: Vec<Asked>,
    /// Rows that the step has left.
    budget: u32,
    /// What is planned so far.
    shape: RankShape,
}

impl OfRank {
    fn new(rank: Rank, step: StepId, budget: u32) -> Self {
        Self { rank, step, plan: StepPlan::default(), asked: Vec::new(), budget, shape: RankShape::default() }
    }

    /// A row for each sequence that only lacks its next token. There are hardly ever more of them than rows in a step:
    /// each had a row beside the others when its prompt was read.
    fn decode(&mut self, engine: &mut Engine) {
        if engine.answers_held {
            return;
        }
        let keys: Vec<Key> = engine.ranks[self.rank.index()].decoding.iter().copied().collect();
        for key in keys {
            engine.work.touch();
            if self.budget == 0 {
                return;
            }
            if engine.sequences.get(&key.1).map(Sequence::pending) == Some(Pending::Decode) {
                self.run(engine, key, 1);
            }
        }
    }

    /// Chunks of prompts, in order, until the budget or the blocks are used up.
    fn prefill(&mut self, engine: &mut Engine, level: u32) {
        let mut budget = self.budget.min(level);
        let keys: Vec<Key> = engine.ranks[self.rank.index()].prefilling.iter().copied().collect();
        let of_batch = if keys.last().is_some_and(|key| key.0 == Class::Batch) {
            (budget / BATCH_SHARE).max(u32::from(budget > 1))
        } else {
            0
        };
        for key in keys {
            if budget == 0 {
                return;
            }
            engine.work.touch();
            let Some(sequence) = engine.sequences.get(&key.1) else { continue };
            let (mut rows, planned) = match (sequence.pending(), &sequence.state) {
                (Pending::Prefill(rows), State::Running(home)) => (rows, home.planned),
                (Pending::Decode, State::Running(home)) => (1, home.planned),
                _ => continue,
            };
            if sequence.request.want == Want::Logits && planned < sequence.told {
                rows = rows.min(sequence.told - planned);
            }
            let kept = if key.0 == Class::Interactive { of_batch } else { 0 };
            let wanted = rows.min(budget - kept).min(engine.config.chunk_max);
            if wanted == 0 {
                continue;
            }
            let (rows, is_short) = self.in_time(engine, planned, wanted);
            // Nobody who came later gets blocks that this one lacks.
            if !self.run(engine, key, rows) {
                return;
            }
            budget = if is_short && rows == wanted { budget - rows } else { kept };
        }
    }

    /// As many of `rows` rows from position `start` on as keep the step short; a block of them at least, so that every
    /// prompt is read at last. And whether it is short.
    fn in_time(&self, engine: &mut Engine, start: u32, mut rows: u32) -> (u32, bool) {
        let Some(pace) = &engine.pace else { return (rows, true) };
        let least = engine.config.limits.block_size;
        loop {
            engine.work.touch();
            let mut shape = self.shape;
            shape.add_run(start, rows, 0, engine.config.window);
            let is_short = pace.is_short(&shape);
            if is_short || rows <= least {
                return (rows, is_short);
            }
            rows = (rows / 2).max(least);
        }
    }

    /// Plans the next `rows` rows of a sequence, if there are blocks for them.
    fn run(&mut self, engine: &mut Engine, key: Key, rows: u32) -> bool {
        let Some(grants) = self.take_blocks(engine, key, rows) else { return false };
        let rank = self.rank;
        let (block_size, window) = (engine.config.limits.block_size, engine.config.window);
        let sequence = engine.sequences.get_mut(&key.1).expect("it has blocks, so it exists");
        let (len, life) = (sequence.len(), sequence.life);
        let State::Running(home) = &mut sequence.state else { unreachable!("it has just been given blocks") };
        let (start, end) = (home.planned, home.planned + rows);
        let (from, tokens) = if home.sampled {
            (Start::AfterPrevious, Tokens::Previous)
        } else {
            let given = sequence.tokens[start as usize..end as usize].to_vec();
            (Start::At(Position(start)), Tokens::Given(given))
        };
        let reads_all = end >= len;
        let outputs = match sequence.request.want {
            Want::Logits if start < sequence.told => Outputs::None,
            Want::Logits => Outputs::AllLogits,
            Want::Tokens if reads_all && sequence.request.max_tokens > 0 => Outputs::Sample,
            Want::Tokens => Outputs::None,
        };
        let samples = outputs == Outputs::Sample;
        self.shape.add_run(start, rows, u32::from(samples), window);
        home.planned = end;
        home.sampled = samples;
        home.sampling += u32::from(samples);
        home.last_step = self.step;
        let mut all = std::mem::take(&mut home.tell);
        all.extend(grants);
        let claim = home.table.lacks(len + 1, block_size);
        let released = home.claim.saturating_sub(claim);
        home.claim -= released;
        if !std::mem::replace(&mut home.admitted, true) {
            let cached = home.cached;
            self.plan.admit.push(admission(sequence, cached));
        }
        self.plan.rows.push(Rows { seq: key.1, start: from, tokens, outputs, grants: all });
        self.asked.push(Asked { seq: key.1, life, end, wants: outputs != Outputs::None, samples });
        self.budget -= rows;
        if engine.ranks[rank.index()].prefilling.contains(&key) {
            let claim = if reads_all { self.claim_of(engine, key) } else { 0 };
            engine.weigh(rank, |state| {
                state.prefill_tokens[key.0 as usize] -= u64::from(rows);
                state.claimed -= u64::from(released + claim);
                if reads_all {
                    state.prefilling.remove(&key);
                    state.decoding.insert(key);
                }
            });
        }
        true
    }

    /// Gives up what a sequence still claims: its prompt is read.
    fn claim_of(&self, engine: &mut Engine, key: Key) -> u32 {
        match engine.sequences.get_mut(&key.1).map(|sequence| &mut sequence.state) {
            Some(State::Running(home)) => std::mem::take(&mut home.claim),
            _ => 0,
        }
    }

    /// Takes the blocks for the next `rows` rows of a sequence. While nothing else will give any back, the last sequence
    /// of the rank that comes after this one and has no row in this step gives up its own.
    fn take_blocks(&self, engine: &mut Engine, key: Key, rows: u32) -> Option<Vec<BlockGrant>> {
        loop {
            let State::Running(home) = &mut engine.sequences.get_mut(&key.1)?.state else { return None };
            let wanted = span(&engine.config, home.planned, home.planned + rows);
            let planned = engine.fence.step;
            let memory = &mut engine.ranks[self.rank.index()].memory;
            match memory.take(&mut home.table, wanted, planned) {
                Ok(grants) => return Some(grants),
                Err(Short::ForNow) => return None,
                Err(Short::Lasting) => {}
            }
            let state = &engine.ranks[self.rank.index()];
            let reading = state.prefilling.contains(&key);
            let alone = state.running() == 1;
            let victim = self.victim(engine, key)?;
            // Alone and still too little: the limits do not hold one context, which is refused at start-up. A prompt
            // that is read keeps what it has: those before it will end.
            if victim == key && (alone || reading) {
                return None;
            }
            engine.preempt(victim.1);
            if victim == key {
                return None;
            }
        }
    }

    /// The last sequence of the rank, not before `key`, that has no row in this step.
    fn victim(&self, engine: &Engine, key: Key) -> Option<Key> {
        let state = &engine.ranks[self.rank.index()];
        let last = |keys: &std::collections::BTreeSet<Key>| {
            keys.range(key..).rev().copied().find(|key| {
                let home = match engine.sequences.get(&key.1).map(|sequence| &sequence.state) {
                    Some(State::Running(Home { last_step, .. })) => *last_step,
                    _ => return false,
                };
                home != self.step
            })
        };
        last(&state.decoding).max(last(&state.prefilling))
    }
}

/// What a rank is told of a sequence that begins to live there.
fn admission(sequence: &Sequence, cached: u32) -> Admission {
    let request = &sequence.request;
    let (prompt, generated) = sequence.tokens.split_at(request.prompt.len());
    let constrained = request.constraint.is_some();
    let history = History {
        prompt: if request.sampling.repetition_penalty == 1.0 { Vec::new() } else { prompt.to_vec() },
        generated: if constrained || request.sampling.looks_back() { generated.to_vec() } else { Vec::new() },
    };
    Admission {
        bias: request.bias.clone(),
        constraint: request.constraint,
        cached,
        history,
        ..Admission::new(request.seq, request.sampling)
    }
}
