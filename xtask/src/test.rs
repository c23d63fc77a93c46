//! Every suite, in two tiers.
//!
//! A test of the full tier is an ordinary test marked `#[ignore = "full tier: why it is slow"]`, so one command runs
//! either tier. Python clients are scripts in `tests/clients/`: each drives the built `phalanx` binary from outside,
//! finds it in `PHALANX_BIN`, bounds its own waits, and says by its exit status whether all was well.

use std::path::Path;
use std::process::Command;

use crate::House;
use crate::python;
use crate::report::{Outcome, Report};
use crate::run::{cargo, run_tests};
use crate::tally::Tally;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tier {
    Quick,
    Full,
}

/// Runs the tier, prints the table and, last of all, the line `N passed, N failed`.
pub(crate) fn test(house: &House, tier: Tier) -> bool {
    let mut report = Report::default();
    let mut command = cargo(house, ["test", "--workspace", "--no-fail-fast"]);
    if tier == Tier::Full {
        command.args(["--", "--include-ignored"]);
        with_nvrtc(house, &mut command, &mut report);
    }
    let (outcome, mut tally) = run_tests(&mut command);
    report.add("cargo test", remark(outcome, tally));
    if tier == Tier::Quick && tally.ignored > 0 {
        let left = format!("{} tests: cargo xtask test --full", tally.ignored);
        report.add("full tier", Outcome::NotRun(left));
    }

    if tier == Tier::Full {
        let (outcome, sanitized) = sanitized_kernels(house);
        report.add("CUDA kernels, sanitized", remark(outcome, sanitized));
        tally.add(sanitized);
    }

    for (script, outcome) in python::clients(house) {
        match outcome {
            Outcome::Passed(_) => tally.passed += 1,
            Outcome::Failed(_) => tally.failed += 1,
            Outcome::NotRun(_) => {}
        }
        report.add(script, outcome);
    }

    let incomplete = tier == Tier::Full && report.any_not_run();
    if tally.not_run > 0 {
        // No tier demands a GPU; a machine that has one says GPU_REQUIRED=1, and then these fail.
        let lack = format!("{} tests: this machine lacks what they need, see NOT RUN above", tally.not_run);
        report.add("GPU and its libraries", Outcome::NotRun(lack));
    }

    println!("\n{report}");
    if incomplete {
        println!("The full tier is not complete: see NOT RUN above.\n");
    }
    println!("{} passed, {} failed", tally.truly_passed(), tally.failed);
    !report.any_failed() && !incomplete
}

/// Names the compiler of the CUDA kernels to the tests, or leaves out those that need it.
fn with_nvrtc(house: &House, command: &mut Command, report: &mut Report) {
    match python::nvrtc(house) {
        Ok(folder) => {
            let found = std::env::var_os("LD_LIBRARY_PATH").filter(|found| !found.is_empty());
            let mut folders = folder.clone().into_os_string();
            if let Some(found) = found {
                folders.push(":");
                folders.push(found);
            }
            command.env("PHALANX_NVRTC", folder).env("LD_LIBRARY_PATH", folders);
        }
        Err(reason) => {
            command.args(["--skip", "nvrtc_"]);
            report.add("CUDA kernels by NVRTC", Outcome::NotRun(reason));
        }
    }
}

/// The conformance tests of the CUDA kernels on the CPU, with every access to memory checked.
fn sanitized_kernels(house: &House) -> (Outcome, Tally) {
    let found = Command::new("cc").arg("-print-file-name=libasan.so").output();
    let library = found.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    if !Path::new(&library).is_absolute() {
        let reason = "cc has no address sanitizer: install gcc with its libasan".to_owned();
        return (Outcome::NotRun(reason), Tally::default());
    }
    // The library must be the first of the test's process, and of no other. Threads of a block change stacks, which
    // leaves nothing to find for the detector of leaks.
    let runner = format!("target.'cfg(unix)'.runner = ['env', 'LD_PRELOAD={library}', 'ASAN_OPTIONS=detect_leaks=0']");
    let arguments = ["test", "-p", "phalanx-kernels", "--test", "conformance", "--target-dir", "target/sanitized"];
    let mut command = cargo(house, arguments);
    command.args(["--config", &runner, "--", "cuda"]).env("PHALANX_EMU_SANITIZE", "address");
    run_tests(&mut command)
}

fn remark(outcome: Outcome, tally: Tally) -> Outcome {
    match outcome {
        Outcome::Passed(_) => Outcome::Passed(format!("{} passed", tally.truly_passed())),
        Outcome::Failed(status) => {
            Outcome::Failed(format!("{} passed, {} failed ({status})", tally.truly_passed(), tally.failed))
        }
        not_run => not_run,
    }
}
