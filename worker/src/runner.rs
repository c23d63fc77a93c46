//! Runs step plans on one rank: the state of its sequences, the inputs of a step, and its result.
//!
//! The state of a sequence is a function of (request, tokens so far), written by absolute position; so a step
//! may be repeated, and a plan that starts a sequence anew at any computed position is legal.
//!
//! A step whose results nothing of the next one depends on may still be under way when that one begins: a device then has
//! its work before it is done with the last. Each rank decides that for itself, and none sees whether another does: all
//! issue the exchanges of the same steps in the same order. A step that fails takes those begun after it with it, and those
//! before it whose exchanges are not known to be done.
//!
//! - `check`: a plan is refused before it touches anything.
//! - `sequence`: what is known of each sequence.
//! - `under_way`: steps that have begun.
//! - [`Outcomes`]: what came of the last steps, for plans that are sent again.

mod check;
mod outcomes;
mod sequence;
mod under_way;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_kernels::{Backend, Draw, Sampled, StepInputs, TokenSource};
use phalanx_model::{Collectives, ForwardError, GptOss, Step, Watch};
use phalanx_proto::{
    Admission, Fence, KvOp, Limits, Outputs, PlanError, Position, Rank, Rows, RowsResult, Sampling, SeqId, Start,
    StepHeader, StepPlan, StepResult, TableId, TokenId, TokenLogprobs, Tokens,
};

use crate::constraints::{Beside, ConstraintFailure, Job, Mask, Table};
pub use outcomes::{OutOfStep, Outcomes, STEPS_IN_FLIGHT};
use sequence::{Past, Sequence};
use under_way::{Asked, Begun, DEPTH, UnderWay};

/// Why a step was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The plan is of another moment; nothing was touched.
    #[error(transparent)]
    OutOfStep(#[from] OutOfStep),
    /// The plan cannot be done; nothing was touched.
    #[error("the plan cannot be done: {0}")]
    Plan(#[from] PlanError),
    /// The plan does not fit the state of a sequence; nothing was touched.
    #[error("the plan does not fit sequence {seq}: {why}")]
    Sequence {
        /// The sequence.
        seq: SeqId,
        /// What does not fit.
        why: &'static str,
    },
    /// The plan's header does not speak of its rows; nothing was touched.
    #[error("the plan has {rows} rows for rank {rank}, and its header says {said:?} for the ranks: it is damaged")]
    Header {
        /// This rank.
        rank: Rank,
        /// Rows of the plan.
        rows: usize,
        /// Rows of each rank by the header.
        said: Vec<u32>,
    },
    /// The plan brings a constraint table that is here; nothing was touched.
    #[error("constraint table {} is here already: give each table of an epoch its own id", .0.0)]
    Table(TableId),
    /// The step failed half way. The epoch is over on this rank.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The step failed half way. The epoch is over on this rank.
    #[error(transparent)]
    Constraint(#[from] ConstraintFailure),
}

impl StepError {
    /// Whether the epoch is over on this rank; otherwise nothing was touched.
    #[must_use]
    pub const fn ends_epoch(&self) -> bool {
        matches!(self, Self::Forward(_) | Self::Constraint(_))
    }
}

/// Draws beyond which a step's exchanges are waited for before it samples: so many launches and uploads are not to wait on the
/// device behind what waits for other ranks.
const DRAWS_AHEAD: usize = 256;

/// Runs the plans of one rank in one epoch.
pub struct Runner<B: Backend, C: Collectives<B::Parts>> {
    model: GptOss<B>,
    collectives: C,
    limits: Limits,
    sequences: BTreeMap<SeqId, Sequence>,
    free_slots: Vec<u32>,
    /// The constraint tables of the epoch.
    tables: BTreeMap<TableId, Arc<Table>>,
    /// Where constraints are evaluated.
    beside: Beside,
    outcomes: Outcomes<StepError>,
    /// Steps that have begun and not ended, at most [`DEPTH`].
    under_way: VecDeque<UnderWay<B::Ended>>,
    /// When a step was last done.
    collected: Option<Instant>,
}

impl<B: Backend, C: Collectives<B::Parts>> Runner<B, C> {
    /// A rank ready for the step after `fence`.
    #[must_use]
    pub fn new(model: GptOss<B>, collectives: C, limits: Limits, fence: Fence) -> Self {
        Self {
            model,
            collectives,
            limits,
            sequences: BTreeMap::new(),
            free_slots: (0..limits.seqs_max).rev().collect(),
            tables: BTreeMap::new(),
            beside: Beside::default(),
            outcomes: Outcomes::new(fence),
            under_way: VecDeque::new(),
            collected: None,
        }
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.collectives.rank()
    }

    /// Bytes of weights, KV and buffers held.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.model.allocated()
    }

    /// Does one step. What came of a step that ran is told again, whatever else its plan says.
    ///
    /// # Errors
    /// A plan that is refused leaves everything as it was; a failed exchange or constraint ends the epoch.
    pub fn run(&mut self, plan: &StepPlan, watch: &(impl Watch + ?Sized)) -> Result<StepResult, StepError> {
        self.begin(plan, watch)?;
        self.finish(plan.header.fence)
    }

    /// Begins a step, unless it has begun before: [`Runner::finish`] tells what came of it. The step before may not have
    /// been finished; it is waited for where this one needs to know what came of it.
    ///
    /// # Errors
    /// A plan that is refused leaves everything as it was.
    pub fn begin(&mut self, plan: &StepPlan, watch: &(impl Watch + ?Sized)) -> Result<(), StepError> {
        let fence = plan.header.fence;
        while self.under_way.len() >= if self.overlaps(&plan.header) { DEPTH } else { 1 } {
            self.collect();
        }
        if self.under_way.is_empty() && self.outcomes.of(fence)?.is_some() {
            return Ok(());
        }
        self.check(plan)?;
        // A device is done with one step after the other.
        let before: Duration = self.under_way.iter().map(|before| allowed(&before.header)).sum();
        self.model.set_deadline(Instant::now() + before + allowed(&plan.header));
        let step = self.step(plan, watch);
        let asked = self.asked(plan);
        self.under_way.push_back(UnderWay { header: plan.header.clone(), asked, step });
        Ok(())
    }

    /// Whether this step can begin before those under way have ended: nothing of it depends on what comes of them, and no
    /// exchange of it waits on the host for another rank.
    #[must_use]
    pub fn overlaps(&self, header: &StepHeader) -> bool {
        self.under_way.back().is_none_or(|newest| {
            let is_next = newest.fence().next() == header.fence;
            is_next && !newest.is_needed() && self.collectives.overlaps(&header.rows_of_rank)
        })
    }

    /// Waits for a step that has begun, and tells what came of it.
    ///
    /// # Errors
    /// The step failed, and the epoch is over on this rank; or it never began.
    pub fn finish(&mut self, fence: Fence) -> Result<StepResult, StepError> {
        while self.under_way.front().is_some_and(|oldest| oldest.fence().step <= fence.step) {
            self.collect();
        }
        self.outcomes.told(fence)?
    }

    /// Whether the oldest step under way is done or has failed, so that finishing it does not wait.
    #[must_use]
    pub fn is_done(&mut self) -> bool {
        let Some(UnderWay { header, step: Ok(Begun { ended, .. }), .. }) = self.under_way.front() else { return true };
        // What failed on other ranks is heard here: the device would wait for them for ever.
        self.collectives.is_settled(header.fence).map_or(true, |settled| settled && self.model.is_done(ended))
    }

    /// Waits for the oldest step under way. Those after a failed one are given up.
    fn collect(&mut self) {
        let Some(UnderWay { header, asked, step }) = self.under_way.pop_front() else { return };
        let outcome = step.and_then(|begun| self.result(header.fence, &asked, begun));
        if outcome.is_err() {
            self.under_way.clear();
        }
        self.outcomes.keep(&header, &outcome);
    }

    /// Waits for a step that was enqueued: first until its exchanges are done.
    fn result(&mut self, fence: Fence, asked: &[Asked], begun: Begun<B::Ended>) -> Result<StepResult, StepError> {
        let Begun { mut result, ended, enqueued } = begun;
        self.settle(fence)?;
        // Until the one before was done, this one waited for it.
        let since = self.collected.map_or(enqueued, |collected| collected.max(enqueued));
        let sampled = self.model.result(ended, since, &mut result.phases)?;
        self.collected = Some(Instant::now());
        self.keep_sampled(asked, sampled, &mut result);
        Ok(result)
    }

    fn settle(&mut self, fence: Fence) -> Result<(), StepError> {
        self.collectives.settle(fence).map_err(|error| ForwardError::from(error).into())
    }

    /// What a plan's runs asked for.
    fn asked(&self, plan: &StepPlan) -> Vec<Asked> {
        let asked = plan.rows.iter().filter(|rows| rows.outputs != Outputs::None);
        let asked = asked.map(|rows| {
            let sequence = &self.sequences[&rows.seq];
            Asked {
                seq: rows.seq,
                outputs: rows.outputs,
                draws: drawn(rows, 0..count(rows)).len(),
                guesses: guesses(rows).to_vec(),
                logprobs: sequence.sampling.logprobs.is_some(),
                looks_back: sequence.looks_back(),
            }
        });
        asked.collect()
    }

    fn step(&mut self, plan: &StepPlan, watch: &(impl Watch + ?Sized)) -> Result<Begun<B::Ended>, StepError> {
        for seq in &plan.release {
            if let Some(sequence) = self.sequences.remove(seq) {
                self.free_slots.push(sequence.slot);
            }
        }
        for table in &plan.tables {
            let table = (table.id, Arc::new(Table::new(table.clone(), self.model.config().vocab)));
            self.tables.extend([table]);
        }
        for admission in &plan.admit {
            self.admit(admission);
        }
        for &KvOp::Copy { from, to } in &plan.kv_ops {
            self.model.copy_block(from.pool, from.block.0, to.block.0);
        }
        let inputs = self.inputs(plan);

        let fence = plan.header.fence;
        let deadline = Instant::now() + allowed(&plan.header);
        let mut result = StepResult { fence, rank: self.rank(), ..StepResult::default() };
        let jobs = self.constrained(plan);
        let forward = || -> Result<(), StepError> {
            let rows_of_rank = &plan.header.rows_of_rank;
            let step = Step { fence, deadline, rows_of_rank, watch, phases: &mut result.phases };
            Ok(self.model.forward(&inputs, &mut self.collectives, step)?)
        };
        let ((), jobs) = self.beside.evaluate(jobs, forward)?;
        let draws = self.draws(plan, &inputs, jobs);
        if draws.len() > DRAWS_AHEAD {
            self.settle(fence)?;
        }
        self.model.sample(draws, &mut result.phases);
        if plan.rows.iter().any(|rows| rows.outputs == Outputs::AllLogits) {
            // They are read at once.
            self.settle(fence)?;
        }
        result.rows = self.results(plan, &inputs);
        let ended = self.model.end();
        if let Some(warning) = self.model.take_warning() {
            tracing::warn!(%warning, "steps are slower than they could be");
        }
        result.exchange = self.collectives.counters();
        Ok(Begun { result, ended, enqueued: Instant::now() })
    }

    fn admit(&mut self, admission: &Admission) {
        let slot = self.free_slots.pop().expect("`check` bounds the sequences by the slots");
        let constraint = admission.constraint.map(|start| self.tables[&start.table].at(start.state));
        self.sequences.insert(admission.seq, Sequence::new(admission, slot, constraint));
    }

    /// Flattens the plan's runs into rows.
    fn inputs(&mut self, plan: &StepPlan) -> StepInputs {
        let mut inputs = StepInputs { tables: vec![Vec::new(), Vec::new()], ..StepInputs::default() };
        for (index, rows) in (0..).zip(&plan.rows) {
            let sequence = self.sequences.get_mut(&rows.seq).expect("`check` found it");
            sequence.grant(&rows.grants);
            let start = first_position(rows.start, sequence.reached);
            let previous = TokenSource::Sampled(sequence.slot);
            let given = |tokens: &[TokenId]| tokens.iter().map(|t| TokenSource::Given(t.0)).collect::<Vec<_>>();
            match &rows.tokens {
                Tokens::Given(tokens) => inputs.tokens.extend(given(tokens)),
                Tokens::Previous => inputs.tokens.push(previous),
                Tokens::Draft(guesses) => {
                    inputs.tokens.push(previous);
                    inputs.tokens.extend(given(guesses));
                }
            }
            let count = count(rows);
            inputs.positions.extend(start..start + count);
            inputs.sequences.extend(std::iter::repeat_n(index, count as usize));
            for (table, of_step) in sequence.tables.iter().zip(&mut inputs.tables) {
                of_step.push(table.clone());
            }
            sequence.reached = start + count;
        }
        inputs
    }

    /// The constraints that say what may be sampled in this step; they are away until [`Runner::draws`].
    fn constrained(&mut self, plan: &StepPlan) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (index, rows) in plan.rows.iter().enumerate() {
            let sequence = self.sequences.get_mut(&rows.seq).expect("`check` found it");
            if !drawn(rows, 0..count(rows)).is_empty()
                && let Some(constraint) = sequence.constraint.take()
            {
                let news = std::mem::take(&mut sequence.news);
                let guesses = guesses(rows).to_vec();
                jobs.push(Job { index, constraint, news, guesses, masks: Vec::new() });
            }
        }
        jobs
    }

    /// How a token is drawn, for each row that one is sampled from.
    fn draws(&mut self, plan: &StepPlan, inputs: &StepInputs, jobs: Vec<Job>) -> Vec<(u32, Draw)> {
        let mut jobs = jobs.into_iter().peekable();
        let mut draws = Vec::new();
        for (index, (rows, all)) in runs(plan).enumerate() {
            let sequence = self.sequences.get_mut(&rows.seq).expect("`check` found it");
            sequence.has_sampled |= !drawn(rows, all.clone()).is_empty();
            let mut masks = Vec::new();
            if let Some(job) = jobs.next_if(|job| job.index == index) {
                sequence.constraint = Some(job.constraint);
                masks = job.masks;
            }
            // A row after a guess is of use only if the guess was right: its past has the guess, and no mask is
            // needed after one that is refused.
            let mut masks = masks.into_iter();
            let mut past = Cow::Borrowed(&sequence.past);
            let guessed = [None].into_iter().chain(guesses(rows).iter().map(Some));
            for (row, guess) in drawn(rows, all).zip(guessed) {
                if let Some(&guess) = guess.filter(|_| sequence.sampling.looks_back()) {
                    past.to_mut().generated(guess);
                }
                let position = inputs.positions[row as usize] + 1;
                draws.push((row, draw(sequence, &past, masks.next(), position)));
            }
        }
        draws
    }

    /// What each run that asked for something gave, but for what was sampled.
    fn results(&mut self, plan: &StepPlan, inputs: &StepInputs) -> Vec<RowsResult> {
        let mut results = Vec::new();
        for (rows, all) in runs(plan) {
            let mut logits = Vec::new();
            let first = match rows.outputs {
                Outputs::None => continue,
                Outputs::AllLogits => {
                    let wanted: Vec<u32> = all.clone().collect();
                    logits = self.model.logits(&wanted);
                    all.start
                }
                Outputs::Sample | Outputs::Verify => drawn(rows, all).start,
            };
            let position = Position(inputs.positions[first as usize] + 1);
            results.push(RowsResult { seq: rows.seq, position, tokens: Vec::new(), logprobs: Vec::new(), logits });
        }
        results
    }

    /// Hands the sampled tokens to the result, and to the sequences that look back at them: others may be gone by now.
    fn keep_sampled(&mut self, asked: &[Asked], sampled: Vec<Sampled>, result: &mut StepResult) {
        let mut sampled = sampled.into_iter();
        for (asked, result) in asked.iter().zip(&mut result.rows).filter(|(asked, _)| asked.draws > 0) {
            let guesses = &asked.guesses;
            let mut drawn: Vec<Sampled> = sampled.by_ref().take(asked.draws).collect();
            let right = guesses.iter().zip(&drawn).take_while(|(guess, drawn)| guess.0 == drawn.token).count();
            drawn.truncate(right + 1);
            result.tokens = drawn.iter().map(|drawn| TokenId(drawn.token)).collect();
            if asked.logprobs {
                result.logprobs = drawn.into_iter().map(logprobs).collect();
            }
            if !asked.is_told() {
                continue;
            }
            let sequence = self.sequences.get_mut(&asked.seq).expect("no step began since this one did");
            let wrong = u32::try_from(guesses.len() - right).expect("`check` bounds the rows");
            sequence.reached -= wrong;
            sequence.sampled(&result.tokens, sequence.reached);
            if let (Some(last), true) = (result.tokens.last(), wrong > 0) {
                self.model.set_token(sequence.slot, last.0);
            }
        }
    }
}

/// How long a step may take.
fn allowed(header: &StepHeader) -> Duration {
    Duration::from_millis(u64::from(header.deadline_ms))
}

/// Where a run begins in a sequence whose positions before `reached` are computed.
fn first_position(start: Start, reached: u32) -> u32 {
    match start {
        Start::At(position) => position.0,
        Start::AfterPrevious => reached,
    }
}

fn count(rows: &Rows) -> u32 {
    u32::try_from(rows.tokens.rows()).expect("`check` bounds the rows")
}

/// The plan's runs, each with its rows within the step.
fn runs(plan: &StepPlan) -> impl Iterator<Item = (&Rows, Range<u32>)> {
    plan.rows.iter().scan(0, |first, rows| {
        let all = *first..*first + count(rows);
        *first = all.end;
        Some((rows, all))
    })
}

/// Of the rows of a run, those that a token is sampled from.
fn drawn(rows: &Rows, all: Range<u32>) -> Range<u32> {
    match rows.outputs {
        Outputs::None | Outputs::AllLogits => all.end..all.end,
        Outputs::Sample => all.end - 1..all.end,
        Outputs::Verify => all,
    }
}

/// The guesses that are to be verified.
fn guesses(rows: &Rows) -> &[TokenId] {
    match (&rows.tokens, rows.outputs) {
        (Tokens::Draft(guesses), Outputs::Verify) => guesses,
        _ => &[],
    }
}

fn draw(sequence: &Sequence, past: &Past, allowed: Option<Mask>, position: u32) -> Draw {
    let sampling = &sequence.sampling;
    let Sampling { temperature, top_k, top_p, min_p, seed, choice, logprobs, .. } = *sampling;
    let (slot, edits) = (sequence.slot, past.edits(sampling));
    Draw { slot, temperature, top_k, top_p, min_p, seed, choice, position, edits, allowed, logprobs }
}

fn logprobs(sampled: Sampled) -> TokenLogprobs {
    let top = sampled.top.into_iter().map(|(token, logprob)| (TokenId(token), logprob)).collect();
    TokenLogprobs { logprob: sampled.logprob, top }
}
