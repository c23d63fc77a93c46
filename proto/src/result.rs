//! What came of one step: the whole contract from worker to coordinator.

use crate::fence::Fence;
use crate::ids::{Position, Rank, SeqId, TokenId};

/// How likely a token was, by the model's own logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The most likely tokens with theirs, in descending order; as many as were asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// What a run of rows gave.
#[derive(Clone, Debug, PartialEq)]
pub struct RowsResult {
    /// The sequence.
    pub seq: SeqId,
    /// Position of the first token in `tokens`; one past the row it was sampled from.
    pub position: Position,
    /// Tokens sampled, in order.
    pub tokens: Vec<TokenId>,
    /// How likely each of them was; empty unless asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Logits if asked for, `[rows, V]`.
    pub logits: Vec<f32>,
}

/// A part of a step whose time is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Building inputs and embedding.
    Input,
    /// Norm, projections, rotation and attention.
    Attention,
    /// Norm and choice of experts.
    Router,
    /// Rows to the ranks of their experts, waits included.
    Dispatch,
    /// The experts.
    Experts,
    /// Results back to the home ranks, waits included.
    Combine,
    /// Final norm and unembedding.
    Unembed,
    /// Choice of tokens.
    Sample,
}

impl Phase {
    /// Every phase, in the order of a step.
    pub const ALL: [Self; 8] = [
        Self::Input,
        Self::Attention,
        Self::Router,
        Self::Dispatch,
        Self::Experts,
        Self::Combine,
        Self::Unembed,
        Self::Sample,
    ];

    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Attention => "attention",
            Self::Router => "router",
            Self::Dispatch => "dispatch",
            Self::Experts => "experts",
            Self::Combine => "combine",
            Self::Unembed => "unembed",
            Self::Sample => "sample",
        }
    }
}

/// Microseconds spent in each phase of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes(pub [u64; Phase::ALL.len()]);

impl PhaseTimes {
    /// Adds time to a phase.
    pub const fn add(&mut self, phase: Phase, microseconds: u64) {
        self.0[phase as usize] += microseconds;
    }

    /// Time of a phase.
    #[must_use]
    pub const fn get(&self, phase: Phase) -> u64 {
        self.0[phase as usize]
    }
}

/// What a rank sent in the exchanges of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExchangeCounters {
    /// Rows sent to other ranks to be worked on by experts there, once per rank and layer.
    pub dispatch_rows: u64,
    /// Rows sent back to other ranks, once per chosen expert.
    pub combine_rows: u64,
    /// Bytes sent to other ranks, frames included.
    pub bytes_sent: u64,
    /// Bytes received from other ranks, frames included.
    pub bytes_received: u64,
}

impl std::ops::AddAssign for ExchangeCounters {
    fn add_assign(&mut self, other: Self) {
        self.dispatch_rows += other.dispatch_rows;
        self.combine_rows += other.combine_rows;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
    }
}

/// What came of one step on one rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// The step.
    pub fence: Fence,
    /// The rank.
    pub rank: Rank,
    /// One entry for each run that asked for something, in the plan's order.
    pub rows: Vec<RowsResult>,
    /// Where the time went.
    pub phases: PhaseTimes,
    /// What was sent.
    pub exchange: ExchangeCounters,
}
