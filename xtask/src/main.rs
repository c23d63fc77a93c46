//! The project's own tasks: `cargo xtask verify|fix|test`.

fn main() {}
