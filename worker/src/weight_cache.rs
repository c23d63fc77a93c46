//! Where a worker keeps packed weights, and when it bothers.

use std::path::PathBuf;
use std::time::Instant;

use phalanx_kernels::Backend;
use phalanx_model::packed::{PackError, PackedFile};
use phalanx_model::{Checkpoint, LoadError};
use sha2::{Digest, Sha256};

/// Names the directory for packed weights, instead of the checkpoint's own or the user's cache; of any model then.
pub const DIRECTORY_VARIABLE: &str = "PHALANX_CACHE_DIR";
/// Smaller models load in a moment anyway.
const MODEL_BYTES_MIN: u64 = 256 << 20;
/// Bytes of the disk that stay free, or as much again where that is less.
const SPARE_BYTES: u64 = 1 << 30;

/// The packed weights of a checkpoint: mapped if a file of them is there, else packed into one first. `None` where there
/// is no use in it, or no place for it, which is logged: weights are then packed in memory, at every start.
///
/// # Errors
/// The checkpoint is at fault.
pub fn packed<B: Backend>(
    backend: &mut B,
    checkpoint: &Checkpoint,
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<Option<PackedFile>, LoadError> {
    let asked = variable(DIRECTORY_VARIABLE).is_some();
    if checkpoint.directory().is_none() || !asked && checkpoint.total_bytes() < MODEL_BYTES_MIN {
        return Ok(None);
    }
    let places = places(checkpoint, &backend.packing());
    for path in &places {
        if let Some(file) = PackedFile::open(backend, checkpoint, path)? {
            tracing::info!(path = %path.display(), "packed weights are there");
            return Ok(Some(file));
        }
    }
    let need = PackedFile::bytes_of(backend, checkpoint)?;
    for path in &places {
        let wanted = need.saturating_add(SPARE_BYTES.min(need));
        if let Some(free) = free_bytes(path).filter(|free| *free < wanted) {
            tracing::warn!(path = %path.display(), need, free, "too little space to keep packed weights");
            continue;
        }
        let begun = Instant::now();
        match PackedFile::build(backend, checkpoint, path, on_progress) {
            Ok((file, packed)) => {
                let seconds = begun.elapsed().as_secs_f64();
                let what =
                    if packed { "weights are packed, the next start maps them" } else { "another packed the weights" };
                tracing::info!(path = %path.display(), seconds, "{what}");
                return Ok(Some(file));
            }
            Err(PackError::Load(error)) => return Err(error),
            Err(error) => tracing::warn!(%error, "packed weights cannot be kept here"),
        }
    }
    tracing::warn!("weights are packed anew at every start; name a directory with room in {DIRECTORY_VARIABLE}");
    Ok(None)
}

/// Where the file may be, best first.
fn places(checkpoint: &Checkpoint, packing: &str) -> Vec<PathBuf> {
    let Some(own) = checkpoint.directory() else { return Vec::new() };
    // Elsewhere than beside it, a checkpoint is known by its path.
    let path = own.canonicalize().unwrap_or_else(|_| own.to_owned());
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    let id: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let elsewhere = |dir: PathBuf| dir.join(format!("{}-{id}-{packing}.weights", checkpoint.name()));
    if let Some(dir) = variable(DIRECTORY_VARIABLE) {
        return vec![elsewhere(dir)];
    }
    let home = || variable("HOME").map(|home| home.join(".cache"));
    let user = variable("XDG_CACHE_HOME").or_else(home);
    let beside = own.join(".phalanx").join(format!("{packing}.weights"));
    [Some(beside), user.map(|dir| elsewhere(dir.join("phalanx")))].into_iter().flatten().collect()
}

/// A path in the environment; an empty one is none.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Free bytes of the disk that `path` will be on, where the system says.
fn free_bytes(path: &std::path::Path) -> Option<u64> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists())?;
    let status = rustix::fs::statvfs(existing).ok()?;
    let free = status.f_bavail.saturating_mul(status.f_frsize);
    Some(free.saturating_add(PackedFile::unfinished_bytes(path)))
}
