//! Checkpoints: genuine, damaged, made at random, and the one that is part of the program.

#![allow(clippy::unwrap_used, reason = "tests")]

mod bad;
mod common;
mod fuzz;
mod nano;
mod open;
#[path = "../../../../tests/support/paths.rs"]
mod paths;
mod synth;
