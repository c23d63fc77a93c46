//! Every suite, in two tiers.
//!
//! A test of the full tier is an ordinary test marked `#[ignore = "full tier: why it is slow"]`, so one command runs
//! either tier. Python clients are scripts in `tests/clients/`: each drives the built `phalanx` binary from outside,
//! finds it in `PHALANX_BIN`, bounds its own waits, and says by its exit status whether all was well.

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
    }
    let (outcome, mut tally) = run_tests(&mut command);
    report.add("cargo test", remark(outcome, tally));
    if tier == Tier::Quick && tally.ignored > 0 {
        let left = format!("{} tests: cargo xtask test --full", tally.ignored);
        report.add("full tier", Outcome::NotRun(left));
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

fn remark(outcome: Outcome, tally: Tally) -> Outcome {
    match outcome {
        Outcome::Passed(_) => Outcome::Passed(format!("{} passed", tally.truly_passed())),
        Outcome::Failed(status) => {
            Outcome::Failed(format!("{} passed, {} failed ({status})", tally.truly_passed(), tally.failed))
        }
        not_run => not_run,
    }
}
