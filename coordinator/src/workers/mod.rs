//! The workers of a cell, as the coordinator sees them.
//!
//! [`WorkerHandle`] makes the calls to one worker, [`form_cell`] makes a cell of several, and what steps the cell
//! afterwards knows only a [`CellLink`]: plans go out, [`CellEvent`]s come back. A connection that breaks between them is
//! mended where it can be, and the driver hears nothing of it; see `carry`.

mod carry;
mod cell;
mod handle;
mod link;

pub use cell::{CellError, CellOptions, Forming, MemoryPools, Workers, form_cell, release_all};
pub use handle::{Who, WorkerError, WorkerHandle};
pub use link::{CellEvent, CellLink, ChannelLink, LinkError, PLANS_AHEAD_MAX, RankPort};
pub use phalanx_wire::{ClusterToken, Health, Progress, Release, StepFailure, StepReply, TokenError};
