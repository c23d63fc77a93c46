//! `phalanx doctor` and `--device`, as users of machines with and without GPUs meet them.
//!
//! The CUDA libraries of these tests are stand-ins, found before any true one. They prove what is asked of a library
//! and what is made of its answers, not that a true one answers so.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/paths.rs"]
mod paths;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Every name by which one of the libraries is looked for.
fn names() -> impl Iterator<Item = String> {
    let endings =
        [".so", "64.so", "64_13.so", "64_130.so", "64_130_0.so", "64_10.so", "64_11.so", "64_12.so", "64_9.so"];
    let numbers = [13, 12, 11, 10, 9, 2, 1].map(|number| format!(".so.{number}"));
    let endings: Vec<String> = endings.into_iter().map(str::to_owned).chain(numbers).collect();
    ["cuda", "nvrtc", "cublasLt", "nccl"]
        .into_iter()
        .flat_map(move |name| endings.clone().into_iter().map(move |ending| format!("lib{name}{ending}")))
}

/// A machine on which every library is a file that is none.
fn bare() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names() {
        std::fs::write(folder.path().join(name), "this is no library").unwrap();
    }
    folder
}

/// Puts a library of this C code there.
fn plant(folder: &Path, name: &str, code: &str) {
    let source = folder.join("code.c");
    std::fs::write(&source, code).unwrap();
    let library = folder.join(name);
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(built.unwrap().success(), "{name} does not compile");
}

fn phalanx(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(paths::binary());
    command.args(args).env("LD_LIBRARY_PATH", folder).env_remove("PHALANX_DEVICE");
    command.env("PHALANX_KERNEL_CACHE", folder);
    command.stdin(Stdio::null()).output().unwrap()
}

/// What doctor says, and its exit code.
fn doctor(folder: &Path, args: &[&str]) -> (Value, Option<i32>) {
    let out = phalanx(folder, &[&["doctor", "--json"], args].concat());
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    (serde_json::from_slice(&out.stdout).unwrap(), out.status.code())
}

const DRIVER: &str = r#"
    #include <string.h>
    #include <stddef.h>
    int cuInit(unsigned flags) { return 0; }
    int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
    int cuDeviceGetCount(int *count) { *count = 2; return 0; }
    int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
    int cuDeviceGetName(char *name, int len, int device) { memset(name, 'x', len); return 0; }
    int cuDeviceGetAttribute(int *value, int attribute, int device) {
        *value = attribute == 75 ? 9 : attribute == 76 ? device - 40 : -1; return 0; }
    int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)80 << 30; return 0; }
    int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, device, 16); return 0; }
    static int current, contexts;
    int cuDevicePrimaryCtxRetain(void **context, int device) { contexts++; *context = &contexts; return device == 41; }
    int cuDevicePrimaryCtxRelease_v2(int device) { contexts--; return 0; }
    int cuCtxPushCurrent_v2(void *context) { current = contexts == 1; return 0; }
    int cuCtxPopCurrent_v2(void **context) { current = 0; return 0; }
    int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = (size_t)7 << 30; return current ? 0 : 201; }
"#;

#[test]
fn a_machine_without_gpus_is_told_what_is_missing_and_serves_all_the_same() {
    let folder = bare();
    let (said, code) = doctor(folder.path(), &[]);
    assert_eq!(code, Some(0));
    assert_eq!(said["device"]["chosen"], "cpu");
    assert!(said["device"]["why"].as_str().unwrap().starts_with("there is no CUDA driver"), "{said}");
    for (library, file) in [
        ("CUDA driver", "libcuda.so.1"),
        ("NVRTC", "libnvrtc.so.13"),
        ("cuBLASLt", "libcublasLt.so.13"),
        ("NCCL", "libnccl.so.2"),
    ] {
        let missing = said["cuda"]["libraries"][library]["missing"].as_str().unwrap();
        assert!(missing.contains(file) && missing.contains("install"), "{missing}");
    }
    assert_eq!(said["cuda"]["gpus"], serde_json::json!([]));
    assert_eq!(said["kernels"], serde_json::json!({"folder": folder.path(), "cubins": 0}));
    std::fs::create_dir(folder.path().join("sm_90a")).unwrap();
    std::fs::write(folder.path().join("sm_90a/experts.cubin"), "").unwrap();
    assert_eq!(doctor(folder.path(), &[]).0["kernels"]["cubins"], 1);
    let sets = said["cpu"]["instruction_sets"].as_array().unwrap();
    assert!(sets.contains(&said["cpu"]["instruction_set"]), "{said}");
    assert!(said["cpu"]["cores"].as_u64().unwrap() > 0 && said["memory"]["available_bytes"].as_u64().unwrap() > 0);

    let text = String::from_utf8(phalanx(folder.path(), &["doctor"]).stdout).unwrap();
    for words in
        ["instructions", "libnvrtc.so.13", "a link named libnccl.so is not needed", "computes on cpu: there is no"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn gpus_that_are_asked_for_and_cannot_be_used_are_an_error_that_says_what_is_missing() {
    let folder = bare();
    let (said, code) = doctor(folder.path(), &["--device", "cuda"]);
    assert_eq!((code, &said["device"]["asked"]), (Some(1), &Value::from("cuda")));
    for args in [vec!["worker"], vec!["serve", "--listen", "127.0.0.1:0"], vec!["chat", "hello"]] {
        let out = phalanx(folder.path(), &[&args[..], &["--device", "cuda:1"]].concat());
        let error = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{args:?}: {error}");
        for words in ["--device cuda:1 cannot be used", "libcuda.so.1", "libnvrtc.so.13", "--device cpu"] {
            assert!(error.contains(words), "{args:?}: `{words}` is not said: {error}");
        }
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let out = phalanx(folder.path(), &["worker", "--device", "gpu"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("cuda:N"));
}

#[test]
fn libraries_and_gpus_that_are_there_are_named() {
    let folder = bare();
    plant(folder.path(), "libcuda.so", DRIVER);
    plant(
        folder.path(),
        "libnvrtc.so",
        "int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }",
    );
    plant(folder.path(), "libcublasLt.so", "#include <stddef.h>\nsize_t cublasLtGetVersion(void) { return 130100; }");
    // Packages have no other name for it, and cudarc does not look for this one.
    plant(folder.path(), "libnccl.so.2", "int ncclGetVersion(int *version) { *version = 23007; return 0; }");
    let (said, code) = doctor(folder.path(), &[]);
    assert_eq!(code, Some(0));
    let version = |library: &str| said["cuda"]["libraries"][library]["version"].as_str().unwrap().to_owned();
    assert_eq!(["CUDA driver", "NVRTC", "cuBLASLt", "NCCL"].map(version), ["13.0", "13.0", "13.1.0", "2.30.7"]);
    let gpus = said["cuda"]["gpus"].as_array().unwrap();
    assert_eq!(gpus.len(), 2);
    assert_eq!(gpus[0]["name"], "x".repeat(255), "a name without an end is cut");
    assert_eq!((&gpus[0]["compute_capability"], &gpus[1]["compute_capability"]), (&"9.0".into(), &"9.1".into()));
    assert_eq!(gpus[0]["memory_bytes"], 80_u64 << 30);
    assert_eq!(gpus[0]["free_bytes"], 7_u64 << 30);
    assert_eq!(gpus[1]["free_bytes"], Value::Null, "no context can be made on it");
    assert_eq!(said["device"]["chosen"], "cuda");
    assert!(said["device"]["why"].as_str().unwrap().ends_with("xxx and 1 more"), "{said}");
    let (said, code) = doctor(folder.path(), &["--device", "cuda:3"]);
    let missing = said["device"]["missing"][0].as_str().unwrap();
    assert_eq!((code, missing), (Some(1), "there is no GPU 3, the driver shows 2: number them from 0"));

    // Weights in q8 are for CPUs, and kernels are measured on them.
    for (args, words) in [
        (vec!["worker", "--dense", "q8"], "GPUs hold dense weights in bf16"),
        (vec!["bench", "kernels", "--device", "cuda"], "measures CPUs"),
    ] {
        let out = phalanx(folder.path(), &args);
        let error = String::from_utf8(out.stderr).unwrap();
        assert!(!out.status.success() && error.contains(words), "{args:?}: {error}");
    }

    // Without a compiler, kernels must be compiled already.
    plant(folder.path(), "libnvrtc.so", "int nvrtcOther(void) { return 0; }");
    let (said, _) = doctor(folder.path(), &["--device", "cuda:0"]);
    let missing = said["device"]["missing"].to_string();
    assert!(missing.contains("NVRTC has no function") && missing.contains("GPU 0 (sm_90a)"), "{missing}");
}

#[test]
fn libraries_that_do_not_work_are_told_apart_from_missing_ones() {
    let folder = bare();
    plant(
        folder.path(),
        "libcuda.so.1",
        &DRIVER.replace("cuInit(unsigned flags) { return 0; }", "cuInit(unsigned flags) { return 100; }"),
    );
    plant(folder.path(), "libnvrtc.so.13", "int nvrtcVersion(int *major, int *minor) { return 5; }");
    plant(folder.path(), "libnccl.so", "int ncclOther(void) { return 0; }");
    let (said, _) = doctor(folder.path(), &[]);
    let contains =
        |value: &Value, words: &str| assert!(value.as_str().is_some_and(|v| v.contains(words)), "{words}: {value}");
    assert_eq!(said["cuda"]["libraries"]["CUDA driver"]["version"], "13.0");
    contains(&said["cuda"]["missing"], "finds no GPU");
    contains(&said["cuda"]["libraries"]["NVRTC"]["missing"], "nvrtcVersion of NVRTC failed with code 5");
    contains(&said["cuda"]["libraries"]["NCCL"]["missing"], "NCCL has no function ncclGetVersion");
    contains(&said["device"]["why"], "finds no GPU");
}
