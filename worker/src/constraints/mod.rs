//! What the tokens of a sequence must obey, evaluated beside the forward pass, so that no row waits for it.
//!
//! A [`Constraint`] says which tokens may come next. It is the seam for grammars; [`Table`] is the one there is. A step
//! hands the constraints of its sequences to a thread of its own while the model computes, and has the masks back
//! before the tokens are chosen.

mod beside;
mod table;

use std::sync::Arc;

use phalanx_proto::TokenId;

pub(crate) use beside::{Beside, Job};
pub use table::Table;

/// The tokens that may be sampled, `[ceil(V / 64)]`: token `t` is bit `t % 64` of word `t / 64`.
pub type Mask = Arc<[u64]>;

/// What the tokens of one sequence must obey, and where in it the sequence stands.
pub trait Constraint: Send {
    /// The tokens that may come next, and those that may come after each of `guesses`, as far as the guesses
    /// themselves may come. One mask at least. Leaves the constraint where it stands.
    fn masks(&mut self, guesses: &[TokenId]) -> Vec<Mask>;

    /// Moves on over a token that has come.
    ///
    /// # Errors
    /// It may not come here.
    fn advance(&mut self, token: TokenId) -> Result<(), Refused>;
}

/// A token may not come where it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("token {0} is refused by the sequence's constraint")]
pub struct Refused(pub TokenId);

/// Why a step has no masks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintFailure {
    /// A sequence's tokens do not obey its constraint.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The thread cannot be started.
    #[error("cannot start the thread of constraints: {0}")]
    Start(String),
    /// A defect.
    #[error("a constraint panicked: {0}; please report this")]
    Panicked(String),
    /// The masks take longer than a step may.
    #[error("the masks of the step's constraints are not there after {0} s")]
    Late(u64),
}
