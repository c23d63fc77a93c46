//! `phalanx kernels build`, as whoever makes an image meets it.
//!
//! NVRTC is a stand-in that answers every source with an empty cubin; the full tier runs the true one.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/hardware.rs"]
mod hardware;
#[path = "support/paths.rs"]
mod paths;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// Compiles anything but what is for sm_86, which it refuses with a log.
const NVRTC: &str = r#"
    #include <string.h>
    #include <stddef.h>
    static int program;
    int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
    int nvrtcCreateProgram(void **out, const char *source, const char *name, int headers, const char *const *texts,
        const char *const *names) { *out = &program; return strlen(source) < 100 || headers < 1; }
    int nvrtcCompileProgram(void *p, int count, const char *const *options) {
        for (int i = 0; i < count; i++) if (strstr(options[i], "sm_86")) return 6;
        return 0; }
    int nvrtcDestroyProgram(void **p) { *p = 0; return 0; }
    int nvrtcGetProgramLogSize(void *p, size_t *size) { *size = 12; return 0; }
    int nvrtcGetProgramLog(void *p, char *log) { memcpy(log, "line 7: oh\n\0", 12); return 0; }
    int nvrtcGetCUBINSize(void *p, size_t *size) { *size = 64; return 0; }
    int nvrtcGetCUBIN(void *p, char *out) { memset(out, 0, 64); memcpy(out, "\x7f""ELF", 4); out[18] = (char)190; return 0; }
"#;

fn phalanx(libraries: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(paths::binary());
    command.arg("kernels").args(args).env("LD_LIBRARY_PATH", libraries).env_remove("PHALANX_KERNEL_CACHE");
    command.output().unwrap()
}

/// A folder in which NVRTC is this.
fn with_nvrtc(code: Option<&str>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let library = |name: &str| folder.path().join(name);
    match code {
        Some(code) => {
            std::fs::write(library("code.c"), code).unwrap();
            let names = [library("libnvrtc.so"), library("code.c")];
            let built = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).args(names).status();
            assert!(built.unwrap().success());
        }
        // Found before any true one.
        None => ["", ".13", ".12", ".11", ".10", ".9", ".2", ".1"].iter().for_each(|ending| {
            std::fs::write(library(&format!("libnvrtc.so{ending}")), "this is no library").unwrap();
        }),
    }
    folder
}

fn cubins(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.map(|entry| entry.path()).collect();
    found.sort();
    found
}

#[test]
fn what_is_asked_for_is_compiled_once_and_kept() {
    let (nvrtc, out) = (with_nvrtc(Some(NVRTC)), tempfile::tempdir().unwrap());
    let folder = out.path().join("made/by it");
    let build = |more: &[&str]| phalanx(nvrtc.path(), &[&["build", "--out", folder.to_str().unwrap()], more].concat());
    let said = build(&["--arch", "80,90a", "--json"]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let json: Value = serde_json::from_slice(&said.stdout).unwrap();
    let archs = json["archs"].as_array().unwrap();
    assert_eq!(archs.iter().map(|arch| arch["arch"].as_str().unwrap()).collect::<Vec<_>>(), ["80", "90a"]);
    for (arch, of) in archs.iter().zip(["sm_80", "sm_90a"]) {
        let kept = cubins(&folder.join(of));
        assert!(!kept.is_empty());
        assert_eq!(arch["files"], kept.len());
        assert_eq!(arch["bytes"], 64 * kept.len());
        assert!(kept.iter().all(|path| path.to_str().unwrap().ends_with("-nvrtc13.0.cubin")), "{kept:?}");
    }
    assert_eq!(cubins(&folder).len(), 2);

    // What is there is not made again; what is damaged is.
    let kept = cubins(&folder.join("sm_80"));
    let mut marked = std::fs::read(&kept[0]).unwrap();
    marked[40] = 1;
    std::fs::write(&kept[0], &marked).unwrap();
    std::fs::write(&kept[1], "damaged").unwrap();
    let text = String::from_utf8(build(&["--arch", "80"]).stdout).unwrap();
    assert!(text.contains("sm_80") && text.contains("PHALANX_KERNEL_CACHE"), "{text}");
    assert_eq!(std::fs::read(&kept[0]).unwrap(), marked);
    assert_eq!(std::fs::read(&kept[1]).unwrap().len(), 64);

    // The folder serves where there is no NVRTC.
    let bare = with_nvrtc(None);
    let again = phalanx(bare.path(), &["build", "--out", folder.to_str().unwrap(), "--arch", "80"]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
}

#[test]
fn what_cannot_be_compiled_is_said() {
    let (nvrtc, bare, out) = (with_nvrtc(Some(NVRTC)), with_nvrtc(None), tempfile::tempdir().unwrap());
    let folder = out.path().to_str().unwrap();
    let file = out.path().join("file");
    std::fs::write(&file, "").unwrap();
    for (libraries, args, words) in [
        (&nvrtc, vec!["--out", folder, "--arch", "86"], "line 7: oh"),
        (&nvrtc, vec!["--out", folder, "--arch", "75"], "90a"),
        (&nvrtc, vec!["--out", file.to_str().unwrap(), "--arch", "80"], "choose another folder"),
        (&bare, vec!["--out", folder], "install nvidia-cuda-nvrtc"),
    ] {
        let said = phalanx(libraries.path(), &[&["build"], &args[..]].concat());
        let error = String::from_utf8(said.stderr).unwrap();
        assert!(!said.status.success() && said.stdout.is_empty());
        assert!(error.contains(words), "{args:?}: `{words}` is not in {error}");
    }
    assert_eq!(cubins(out.path()), [file], "nothing half made is left");
}

#[test]
#[ignore = "full tier: needs NVRTC"]
fn nvrtc_itself_builds_the_kernels_of_an_architecture() {
    if std::env::var_os("PHALANX_NVRTC").is_none() {
        hardware::not_run("PHALANX_NVRTC is not set; cargo xtask test --full brings NVRTC");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let mut command = Command::new(paths::binary());
    command.args(["kernels", "build", "--arch", "90a", "--json"]).env("PHALANX_KERNEL_CACHE", out.path());
    let said = command.output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let json: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(json["archs"][0]["files"], cubins(&out.path().join("sm_90a")).len());
    assert!(json["archs"][0]["bytes"].as_u64().unwrap() > 50_000, "{json}");
}
