//! What a machine can mend: generated files, clippy's suggestions, format; in this order, each after what it touches.

use crate::House;
use crate::report::Report;
use crate::run::{cargo, run};

/// Writes to the tree. Read the diff afterwards: a regenerated file is a change like any other.
pub(crate) fn fix(house: &House) -> bool {
    let mut report = Report::default();

    let mut generate = cargo(house, ["test", "--package", "phalanx-wire", "--test", "codegen"]);
    report.add("generated code", run(generate.env("UPDATE_CODEGEN", "1")));

    let clippy = ["clippy", "--workspace", "--all-targets", "--fix", "--allow-dirty", "--allow-staged"];
    report.add("clippy", run(&mut cargo(house, clippy)));
    report.add("format", run(&mut cargo(house, ["fmt", "--all"])));

    println!("\n{report}");
    !report.any_failed()
}
