//! Runs step plans on one rank: the state of its sequences, the inputs of a step, and its result.
//!
//! The state of a sequence is a function of (request, tokens so far), written by absolute position; so a step
//! may be repeated, and a plan that starts a sequence anew at any computed position is legal.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use phalanx_kernels::{Backend, Draw, StepInputs, TokenSource};
use phalanx_model::weights::{pool_index, pool_of};
use phalanx_model::{Collectives, ForwardError, GptOss, Step, Watch};
use phalanx_proto::{
    Admission, Fence, KvOp, LayerKind, Limits, Outputs, PlanError, Pool, Position, Rank, Rows, RowsResult, Sampling,
    SeqId, Start, StepPlan, StepResult, TokenId, Tokens,
};

/// Why a step was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The plan is of another moment; nothing was touched.
    #[error("the plan is of {theirs}, this rank has applied {ours}")]
    Fence {
        /// The plan's moment.
        theirs: Fence,
        /// The last step applied.
        ours: Fence,
    },
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
    /// The step failed half way. The epoch is over on this rank.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

/// No block has been given for this stretch.
const NO_BLOCK: u32 = u32::MAX;

/// A sequence that lives on this rank.
#[derive(Clone, Debug)]
struct Sequence {
    sampling: Sampling,
    /// Where the backend keeps the token sampled last.
    slot: u32,
    /// The token sampled last.
    last: Option<TokenId>,
    /// Positions whose keys and values are written.
    reached: u32,
    /// Block of each stretch, for each pool.
    tables: [Vec<u32>; 2],
}

impl Sequence {
    fn grant(&mut self, rows: &Rows) {
        for grant in &rows.grants {
            let table = &mut self.tables[pool_index(grant.pool)];
            let index = grant.index as usize;
            if table.len() <= index {
                table.resize(index + 1, NO_BLOCK);
            }
            table[index] = grant.block.0;
        }
    }
}

/// Runs the plans of one rank in one epoch.
pub struct Runner<B: Backend, C: Collectives<B::Parts>> {
    model: GptOss<B>,
    collectives: C,
    limits: Limits,
    /// The last step applied.
    fence: Fence,
    sequences: BTreeMap<SeqId, Sequence>,
    free_slots: Vec<u32>,
    /// The last result, for a plan that is sent again.
    last: Option<StepResult>,
}

impl<B: Backend, C: Collectives<B::Parts>> Runner<B, C> {
    /// A rank ready for the step after `fence`.
    #[must_use]
    pub fn new(model: GptOss<B>, collectives: C, limits: Limits, fence: Fence) -> Self {
        let free_slots = (0..limits.seqs_max).rev().collect();
        Self { model, collectives, limits, fence, sequences: BTreeMap::new(), free_slots, last: None }
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

    /// Does one step. A plan of the last step applied gives its result again.
    ///
    /// # Errors
    /// A plan that is refused leaves everything as it was; a failed exchange ends the epoch.
    pub fn run(&mut self, plan: &StepPlan, watch: &impl Watch) -> Result<StepResult, StepError> {
        let fence = plan.header.fence;
        if let Some(last) = &self.last
            && last.fence == fence
        {
            return Ok(last.clone());
        }
        if fence != self.fence.next() {
            return Err(StepError::Fence { theirs: fence, ours: self.fence });
        }
        plan.check(&self.limits, self.model.config().vocab)?;
        self.check(plan)?;

        for seq in &plan.release {
            if let Some(sequence) = self.sequences.remove(seq) {
                self.free_slots.push(sequence.slot);
            }
        }
        for admission in &plan.admit {
            self.admit(admission);
        }
        for &KvOp::Copy { from, to } in &plan.kv_ops {
            self.model.copy_block(from.pool, from.block.0, to.block.0);
        }
        let inputs = self.inputs(plan);
        let result = self.step(plan, &inputs, watch)?;
        self.fence = fence;
        self.last = Some(result.clone());
        Ok(result)
    }

    /// Checks the plan against the state of its sequences.
    fn check(&self, plan: &StepPlan) -> Result<(), StepError> {
        let fail = |seq, why| Err(StepError::Sequence { seq, why });
        let mut live: BTreeMap<SeqId, Option<&Sequence>> = self.sequences.iter().map(|(k, v)| (*k, Some(v))).collect();
        for seq in &plan.release {
            live.remove(seq);
        }
        for admission in &plan.admit {
            if live.insert(admission.seq, None).is_some() {
                return fail(admission.seq, "it is admitted twice");
            }
        }
        if live.len() > self.limits.seqs_max as usize {
            let (asked, max) = (live.len(), self.limits.seqs_max as usize);
            return Err(PlanError::TooMany { what: "sequences", asked, max }.into());
        }
        for rows in &plan.rows {
            let Some(sequence) = live.get(&rows.seq) else {
                return fail(rows.seq, "it does not live on this rank");
            };
            let reached = sequence.map_or(0, |s| s.reached);
            let start = match rows.start {
                Start::At(position) => position.0,
                Start::AfterPrevious => reached,
            };
            if start > reached {
                return fail(rows.seq, "its rows begin beyond the positions computed");
            }
            let Some(end) = u32::try_from(rows.tokens.rows()).ok().and_then(|n| start.checked_add(n)) else {
                return fail(rows.seq, "its rows overflow");
            };
            if end > self.limits.context {
                return fail(rows.seq, "its rows exceed the context");
            }
            let sampled = sequence.is_some_and(|s| s.last.is_some());
            if !matches!(rows.tokens, Tokens::Given(_)) && !sampled {
                return fail(rows.seq, "it has sampled no token yet");
            }
            if rows.outputs == Outputs::Verify && !matches!(rows.tokens, Tokens::Draft(_)) {
                return fail(rows.seq, "it has no guesses to verify");
            }
            self.check_blocks(rows, *sequence, start, end)?;
        }
        Ok(())
    }

    /// Every stretch that the rows write or see must have a block.
    fn check_blocks(&self, rows: &Rows, sequence: Option<&Sequence>, start: u32, end: u32) -> Result<(), StepError> {
        let config = self.model.config();
        for kind in [LayerKind::Full, LayerKind::Sliding] {
            if config.layers_of(kind) == 0 {
                continue;
            }
            let pool = pool_of(kind);
            let first = match pool {
                Pool::Full => 0,
                Pool::Window => (start + 1).saturating_sub(config.window),
            };
            let granted = |index: u32| {
                let table = sequence.map(|s| &s.tables[pool_index(pool)]);
                table.and_then(|t| t.get(index as usize)).is_some_and(|&b| b != NO_BLOCK)
                    || rows.grants.iter().any(|g| g.pool == pool && g.index == index)
            };
            let size = self.limits.block_size;
            if !(first / size..end.div_ceil(size)).all(granted) {
                return Err(StepError::Sequence { seq: rows.seq, why: "it has no block for a position it needs" });
            }
        }
        Ok(())
    }

    fn admit(&mut self, admission: &Admission) {
        let slot = self.free_slots.pop().expect("`check` bounds the sequences by the slots");
        let tables = [Vec::new(), Vec::new()];
        let sequence = Sequence { sampling: admission.sampling, slot, last: None, reached: 0, tables };
        self.sequences.insert(admission.seq, sequence);
    }

    /// Flattens the plan's runs into rows.
    fn inputs(&mut self, plan: &StepPlan) -> StepInputs {
        let mut inputs = StepInputs { tables: vec![Vec::new(), Vec::new()], ..StepInputs::default() };
        for (index, rows) in (0..).zip(&plan.rows) {
            let sequence = self.sequences.get_mut(&rows.seq).expect("`check` found it");
            sequence.grant(rows);
            let start = match rows.start {
                Start::At(position) => position.0,
                Start::AfterPrevious => sequence.reached,
            };
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
            let count = u32::try_from(rows.tokens.rows()).expect("`check` bounds the rows");
            inputs.positions.extend(start..start + count);
            inputs.sequences.extend(std::iter::repeat_n(index, count as usize));
            for (table, of_step) in sequence.tables.iter().zip(&mut inputs.tables) {
                of_step.push(table.clone());
            }
            sequence.reached = start + count;
        }
        inputs
    }

    fn step(&mut self, plan: &StepPlan, inputs: &StepInputs, watch: &impl Watch) -> Result<StepResult, StepError> {
        let fence = plan.header.fence;
        let deadline = Instant::now() + Duration::from_millis(u64::from(plan.header.deadline_ms));
        let mut result = StepResult { fence, rank: self.rank(), ..StepResult::default() };
        let step = Step { fence, deadline, watch, phases: &mut result.phases };
        self.model.forward(inputs, &mut self.collectives, step)?;

        let mut wanted = Vec::new();
        let mut first_row = 0u32;
        for rows in &plan.rows {
            let count = u32::try_from(rows.tokens.rows()).expect("`check` bounds the rows");
            let all = first_row..first_row + count;
            let drawn = match rows.outputs {
                Outputs::None | Outputs::AllLogits => all.end..all.end,
                Outputs::Sample => all.end - 1..all.end,
                Outputs::Verify => all.clone(),
            };
            let sequence = &self.sequences[&rows.seq];
            wanted.extend(drawn.map(|row| (row, draw(sequence, inputs.positions[row as usize] + 1))));
            first_row = all.end;
        }
        self.model.sample(&wanted, &mut result.phases);

        let mut first_row = 0u32;
        for rows in &plan.rows {
            let count = u32::try_from(rows.tokens.rows()).expect("`check` bounds the rows");
            if rows.outputs == Outputs::AllLogits {
                let wanted: Vec<u32> = (first_row..first_row + count).collect();
                let position = Position(inputs.positions[first_row as usize] + 1);
                let logits = self.model.logits(&wanted);
                result.rows.push(RowsResult {
                    seq: rows.seq,
                    position,
                    tokens: Vec::new(),
                    logprobs: Vec::new(),
                    logits,
                });
            } else if rows.outputs != Outputs::None {
                let first = if rows.outputs == Outputs::Sample { first_row + count - 1 } else { first_row };
                let position = Position(inputs.positions[first as usize] + 1);
                result.rows.push(RowsResult {
                    seq: rows.seq,
                    position,
                    tokens: Vec::new(),
                    logprobs: Vec::new(),
                    logits: Vec::new(),
                });
            }
            first_row += count;
        }
        let tokens = self.model.finish()?;
        self.keep_tokens(plan, &tokens, &mut result);
        result.exchange = self.collectives.counters();
        Ok(result)
    }

    /// Hands the sampled tokens to their sequences and to the result.
    fn keep_tokens(&mut self, plan: &StepPlan, tokens: &[u32], result: &mut StepResult) {
        let mut tokens = tokens.iter().map(|&t| TokenId(t));
        let asked = plan.rows.iter().filter(|rows| rows.outputs != Outputs::None);
        for (rows, result) in asked.zip(&mut result.rows) {
            let sequence = self.sequences.get_mut(&rows.seq).expect("`check` found it");
            let guesses: &[TokenId] = match (&rows.tokens, rows.outputs) {
                (Tokens::Draft(guesses), Outputs::Verify) => guesses,
                (_, Outputs::Sample) => &[],
                _ => continue,
            };
            let drawn: Vec<TokenId> = tokens.by_ref().take(guesses.len() + 1).collect();
            let right = guesses.iter().zip(&drawn).take_while(|(guess, token)| guess == token).count();
            sequence.reached -= u32::try_from(guesses.len() - right).expect("`check` bounds the rows");
            result.tokens = drawn[..=right].to_vec();
            sequence.last = result.tokens.last().copied();
            if let (Some(last), true) = (sequence.last, right < guesses.len()) {
                self.model.set_token(sequence.slot, last.0);
            }
        }
    }
}

fn draw(sequence: &Sequence, position: u32) -> Draw {
    let Sampling { temperature, top_p, seed, choice, .. } = sequence.sampling;
    Draw { slot: sequence.slot, temperature, top_p, seed, choice, position }
}
