//! Python: private environments, and the clients: official client libraries against a server that the script starts.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::House;
use crate::report::Outcome;
use crate::run::{answers, run};

/// Where the scripts and their requirements are.
const FOLDER: &str = "tests/clients";
/// What brings the compiler of the CUDA kernels.
const NVRTC: &str = "kernels/csrc/requirements.txt";
/// What an environment was made of, in it.
const STAMP: &str = "installed.txt";

/// Runs every script of [`FOLDER`] in a private environment, in the order of their names.
pub(crate) fn clients(house: &House) -> Vec<(String, Outcome)> {
    let folder = house.root.join(FOLDER);
    let scripts = scripts(&folder);
    if scripts.is_empty() {
        return vec![("python clients".into(), Outcome::NotRun(format!("no script in {FOLDER}")))];
    }
    let environment = if house.phalanx.is_file() {
        environment(&house.root.join(".venv"), &folder.join("requirements.txt"), &["--quiet"], &[])
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
    environment(&home, &house.root.join(NVRTC), &["--quiet"], &[])?;
    let versions = std::fs::read_dir(home.join("lib")).into_iter().flatten().flatten();
    let mut folders = versions.map(|version| version.path().join("site-packages/nvidia/cu13/lib"));
    folders.find(|folder| folder.join("libnvrtc.so.13").is_file()).ok_or_else(|| format!("{NVRTC} brought no NVRTC"))
}

/// Whether an environment holds what its requirements name.
pub(crate) fn is_made(home: &Path, requirements: &Path) -> bool {
    let wanted = std::fs::read(requirements);
    wanted.is_ok_and(|wanted| std::fs::read(home.join(STAMP)).is_ok_and(|installed| installed == wanted))
}

/// Makes a private environment of pinned requirements, once, and returns its Python; `options` are pip's, `variables`
/// what its builds see. `Err` says why there is none.
pub(crate) fn environment(
    home: &Path,
    requirements: &Path,
    options: &[&str],
    variables: &[(&str, &str)],
) -> Result<PathBuf, String> {
    let python = home.join("bin/python");
    if is_made(home, requirements) {
        return Ok(python);
    }
    let wanted = std::fs::read(requirements).map_err(|error| format!("{}: {error}", requirements.display()))?;
    make(home)?;
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--disable-pip-version-check"]).args(options);
    install.arg("--requirement").arg(requirements).envs(variables.iter().copied());
    if !matches!(run(&mut install), Outcome::Passed(_)) {
        return Err(format!("pip could not install {}: is there a network?", requirements.display()));
    }
    let stamp = home.join(STAMP);
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
