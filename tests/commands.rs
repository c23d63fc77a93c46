//! The command line as users and machines meet it: output, exit codes, errors that name file and tensor.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/paths.rs"]
mod paths;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use paths::{binary, fixture};
use serde_json::Value;

fn phalanx(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = phalanx(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// A copy of a fixture that may be damaged.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

#[test]
fn logits_have_one_hash_for_any_number_of_workers() {
    let model = fixture("tiny-b");
    let model = model.to_str().unwrap();
    let logits = |workers: &str, more: &[&str]| {
        let ids = (1..40).map(|id| (id * 7).to_string()).collect::<Vec<_>>().join(",");
        let args = ["model", "logits", "--model", model, "--prompt-ids", &ids, "--workers", workers, "--json"];
        json(&[&args[..], more].concat())
    };
    let exact = logits("1", &["--precision", "exact"]);
    assert_eq!(exact["last_logits"].as_array().unwrap().len(), 1000);
    assert_eq!(exact["bits_sha256"].as_str().unwrap().len(), 64);
    assert_eq!(exact, logits("8", &["--precision", "exact"]));
    assert_eq!(exact, logits("3", &["--precision", "exact", "--chunk", "4"]));
    let fast = logits("1", &[]);
    assert_ne!(exact["bits_sha256"], fast["bits_sha256"]);
    assert_eq!(fast, logits("4", &["--precision", "fast"]));

    let saved = tempfile::NamedTempFile::new().unwrap();
    let more = ["--precision", "exact", "--chunk", "4", "--save", saved.path().to_str().unwrap()];
    assert_eq!(exact, logits("1", &more));
    let saved = std::fs::read(saved.path()).unwrap();
    assert_eq!(saved.len(), 39 * 1000 * 4, "every position is written, once");
    let last = saved[38 * 1000 * 4..].chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
    let printed = exact["last_logits"].as_array().unwrap().iter().map(|logit| logit.as_f64().unwrap() as f32);
    assert!(last.eq(printed), "the last of them are those printed");
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let model = fixture("tiny-a");
    for precision in ["exact", "fast"] {
        let mut hashes = Vec::new();
        for isa in ["portable", "avx2", "avx512", "avx512-vnni", "avx512-vbmi"] {
            let args = ["model", "logits", "--model", model.to_str().unwrap(), "--prompt-ids", "1,2,3,4,5", "--json"];
            let out = phalanx(&[&args[..], &["--precision", precision, "--isa", isa]].concat());
            if out.status.success() {
                let value: Value = serde_json::from_slice(&out.stdout).unwrap();
                hashes.push(value["bits_sha256"].clone());
            } else {
                let error = String::from_utf8_lossy(&out.stderr).into_owned();
                assert!(error.contains("this processor has no"), "{error}");
            }
        }
        assert!(!hashes.is_empty() && hashes.iter().all(|hash| *hash == hashes[0]), "{precision}: {hashes:?}");
    }
}

#[test]
fn generation_goes_on_past_the_end_of_text() {
    let model = fixture("tiny-a");
    let golden: Value = serde_json::from_slice(&std::fs::read(model.join("golden.json")).unwrap()).unwrap();
    let case = &golden["prompts"]["7"];
    let ids: Vec<String> = case["input_ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let args = ["model", "generate", "--model", model.to_str().unwrap(), "--prompt-ids", &ids.join(","), "--json"];
    let out = json(&[&args[..], &["--max-tokens", "48", "--precision", "exact", "--workers", "2"]].concat());
    assert_eq!(out["token_ids"], case["greedy_f32"]);
}

#[test]
fn verify_finds_every_layout_alike() {
    let model = fixture("tiny-a");
    let out = json(&["verify", "--model", model.to_str().unwrap(), "--workers", "1,2,3", "--json"]);
    assert_eq!(out["equal"], true);
    assert_eq!(out["rows"].as_array().unwrap().len(), 3 * 3 * 4);
}

#[test]
fn bench_offline_reports_speed_and_memory() {
    let model = fixture("tiny-a");
    let args = ["bench", "offline", "--model", model.to_str().unwrap(), "--prompt-len", "20", "--gen-len", "8"];
    let out = json(&[&args[..], &["--batch", "3", "--threads", "2", "--workers", "2", "--json"]].concat());
    for key in ["pp_tok_s", "tg_tok_s", "load_s", "rss_gb", "prefill_step_ms", "decode_step_ms"] {
        assert!(out[key].as_f64().unwrap() > 0.0, "{key}: {out}");
    }
}

#[test]
fn bench_offline_measures_several_batches_with_one_load() {
    let args = ["bench", "offline", "--gen-len", "5", "--batch", "1,3", "--step-rows", "16", "--prompt-len"];
    let out = phalanx(&[&args[..], &["40,10", "--json"]].concat());
    assert!(out.status.success(), "{out:?}");
    let lines: Vec<Value> =
        String::from_utf8(out.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers = |key: &str| lines.iter().map(|line| line[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((numbers("batch"), numbers("prompt_len")), (vec![1, 3], vec![40, 10]));
    // 40 rows, and 3 times 10 rows, by 16; then four tokens after each first one.
    assert_eq!((numbers("prefill_steps"), numbers("decode_steps")), (vec![3, 2], vec![4, 4]));
    assert_eq!(lines[0]["load_s"], lines[1]["load_s"]);
    // However long the prompts are read, all decode side by side.
    let long = json(&[
        "bench",
        "offline",
        "--batch",
        "8",
        "--prompt-len",
        "64",
        "--gen-len",
        "3",
        "--step-rows",
        "16",
        "--json",
    ]);
    assert_eq!((&long["decode_rows_per_step"], &long["prefill_steps"]), (&8.0.into(), &32.into()), "{long}");
    let out = phalanx(&["bench", "offline", "--batch", "17", "--step-rows", "16"]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("raise --step-rows"), "{out:?}");
    let many =
        ["bench", "offline", "--batch", "1025", "--prompt-len", "1", "--gen-len", "3", "--step-rows", "2048", "--json"];
    assert_eq!(json(&many)["decode_rows_per_step"], 1025.0);
    let out = phalanx(&[&args[..], &["40,10,10"]].concat());
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("3 lengths of prompts are given for 2 batches"), "{out:?}");
}

#[test]
fn an_exported_nano_is_the_embedded_one() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("nano");
    assert!(phalanx(&["model", "export", "nano", to.to_str().unwrap()]).status.success());
    let logits = |model: &str| json(&["model", "logits", "--model", model, "--prompt-ids", "200006,1428", "--json"]);
    assert_eq!(logits("nano")["bits_sha256"], logits(to.to_str().unwrap())["bits_sha256"]);
}

#[test]
fn inspect_plans_the_memory_of_each_worker() {
    let out = json(&["model", "inspect", "nano", "--workers", "3", "--json"]);
    assert_eq!(out["model"]["experts"], 16);
    let totals: Vec<u64> =
        out["memory"].as_array().unwrap().iter().map(|m| m["total_bytes"].as_u64().unwrap()).collect();
    assert_eq!(totals.len(), 3);
    let experts = |rank: usize| out["memory"][rank]["uses"]["expert weights"].as_u64().unwrap();
    assert_eq!(experts(0) * 5, experts(1) * 6, "six experts and five");
}

/// Every bad checkpoint gives one clear error and exit code 2, before anything is served.
#[test]
fn bad_checkpoints_are_named() {
    type Damage = fn(&Path);
    let first = "model-00000-of-00002.safetensors";
    let cases: [(&str, Damage, &[&str]); 7] = [
        (
            "missing shard",
            |d| std::fs::remove_file(d.join("model-00001-of-00002.safetensors")).unwrap(),
            &["model-00001-of-00002.safetensors"],
        ),
        (
            "truncated file",
            |d| {
                let path = d.join("model-00000-of-00002.safetensors");
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
            },
            &[first],
        ),
        (
            "header bomb",
            |d| {
                let path = d.join("model-00000-of-00002.safetensors");
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[..8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
                std::fs::write(&path, &bytes).unwrap();
            },
            &[first],
        ),
        (
            "wrong type",
            |d| replace(&d.join("model-00000-of-00002.safetensors"), "\"BF16\"", "\"F16\" "),
            &[first, "F16"],
        ),
        (
            "path out of the directory",
            |d| {
                replace(
                    &d.join("model.safetensors.index.json"),
                    "model-00000-of-00002.safetensors",
                    "../00-of-00002.safetensors.",
                )
            },
            &["model.safetensors.index.json"],
        ),
        (
            "zero heads",
            |d| replace(&d.join("config.json"), "\"num_attention_heads\": 8", "\"num_attention_heads\": 0"),
            &["config.json", "num_attention_heads"],
        ),
        ("no configuration", |d| std::fs::remove_file(d.join("config.json")).unwrap(), &["config.json"]),
    ];
    for (what, damage, named) in cases {
        let dir = copy("tiny-a");
        damage(dir.path());
        let model = dir.path().to_str().unwrap();
        for args in [
            vec!["model", "inspect", model],
            vec!["model", "logits", "--model", model, "--prompt-ids", "1"],
            vec!["serve", "--model", model, "--listen", "127.0.0.1:0"],
        ] {
            let out = phalanx(&args);
            let error = String::from_utf8_lossy(&out.stderr).into_owned();
            assert_eq!(out.status.code(), Some(2), "{what}, {args:?}: {error}");
            for name in named {
                assert!(error.contains(name), "{what}, {args:?}: `{name}` is not named in: {error}");
            }
            assert!(!error.contains("panicked"), "{what}: {error}");
        }
    }
}

/// Replaces the first place by as many bytes.
fn replace(path: &Path, from: &str, to: &str) {
    let bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    let bytes = [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat();
    std::fs::write(path, bytes).unwrap();
}

/// Runs `phalanx` with these variables and gives exit code and standard error.
fn fails(args: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(binary());
    let out = command.args(args).envs(variables.iter().copied()).stdin(Stdio::null()).output().unwrap();
    assert!(!out.status.success(), "{args:?} {variables:?}");
    (out.status.code(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn flags_at_fault_are_exit_code_2_and_said_once() {
    let dataset = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(dataset.path(), "{}\n").unwrap();
    let token = "0123456789abcdef";
    type Variables = &'static [(&'static str, &'static str)];
    let cases: [(&[&str], Variables, &str); 22] = [
        (&["worker", "--cluster-token", "short"], &[], "a cluster token has from 16"),
        (&["worker", "--cluster-token-file", "/nope"], &[], "/nope"),
        (&["worker"], &[("PHALANX_CLUSTER_TOKEN", "a"), ("PHALANX_CLUSTER_TOKEN_FILE", "b")], "are both set"),
        (&["worker", "--listen", "0.0.0.0:0"], &[], "needs a cluster token"),
        (&["worker", "--device", "cpu", "--exchange", "nccl"], &[], "--exchange nccl is for GPUs"),
        (&["coordinator", "--listen", "127.0.0.1:0", "--worker", "nonsense"], &[], "use HOST:PORT"),
        (&["coordinator", "--replicas", "3", "--worker", "a:1,b:2"], &[], "name a multiple of 3"),
        (&["serve", "--listen", "127.0.0.1:0", "--survive", "1"], &[], "lost"),
        (&["serve", "--device", "cpu", "--exchange", "nccl"], &[], "--exchange nccl is for GPUs"),
        (&["serve", "--device", "cpu", "--exchange", "nccl-graphs"], &[], "--exchange nccl-graphs is for GPUs"),
        (&["serve", "--api-keys", "one,,two"], &[], "it is empty; leave it out"),
        (&["serve"], &[("PHALANX_API_KEYS", "")], "it is empty; leave it out"),
        (&["serve", "--served-model-name", " "], &[], "it is empty; leave it out"),
        (&["serve", "--current-date", "the day"], &[], "2025-12-31"),
        (&["serve", "--current-date", "2025-02-29"], &[], "2025-12-31"),
        (&["serve", "--current-date", "2025-1-01"], &[], "2025-12-31"),
        (&["bench", "offline", "--batch", "1,2", "--prompt-len", "1,2,3"], &[], "3 lengths of prompts"),
        (&["bench", "kernels", "--device", "cpu", "--only", "foo"], &[], "no op's name contains"),
        (&["bench", "serve", "--dataset", "/nope"], &[], "cannot read /nope"),
        (&["bench", "serve", "--dataset", dataset.path().to_str().unwrap()], &[], "neither `messages`"),
        (&["bench", "serve", "--url", "ftp://x"], &[], "http://127.0.0.1:8000"),
        (&["chat", "--url", "ftp://x", "hello"], &[], "http://127.0.0.1:8000"),
    ];
    for (args, variables, words) in cases {
        let (code, error) = fails(args, variables);
        assert_eq!((code, error.matches(words).count()), (Some(2), 1), "{args:?} {variables:?}: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
    // A flag wins over a variable, whichever of the two it is.
    let (_, error) = fails(&["worker", "--cluster-token-file", "/nope"], &[("PHALANX_CLUSTER_TOKEN", "short")]);
    assert_eq!(error.matches("No such file").count(), 1, "{error}");
    let nowhere = ["worker", "--model", "/nope", "--cluster-token", token];
    let (_, error) = fails(&nowhere, &[("PHALANX_CLUSTER_TOKEN_FILE", "/none")]);
    assert!(error.contains("no model `/nope`"), "{error}");
    let (_, error) = fails(&["chat", "--model", "/nope", "hello"], &[("PHALANX_API_KEY", "of-some-server")]);
    assert!(error.contains("no model `/nope`"), "{error}");
}

#[test]
fn switches_can_be_set_by_the_environment_as_elsewhere() {
    for value in ["1", "0", "true", "no", ""] {
        let nowhere = ["serve", "--model", "/nope", "--listen", "127.0.0.1:0"];
        let (_, error) = fails(&nowhere, &[("PHALANX_NO_WEIGHT_CACHE", value), ("PHALANX_NO_PREFIX_CACHE", value)]);
        assert!(error.contains("no model `/nope`"), "{value:?}: {error}");
    }
}

#[test]
fn mistakes_are_explained() {
    for (args, words) in [
        (vec!["model", "logits", "--prompt-ids", "201088"], "outside the vocabulary"),
        (vec!["model", "logits", "--prompt-ids", "1", "--save", "/dev/null/logits"], "cannot write /dev/null/logits"),
        (vec!["model", "generate", "--prompt-ids", "1", "--max-tokens", "200000"], "the context has"),
        (vec!["model", "logits", "--prompt-ids", "one"], "invalid value"),
        (vec!["serve", "--workers", "0"], "--workers"),
        (vec!["chat", "--url", "http://127.0.0.1:9", "hello"], "no server answers"),
        (vec!["model", "inspect", "synth:40b"], "no shape `40b`: give 20b, 120b"),
        (vec!["serve", "--model", "no/such-model"], "no/such-model"),
        (vec!["coordinator"], "--worker"),
    ] {
        let out = phalanx(&args);
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success(), "{args:?}");
        assert!(error.contains(words), "{args:?}: {error}");
        assert!(!error.contains("panicked"), "{args:?}: {error}");
    }
}
