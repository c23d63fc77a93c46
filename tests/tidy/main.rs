//! The house, checked: what `ARCHITECTURE.md` says is absent is absent, and what every part must have is there.
//!
//! Everything here reads files and nothing else. A message names the file, says what is wrong and how to mend it.

#![allow(clippy::unwrap_used, reason = "tests")]

mod edges;
mod markdown;
mod rust;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Folders that hold no source: build outputs and private environments.
const NOT_SOURCE: [&str; 5] = ["target", ".git", ".venv", ".gpu", "__pycache__"];

/// The only places where `unsafe` may stand.
const UNSAFE_HOMES: [&str; 2] = ["kernels/", "worker/src/collectives/"];

/// The types by which time, chance and the outside world could leak into the planner.
const IMPURE: [&str; 5] = [
    "std::time::Instant",
    "std::time::SystemTime",
    "std::collections::HashMap",
    "std::collections::HashSet",
    "std::net::TcpStream",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files below the root whose name ends so, as (path relative to the root, text).
fn sources(ending: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if path.is_dir() && !NOT_SOURCE.contains(&name.as_ref()) {
                folders.push(path);
            } else if name.ends_with(ending) && path.is_file() {
                let relative = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                files.push((relative, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!files.is_empty(), "no file ends with {ending}: is {} the repository?", root().display());
    files.sort();
    files
}

fn manifest(folder: &str) -> toml::Table {
    let path = root().join(folder).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
fn none(found: Vec<String>) {
    assert!(found.is_empty(), "\n\n{}\n", found.join("\n"));
}

#[test]
fn crates_depend_on_each_other_only_as_drawn() {
    none(edges::DRAWN.iter().flat_map(|drawn| edges::undrawn(drawn, &manifest(drawn.folder))).collect());
}

#[test]
fn every_crate_is_drawn() {
    let workspace = manifest("");
    let members = workspace["workspace"]["members"].as_array().unwrap();
    let mut members: Vec<&str> = members.iter().map(|member| member.as_str().unwrap()).collect();
    let mut drawn: Vec<&str> = edges::DRAWN.iter().map(|drawn| drawn.folder).collect();
    members.sort_unstable();
    drawn.sort_unstable();
    assert_eq!(
        members, drawn,
        "workspace.members in Cargo.toml and DRAWN in tests/tidy/edges.rs must name the same crates"
    );
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    let lacks = |folder: &&str| {
        let lints = manifest(folder).get("lints").and_then(|lints| lints.get("workspace")?.as_bool());
        lints != Some(true)
    };
    let folders = edges::DRAWN.iter().map(|drawn| drawn.folder);
    none(folders.filter(lacks).map(|f| format!("{f}/Cargo.toml: add `[lints]` with `workspace = true`")).collect());
}

#[test]
fn the_planner_bans_clocks_chance_and_sockets() {
    let clippy: toml::Table = {
        let text = std::fs::read_to_string(root().join("coordinator/planner/clippy.toml")).unwrap();
        text.parse().unwrap()
    };
    let banned = clippy["disallowed-types"].as_array().unwrap();
    let banned: Vec<&str> = banned.iter().map(|ban| ban["path"].as_str().unwrap()).collect();
    let missing = IMPURE.iter().filter(|path| !banned.contains(path));
    none(missing.map(|p| format!("coordinator/planner/clippy.toml: put {p} back among disallowed-types")).collect());
}

#[test]
fn unsafe_stays_in_its_two_homes_and_says_why_it_is_sound() {
    let mut found = Vec::new();
    for (file, text) in sources(".rs") {
        let home = UNSAFE_HOMES.iter().any(|home| file.starts_with(home));
        for place in rust::unsafe_code(&text) {
            if !home {
                let homes = UNSAFE_HOMES.join(" or ");
                found.push(format!("{file}:{}: move `unsafe` to {homes}, behind a safe function", place.line));
            } else if place.needs_reason && !place.has_reason {
                found.push(format!("{file}:{}: say above it, after `// SAFETY:`, what makes this sound", place.line));
            }
        }
    }
    none(found);
}

#[test]
fn nothing_is_left_to_do_in_the_code() {
    let mut found = Vec::new();
    for (file, text) in sources(".rs") {
        for line in rust::unfinished(&text) {
            found.push(format!("{file}:{line}: build it, or leave the room unbuilt and take the stub out"));
        }
    }
    none(found);
}

#[test]
fn an_ignored_test_belongs_to_the_full_tier() {
    let mut found = Vec::new();
    for (file, text) in sources(".rs") {
        for line in rust::ignored_without_tier(&text) {
            found.push(format!(
                "{file}:{line}: write `#[ignore = \"full tier: why\"]` (`cargo xtask test --full` runs it)"
            ));
        }
        for line in rust::ignored_examples(&text) {
            found.push(format!(
                "{file}:{line}: mark the example `text`, or let it run: the full tier runs ignored ones"
            ));
        }
    }
    none(found);
}

#[test]
fn every_crate_and_top_folder_has_a_readme() {
    let mut folders: BTreeSet<PathBuf> = edges::DRAWN.iter().map(|drawn| drawn.folder.into()).collect();
    for entry in std::fs::read_dir(root()).unwrap().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // The root package is introduced by the README at the root.
        let own = !name.starts_with('.') && name != "src" && !NOT_SOURCE.contains(&name.as_ref());
        if own && entry.path().is_dir() {
            folders.insert(name.as_ref().into());
        }
    }
    let lacking = folders.iter().filter(|folder| !root().join(folder).join("README.md").is_file());
    none(lacking.map(|f| format!("{}/: add a README.md: purpose, entry point, how to test", f.display())).collect());
}

#[test]
fn links_in_the_documents_resolve() {
    none(sources(".md").iter().flat_map(|(file, text)| markdown::broken_links(root(), file, text)).collect());
}

#[test]
fn no_document_names_a_path_of_one_machine() {
    let mut found = Vec::new();
    for (file, text) in sources(".md").into_iter().chain(sources(".rs")) {
        let comments_only = file.ends_with(".rs");
        for (number, line) in text.lines().enumerate() {
            let read = !comments_only || line.trim_start().starts_with("//");
            if let Some(path) = markdown::machine_path(line).filter(|_| read) {
                found.push(format!("{file}:{}: `{path}` is on one machine: name a placeholder like DIR", number + 1));
            }
        }
    }
    none(found);
}
