//! Which moment is meant. A command or result from another moment is refused, never guessed at.

use std::fmt;

/// A coordinator's reign. A later leader has the higher term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

/// One composition of a cell: its members, layout and placement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// One lockstep step of a cell, counted from 1 within an epoch; 0 is before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub u64);

/// (term, epoch, step), compared in that order. Every command, result and connection carries it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence {
    /// The coordinator's reign.
    pub term: Term,
    /// The cell's composition.
    pub epoch: Epoch,
    /// The step within the epoch.
    pub step: StepId,
}

impl Fence {
    /// The fence of the next step in the same epoch.
    #[must_use]
    pub const fn next(self) -> Self {
        Self { term: self.term, epoch: self.epoch, step: StepId(self.step.0 + 1) }
    }

    /// Whether `self` names the same epoch of the same term as `other`.
    #[must_use]
    pub const fn same_epoch(self, other: Self) -> bool {
        self.term.0 == other.term.0 && self.epoch.0 == other.epoch.0
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "term {} epoch {} step {}", self.term.0, self.epoch.0, self.step.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fences_compare_by_term_then_epoch_then_step() {
        let fence = |t, e, s| Fence { term: Term(t), epoch: Epoch(e), step: StepId(s) };
        let ordered = [fence(1, 1, 9), fence(1, 2, 1), fence(1, 2, 2), fence(2, 1, 1)];
        assert!(ordered.is_sorted_by(|a, b| a < b));
    }
}
