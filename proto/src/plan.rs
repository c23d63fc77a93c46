//! What to do in one step: the whole contract from coordinator to worker.

use std::fmt;

use crate::constraint::{ConstraintError, ConstraintStart, ConstraintTable};
use crate::fence::{Fence, StepId};
use crate::ids::{BlockId, Position, SeqId, TokenId};
use crate::limits::Limits;

/// Which layers' KV memory is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pool {
    /// Full layers: a block for every stretch of the sequence.
    Full,
    /// Sliding layers: only blocks that some row to come still sees.
    Window,
}

/// Where a KV block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// The backend's own memory, where attention reads it.
    Device,
    /// Host memory, from which it must be loaded first.
    Host,
}

/// The full address of a KV block on a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockAddress {
    /// The pool.
    pub pool: Pool,
    /// The tier.
    pub tier: Tier,
    /// The block within pool and tier.
    pub block: BlockId,
}

/// Work on KV blocks, done in order before the step's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvOp {
    /// Copies a block's keys and values of all layers of its pool.
    Copy {
        /// The block read.
        from: BlockAddress,
        /// The block written, of the same pool.
        to: BlockAddress,
    },
}

/// Gives a block to a sequence: its positions `index * block_size ..` live there from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGrant {
    /// The pool.
    pub pool: Pool,
    /// Which stretch of the sequence, counted in blocks from position 0.
    pub index: u32,
    /// The block.
    pub block: BlockId,
}

/// How a sequence's tokens are chosen. The choice at a position is a function of these, of the logits, of the tokens
/// before it and of the position; never of the batch or of the order of calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of most likely tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Subtracted from the logit of every token generated already.
    pub presence_penalty: f32,
    /// Subtracted from the logit of every token generated already, once for each time.
    pub frequency_penalty: f32,
    /// Divides the logits above 0, and multiplies those below, of every token of prompt and answer; 1 changes none.
    pub repetition_penalty: f32,
    /// Seed of the request.
    pub seed: u64,
    /// Which of the request's choices this is.
    pub choice: u32,
    /// How many of the most likely tokens are reported with each token; none: nothing is.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// Always the most likely token; the lowest id among equals.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
        choice: 0,
        logprobs: None,
    };

    /// Most alternatives reported with a token.
    pub const LOGPROBS_MAX: u32 = 20;

    /// Most by which a penalty may change a logit, either way.
    pub const PENALTY_MAX: f32 = 100.0;

    /// Whether the tokens before a position have a say in what is chosen there.
    #[must_use]
    pub fn looks_back(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }

    /// Checks that every number is one that can be sampled with.
    ///
    /// # Errors
    /// The first field out of range, and its range.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let penalty = -Self::PENALTY_MAX..=Self::PENALTY_MAX;
        let checks = [
            (self.temperature.is_finite() && self.temperature >= 0.0, "temperature", "must be 0 or above"),
            (self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "must be above 0 and at most 1"),
            ((0.0..=1.0).contains(&self.min_p), "min_p", "must be between 0 and 1"),
            (penalty.contains(&self.presence_penalty), "presence_penalty", "must be between -100 and 100"),
            (penalty.contains(&self.frequency_penalty), "frequency_penalty", "must be between -100 and 100"),
            (
                self.repetition_penalty > 0.0 && self.repetition_penalty <= Self::PENALTY_MAX,
                "repetition_penalty",
                "must be above 0 and at most 100",
            ),
            (self.logprobs.is_none_or(|n| n <= Self::LOGPROBS_MAX), "logprobs", "must be at most 20"),
        ];
        checks.into_iter().find(|(right, ..)| !right).map_or(Ok(()), |(_, field, range)| Err((field, range)))
    }
}

/// A sequence that begins to live on a rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    /// The sequence.
    pub seq: SeqId,
    /// How its tokens are chosen.
    pub sampling: Sampling,
    /// Added to the logits of these tokens, ascending and each at most once.
    pub bias: Vec<(TokenId, f32)>,
    /// What its tokens must obey, and where in it the first token to sample stands.
    pub constraint: Option<ConstraintStart>,
    /// Positions whose keys and values are in the blocks granted with the first rows already.
    pub cached: u32,
    /// The tokens before the first that is sampled, if the choice depends on them; else empty.
    pub history: History,
}

impl Admission {
    /// Most biases of a sequence.
    pub const BIAS_MAX: usize = 1024;

    /// A sequence that brings nothing but its way to choose.
    #[must_use]
    pub const fn new(seq: SeqId, sampling: Sampling) -> Self {
        let history = History { prompt: Vec::new(), generated: Vec::new() };
        Self { seq, sampling, bias: Vec::new(), constraint: None, cached: 0, history }
    }
}

/// The tokens of a sequence so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Those it was given.
    pub prompt: Vec<TokenId>,
    /// Those it has sampled before it came to this rank.
    pub generated: Vec<TokenId>,
}

/// Where a run of rows begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At this position; earlier positions have been computed, later ones are written over.
    At(Position),
    /// One past the last position that the sequence's rows have reached.
    AfterPrevious,
}

/// What the rows read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// These, one a row.
    Given(Vec<TokenId>),
    /// The token this sequence sampled last, which the coordinator need not know yet: one row.
    Previous,
    /// The token sampled last, then guesses at those that follow: one row more than guesses.
    Draft(Vec<TokenId>),
}

impl Tokens {
    /// Rows that these tokens make.
    #[must_use]
    pub const fn rows(&self) -> usize {
        match self {
            Self::Given(tokens) => tokens.len(),
            Self::Previous => 1,
            Self::Draft(guesses) => 1 + guesses.len(),
        }
    }
}

/// What is wanted of a run of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// Only their keys and values.
    None,
    /// A token sampled from the last row.
    Sample,
    /// The logits of every row.
    AllLogits,
    /// Tokens sampled from each row for as long as the guess that the next row read was the token sampled.
    Verify,
}

/// A run of consecutive rows of one sequence in one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The sequence.
    pub seq: SeqId,
    /// Where the run begins.
    pub start: Start,
    /// What the rows read.
    pub tokens: Tokens,
    /// What is wanted of them.
    pub outputs: Outputs,
    /// Blocks given to the sequence with this step.
    pub grants: Vec<BlockGrant>,
}

/// The part of a plan that is the same for every rank of the cell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepHeader {
    /// Which step this is.
    pub fence: Fence,
    /// Milliseconds after which a wait within the step counts as a failure.
    pub deadline_ms: u32,
    /// The coordinator has every result up to this step: they need not be kept any longer.
    pub applied: StepId,
    /// Rows of each rank in this step, `[ep]`.
    pub rows_of_rank: Vec<u32>,
}

/// What one rank does in one step. Same plan and same state give the same tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// The part common to all ranks.
    pub header: StepHeader,
    /// Tables that admissions may name from now on.
    pub tables: Vec<ConstraintTable>,
    /// Sequences to forget, before anything else.
    pub release: Vec<SeqId>,
    /// Sequences that begin to live on this rank.
    pub admit: Vec<Admission>,
    /// Work on KV blocks.
    pub kv_ops: Vec<KvOp>,
    /// The rows, each sequence at most once.
    pub rows: Vec<Rows>,
}

/// Why a plan is refused before it touches anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanError {
    /// More of something than the limits allow.
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        asked: usize,
        /// How many at most.
        max: usize,
    },
    /// A token outside the vocabulary.
    Token {
        /// The sequence.
        seq: SeqId,
        /// The token.
        token: TokenId,
    },
    /// A block outside its pool.
    Block {
        /// The sequence.
        seq: SeqId,
        /// The grant.
        grant: BlockGrant,
    },
    /// A run without rows.
    Empty {
        /// The sequence.
        seq: SeqId,
    },
    /// A sequence that appears twice in one step.
    Twice {
        /// The sequence.
        seq: SeqId,
    },
    /// A sampling parameter out of range.
    Sampling {
        /// The sequence.
        seq: SeqId,
        /// The parameter.
        field: &'static str,
        /// Its range.
        range: &'static str,
    },
    /// A constraint table that is not one.
    Constraint(ConstraintError),
    /// A KV operation on a block that does not exist, between pools, or outside device memory.
    KvOp {
        /// The operation.
        op: KvOp,
    },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany { what, asked, max } => write!(f, "{asked} {what} in a step, at most {max}"),
            Self::Token { seq, token } => write!(f, "sequence {seq} reads token {token}, outside the vocabulary"),
            Self::Block { seq, grant } => {
                write!(f, "sequence {seq} is given block {} of {:?}, outside the pool", grant.block, grant.pool)
            }
            Self::Empty { seq } => write!(f, "sequence {seq} has a run without rows"),
            Self::Twice { seq } => write!(f, "sequence {seq} appears twice in a step"),
            Self::Sampling { seq, field, range } => write!(f, "{field} of sequence {seq} {range}"),
            Self::Constraint(error) => error.fmt(f),
            Self::KvOp { op } => write!(f, "{op:?} is impossible on this rank"),
        }
    }
}

impl std::error::Error for PlanError {}

impl StepPlan {
    /// Rows of this rank.
    #[must_use]
    pub fn row_count(&self) -> usize {
        self.rows.iter().map(|rows| rows.tokens.rows()).sum()
    }

    /// Checks everything that can be known without the state of the sequences.
    ///
    /// # Errors
    /// The first thing that cannot be done.
    pub fn check(&self, limits: &Limits, vocab: u32) -> Result<(), PlanError> {
        let bound = |what, asked: usize, max: u32| {
            if asked > max as usize { Err(PlanError::TooMany { what, asked, max: max as usize }) } else { Ok(()) }
        };
        bound("rows", self.row_count(), limits.step_rows_max)?;
        bound("runs", self.rows.len(), limits.seqs_max)?;
        bound("admissions", self.admit.len(), limits.seqs_max)?;
        bound("releases", self.release.len(), limits.seqs_max)?;
        bound("KV operations", self.kv_ops.len(), limits.full_blocks.saturating_add(limits.window_blocks))?;
        bound("tables", self.tables.len(), ConstraintTable::TABLES_MAX)?;
        for table in &self.tables {
            table.check(vocab).map_err(PlanError::Constraint)?;
        }
        for admission in &self.admit {
            check_admission(admission, limits, vocab)?;
        }
        for &op in &self.kv_ops {
            let KvOp::Copy { from, to } = op;
            let exists = |a: BlockAddress| a.tier == Tier::Device && a.block.0 < limits.blocks(a.pool);
            if from.pool != to.pool || !exists(from) || !exists(to) {
                return Err(PlanError::KvOp { op });
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        let stretches = limits.context.div_ceil(limits.block_size);
        for rows in &self.rows {
            let seq = rows.seq;
            if !seen.insert(seq) {
                return Err(PlanError::Twice { seq });
            }
            if rows.tokens.rows() == 0 {
                return Err(PlanError::Empty { seq });
            }
            if let Tokens::Given(tokens) | Tokens::Draft(tokens) = &rows.tokens
                && let Some(&token) = tokens.iter().find(|t| t.0 >= vocab)
            {
                return Err(PlanError::Token { seq, token });
            }
            let outside = |g: &&BlockGrant| g.block.0 >= limits.blocks(g.pool) || g.index >= stretches;
            if let Some(&grant) = rows.grants.iter().find(outside) {
                return Err(PlanError::Block { seq, grant });
            }
        }
        Ok(())
    }
}

fn check_admission(admission: &Admission, limits: &Limits, vocab: u32) -> Result<(), PlanError> {
    let seq = admission.seq;
    admission.sampling.check().map_err(|(field, range)| PlanError::Sampling { seq, field, range })?;
    let History { prompt, generated } = &admission.history;
    let (len, max) = (prompt.len().saturating_add(generated.len()), limits.context as usize);
    if len > max {
        return Err(PlanError::TooMany { what: "tokens of a sequence", asked: len, max });
    }
    let (len, max) = (admission.bias.len(), Admission::BIAS_MAX);
    if len > max {
        return Err(PlanError::TooMany { what: "biases of a sequence", asked: len, max });
    }
    let mut tokens = prompt.iter().chain(generated).chain(admission.bias.iter().map(|(token, _)| token));
    if let Some(&token) = tokens.find(|token| token.0 >= vocab) {
        return Err(PlanError::Token { seq, token });
    }
    let ascending = admission.bias.is_sorted_by(|a, b| a.0 < b.0);
    if !ascending || admission.bias.iter().any(|(_, bias)| bias.is_nan() || bias.abs() > Sampling::PENALTY_MAX) {
        let range = "must name ascending tokens and be between -100 and 100";
        return Err(PlanError::Sampling { seq, field: "bias", range });
    }
    Ok(())
}
