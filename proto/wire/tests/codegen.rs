//! The committed code is what the `.proto` files give. `UPDATE_CODEGEN=1 cargo test -p phalanx-wire --test codegen`
//! writes it anew.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

#[test]
fn generated_code_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = root.join("src/generated/phalanx.v1.rs");

    let descriptors = protox::compile(["phalanx/v1/worker.proto"], [root.join("proto")]).unwrap();
    let fresh = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .bytes(".phalanx.v1.Envelope.payload")
        .out_dir(fresh.path())
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)
        .unwrap();
    let fresh = std::fs::read_to_string(fresh.path().join("phalanx.v1.rs")).unwrap();

    if std::env::var_os("UPDATE_CODEGEN").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(committed == fresh, "generated code is stale: UPDATE_CODEGEN=1 cargo test -p phalanx-wire --test codegen");
}
