//! Decides what the workers do, and speaks HTTP to the world.

pub mod api;
pub mod driver;
pub mod engine_client;
pub mod harmony;
pub mod metrics;
mod pace;
pub mod workers;
