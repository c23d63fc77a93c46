//! The words of Phalanx on the wire: the gRPC service between coordinator and worker, and checked conversions.
//!
//! [`v1`] is what travels. What a program works with are the words of `phalanx-proto` and of [`control`]; each is
//! made from its message by `TryFrom`, which checks everything once, so that behind it an impossible value does
//! not exist. Plans and replies travel in an [`v1::Envelope`] with a checksum.

pub mod control;
mod envelope;
mod error;
mod model;
mod step;
pub mod token;

/// The messages and services of package `phalanx.v1`, generated from `proto/phalanx/v1/*.proto`.
#[allow(missing_docs, clippy::all, reason = "generated code")]
pub mod v1 {
    include!("generated/phalanx.v1.rs");
}

pub use control::{
    Description, Health, Join, Prepare, PrepareEvent, Progress, Release, StepFailure, StepProgress, StepReply,
    WorkerState,
};
pub use error::WireError;
pub use model::PLACES_MAX;
pub use token::{ClusterToken, TokenError};

/// The build that speaks: coordinator and workers of a cell run the same.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Largest message to a worker in bytes.
pub const REQUEST_BYTES_MAX: usize = 8 << 20;

/// Largest message from a worker in bytes. What fills it are logits.
pub const REPLY_BYTES_MAX: usize = 64 << 20;

/// Rows whose logits fit a reply, at least 1; a plan that asks for more must be cut into several.
#[must_use]
pub const fn logit_rows_max(vocab: u32) -> usize {
    // A sixteenth is left for everything else.
    let rows = (REPLY_BYTES_MAX - REPLY_BYTES_MAX / 16) / (4 * (vocab as usize + 1));
    if rows == 0 { 1 } else { rows }
}
