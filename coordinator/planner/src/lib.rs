//! Decides: who runs, where, and with which KV blocks. Values in, values out.
//!
//! - [`Engine`]: the life of every request of one cell, from submission to its last token.
//! - [`queue`]: who waits, and who is next.
//! - [`router`]: in which cell and on which rank a request lives.
//! - `place`: which rank a waiting sequence is given.
//! - [`schedule`]: what each rank does in the next step.
//! - [`blocks`]: which KV block belongs to whom, and [`prefix`]: which are kept for prompts that begin alike.
//! - [`work`]: what planning costs.
//! - [`invariants`]: what must hold after every decision.
//! - [`cost`]: how long a step takes, and how long a rank may be waited for.
//!
//! Absent on purpose: clocks, randomness, sockets, threads, tensors. The same calls give the same plans.

pub mod blocks;
pub mod cost;
pub mod engine;
pub mod invariants;
mod place;
pub mod prefix;
pub mod queue;
pub mod router;
pub mod schedule;
pub mod sequence;
pub mod work;

pub use engine::{ApplyError, Class, Engine, EngineConfig, Event, FinishReason, Refused, Request, Stats, Want};
pub use work::Work;
