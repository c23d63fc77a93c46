//! Private Python environments: for the clients, official libraries against a server that the script starts itself, and
//! for what comes as a Python package though it is none.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::House;
use crate::report::Outcome;
use crate::run::{answers, run};

/// Where the scripts and their requirements are.
const FOLDER: &str = "tests/clients";
/// What compiles the CUDA kernels.
const NVRTC: &str = "kernels/csrc/requirements.txt";

/// Runs every script of [`FOLDER`] in a private environment, in the order of their names.
pub(crate) fn clients(house: &House) -> Vec<(String, Outcome)> {
    let folder = house.root.join(FOLDER);
    let scripts = scripts(&folder);
    if scripts.is_empty() {
        return vec![("python clients".into(), Outcome::NotRun(format!("no script in {FOLDER}")))];
    }
    let environment = if house.phalanx.is_file() {
        environment(&house.root.join(".venv"), &folder.join("requirements.txt"))
    } else {
        Err(format!("{} was not built", house.phalanx.display()))
    };
    let one = |script: &PathBuf| match &environment {
        Ok(python) => run(Command::new(python)
            .arg(script)
            .current_dir(&house.root)
            .env("PHALANX_BIN", &house.phalanx)
            .env("PYTHONDONTWRITEBYTECODE", "1")),
        Err(reason) => Outcome::NotRun(reason.clone()),
    };
    scripts.iter().map(|script| (name(script), one(script))).collect()
}

fn scripts(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut scripts: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ext| ext == "py")).collect();
    scripts.sort();
    scripts
}

fn name(script: &Path) -> String {
    let file = script.file_name().unwrap_or_default();
    format!("{FOLDER}/{}", file.to_string_lossy())
}

/// The folder of the library that compiles the CUDA kernels, brought once; `Err` says why there is none.
pub(crate) fn nvrtc(house: &House) -> Result<PathBuf, String> {
    let home = house.root.join("target/nvrtc");
    environment(&home, &house.root.join(NVRTC))?;
    let versions = std::fs::read_dir(home.join("lib")).into_iter().flatten().flatten();
    let mut folders = versions.map(|version| version.path().join("site-packages/nvidia/cu13/lib"));
    folders.find(|folder| folder.join("libnvrtc.so.13").is_file()).ok_or_else(|| format!("{NVRTC} brought no NVRTC"))
}

/// Makes an environment with the pinned requirements, once; `Err` says why there is none.
fn environment(home: &Path, requirements: &Path) -> Result<PathBuf, String> {
    let python = home.join("bin/python");
    let wanted = std::fs::read(requirements).map_err(|error| format!("{}: {error}", requirements.display()))?;
    let stamp = home.join("installed.txt");
    if std::fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    make(home)?;
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]).arg(requirements);
    if !matches!(run(&mut install), Outcome::Passed(_)) {
        return Err(format!("pip could not install {}: is there a network?", requirements.display()));
    }
    std::fs::write(&stamp, wanted).map_err(|error| format!("{}: {error}", stamp.display()))?;
    Ok(python)
}

/// Debian keeps `venv` in a package of its own: root installs it, anyone else is told.
fn make(home: &Path) -> Result<(), String> {
    let venv = || {
        let mut command = Command::new("python3");
        command.args(["-m", "venv", "--clear"]).arg(home);
        matches!(run(&mut command), Outcome::Passed(_))
    };
    if venv() {
        return Ok(());
    }
    let is_root = answers(Command::new("sh").args(["-c", "test \"$(id -u)\" = 0 && command -v apt-get"]));
    if is_root {
        let install = "apt-get update -qq && apt-get install --yes -qq python3-venv";
        if matches!(run(Command::new("sh").args(["-c", install])), Outcome::Passed(_)) && venv() {
            return Ok(());
        }
    }
    Err("python3 -m venv failed: install python3 and python3-venv".into())
}
