//! How ranks exchange rows: [`local`] between threads of one process, [`tcp`] between processes on any hosts, [`staged`]
//! between GPUs over either, [`nccl`] between GPUs.
//!
//! All move bytes and never add. All are bounded by the step's deadline, name the rank that is to blame
//! when an exchange fails, tell the other ranks so, and are broken for the rest of the epoch afterwards.

pub mod local;
pub mod nccl;
pub mod staged;
mod step;
pub mod tcp;

use std::fmt;

use phalanx_proto::{CellId, Epoch, Term};

/// The ranks that exchange rows with each other: one epoch of one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupId {
    /// The cell.
    pub cell: CellId,
    /// The coordinator's reign.
    pub term: Term,
    /// The cell's composition.
    pub epoch: Epoch,
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cell {} term {} epoch {}", self.cell, self.term.0, self.epoch.0)
    }
}
