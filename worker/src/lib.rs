//! Does what the plan says: runs steps, exchanges rows, samples.

pub mod collectives;
