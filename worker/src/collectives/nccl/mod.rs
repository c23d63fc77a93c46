//! Ranks with GPUs, over NVIDIA's NCCL, opened at run time if it is there.
//!
//! One GPU has run it with several ranks as threads; steps that overlap have run with a stand-in for NCCL's functions alone.
//!
//! - [`Nccl`]: the exchanges of a step between devices. The TCP connections of the epoch carry the news of lost ranks,
//!   and fences and sizes where the host must know them; NCCL carries the rows.
//! - [`Way`]: whether the host must know them: a function of the step, the same on every rank.
//! - [`Communicator`]: NCCL's communicator, made and watched without blocking, aborted without panic, shrunk where
//!   ranks are lost.
//! - [`State`] and the schedule ([`all_to_all`], [`fixed`]): what may be called next, and which bytes go where; pure.
//! - [`Api`]: the library's functions, looked up one by one.

#![allow(unsafe_code, reason = "one of the two homes of unsafe: a C library and addresses on devices")]

mod captures;
mod communicator;
mod exchange;
#[cfg(test)]
mod fake;
mod join;
mod marks;
mod offer;
mod schedule;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod way;

pub use communicator::{Communicator, NcclError};
pub use exchange::{CONTROL_BYTES, Nccl};
pub use join::{JoinError, JoinOptions, join_if_all_can};
pub use offer::{Carrier, ExchangeRequest, NoCarrier, Offer, carrier};
pub use schedule::{Direction, Transfer, all_to_all, fixed, starts};
pub use state::{Event, State};
pub use table::{Api, Code, UniqueId};
pub use way::{SLOTS_BYTES_MAX, Shape, Way};

/// Bytes of a GPU that NCCL takes for a communicator, at most, as is planned: half of it is one buffer for peers on other
/// machines that versions of 2.28 were seen to allocate, the rest is for rings and pairs, 32 channels of some 10 MiB. What it
/// takes is logged once the ranks have joined; connections made later may take more.
pub const LIBRARY_BYTES: u64 = 1 << 30;
