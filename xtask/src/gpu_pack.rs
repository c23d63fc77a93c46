//! What a machine with a GPU needs to run the tests, in one folder: it has neither Rust nor a network.
//!
//! Binaries are built here for release and stripped; beside them are the kernels' machine code, the fixtures they read and
//! `run.sh`, which runs them all and ends with one table. Nothing in the folder is of one machine: tests find their files by `PHALANX_ROOT`
//! and `PHALANX_BIN`, which the script sets.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::House;
use crate::python;
use crate::report::Outcome;
use crate::run::{answers, cargo, run};

/// Where the pack is made; ignored by Git.
const FOLDER: &str = ".gpu";
/// What may be carried.
const BYTES_MAX: u64 = 60 << 20;
/// What the kernels are compiled for ahead of time; other devices need NVRTC beside them.
const ARCHS: &str = "90a";
const SCRIPT: &str = include_str!("gpu_pack/run.sh");
/// What measures others' kernels, where they are installed.
const PEERS: &str = include_str!("gpu_pack/peers.py");

/// What is built: whatever runs on a GPU, or beside one.
const BUILD: &[&str] = &[
    "test",
    "--release",
    "--locked",
    "--no-run",
    "--message-format=json-render-diagnostics",
    "--package",
    "phalanx-kernels",
    "--package",
    "phalanx-worker",
    "--package",
    "phalanx",
    "--lib",
    "--test",
    "conformance",
    "--test",
    "golden",
    "--test",
    "shapes",
    "--test",
    "nano",
];
/// What the tests read.
const FIXTURES: &[&str] = &["tests/fixtures/tiny-a", "tests/fixtures/tiny-b", "models/gpt-oss-nano/eval_prompts.jsonl"];

/// Makes the pack anew. Says whether all was well.
pub(crate) fn gpu_pack(house: &House) -> bool {
    match pack(house) {
        Ok(bytes) => {
            println!(
                "\n{FOLDER}/ holds {:.1} MiB: copy it to a machine with a GPU and run {FOLDER}/run.sh",
                mib(bytes)
            );
            true
        }
        Err(why) => {
            eprintln!("error: {why}");
            false
        }
    }
}

fn pack(house: &House) -> Result<u64, String> {
    let built = build(house)?;
    let folder = house.root.join(FOLDER);
    let at = |error: io::Error| format!("{}: {error}", folder.display());
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error)),
        _ => {}
    }
    for name in ["tests", "bin", "lib"] {
        fs::create_dir_all(folder.join(name)).map_err(at)?;
    }
    for Built { package, target, is_test, executable } in &built {
        let to = if *is_test {
            folder.join("tests").join(format!("{package}.{target}"))
        } else {
            folder.join("bin").join(target)
        };
        if to.exists() {
            return Err(format!("two executables are named {}: give their targets different names", to.display()));
        }
        fs::copy(executable, &to).map_err(at)?;
        // Without `strip` the pack is larger, not wrong.
        answers(Command::new("strip").arg(&to));
    }
    for fixture in FIXTURES {
        copy(&house.root.join(fixture), &folder.join("root").join(fixture)).map_err(at)?;
    }
    build_kernels(house, &folder)?;
    compress(&folder).map_err(at)?;
    write_script(&folder).map_err(at)?;
    let mut files = sizes(&folder).map_err(at)?;
    files.sort_unstable_by(|a, b| b.cmp(a));
    for (bytes, path) in &files {
        println!("{:8.1} MiB  {}", mib(*bytes), path.strip_prefix(&folder).unwrap_or(path).display());
    }
    let total = files.iter().map(|(bytes, _)| bytes).sum();
    if total > BYTES_MAX {
        return Err(format!(
            "{FOLDER}/ holds {:.1} MiB, {:.0} may be carried: take something out of BUILD in xtask/src/gpu_pack.rs",
            mib(total),
            mib(BYTES_MAX)
        ));
    }
    Ok(total)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// An executable that cargo has made.
#[derive(Debug, PartialEq, Eq)]
struct Built {
    package: String,
    target: String,
    is_test: bool,
    executable: PathBuf,
}

fn build(house: &House) -> Result<Vec<Built>, String> {
    let mut command = cargo(house, BUILD);
    println!("$ cargo {}", BUILD.join(" "));
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| format!("cannot start cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo ends with {}", output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let built: Vec<Built> = text.lines().filter_map(built).collect();
    if built.iter().any(|built| built.is_test) {
        Ok(built)
    } else {
        Err("cargo names no test: has its output changed?".into())
    }
}

/// The executable that a line of cargo's messages names. Fields are found by their names: these tasks have no
/// dependencies, and cargo writes one message a line, each field once before those of `profile`.
fn built(line: &str) -> Option<Built> {
    let field = |name: &str| {
        let begin = line.find(&format!("\"{name}\":\""))? + name.len() + 4;
        let value = &line[begin..];
        let value = &value[..value.find('"')?];
        // A path with a backslash would have to be unescaped; such a machine packs nothing.
        (!value.contains('\\')).then_some(value)
    };
    if field("reason")? != "compiler-artifact" {
        return None;
    }
    let executable = field("executable")?.into();
    let package = Path::new(field("manifest_path")?).parent()?.file_name()?.to_str()?;
    let package = match package {
        "kernels" | "worker" => package,
        _ => "phalanx",
    };
    // The target, which comes before, says whether it has tests; the profile, whether this is them.
    let (_, profile) = line.split_once("\"profile\":")?;
    let is_test = profile.contains("\"test\":true");
    Some(Built { package: package.to_owned(), target: field("name")?.to_owned(), is_test, executable })
}

/// Compiles the kernels, as `run.sh` finds them. Without NVRTC the pack is smaller, not wrong.
fn build_kernels(house: &House, folder: &Path) -> Result<(), String> {
    let nvrtc = match python::nvrtc(house) {
        Ok(nvrtc) => nvrtc,
        Err(reason) => {
            println!("no kernels are compiled ahead of time: {reason}");
            return Ok(());
        }
    };
    let mut command = Command::new(folder.join("bin/phalanx"));
    command.args(["kernels", "build", "--arch", ARCHS, "--out"]).arg(folder.join("cubin"));
    match run(command.env("LD_LIBRARY_PATH", nvrtc)) {
        Outcome::Passed(_) => Ok(()),
        _ => Err("the kernels cannot be compiled: see above".into()),
    }
}

/// Makes the executables smaller, to a third or less; `run.sh` unpacks them. Without `xz` and `gzip` the pack is larger, not
/// wrong.
fn compress(folder: &Path) -> io::Result<()> {
    for part in ["bin", "tests"] {
        for (_, path) in sizes(&folder.join(part))? {
            let by = |program: &str| answers(Command::new(program).args(["-6", "--force"]).arg(&path));
            let _as_it_is = by("xz") || by("gzip");
        }
    }
    Ok(())
}

fn write_script(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(folder.join("peers.py"), PEERS)?;
    let script = folder.join("run.sh");
    fs::write(&script, SCRIPT)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
}

/// Copies a file, or a folder and all in it; the folder to copy into is made.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if from.is_file() {
        to.parent().map_or(Ok(()), fs::create_dir_all)?;
        return fs::copy(from, to).map(drop);
    }
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        copy(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

/// Every file below a folder with its bytes.
fn sizes(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_dir() {
            found.extend(sizes(&entry.path())?);
        } else {
            found.push((meta.len(), entry.path()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn executables_are_read_from_cargo_s_messages() {
        let line = |kind: &str, test: bool, executable: &str| {
            format!(
                "{{\"reason\":\"compiler-artifact\",\"package_id\":\"path+file:///r/worker#phalanx-worker@0.1.0\",\
                 \"manifest_path\":\"/r/worker/Cargo.toml\",\
                 \"target\":{{\"kind\":[\"{kind}\"],\"name\":\"collectives\",\"test\":true}},\
                 \"profile\":{{\"opt_level\":\"3\",\"test\":{test}}},\"executable\":{executable},\"fresh\":true}}"
            )
        };
        let expected = Built {
            package: "worker".into(),
            target: "collectives".into(),
            is_test: true,
            executable: "/t/collectives-1f".into(),
        };
        assert_eq!(built(&line("test", true, "\"/t/collectives-1f\"")), Some(expected));
        assert!(!built(&line("bin", false, "\"/t/phalanx\"")).unwrap().is_test);
        assert_eq!(built(&line("lib", false, "null")), None);
        assert_eq!(built("{\"reason\":\"build-finished\",\"success\":true}"), None);
    }

    /// A pack whose tests are these shell scripts, removed when dropped.
    struct Pack(PathBuf);

    impl Pack {
        fn new(name: &str, tests: &[(&str, &str)]) -> Self {
            let folder = std::env::temp_dir().join(format!("phalanx-gpu-pack-{}-{name}", std::process::id()));
            for part in ["tests", "bin", "lib", "root"] {
                fs::create_dir_all(folder.join(part)).unwrap();
            }
            for (name, body) in tests {
                let path = folder.join("tests").join(name);
                fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            }
            write_script(&folder).unwrap();
            Self(folder)
        }

        /// Exit status and output of `run.sh`.
        fn run(&self, required: Option<&str>, names: &[&str]) -> (Option<i32>, String) {
            let mut command = Command::new(self.0.join("run.sh"));
            command.args(names).env("LIMIT_SECONDS", "1").env("KEEP_CACHE", "1");
            command.env_remove("OUT").env_remove("GPU_REQUIRED");
            command.env_remove("PHALANX_ROOT").current_dir("/");
            if let Some(required) = required {
                command.env("GPU_REQUIRED", required);
            }
            let output = command.output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
        }
    }

    impl Drop for Pack {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn executables_travel_compressed() {
        let pack = Pack::new("compressed", &[("good", GOOD)]);
        let good = pack.0.join("tests/good");
        compress(&pack.0).unwrap();
        assert!(!good.exists());
        for by in ["what there is", "gzip"] {
            for _ in 0..2 {
                let (status, output) = pack.run(None, &[]);
                assert_eq!(status, Some(0), "{by}: {output}");
                assert!(output.contains("3       0        0  passed"), "{by}: {output}");
            }
            assert!(answers(Command::new("gzip").arg("--keep").arg(&good)));
            fs::remove_file(&good).unwrap();
        }
    }

    #[test]
    fn checks_of_the_conformance_suite_run_apart_and_on_the_gpu() {
        let suite = "if [ \"$1\" = --list ]; then\n\
                     for test in cuda::good cuda::fails cuda::hangs cpu::left_out; do echo \"$test: test\"; done\n\
                     exit\nfi\n\
                     [ \"$PHALANX_GPU $1 $3\" = '0 --exact --include-ignored' ] || exit 9\n\
                     case $2 in\n\
                     *good) echo 'test result: ok. 1 passed; 0 failed';;\n\
                     *fails) echo 'test result: FAILED. 0 passed; 1 failed'; exit 101;;\n\
                     *hangs) sleep 60;;\n\
                     *) echo 'test result: ok. 100 passed; 0 failed';;\n\
                     esac";
        let pack = Pack::new("apart", &[("kernels.conformance", suite)]);
        let (status, output) = pack.run(None, &[]);
        assert_eq!(status, Some(1), "{output}");
        let last: Vec<&str> = output.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(last[..4], ["kernels.conformance", "1", "1", "0"], "{output}");
        for line in ["cuda::fails: exit status 101 ... FAILED", "cuda::hangs: still running after 1 s ... FAILED"] {
            assert!(output.contains(line), "`{line}` is not in: {output}");
        }
        for nothing in ["exit 127", "exit 0"] {
            let pack = Pack::new("apart-nothing", &[("kernels.conformance", nothing)]);
            assert_eq!(pack.run(None, &[]).0, Some(1), "a suite that does not list its checks has not passed");
        }
    }

    const GOOD: &str = "echo 'test result: ok. 3 passed; 0 failed; 1 ignored'";

    #[test]
    fn the_script_runs_every_test_and_ends_with_one_table() {
        let lacking = "[ \"$GPU_REQUIRED\" = 1 ] && exit 101\necho 'NOT RUN a: no GPU'\n\
                       echo 'test result: ok. 2 passed; 0 failed'";
        let seen = "[ -d \"$PHALANX_ROOT\" ] && [ \"$(pwd)\" = \"$PHALANX_ROOT\" ] || exit 7\n\
                    [ \"$1\" = --test-threads=1 ] || exit 8\n";
        let pack = Pack::new("table", &[("good", &format!("{seen}{GOOD}")), ("lacking", lacking)]);
        let (status, output) = pack.run(Some("0"), &[]);
        assert_eq!(status, Some(0), "{output}");
        let table: Vec<Vec<&str>> =
            output.lines().rev().take(3).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(table[2], ["suite", "passed", "failed", "not", "run", "outcome"]);
        assert_eq!(table[1], ["good", "3", "0", "0", "passed"]);
        assert_eq!(table[0], ["lacking", "1", "0", "1", "passed"]);

        let (status, output) = pack.run(None, &[]);
        assert_eq!(status, Some(1), "what is missing is a failure unless told otherwise: {output}");
        assert!(output.ends_with("FAILED: exit status 101\n"), "{output}");
        assert_eq!(pack.run(None, &["good"]).0, Some(0));
        assert_eq!(pack.run(None, &["nothing"]).0, Some(1));
    }

    #[test]
    fn the_script_measures_where_there_is_a_gpu() {
        let pack = Pack::new("benches", &[("good", GOOD)]);
        let phalanx = |gpu: &str| {
            let path = pack.0.join("bin/phalanx");
            let body = format!(
                "#!/usr/bin/env bash\n[ $1 = doctor ] && exit {gpu}\ncase $* in\n*synth:120b*) exit 3;;\n\
                 model*) mkdir -p ${{@: -1}} && echo 1 >${{@: -1}}/a.safetensors;;\n\
                 *--json*) echo '{{\"batch\":1,\"load_s\":2.5}}';;\nesac\necho \"said $*\"\n"
            );
            fs::write(&path, body).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        phalanx("1");
        let (status, output) = pack.run(None, &[]);
        assert_eq!(status, Some(0), "{output}");
        assert!(output.ends_with("NOT RUN: no GPU\n"), "{output}");
        phalanx("0");
        let (status, output) = pack.run(None, &["benches"]);
        assert_eq!(status, Some(1), "what fails is a failure: {output}");
        assert!(output.contains("said bench offline --device cuda:0 --model synth:20b"), "{output}");
        assert!(output.contains("loaded in 2.5 s\n") && !pack.0.join("load").exists(), "{output}");
        assert!(output.ends_with("FAILED: exit status 3\n"), "{output}");
        assert!(!output.contains("== good"), "{output}");
    }

    #[test]
    fn the_script_measures_peers_where_there_is_a_torch_and_never_fails_for_them() {
        let pack = Pack::new("peers", &[]);
        let program = |path: &str, body: &str| {
            let path = pack.0.join(path);
            fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        program("bin/phalanx", "echo '\"load_s\":1'");
        for (python, row) in [
            ("exit 1", "NOT RUN: python3 has no torch"),
            ("case $1 in */peers.py) echo \"a peer: $2\" ;; esac", "measured"),
            ("case $1 in */peers.py) [ -f $1 ] && exit 5 ;; esac", "NOT RUN: exit status 5"),
        ] {
            program("lib/python3", python);
            let path = format!("{}:{}", pack.0.join("lib").display(), std::env::var("PATH").unwrap());
            let mut command = Command::new(pack.0.join("run.sh"));
            command.arg("benches").env("PATH", path).env("KEEP_CACHE", "1").env_remove("OUT");
            let output = command.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{text}");
            assert!(text.lines().any(|line| line.starts_with("peers ") && line.ends_with(row)), "{text}");
            assert_eq!(text.contains("a peer: --json"), row == "measured", "{text}");
        }
    }

    #[test]
    fn a_test_that_fails_dies_or_hangs_fails_the_run_and_the_others_still_run() {
        let fails = "echo 'test a ... FAILED'\necho 'test result: FAILED. 1 passed; 2 failed'\nexit 101";
        let pack = Pack::new(
            "faults",
            &[("a-fails", fails), ("b-dies", "kill -9 $$"), ("c-hangs", "sleep 60"), ("d-good", GOOD)],
        );
        let (status, output) = pack.run(None, &[]);
        assert_eq!(status, Some(1), "{output}");
        for row in [
            "1       2        0  FAILED: exit status 101",
            "FAILED: still running after 1 s",
            "3       0        0  passed",
        ] {
            assert!(output.contains(row), "`{row}` is not in: {output}");
        }
        assert_eq!(output.matches("FAILED: ").count(), 3, "{output}");
    }
}
