//! A fixture to damage.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

pub(crate) const SHARD_0: &str = "model-00000-of-00002.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

pub(crate) use crate::paths::fixture;

/// A copy of the checkpoint in a fixture, without its golden outputs.
pub(crate) fn copy_of(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap();
        if !file.to_str().unwrap().starts_with("golden") {
            fs::copy(&path, dir.path().join(file)).unwrap();
        }
    }
    dir
}

/// Changes a JSON file.
pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// The header and the numbers of a safetensors file.
pub(crate) fn split(path: &Path) -> (String, Vec<u8>) {
    let file = fs::read(path).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (String::from_utf8(file[8..8 + length].to_vec()).unwrap(), file[8 + length..].to_vec())
}

/// Writes a safetensors file.
pub(crate) fn join(path: &Path, header: &[u8], data: &[u8]) {
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header, data].concat()).unwrap();
}

/// Changes the header of a safetensors file and nothing else.
pub(crate) fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    let (header, data) = split(path);
    let mut value = serde_json::from_str(&header).unwrap();
    edit(&mut value);
    join(path, value.to_string().as_bytes(), &data);
}
