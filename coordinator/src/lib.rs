//! Decides what the workers do, and speaks HTTP to the world.

pub mod engine_client;
pub mod harmony;
