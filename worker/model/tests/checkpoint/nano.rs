//! The demo model: in memory, and as a directory.

use std::fs;
use std::path::Path;
use std::process::Command;

use phalanx_model::checkpoint::names;
use phalanx_model::{Checkpoint, CheckpointError, nano};

use crate::paths::root;

#[test]
fn expands_to_the_whole_vocabulary() {
    let checkpoint = nano::checkpoint().unwrap();
    assert_eq!(checkpoint.name(), "gpt-oss-nano");
    assert_eq!(checkpoint.config().vocab, 201_088);
    assert_eq!(checkpoint.config().eos, [200_002, 199_999, 200_012]);
    for name in [names::EMBEDDING, names::UNEMBEDDING] {
        assert_eq!(checkpoint.view(name).unwrap().shape, [201_088, 192]);
    }
    assert!(!checkpoint.embedding_mapped());
    let table = checkpoint.embedding();
    drop(checkpoint);
    let row = |token: usize| &table.table()[token * 384..][..384];
    assert_eq!(row(201_087), row(201_086), "tokens that were never trained share a row");
    assert_ne!(row(200_002), row(201_086), "a token that was trained has its own");
}

#[test]
fn the_exported_directory_is_what_the_script_writes_and_loads_as_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    nano::export(&ours).unwrap();
    let again = nano::export(&ours);
    assert!(matches!(again, Err(CheckpointError::Occupied { .. })), "{again:?}");
    let pack = root().join("models/gpt-oss-nano");
    let script = Command::new("python3").arg(pack.join("train/expand.py")).args([&pack, &theirs]).output().unwrap();
    assert!(script.status.success(), "{}", String::from_utf8_lossy(&script.stderr));
    let names = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&ours), names(&theirs));
    for name in names(&ours) {
        let same = fs::read(ours.join(&name)).unwrap() == fs::read(theirs.join(&name)).unwrap();
        assert!(same, "{} differs", name.display());
    }

    let (file, memory) = (Checkpoint::open(&ours).unwrap(), nano::checkpoint().unwrap());
    assert_eq!(file.name(), "ours");
    assert!(file.embedding_mapped());
    assert_eq!(file.config(), memory.config());
    assert_eq!(file.total_bytes(), memory.total_bytes());
    for expected in names::expected(file.config()) {
        let (a, b) = (file.tensor(&expected.name).unwrap(), memory.tensor(&expected.name).unwrap());
        assert!(a.bytes() == b.bytes(), "{} differs", expected.name);
    }
}
