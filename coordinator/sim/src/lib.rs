//! Runs the planner's real decisions in virtual time.
//!
//! - [`clock`] and [`random`]: time and chance, both from a seed.
//! - [`rank`]: a rank that computes nothing and remembers everything; [`truth`]: what a request must give.
//! - [`cell`]: an engine, its ranks in lockstep, and the streams between them.
//! - [`scenario`], [`faults`] and [`campaign`]: small worlds in which everything goes wrong that may, by the thousand.
//! - [`mod@capacity`]: how much a layout carries on given hardware, and how long its clients wait.
//!
//! Nothing here depends on the machine it runs on: a seed gives the same run everywhere.

pub mod campaign;
pub mod capacity;
pub mod cell;
pub mod clock;
pub mod faults;
pub mod random;
pub mod rank;
pub mod scenario;
pub mod truth;
