//! The one binary users run.

fn main() {}
