//! Where tests find what they read and run, also on a machine where they were not built: there `PHALANX_ROOT` names a
//! copy of the repository, and `PHALANX_BIN` the binary.

#![allow(dead_code, reason = "each user takes a part")]

use std::path::{Path, PathBuf};

/// The repository.
pub(crate) fn root() -> PathBuf {
    let built_in = || {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let is_root = |folder: &&Path| folder.join("Cargo.lock").is_file();
        package.ancestors().find(is_root).unwrap_or(package).to_path_buf()
    };
    std::env::var_os("PHALANX_ROOT").map_or_else(built_in, PathBuf::from)
}

/// A folder of the golden fixtures, or a file of them.
pub(crate) fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

/// The program under test; for tests of the root package.
pub(crate) fn binary() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_phalanx").unwrap_or("phalanx");
    std::env::var_os("PHALANX_BIN").map_or_else(|| built.into(), PathBuf::from)
}
