//! Which crate may name which: the drawing, and a manifest held against it.

use toml::{Table, Value};

/// What one crate may depend on.
pub(crate) struct Drawn {
    /// Relative to the root, as in `workspace.members`.
    pub(crate) folder: &'static str,
    /// The crates of this workspace that it may name, in code and in tests.
    pub(crate) ours: &'static [&'static str],
    /// If given: the only crates of others that it may name outside its tests.
    pub(crate) others: Option<&'static [&'static str]>,
    /// Crates of others that it must never name, not even in tests.
    pub(crate) never: &'static [&'static str],
}

const TRANSPORT: &[&str] = &["tokio", "tonic", "prost", "hyper", "axum", "reqwest"];

pub(crate) const DRAWN: &[Drawn] = &[
    Drawn {
        folder: ".",
        ours: &[
            "phalanx-proto",
            "phalanx-wire",
            "phalanx-kernels",
            "phalanx-model",
            "phalanx-worker",
            "phalanx-planner",
            "phalanx-coordinator",
        ],
        others: None,
        never: &[],
    },
    Drawn { folder: "proto", ours: &[], others: Some(&[]), never: TRANSPORT },
    Drawn { folder: "proto/wire", ours: &["phalanx-proto"], others: None, never: &[] },
    // Its tests name it once more, with the CUDA kernels compiled for the CPU.
    Drawn { folder: "kernels", ours: &["phalanx-kernels"], others: None, never: TRANSPORT },
    Drawn { folder: "worker/model", ours: &["phalanx-proto", "phalanx-kernels"], others: None, never: TRANSPORT },
    Drawn {
        folder: "worker",
        ours: &["phalanx-proto", "phalanx-wire", "phalanx-kernels", "phalanx-model"],
        others: None,
        never: &[],
    },
    Drawn {
        folder: "coordinator/planner",
        ours: &["phalanx-proto"],
        others: Some(&["thiserror"]),
        never: &["rand", "rand_pcg", "tokio", "tonic", "axum"],
    },
    Drawn {
        folder: "coordinator",
        ours: &["phalanx-proto", "phalanx-wire", "phalanx-planner"],
        others: None,
        never: &[],
    },
    Drawn {
        folder: "coordinator/sim",
        ours: &["phalanx-proto", "phalanx-planner"],
        others: Some(&["thiserror"]),
        never: &["rand", "rand_pcg", "tokio", "tonic", "axum"],
    },
    Drawn { folder: "xtask", ours: &[], others: Some(&[]), never: TRANSPORT },
];

/// What the manifest names and the drawing does not.
pub(crate) fn undrawn(drawn: &Drawn, manifest: &Table) -> Vec<String> {
    let mut found = Vec::new();
    for dependency in dependencies(manifest) {
        let name = dependency.name.as_str();
        let allowed = if name.starts_with("phalanx") {
            drawn.ours.contains(&name)
        } else {
            let listed = dependency.of_tests || drawn.others.is_none_or(|others| others.contains(&name));
            listed && !drawn.never.contains(&name)
        };
        if !allowed {
            let folder = drawn.folder;
            found.push(format!(
                "{folder}/Cargo.toml: `{name}` is an edge that is not drawn: move the code to a crate that may \
                have it, or pass a value in (the drawing is in tests/tidy/edges.rs and ARCHITECTURE.md)"
            ));
        }
    }
    found
}

struct Dependency {
    name: String,
    of_tests: bool,
}

/// Every dependency of every kind and target, by the name of its package.
fn dependencies(manifest: &Table) -> Vec<Dependency> {
    let targets = manifest.get("target").and_then(Value::as_table);
    let targets = targets.into_iter().flat_map(Table::values).filter_map(Value::as_table);
    let mut found = Vec::new();
    for table in std::iter::once(manifest).chain(targets) {
        for kind in ["dependencies", "build-dependencies", "dev-dependencies"] {
            for (key, value) in table.get(kind).and_then(Value::as_table).into_iter().flatten() {
                let package = value.get("package").and_then(Value::as_str);
                let name = package.unwrap_or(key).to_owned();
                found.push(Dependency { name, of_tests: kind == "dev-dependencies" });
            }
        }
    }
    found
}

#[test]
fn an_edge_that_is_not_drawn_is_found_wherever_it_hides() {
    let planner = DRAWN.iter().find(|drawn| drawn.folder == "coordinator/planner").unwrap();
    let finds = |text: &str| undrawn(planner, &text.parse().unwrap()).len();
    assert_eq!(finds("[dependencies]\nphalanx-proto.workspace = true\nthiserror = '2'"), 0);
    assert_eq!(finds("[dev-dependencies]\nproptest = '1'"), 0);
    assert_eq!(finds("[dependencies]\nproptest = '1'"), 1);
    assert_eq!(finds("[dev-dependencies]\nphalanx-worker.workspace = true"), 1);
    assert_eq!(finds("[build-dependencies]\ntokio = '1'"), 1);
    assert_eq!(finds("[target.'cfg(unix)'.dependencies]\nphalanx-kernels = { path = 'k' }"), 1);
    assert_eq!(finds("[dependencies]\nproto = { package = 'phalanx-model', path = 'm' }"), 1);
}
