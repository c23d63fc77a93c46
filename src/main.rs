//! The one binary users run.

use std::process::ExitCode;

fn main() -> ExitCode {
    phalanx::cli::run()
}
