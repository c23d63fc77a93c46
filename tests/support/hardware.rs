//! Tests of what a machine may lack: they run where it is there, and say so where it is not.

use std::io::Write;

/// Says that the test on this thread has not run, and why. `cargo xtask test` counts these lines apart from what
/// passed.
///
/// # Panics
/// With `GPU_REQUIRED=1`: there, what is missing is a failure.
pub(crate) fn not_run(why: impl std::fmt::Display) {
    let required = std::env::var("GPU_REQUIRED").is_ok_and(|value| value == "1");
    assert!(!required, "GPU_REQUIRED=1, and this cannot run: {why}");
    let thread = std::thread::current();
    // Past the harness, which keeps to itself what passing tests print.
    drop(writeln!(std::io::stdout(), "\nNOT RUN {}: {why}", thread.name().unwrap_or("a test")));
}
