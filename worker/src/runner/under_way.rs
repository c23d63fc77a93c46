//! Steps that have begun and whose results are still to come.

use std::time::Instant;

use phalanx_proto::{Fence, Outputs, SeqId, StepHeader, StepResult, TokenId};

use super::StepError;

/// Steps under way at once: while a device is at one, the next is enqueued.
pub(super) const DEPTH: usize = 2;

/// A step under way.
pub(super) struct UnderWay<E> {
    pub(super) header: StepHeader,
    /// Of each run that asked for something, in the order of the result.
    pub(super) asked: Vec<Asked>,
    /// What it was begun with, or why it could not be enqueued.
    pub(super) step: Result<Begun<E>, StepError>,
}

/// A step that was enqueued.
pub(super) struct Begun<E> {
    /// All but what was sampled.
    pub(super) result: StepResult,
    pub(super) ended: E,
    /// When all of it was enqueued.
    pub(super) enqueued: Instant,
}

/// What a run asked for.
pub(super) struct Asked {
    pub(super) seq: SeqId,
    pub(super) outputs: Outputs,
    /// Rows that a token is sampled from.
    pub(super) draws: usize,
    /// Guesses that are verified.
    pub(super) guesses: Vec<TokenId>,
    pub(super) logprobs: bool,
    /// Whether the sequence's next tokens depend on what is sampled, beyond its being their input.
    pub(super) looks_back: bool,
}

impl Asked {
    /// Whether its sequence is to be told what was sampled.
    pub(super) fn is_told(&self) -> bool {
        self.draws > 0 && (self.looks_back || self.outputs == Outputs::Verify)
    }
}

impl<E> UnderWay<E> {
    pub(super) const fn fence(&self) -> Fence {
        self.header.fence
    }

    /// Whether the next step cannot begin before this one's results are known.
    pub(super) fn is_needed(&self) -> bool {
        self.step.is_err() || self.asked.iter().any(Asked::is_told)
    }
}
