//! gpt-oss, written once over a backend and a set of collectives.
//!
//! Absent on purpose: devices, transports, runtimes. Which op runs where is the backend's concern
//! (`phalanx-kernels`); how bytes reach another rank is the concern of the collectives' implementor.

pub mod checkpoint;
pub mod collectives;
pub mod error;
pub mod gpt_oss;
pub mod nano;
pub mod packed;
pub mod rope;
pub mod synth;
pub mod weights;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use collectives::{CollectiveError, Collectives, Exchange, ExchangeKind};
pub use error::{ForwardError, LoadError};
pub use gpt_oss::{GptOss, Step, Watch};
