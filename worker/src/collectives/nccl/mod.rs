//! Ranks with GPUs, over NVIDIA's NCCL, opened at run time if it is there.
//!
//! **No GPU has run this yet.** What is proved is proved with a stand-in for NCCL's functions, through the same code.
//!
//! - [`Nccl`]: the exchanges of a step. The TCP connections of the epoch carry fences, sizes and the news of lost
//!   ranks; NCCL carries the rows.
//! - [`Communicator`]: NCCL's communicator, made and watched without blocking, aborted without panic, shrunk where
//!   ranks are lost.
//! - [`State`] and the schedule ([`all_to_all`], [`fixed`]): what may be called next, and which bytes go where; pure.
//! - [`tag()`], [`check_tag`]: the fence within a slot, for exchanges in captured graphs, where no size is known outside
//!   the device.
//! - [`Api`]: the library's functions, looked up one by one.

#![allow(unsafe_code, reason = "one of the two homes of unsafe: a C library and addresses on devices")]

mod communicator;
mod device;
mod exchange;
#[cfg(test)]
mod fake;
mod schedule;
mod state;
mod table;
mod tag;
#[cfg(test)]
mod tests;

pub use communicator::{Communicator, NcclError};
pub use device::{ALIGN, Device, DeviceFault};
pub use exchange::{CONTROL_BYTES, JoinError, JoinOptions, Nccl};
pub use schedule::{Direction, Transfer, all_to_all, fixed, starts};
pub use state::{Event, State};
pub use table::{Api, Code, UniqueId};
pub use tag::{TAG_BYTES, check_tag, tag};
