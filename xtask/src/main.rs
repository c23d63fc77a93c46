//! The project's own tasks: `cargo xtask verify|fix|test|gpu-pack|sim|bench-peers`.
//!
//! - [`verify`]: the gate. It reads and never writes, so it may run on any tree.
//! - [`fix`]: what a machine can mend, mended.
//! - [`mod@test`]: every suite, in two tiers, with a closing table that says what ran and what did not.
//! - [`mod@gpu_pack`]: the tests as binaries, for a machine with a GPU and without Rust.
//! - [`sim`]: the planner in virtual time, thousands of small worlds in which everything goes wrong that may.
//! - [`peers`]: how fast Phalanx is beside others, on this machine.
//!
//! Absent on purpose: dependencies. A task must build in a second on a machine that has only Rust.

mod fix;
mod gpu_pack;
mod peers;
mod python;
mod report;
mod run;
mod sim;
mod tally;
mod test;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask TASK

Tasks:
  verify         read-only gate: format, clippy, docs, tidy, generated code, licences
  fix            writes: regenerates generated files, applies clippy's suggestions, formats
  test           quick tier: every test of the workspace, then the Python clients
  test --full    also the tests marked `full tier`; ends non-zero if anything but what needs a GPU could not run
  gpu-pack       writes .gpu/: tests as binaries and one script, for a machine with a GPU and without Rust
  sim [OPTIONS]  the planner in virtual time, with faults; `sim --help` says more
  bench-peers [OPTIONS]
                 speed on CPUs beside llama.cpp and ik_llama.cpp; `bench-peers --help` says more

Exit status: 0 all well, 1 something failed, 2 the command line was not understood.
";

/// Where the tasks work: found once, at the start, because `cargo test` replaces this very executable.
struct House {
    /// The repository's root.
    root: PathBuf,
    /// The `phalanx` binary that `cargo test --workspace` leaves beside this executable.
    phalanx: PathBuf,
}

impl House {
    fn find() -> std::io::Result<House> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().unwrap_or(manifest).to_path_buf();
        let phalanx = std::env::current_exe()?.with_file_name(format!("phalanx{}", std::env::consts::EXE_SUFFIX));
        Ok(House { root, phalanx })
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let house = match House::find() {
        Ok(house) => house,
        Err(error) => {
            eprintln!("error: cannot find this executable: {error}");
            return ExitCode::FAILURE;
        }
    };
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let well = match words[..] {
        ["verify"] => verify::verify(&house),
        ["fix"] => fix::fix(&house),
        ["test"] => test::test(&house, test::Tier::Quick),
        ["test", "--full"] => test::test(&house, test::Tier::Full),
        ["gpu-pack"] => gpu_pack::gpu_pack(&house),
        ["sim", ref options @ ..] => return sim::sim(&house, options),
        ["bench-peers", ref options @ ..] => return peers::bench(&house, options),
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            true
        }
        _ => {
            eprint!("error: not a task: {:?}\n\n{USAGE}", words.join(" "));
            return ExitCode::from(2);
        }
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
