//! `bench-peers`: Phalanx on CPUs beside llama.cpp and ik_llama.cpp, on the same random weights.
//!
//! Everything is made so that the ratio is fair: the same tensors in both file formats, dense weights of the same
//! precision, the same threads, peers built for this very processor; and each round runs every engine once, so that a
//! ratio is of two runs that saw the machine in the same mood. Nothing here is a test: no number decides whether a
//! change may land. What is arithmetic is tested as usual.
//!
//! Kernels (C1, C2) are compared with those of llama.cpp, called in the libraries that its bindings bring. Those of
//! ik_llama.cpp are not: its bindings do not export what would call them.

mod engine;
mod floor;
mod json;
mod logits;
mod machine;
mod options;
mod program;
mod ready;
mod report;
mod rounds;
mod stats;

use std::process::{Command, ExitCode};

use crate::House;
use engine::Engine;
use json::{Json, member};
use options::{Case, Options};
use ready::Ready;
use report::Results;

/// Runs the task.
pub(crate) fn bench(house: &House, words: &[&str]) -> ExitCode {
    if words.iter().any(|word| ["--help", "-h", "help"].contains(word)) {
        print!("{}", options::USAGE);
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(words) {
        Ok(options) => options,
        Err(error) => {
            eprint!("error: {error}\n\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    match compare(house, &options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(house: &House, options: &Options) -> Result<(), String> {
    let ready = ready::ready(house, options)?;
    let mut engines = vec![Engine::Phalanx, Engine::Llama];
    engines.extend(options.ik.then_some(Engine::Ik));

    let mut results = Results {
        engines: engines.clone(),
        rounds: Vec::new(),
        distances: Vec::new(),
        shape: ready.shape.clone(),
        dense: options.dense,
        threads: ready.setup.threads,
    };
    let in_rounds = [Case::Kernels, Case::Decode, Case::Prefill, Case::Busy, Case::Batched, Case::FirstToken];
    let mut ended = Ok(());
    if in_rounds.iter().any(|case| options.wants(*case)) {
        println!("\n{} rounds of {} engines", options.rounds, engines.len());
        let mut rounds = Vec::new();
        ended = rounds::rounds(&ready, options, &engines, &mut rounds, |rounds| {
            results.rounds = rounds.to_vec();
            keep(house, options, &ready, &results)
        });
    }
    if ended.is_ok() && options.wants(Case::Logits) {
        results.distances = logits::distances(&ready.setup, &engines, ready.shape.vocab as u32, &ready.dir)?;
    }
    keep(house, options, &ready, &results)?;
    println!("\n{}", heading(&about(house, options, &ready, &results)));
    print!("{}", results.table());
    if let Some(path) = &options.json {
        println!("every round: {}", path.display());
    }
    ended.map_err(|error| format!("the rounds ended early: {error}"))
}

/// Writes what there is so far: a long run that is ended early is not lost.
fn keep(house: &House, options: &Options, ready: &Ready, results: &Results) -> Result<(), String> {
    let Some(path) = &options.json else { return Ok(()) };
    let text = format!("{}\n", results.json(about(house, options, ready, results)));
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Versions, build flags, machine and weights.
fn about(house: &House, options: &Options, ready: &Ready, results: &Results) -> Vec<(String, Json)> {
    let said = |command: &mut Command| {
        let output = command.current_dir(&house.root).output().ok();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let mut versions = vec![
        member("phalanx", said(Command::new(&ready.setup.phalanx).arg("--version"))),
        member("commit", said(Command::new("git").args(["describe", "--always", "--dirty"]))),
    ];
    for engine in [Engine::Llama, Engine::Ik] {
        let turns = results.rounds.iter().flat_map(|round| &round.turns);
        let said = turns.filter(|(found, _)| *found == engine).find_map(|(_, turn)| turn.about.as_ref());
        for (key, what) in [("engine", "version"), ("built_for", "built_for")] {
            if let Some(Ok(text)) = said.map(|about| about.text(key)) {
                versions.push(member(&format!("{} {what}", engine.name()), text));
            }
        }
    }
    vec![
        member("machine", machine::describe()),
        member("versions", Json::Object(versions)),
        member("build_flags", "CMAKE_ARGS=-DGGML_NATIVE=ON"),
        member("size", options.size.as_str()),
        member("layers", options.layers),
        member("dense", options.dense.name()),
        member("threads", ready.setup.threads),
        member("weights", ready.weights.clone()),
    ]
}

/// The same, for people.
fn heading(about: &[(String, Json)]) -> String {
    let mut lines = Vec::new();
    for (name, value) in about {
        match value {
            Json::Object(members) if name == "weights" => {
                let hashes = members.iter().filter(|(name, _)| name.ends_with("sha256"));
                lines.extend(hashes.map(|(name, hash)| format!("{name:<12}{}", plain(hash))));
            }
            Json::Object(members) => {
                let parts: Vec<String> =
                    members.iter().map(|(name, value)| format!("{name}: {}", plain(value))).collect();
                lines.push(format!("{name:<12}{}", parts.join("\n            ")));
            }
            value => lines.push(format!("{name:<12}{}", plain(value))),
        }
    }
    lines.join("\n")
}

fn plain(value: &Json) -> String {
    if let Json::Text(text) = value { text.clone() } else { value.to_string() }
}
