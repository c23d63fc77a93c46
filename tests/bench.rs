//! The load generator, against a real server and against servers that misbehave.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/server.rs"]
#[allow(dead_code, reason = "other test binaries use the rest")]
mod server;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output};

use serde_json::{Value, json};
use server::Serve;

fn bench(url: &str, args: &[&str]) -> Output {
    let args = ["bench", "serve", "--url", url].into_iter().chain(args.iter().copied());
    Command::new(server::paths::binary()).args(args).output().unwrap()
}

fn measured(out: &Output) -> Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&out.stderr)))
}

/// Percentiles ascend, and nothing is missing.
fn check_times(report: &Value, name: &str) {
    let times = &report[name];
    let at = ["p50", "p90", "p95", "p99", "max"].map(|percent| times[percent].as_f64().unwrap());
    assert!(at.is_sorted() && at[0] > 0.0, "{name}: {times}");
}

#[test]
fn a_real_server_is_measured() {
    let serve = Serve::start(&["--workers", "1"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("requests.jsonl");
    let sizes = ["--requests", "6", "--concurrency", "3", "--output-tokens", "8", "--input-tokens", "20"];
    let closed = [&sizes[..], &["--json", "--warmup", "2", "--save", file.to_str().unwrap()]].concat();
    let out = bench(&serve.url, &closed);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report = measured(&out);
    assert_eq!((&report["requests"], &report["succeeded"]), (&json!(6), &json!(6)), "{report}");
    assert_eq!(report["completion_tokens"], 48, "each answer has the tokens asked for");
    assert!((1..=3).contains(&report["concurrency_max"].as_u64().unwrap()), "{report}");
    assert!(report["prompt_tokens"].as_u64().unwrap() > 6 * 20, "{report}");
    ["ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"].iter().for_each(|name| check_times(&report, name));
    let saved = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = saved.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tokens: u64 = lines.iter().map(|line| line["completion_tokens"].as_u64().unwrap()).sum();
    assert_eq!((lines.len(), tokens), (6, 48));

    assert!(report["late_ms_max"].is_null(), "{report}");

    // Open loop, in one piece, for people; the prompts begin alike and the server notices.
    let more = ["--rate", "50", "--no-stream", "--shared-prefix-tokens", "64", "--input-tokens", "80"];
    let open = ["--requests", "6", "--output-tokens", "4"];
    let out = bench(&serve.url, &[&open[..], &more].concat());
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("6 requests in") && text.contains("24 generated"), "{text}");
    assert!(!text.contains("(0 cached)") && text.contains("after they were due"), "{text}");

    let out = bench(&serve.url, &[&sizes[..], &["--save", "/dev/null/requests"]].concat());
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.stdout.is_empty() && error.contains("cannot write /dev/null/requests"), "{error}");

    let out = bench(&serve.url, &[&sizes[..], &["--model", "no-such-model", "--json"]].concat());
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(measured(&out)["errors"], json!({"status 404": 6}));
    assert!(String::from_utf8_lossy(&out.stderr).contains("some requests failed"));
    let out = bench(&serve.url, &[&sizes[..], &["--model", "no-such-model", "--json", "--allow-failures"]].concat());
    assert!(out.status.success());
}

#[test]
fn a_dataset_is_asked_and_a_bad_line_named() {
    let serve = Serve::start(&["--workers", "1"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("data.jsonl");
    let good = "{\"prompt\": \"Say hello.\", \"max_tokens\": 3}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n";
    std::fs::write(&file, good).unwrap();
    let args = ["--dataset", file.to_str().unwrap(), "--requests", "4", "--output-tokens", "5", "--json"];
    let out = bench(&serve.url, &args);
    assert_eq!(measured(&out)["completion_tokens"], 2 * 3 + 2 * 5);
    // What was asked before is not what is measured.
    let lines: String = ["time", "people", "water", "night"]
        .map(|word| format!("{{\"prompt\": \"{}\"}}\n", [word; 60].join(" ")))
        .concat();
    let more = folder.path().join("more.jsonl");
    std::fs::write(&more, lines).unwrap();
    let each = ["--requests", "2", "--warmup", "2", "--concurrency", "1", "--output-tokens", "2", "--json"];
    let report = measured(&bench(&serve.url, &[&["--dataset", more.to_str().unwrap()][..], &each].concat()));
    assert!(report["cached_prompt_tokens"].as_u64() < Some(2 * 100), "{report}");
    for (bad, says) in
        [("{\"text\": 1}", "neither"), ("{", "no JSON"), ("{\"prompt\": \"a\", \"max_tokens\": -1}", "max_tokens")]
    {
        std::fs::write(&file, format!("{good}{bad}\n")).unwrap();
        let out = bench(&serve.url, &args);
        let error = String::from_utf8(out.stderr).unwrap();
        assert!(!out.status.success() && error.contains("line 4") && error.contains(says), "{error}");
    }
}

#[test]
fn nobody_there_is_said_clearly() {
    let out = bench("http://127.0.0.1:9", &[]);
    let error = String::from_utf8(out.stderr).unwrap();
    assert!(!out.status.success() && error.contains("no server answers at http://127.0.0.1:9"), "{error}");
}

/// A server that gives every request this answer.
fn raw_server(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut read = vec![0; 65_536];
            // What is asked does not matter; who leaves early does not either.
            drop(stream.read(&mut read));
            drop(stream.write_all(answer.as_bytes()));
        }
    });
    url
}

#[test]
fn what_goes_wrong_is_counted_by_kind() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    let delta = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"},\"finish_reason\":null}]}\n\n";
    let leak = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
    for (answer, kind) in [
        (leak(format!("{head}{delta}")), "stream: ended early"),
        (leak(format!("{head}{delta}data: [DONE]\n\n")), "stream: no finish_reason"),
        (leak(format!("{head}data: {{\n\n")), "stream: no JSON"),
        (leak(format!("{head}data: {{\"error\":{{\"message\":\"x\"}}}}\n\n")), "stream: error event"),
        (
            "HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            "status 429",
        ),
        ("nonsense\r\n\r\n", "transport: protocol error"),
    ] {
        let url = raw_server(answer);
        let out = bench(&url, &["--model", "m", "--requests", "3", "--json"]);
        assert_eq!(out.status.code(), Some(1));
        let report = measured(&out);
        assert_eq!(report["errors"], json!({kind: 3}), "{report}");
        if kind == "status 429" {
            assert_eq!(report["retry_after_s_max"], 7.0);
        }
    }
}

#[test]
fn requests_at_a_rate_do_not_wait_for_answers_to_others() {
    const REQUESTS: usize = 12;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        // Nobody has an answer before all have asked.
        let mut streams: Vec<_> = listener.incoming().take(REQUESTS).map(Result::unwrap).collect();
        for stream in &mut streams {
            drop(stream.read(&mut [0; 65_536]));
            let answer = "HTTP/1.1 503 Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            drop(stream.write_all(answer.as_bytes()));
        }
    });
    let requests = REQUESTS.to_string();
    let args = ["--model", "m", "--rate", "1000", "--requests", &requests, "--timeout-seconds", "20", "--json"];
    let report = measured(&bench(&url, &args));
    assert_eq!((&report["errors"], &report["concurrency_max"]), (&json!({"status 503": 12}), &json!(12)), "{report}");
    assert!(report["late_ms_max"].is_number(), "{report}");
}

#[test]
fn kernels_are_measured_beside_what_the_machine_can_do() {
    let mut command = Command::new(server::paths::binary());
    command.args(["bench", "kernels", "--device", "cpu", "--threads", "1", "--rounds", "1", "--rows", "1,3"]);
    let out = command.args(["--only", "attend-full,attend-window", "--context", "200", "--json"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let ops = report["ops"].as_array().unwrap();
    let named: Vec<_> = ops.iter().map(|op| (op["op"].as_str().unwrap(), op["rows"].as_u64().unwrap())).collect();
    assert_eq!(named, [("attend-full", 1), ("attend-full", 3), ("attend-window", 1), ("attend-window", 3)]);
    for op in ops {
        let share = |of: &str| op[of].as_f64().unwrap();
        assert!(
            op["seconds"].as_f64().unwrap() > 0.0 && share("read_share") > 0.0 && share("peak_share") > 0.0,
            "{op}"
        );
    }
    // Two for each multiplication of 200 (or, in a window, 128) keys and values by 64 heads of 64.
    assert_eq!(ops[0]["operations"], 200 * 4 * 64 * 64);
    assert_eq!(ops[3]["operations"], 3 * 128 * 4 * 64 * 64);
    let none = Command::new(server::paths::binary()).args(["bench", "kernels", "--only", "nothing"]).output().unwrap();
    assert!(!none.status.success() && String::from_utf8_lossy(&none.stderr).contains("no op's name contains"));
}
