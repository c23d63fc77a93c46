//! From a name on the command line to a checkpoint.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::contents::{is_plain, read_bounded};
use super::{Checkpoint, CheckpointError};
use crate::{nano, synth};

/// Longest revision; a hash has 40 characters.
const REVISION_BYTES_MAX: u64 = 256;

/// Opens a model by name: `nano`, `synth:SHAPE`, a directory, or the id of a model in the local Hugging Face cache.
///
/// # Errors
/// There is no such model, or its checkpoint has a defect.
pub fn open(model: &str) -> Result<Checkpoint, CheckpointError> {
    open_with(model, &environment)
}

/// Where huggingface_hub keeps what it downloads, whether or not it is there.
#[must_use]
pub fn hub_cache() -> Option<PathBuf> {
    hub_cache_in(&environment)
}

fn environment(variable: &str) -> Option<OsString> {
    std::env::var_os(variable).filter(|value| !value.is_empty())
}

/// [`open`] in an environment of one's own.
pub(crate) fn open_with(
    model: &str,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Checkpoint, CheckpointError> {
    if model == nano::SPEC {
        return nano::checkpoint();
    }
    if let Some(shape) = model.strip_prefix(synth::PREFIX) {
        return synth::checkpoint(shape);
    }
    let dir = Path::new(model);
    if dir.exists() {
        return Checkpoint::open(dir);
    }
    let mut looked = vec![dir.to_owned()];
    if let (Some(hub), Some((owner, name))) = (hub_cache_in(environment), hub_id(model)) {
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

/// [`hub_cache`] in an environment of one's own.
fn hub_cache_in(environment: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |variable| environment(variable).map(PathBuf::from);
    let home = || {
        path("XDG_CACHE_HOME")
            .or_else(|| path("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("huggingface"))
    };
    path("HF_HUB_CACHE").or_else(|| path("HF_HOME").or_else(home).map(|home| home.join("hub")))
}

#[cfg(test)]
#[path = "../../../../tests/support/paths.rs"]
mod paths;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use super::*;

    const MODEL: &str = "openai/gpt-oss-20b";

    /// Opens a model where only `variable` is set.
    fn open_where(variable: &str, value: &Path, model: &str) -> Result<String, String> {
        let environment = |asked: &str| (asked == variable).then(|| value.as_os_str().to_owned());
        open_with(model, &environment).map(|c| c.name().to_owned()).map_err(|error| error.to_string())
    }

    /// A cache with one model.
    fn cached(hub: &Path) {
        let repository = hub.join("models--openai--gpt-oss-20b");
        let snapshot = repository.join("snapshots/5be1");
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(repository.join("refs/main"), "5be1\n").unwrap();
        let fixture = paths::fixture("tiny-a");
        for entry in fs::read_dir(fixture).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), snapshot.join(entry.file_name())).unwrap();
        }
    }

    #[test]
    fn a_model_is_found_in_the_cache_wherever_that_is() {
        for (variable, hub) in [
            ("HF_HUB_CACHE", "."),
            ("HF_HOME", "hub"),
            ("XDG_CACHE_HOME", "huggingface/hub"),
            ("HOME", ".cache/huggingface/hub"),
        ] {
            let root = tempfile::tempdir().unwrap();
            cached(&root.path().join(hub));
            assert_eq!(open_where(variable, root.path(), MODEL).as_deref(), Ok(MODEL), "{variable}");
        }
    }

    #[test]
    fn a_model_that_is_nowhere_is_an_error_that_says_where_it_was_looked_for() {
        let root = tempfile::tempdir().unwrap();
        let error = open_where("HF_HUB_CACHE", root.path(), MODEL).unwrap_err();
        let head = root.path().join("models--openai--gpt-oss-20b/refs/main");
        assert_eq!(
            error,
            format!(
                "no model `openai/gpt-oss-20b`: looked at openai/gpt-oss-20b, {}; give `nano`, a checkpoint \
                 directory, `synth:20b` for random weights, or the id of a model in the local Hugging Face cache \
                 (download one with \
                 `hf download openai/gpt-oss-20b`)",
                head.display()
            )
        );
        let error = open_where("HF_HUB_CACHE", root.path(), "../no/../such").unwrap_err();
        assert!(error.contains("looked at ../no/../such;"), "{error}");
    }

    #[test]
    fn a_revision_does_not_lead_out_of_the_cache() {
        let root = tempfile::tempdir().unwrap();
        cached(root.path());
        let head = root.path().join("models--openai--gpt-oss-20b/refs/main");
        fs::write(head, "../snapshots/5be1").unwrap();
        let error = open_where("HF_HUB_CACHE", root.path(), MODEL).unwrap_err();
        assert!(error.starts_with("no model"), "{error}");
    }
}
