//! What the tokens of a sequence must obey: a finite automaton over classes of tokens.

use std::fmt;

use crate::ids::TokenId;

/// Names a table within an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

/// A finite automaton: in each state, each class of tokens leads to a state or is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConstraintTable {
    /// Its name.
    pub id: TableId,
    /// Runs of tokens of one class: (first token, class), ascending, the first at token 0, each up to the next.
    pub runs: Vec<(TokenId, u32)>,
    /// Classes there are.
    pub classes: u32,
    /// The state that a class leads to, `[states, classes]`; [`ConstraintTable::REFUSED`] where it may not be sampled.
    pub next: Vec<u32>,
}

/// Where a sequence enters a constraint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConstraintStart {
    /// The table.
    pub table: TableId,
    /// The state before the sequence's first generated token; generated tokens of its history move on from there.
    pub state: u32,
}

/// Why a table is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConstraintError {
    /// Runs do not begin at token 0, do not ascend, leave the vocabulary, or name a class that does not exist.
    Runs(TableId),
    /// There are no states, too many, or targets that do not exist.
    States(TableId),
    /// A state refuses every token.
    DeadEnd {
        /// The table.
        table: TableId,
        /// The state.
        state: u32,
    },
}

impl fmt::Display for ConstraintError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runs(id) => write!(f, "the runs of constraint table {} do not divide the vocabulary", id.0),
            Self::States(id) => write!(f, "the states of constraint table {} do not fit together", id.0),
            Self::DeadEnd { table, state } => {
                write!(f, "state {state} of constraint table {} refuses every token", table.0)
            }
        }
    }
}

impl std::error::Error for ConstraintError {}

impl ConstraintTable {
    /// In `next`: the class may not be sampled here.
    pub const REFUSED: u32 = u32::MAX;
    /// Most tables of an epoch.
    pub const TABLES_MAX: u32 = 16;
    /// Most states of a table.
    pub const STATES_MAX: usize = 256;
    /// Most classes of a table.
    pub const CLASSES_MAX: u32 = 256;
    /// Most runs of a table.
    pub const RUNS_MAX: usize = 65_536;

    /// States there are.
    #[must_use]
    pub fn states(&self) -> usize {
        self.next.len().checked_div(self.classes as usize).unwrap_or(0)
    }

    /// The state that `class` leads to from `state`, if it may be sampled there.
    #[must_use]
    pub fn step(&self, state: u32, class: u32) -> Option<u32> {
        if class >= self.classes {
            return None;
        }
        let at = (state as usize).checked_mul(self.classes as usize)?.checked_add(class as usize)?;
        self.next.get(at).copied().filter(|&next| next != Self::REFUSED)
    }

    /// The class of a token.
    #[must_use]
    pub fn class(&self, token: TokenId) -> Option<u32> {
        let after = self.runs.partition_point(|(first, _)| *first <= token);
        after.checked_sub(1).map(|run| self.runs[run].1)
    }

    /// Checks that every token has a class and every state a way on.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self, vocab: u32) -> Result<(), ConstraintError> {
        let runs = &self.runs;
        let divides = runs.first().is_some_and(|(first, _)| first.0 == 0)
            && runs.len() <= Self::RUNS_MAX
            && runs.is_sorted_by(|a, b| a.0 < b.0)
            && runs.iter().all(|(first, class)| first.0 < vocab && *class < self.classes);
        if !divides || self.classes > Self::CLASSES_MAX {
            return Err(ConstraintError::Runs(self.id));
        }
        let states = self.states();
        let exists = |next: &u32| *next == Self::REFUSED || (*next as usize) < states;
        let whole = states * self.classes as usize == self.next.len();
        if states == 0 || states > Self::STATES_MAX || !whole || !self.next.iter().all(exists) {
            return Err(ConstraintError::States(self.id));
        }
        let lives = |state: &u32| runs.iter().any(|(_, class)| self.step(*state, *class).is_some());
        match (0..).take(states).find(|state| !lives(state)) {
            Some(state) => Err(ConstraintError::DeadEnd { table: self.id, state }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens 0..5 alternate with tokens 5..10.
    fn alternating() -> ConstraintTable {
        let refused = ConstraintTable::REFUSED;
        let runs = vec![(TokenId(0), 0), (TokenId(5), 1)];
        ConstraintTable { id: TableId(1), runs, classes: 2, next: vec![1, refused, refused, 0] }
    }

    #[test]
    fn a_table_says_what_may_follow() {
        let table = alternating();
        assert_eq!(table.check(10), Ok(()));
        assert_eq!(table.class(TokenId(4)), Some(0));
        assert_eq!(table.class(TokenId(5)), Some(1));
        assert_eq!(table.step(0, 0), Some(1));
        assert_eq!(table.step(0, 1), None);
        assert_eq!(table.step(9, 0), None);
        assert_eq!(table.step(0, 2), None);
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let broken = |change: fn(&mut ConstraintTable)| {
            let mut table = alternating();
            change(&mut table);
            table.check(10).unwrap_err()
        };
        assert_eq!(broken(|t| t.runs[0].0 = TokenId(1)), ConstraintError::Runs(TableId(1)));
        assert_eq!(broken(|t| t.runs[1].0 = TokenId(10)), ConstraintError::Runs(TableId(1)));
        assert_eq!(broken(|t| t.runs.clear()), ConstraintError::Runs(TableId(1)));
        assert_eq!(broken(|t| t.runs[1].1 = 2), ConstraintError::Runs(TableId(1)));
        assert_eq!(broken(|t| t.next[0] = 2), ConstraintError::States(TableId(1)));
        assert_eq!(broken(|t| t.next.push(0)), ConstraintError::States(TableId(1)));
        assert_eq!(broken(|t| t.next.clear()), ConstraintError::States(TableId(1)));
        let dead = ConstraintError::DeadEnd { table: TableId(1), state: 1 };
        assert_eq!(broken(|t| t.next[3] = ConstraintTable::REFUSED), dead);
    }
}
