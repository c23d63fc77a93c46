//! Everything that must be there before anything is measured: tools, environments, weights, the binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::engine::{Setup, has_kernels, help_mentions, takes_dense};
use super::floor::{Dense, Shape};
use super::json::Json;
use super::machine::{build_membw, cores};
use super::options::{Case, Options};
use crate::House;
use crate::python;
use crate::report::Outcome;
use crate::run::{answers, cargo, run};

/// Where scripts, requirements and sources are, below the repository's root.
const SCRIPTS: &str = "xtask/peers";
/// As much as the machine can: what a wheel for any machine leaves out. And no warnings: they are tens of thousands.
const BUILD: [(&str, &str); 3] = [("CMAKE_ARGS", "-DGGML_NATIVE=ON"), ("CFLAGS", "-w"), ("CXXFLAGS", "-w")];
const IK_PACKAGE: &str = "ik-llama-cpp-python";
const IK_VERSION: &str = "0.1.5";
/// Free space that building an environment takes.
const BUILD_GB: f64 = 3.0;

/// What is ready.
pub(crate) struct Ready {
    pub(crate) setup: Setup,
    pub(crate) shape: Shape,
    /// What `weights.py` said: places, hashes, shape.
    pub(crate) weights: Json,
    pub(crate) membw: PathBuf,
    pub(crate) dir: PathBuf,
}

/// Makes what is missing; `Err` says what to do.
pub(crate) fn ready(house: &House, options: &Options) -> Result<Ready, String> {
    for (program, package) in [("python3", "python3"), ("cc", "build-essential"), ("c++", "build-essential")] {
        if !answers(Command::new(program).arg("--version")) {
            return Err(format!("{program} is missing: install it (Debian: apt-get install {package})"));
        }
    }
    let target = house.phalanx.parent().and_then(Path::parent).unwrap_or(&house.root);
    let dir = options.dir.clone().unwrap_or_else(|| target.join("peers"));
    let logs = dir.join("logs");
    let named = |error: std::io::Error| format!("{}: {error}; name another place with --dir", logs.display());
    std::fs::create_dir_all(&logs).map_err(named)?;
    let dir = std::fs::canonicalize(&dir).map_err(named)?;
    let scripts = house.root.join(SCRIPTS);

    let phalanx = phalanx(house, options, target)?;
    let llama = match &options.env_llama {
        Some(made) => named_environment(made)?,
        None => environment("llama", &dir, &scripts, &[])?,
    };
    let ik = match &options.env_ik {
        _ if !options.ik => None,
        Some(made) => Some(named_environment(made)?),
        None => Some(ik(&dir, &scripts, &llama)?),
    };
    let weights = weights(options, &dir, &scripts, &llama)?;
    let membw = dir.join("membw");
    build_membw(&scripts.join("membw.c"), &membw)?;

    let shape = weights.get("shape").ok_or("weights.py names no shape")?;
    let setup = Setup {
        phalanx,
        llama,
        ik,
        scripts,
        hf: weights.text("hf")?.into(),
        gguf: weights.text("gguf")?.into(),
        logs: dir.join("logs"),
        threads: options.threads.unwrap_or_else(cores),
        dense: options.dense,
    };
    Ok(Ready { setup, shape: Shape::from_json(shape)?, membw, weights, dir })
}

/// The binary to measure, built for release unless one is named.
fn phalanx(house: &House, options: &Options, target: &Path) -> Result<PathBuf, String> {
    let binary = if let Some(named) = &options.phalanx {
        std::fs::canonicalize(named).map_err(|error| format!("{}: {error}", named.display()))?
    } else {
        match run(&mut cargo(house, ["build", "--release", "--package", "phalanx"])) {
            Outcome::Passed(_) => target.join("release").join(format!("phalanx{}", std::env::consts::EXE_SUFFIX)),
            Outcome::Failed(why) | Outcome::NotRun(why) => return Err(format!("phalanx does not build: {why}")),
        }
    };
    if options.dense == Dense::Q8 && !takes_dense(&binary, &["bench", "offline"]) {
        return Err(format!(
            "{} knows no `bench offline --dense`, so its dense weights are bf16: compare with --dense bf16",
            binary.display()
        ));
    }
    if options.wants(Case::Logits) && !help_mentions(&binary, &["model", "logits"], "--save") {
        return Err(format!("{} knows no `model logits --save`: leave c8 out with --only", binary.display()));
    }
    if options.wants(Case::Kernels) && !has_kernels(&binary) {
        println!("C1 and C2 of Phalanx are left out: {} has no `bench kernels`", binary.display());
    }
    Ok(binary)
}

fn named_environment(made: &Path) -> Result<PathBuf, String> {
    let python = made.join("bin/python");
    if python.is_file() { Ok(python) } else { Err(format!("{}: no such file", python.display())) }
}

fn environment(name: &str, dir: &Path, scripts: &Path, more: &[(&str, &str)]) -> Result<PathBuf, String> {
    let home = dir.join(format!("env-{name}"));
    let requirements = scripts.join(format!("{name}.txt"));
    if !python::is_made(&home, &requirements) {
        enough_space(dir, BUILD_GB)?;
        println!("\nBuilding {name} from source, once: about 10 minutes on two cores. pip shows what it does.");
    }
    // Verbose: a compiler that is silent for ten minutes looks like one that hangs. No cache: what pip has built before may
    // have been built with other flags.
    let options = ["--verbose", "--progress-bar", "off", "--no-cache-dir"];
    let made = python::environment(&home, &requirements, &options, &[&BUILD, more].concat());
    made.map_err(|why| format!("{why} If not: what the compiler said stands above; it must know C++17."))
}

/// The source of ik_llama.cpp's bindings does not build as it is: a file of a program that is not needed is missing.
/// So it is unpacked, and told to build less.
fn ik(dir: &Path, scripts: &Path, python: &Path) -> Result<PathBuf, String> {
    let source = dir.join("source");
    let unpacked = source.join(format!("ik_llama_cpp_python-{IK_VERSION}"));
    if !python::is_made(&dir.join("env-ik"), &scripts.join("ik.txt")) {
        let mut download = Command::new(python);
        download.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]);
        download.args(["--no-binary", IK_PACKAGE]).arg(format!("{IK_PACKAGE}=={IK_VERSION}"));
        well(download.arg("--dest").arg(&source))?;
        let archive = source.join(format!("ik_llama_cpp_python-{IK_VERSION}.tar.gz"));
        well(Command::new(python).args(["-m", "tarfile", "-e"]).arg(&archive).arg(&source))?;
        let lists = unpacked.join("CMakeLists.txt");
        std::fs::copy(scripts.join("ik.cmake"), &lists).map_err(|error| format!("{}: {error}", lists.display()))?;
    }
    environment("ik", dir, scripts, &[("IK_SOURCE", &unpacked.to_string_lossy())])
}

fn well(command: &mut Command) -> Result<(), String> {
    match run(command) {
        Outcome::Passed(_) => Ok(()),
        Outcome::Failed(why) | Outcome::NotRun(why) => {
            Err(format!("the source of {IK_PACKAGE} could not be had ({why}): is there a network? Or say --no-ik"))
        }
    }
}

fn weights(options: &Options, dir: &Path, scripts: &Path, python: &Path) -> Result<Json, String> {
    let folder = dir.join(format!("{}-{}-layers", options.size, options.layers));
    let mut command = Command::new(python);
    command.arg(scripts.join("weights.py")).arg(&folder).args(["--size", &options.size]);
    command.args(["--layers", &options.layers.to_string(), "--dense", options.dense.name()]);
    command.env("PYTHONDONTWRITEBYTECODE", "1").stderr(Stdio::inherit());
    println!("\nWeights: {} with {} layers", options.size, options.layers);
    let output = command.output().map_err(|error| format!("cannot start {}: {error}", python.display()))?;
    if !output.status.success() {
        return Err(format!("the weights could not be written below {}: see above", folder.display()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Json::parse(text.lines().last().unwrap_or_default())
}

fn enough_space(dir: &Path, gb: f64) -> Result<(), String> {
    let output = Command::new("df").args(["-Pk"]).arg(dir).output();
    let free = output.ok().and_then(|output| free_gb(&String::from_utf8_lossy(&output.stdout)));
    match free {
        Some(free) if free < gb => {
            let dir = dir.display();
            Err(format!("{dir}: {free:.1} GB are free, {gb:.1} are needed: make room or name another place with --dir"))
        }
        // Unknown is no reason to stop: whoever writes finds out.
        _ => Ok(()),
    }
}

/// From `df -Pk`: the fourth column of the second line.
fn free_gb(df: &str) -> Option<f64> {
    let blocks: f64 = df.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    Some(blocks * 1024.0 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_read_from_df() {
        let df = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/vda 100 90 1000000 15% /\n";
        assert!((free_gb(df).unwrap() - 1.024).abs() < 1e-9);
        assert_eq!(free_gb("Filesystem\n"), None);
    }
}
