//! gpt-oss, written once over a backend and a set of collectives.
//!
//! Absent on purpose: devices, transports, runtimes. Which op runs where is the backend's concern
//! (`phalanx-kernels`); how bytes reach another rank is the concern of the collectives' implementor.

pub mod collectives;

pub use collectives::{CollectiveError, Collectives, Exchange, ExchangeKind};
