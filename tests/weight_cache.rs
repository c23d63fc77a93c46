//! Weights that are packed once: the same bits as packed anew, and nothing but a whole and present file is used.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// A copy of a fixture, and an empty directory for its packed weights.
struct Place {
    model: tempfile::TempDir,
    cache: tempfile::TempDir,
}

impl Place {
    fn new(fixture: &str) -> Self {
        let model = tempfile::tempdir().unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
        for entry in fs::read_dir(fixture).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, model.path().join(path.file_name().unwrap())).unwrap();
        }
        Self { model, cache: tempfile::tempdir().unwrap() }
    }

    /// Hash of the logits of a prompt, and what was said meanwhile.
    fn logits(&self, more: &[&str]) -> (String, String) {
        let model = self.model.path().to_str().unwrap();
        let args = ["--log", "info", "model", "logits", "--model", model, "--prompt-ids", "5,6,7,8,9,10,11", "--json"];
        let out = Command::new(env!("CARGO_BIN_EXE_phalanx"))
            .args(args)
            .args(more)
            .env("PHALANX_CACHE_DIR", self.cache.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{more:?}: {said}");
        let value: Value = serde_json::from_slice(&out.stdout).unwrap();
        (value["bits_sha256"].as_str().unwrap().to_owned(), said)
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(self.cache.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }
}

const PACKED: &str = "weights are packed, the next start";
const THERE: &str = "packed weights are there";

#[test]
fn a_second_start_maps_what_the_first_one_packed_and_gives_the_same_bits() {
    for name in ["tiny-a", "tiny-b"] {
        let place = Place::new(name);
        for precision in [&["--precision", "exact"][..], &["--dense", "bf16"], &["--dense", "q8"]] {
            let (anew, said) = place.logits(&[precision, &["--no-weight-cache"]].concat());
            assert!(!said.contains(PACKED) && !said.contains(THERE), "{said}");
            // Exact and bf16 hold the same weights, so the second of them finds the first one's file.
            let (first, _) = place.logits(precision);
            for workers in ["1", "3"] {
                let (later, said) = place.logits(&[precision, &["--workers", workers]].concat());
                assert!(said.contains(THERE) && !said.contains(PACKED), "{said}");
                assert_eq!((&first, &later), (&anew, &anew), "{name} {precision:?} {workers} workers");
            }
        }
        assert_eq!(place.files().len(), 2, "one file for bf16 and one for q8: {:?}", place.files());
    }
}

#[test]
fn workers_that_start_together_pack_once() {
    let place = Place::new("tiny-b");
    // Two processes of three workers each.
    let said: Vec<String> = std::thread::scope(|scope| {
        let starts = [0, 1].map(|_| scope.spawn(|| place.logits(&["--workers", "3"]).1));
        starts.map(|start| start.join().unwrap()).into()
    });
    let said = said.concat();
    let others = said.matches(THERE).count() + said.matches("another packed the weights").count();
    assert_eq!((said.matches(PACKED).count(), others, place.files().len()), (1, 5, 1), "{said}");
}

#[test]
fn a_file_that_is_not_this_checkpoint_whole_is_packed_again() {
    let place = Place::new("tiny-a");
    let (expected, _) = place.logits(&[]);
    let [file] = &place.files()[..] else { panic!("{:?}", place.files()) };
    let whole = fs::read(file).unwrap();
    let spoil: [(&str, &dyn Fn()); 4] = [
        ("cut short", &|| File::options().write(true).open(file).unwrap().set_len(whole.len() as u64 - 4096).unwrap()),
        ("another header", &|| {
            fs::write(file, [&b"phalanx packed weights\ncpu-0"[..], &whole[28..]].concat()).unwrap()
        }),
        ("empty", &|| fs::write(file, []).unwrap()),
        ("weights changed", &|| {
            // A norm's last bytes are not in the file, but they tell that the checkpoint is another.
            let shard = place.model.path().join("model-00002-of-00002.safetensors");
            let mut bytes = fs::read(&shard).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&shard, bytes).unwrap();
        }),
    ];
    for (what, spoil) in spoil {
        let before = fs::metadata(file).unwrap().ino();
        spoil();
        let (got, said) = place.logits(&[]);
        assert!(said.contains(PACKED), "{what}: {said}");
        assert_ne!(fs::metadata(file).unwrap().ino(), before, "{what}: a file in use is replaced, not written to");
        let (anew, _) = place.logits(&["--no-weight-cache"]);
        assert_eq!(got, anew, "{what}");
        assert_eq!(got == expected, what != "weights changed", "{what}");
        assert_eq!(place.files().len(), 1, "{what}: nothing unfinished is left: {:?}", place.files());
    }
}

#[test]
fn where_nothing_can_be_kept_weights_are_packed_in_memory_and_a_line_says_so() {
    let place = Place::new("tiny-a");
    let (expected, _) = place.logits(&["--no-weight-cache"]);
    // No directory can be made below a file, whoever asks.
    let blocked = tempfile::NamedTempFile::new().unwrap();
    let place = Place { cache: tempfile::tempdir().unwrap(), ..place };
    let out = Command::new(env!("CARGO_BIN_EXE_phalanx"))
        .args(["model", "logits", "--model", place.model.path().to_str().unwrap()])
        .args(["--prompt-ids", "5,6,7,8,9,10,11", "--json"])
        .env("PHALANX_CACHE_DIR", blocked.path().join("below"))
        .output()
        .unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{said}");
    assert!(said.contains("cannot be kept here") && said.contains("PHALANX_CACHE_DIR"), "{said}");
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(value["bits_sha256"], expected);
}
