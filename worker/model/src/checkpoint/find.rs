//! From a name on the command line to a checkpoint.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::contents::{is_plain, read_bounded};
use super::{Checkpoint, CheckpointError};
use crate::nano;

/// Longest revision; a hash has 40 characters.
const REVISION_BYTES_MAX: u64 = 256;

/// Opens a model by name: `nano`, a directory, or the id of a model in the local Hugging Face cache.
///
/// # Errors
/// There is no such model, or its checkpoint has a defect.
pub fn open(model: &str) -> Result<Checkpoint, CheckpointError> {
    open_with(model, &|variable| std::env::var_os(variable).filter(|value| !value.is_empty()))
}

/// [`open`] in an environment of one's own.
pub(crate) fn open_with(
    model: &str,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Checkpoint, CheckpointError> {
    if model == nano::SPEC {
        return nano::checkpoint();
    }
    let dir = Path::new(model);
    if dir.exists() {
        return Checkpoint::open(dir);
    }
    let mut looked = vec![dir.to_owned()];
    if let (Some(hub), Some((owner, name))) = (hub_cache(environment), hub_id(model)) {
        let repository = hub.join(format!("models--{owner}--{name}"));
        let head = repository.join("refs").join("main");
        if head.exists() {
            let revision = String::from_utf8_lossy(&read_bounded(&head, REVISION_BYTES_MAX)?).trim().to_owned();
            let snapshot = repository.join("snapshots").join(&revision);
            if is_plain(&revision) && snapshot.is_dir() {
                return Ok(Checkpoint::open(&snapshot)?.named(model));
            }
            looked.push(snapshot);
        } else {
            looked.push(head);
        }
    }
    Err(CheckpointError::Unknown { model: model.to_owned(), looked })
}

/// `owner/name`.
fn hub_id(model: &str) -> Option<(&str, &str)> {
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    model.split_once('/').filter(|(owner, name)| word(owner) && word(name))
}

/// Where huggingface_hub keeps what it downloads.
fn hub_cache(environment: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |variable| environment(variable).map(PathBuf::from);
    let home = || {
        path("XDG_CACHE_HOME")
            .or_else(|| path("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("huggingface"))
    };
    path("HF_HUB_CACHE").or_else(|| path("HF_HOME").or_else(home).map(|home| home.join("hub")))
}
