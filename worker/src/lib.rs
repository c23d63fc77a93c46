//! Does what the plan says: runs steps, exchanges rows, samples.

pub mod collectives;
pub mod constraints;
pub mod device;
pub mod host;
mod panics;
pub mod process;
pub mod progress;
pub mod rank;
pub mod runner;
pub mod service;
pub mod tenure;
pub mod weight_cache;
