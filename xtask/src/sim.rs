//! The planner in virtual time: `phalanx-sim`, built and run.

use std::process::ExitCode;

use crate::House;
use crate::run::cargo;

/// Passes the options on, and the exit status back.
pub(crate) fn sim(house: &House, options: &[&str]) -> ExitCode {
    let mut command = cargo(house, ["run", "--quiet", "--package", "phalanx-sim", "--"]);
    match command.args(options).status() {
        Ok(status) => status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from),
        Err(error) => {
            eprintln!("error: cannot start cargo: {error}");
            ExitCode::FAILURE
        }
    }
}
