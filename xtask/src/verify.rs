//! The read-only gate: what must hold for a change to land, apart from the tests.

use crate::House;
use crate::report::{Outcome, Report};
use crate::run::{answers, cargo, run};

/// Runs every check, even after one failed, and says whether all that could run were well.
pub(crate) fn verify(house: &House) -> bool {
    let mut report = Report::default();

    let format = ["fmt", "--all", "--", "--check"];
    report.add("format", with_component(house, "fmt", "rustfmt", &format));
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    report.add("clippy", with_component(house, "clippy", "clippy", &clippy));

    let mut docs = cargo(house, ["doc", "--workspace", "--no-deps", "--locked"]);
    report.add("docs", run(docs.env("RUSTDOCFLAGS", "-D warnings")));

    // The whole workspace is named so that these share what `cargo xtask test` builds.
    let generated = ["test", "--workspace", "--locked", "--test", "tidy", "--test", "codegen"];
    report.add("tidy and generated code", run(&mut cargo(house, generated)));

    report.add("licences and sources", deny(house));

    println!("\n{report}");
    !report.any_failed()
}

/// `cargo fmt` and `cargo clippy` are components that a minimal toolchain lacks.
fn with_component(house: &House, subcommand: &str, component: &str, arguments: &[&str]) -> Outcome {
    if answers(&mut cargo(house, [subcommand, "--version"])) {
        run(&mut cargo(house, arguments))
    } else {
        Outcome::NotRun(format!("cargo {subcommand} is missing: rustup component add {component}"))
    }
}

/// Advisories are left out: they come from the network, and a gate must say the same thing twice.
fn deny(house: &House) -> Outcome {
    if answers(&mut cargo(house, ["deny", "--version"])) {
        run(&mut cargo(house, ["deny", "--workspace", "--locked", "check", "bans", "licenses", "sources"]))
    } else {
        Outcome::NotRun("cargo-deny is missing: cargo install --locked cargo-deny".into())
    }
}
