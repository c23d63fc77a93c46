//! Real clusters: processes that are asked, drained and killed.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/server.rs"]
#[allow(dead_code, reason = "other test binaries use the rest")]
mod server;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use server::{Serve, chat, kill, runs, until};
use tempfile::NamedTempFile;

const QUESTION: &str = "What is 17 + 18?";

fn phalanx() -> Command {
    Command::new(server::paths::binary())
}

#[test]
fn chat_thinks_answers_and_leaves_no_process_behind() {
    let mark = format!("PHALANX_TEST_MARK={}", std::process::id());
    let (name, value) = mark.split_once('=').unwrap();
    let out = phalanx().args(["chat", QUESTION]).env(name, value).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() >= 3, "thinking, answer and speed: {text}");
    assert!(lines[lines.len() - 2].contains("35"), "{text}");
    assert!(lines[lines.len() - 1].contains("tokens/s"), "{text}");
    let left = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let environ = std::fs::read(entry.ok()?.path().join("environ")).ok()?;
        environ.split(|&b| b == 0).any(|var| var == mark.as_bytes()).then_some(())
    });
    assert_eq!(left.count(), 0, "a process was left behind");
}

/// What is said to a server is not said to each of its workers, but for what they log.
#[test]
fn workers_take_no_address_from_their_parents_environment() {
    let out = phalanx()
        .args(["chat", "--log", "info", QUESTION])
        .envs([("PHALANX_WORKER_LISTEN", "0.0.0.0:1"), ("PHALANX_WORKER_DATA_LISTEN", "0.0.0.0:1")])
        .envs([("PHALANX_CLUSTER_TOKEN_FILE", "/nope"), ("PHALANX_LOG", "error")])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{error}");
    let said = error.matches(" INFO phalanx::cli: computes on").count();
    assert_eq!(said, 3, "chat and two workers log what is asked for, without colours: {error}");
}

#[test]
fn an_interrupted_chat_leaves_no_process_behind() {
    let mut child =
        phalanx().args(["chat", "--workers", "3"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut workers = Vec::new();
    until("three workers run", || {
        workers = server::children(child.id());
        workers.len() == 3
    });
    kill(child.id(), "INT");
    until("chat ends", || child.try_wait().unwrap().is_some());
    until("the workers end", || !workers.iter().any(|&pid| runs(pid)));
}

#[test]
fn workers_do_not_outlive_a_killed_server() {
    let serve = Serve::start(&["--workers", "2"]);
    let workers = serve.workers();
    assert_eq!(workers.len(), 2);
    serve.signal("KILL");
    until("the workers end", || !workers.iter().any(|&pid| runs(pid)));
}

#[test]
fn a_server_tells_its_state_and_drains() {
    let mut serve = Serve::start(&["--workers", "2", "--served-model-name", "tiny"]);
    for path in ["/health", "/livez", "/readyz"] {
        assert_eq!(serve.get(path).0, 200, "{path}");
    }
    let (_, models) = serve.get("/v1/models");
    assert!(models.contains("\"tiny\""), "{models}");
    let ask = json!({"model": "tiny", "messages": [{"role": "user", "content": "Tell me a story."}],
                     "stream": true, "temperature": 0});
    let mut stream = serve.stream(&ask);
    let first = stream.next().unwrap();
    assert!(first.contains("chat.completion.chunk"), "{first}");
    serve.signal("TERM");
    let rest: Vec<String> = stream.collect();
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"), "the stream is finished before the server ends");
    assert!(rest.iter().any(|data| data.contains("\"finish_reason\":\"stop\"")));
    assert_eq!(serve.ended(), Some(0));
}

/// A request that goes on for longer than any test.
fn endless(stream: bool) -> Value {
    json!({"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Tell me a story."}],
           "stream": stream, "ignore_eos": true, "max_tokens": 100_000})
}

#[test]
fn a_server_that_drains_says_so_until_it_is_asked_again() {
    let mut serve = Serve::start(&["--kv-tokens", "131072", "--drain-seconds", "3600"]);
    let mut stream = serve.stream(&endless(true));
    stream.next().unwrap();
    serve.signal("TERM");
    until("the server drains", || serve.get("/readyz").0 == 503);
    let (_, ready) = serve.get("/readyz");
    assert!(ready.contains("\"draining\""), "{ready}");
    for path in ["/livez", "/metrics"] {
        assert_eq!(serve.get(path).0, 200, "{path}");
    }
    let (status, refused) = serve.post("/v1/chat/completions", &chat(QUESTION));
    assert_eq!((status, &refused["error"]["code"]), (503, &json!("shutting_down")), "{refused}");
    stream.next().unwrap();
    serve.signal("TERM");
    let rest: Vec<String> = stream.collect();
    assert!(rest.last().unwrap().contains("\"error\""), "{:?}", rest.last());
    assert_eq!(serve.ended(), Some(0));
}

#[test]
fn a_worker_that_is_lost_while_the_server_drains_ends_the_drain() {
    let mut serve = Serve::start(&["--kv-tokens", "131072", "--drain-seconds", "3600"]);
    let mut stream = serve.stream(&endless(true));
    stream.next().unwrap();
    serve.signal("TERM");
    until("the server drains", || serve.get("/readyz").0 == 503);
    kill(serve.workers()[0], "KILL");
    assert!(stream.last().unwrap().contains("\"error\""));
    assert_eq!(serve.ended(), Some(0));
}

#[test]
fn after_the_grace_time_requests_end_with_an_error() {
    let mut serve = Serve::start(&["--kv-tokens", "131072", "--drain-seconds", "0"]);
    let mut stream = serve.stream(&endless(true));
    stream.next().unwrap();
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| serve.post("/v1/chat/completions", &endless(false)));
        until("both run", || serve.get("/health").1.contains("\"running\":2"));
        serve.signal("TERM");
        let (status, answer) = answer.join().unwrap();
        assert_eq!(status, 503, "{answer}");
        assert!(answer["error"]["message"].is_string(), "{answer}");
    });
    assert!(stream.last().unwrap().contains("\"error\""));
    assert_eq!(serve.ended(), Some(0));
}

#[test]
fn metrics_count_what_the_workers_exchange() {
    let serve = Serve::start(&["--workers", "2"]);
    let (status, answer) = serve.post("/v1/chat/completions", &chat(QUESTION));
    assert_eq!(status, 200, "{answer}");
    assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().contains("35"), "{answer}");
    let (_, metrics) = serve.get("/metrics");
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert!(value("phalanx_exchange_rows_total{engine=\"0\",kind=\"dispatch\"") > 0.0);
    assert!(value("phalanx_exchange_bytes_total{direction=\"sent\",engine=\"0\"") > 0.0);
    let completion = answer["usage"]["completion_tokens"].as_f64().unwrap();
    assert_eq!(value("vllm:generation_tokens_total"), completion);
}

#[test]
fn a_killed_worker_is_named_and_nothing_hangs() {
    let mut serve = Serve::start(&["--workers", "3"]);
    // Streams that would go on for long: nano is asked to repeat itself at random.
    let ask = json!({"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Tell me a story."}],
                     "stream": true, "temperature": 2.0, "seed": 1, "n": 8});
    let mut streams: Vec<_> = (0..2).map(|_| serve.stream(&ask)).collect();
    for stream in &mut streams {
        stream.next().unwrap();
    }
    kill(serve.workers()[1], "KILL");
    for stream in streams {
        let rest: Vec<String> = stream.collect();
        let last: Value = serde_json::from_str(rest.last().unwrap()).unwrap_or_default();
        let message = last["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains("worker 1"), "the last event names the worker: {rest:?}");
    }
    // A cell does not outlive its worker, and whoever supervises the server starts it again.
    assert_eq!(serve.ended(), Some(1));
}

/// As systemd does it.
#[test]
fn a_server_drains_when_its_workers_are_signalled_too() {
    let mut serve = Serve::start(&["--workers", "2"]);
    let ask = json!({"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Tell me a story."}],
                     "stream": true, "temperature": 0});
    let mut stream = serve.stream(&ask);
    stream.next().unwrap();
    for pid in [vec![serve.child.id()], serve.workers()].concat() {
        kill(pid, "TERM");
    }
    let rest: Vec<String> = stream.collect();
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"), "{rest:?}");
    assert_eq!(serve.ended(), Some(0));
}

#[test]
fn a_coordinator_serves_with_workers_that_run_already() {
    let (one, two) = (Running::worker(), Running::worker());
    let coordinator = |token: &str| {
        let mut command = phalanx();
        command.args(["coordinator", "--listen", "127.0.0.1:0", "--cluster-token", token]);
        command.args(["--worker", &one.address, "--worker", &two.address]).stdout(Stdio::piped());
        command
    };
    let refused = coordinator("another-token-of-another").output().unwrap();
    assert!(!refused.status.success());

    // The second one finds workers whose first coordinator was killed; terms are counted in seconds.
    for _ in 0..2 {
        let served = Running::coordinator(&[&one, &two]);
        let out = phalanx().args(["chat", "--url", &served.ready(), QUESTION]).output().unwrap();
        assert!(String::from_utf8_lossy(&out.stdout).contains("35"), "{out:?}");
        drop(served);
        another_term();
    }
}

/// Whom a worker waits for while an epoch is prepared may be lost: another coordinator gets it at once.
#[test]
fn a_worker_that_waits_for_one_that_was_killed_can_be_taken() {
    let (one, mut two) = (Running::worker(), Running::worker());
    let mut first = Running::coordinator(&[&one, &two]);
    until("the worker is taken", || two.log().contains("joined"));
    two.end();
    assert_eq!(first.ended(), Some(1), "{}", first.log());
    another_term();
    let three = Running::worker();
    Running::coordinator(&[&one, &three]).ready();
}

#[test]
fn a_worker_under_two_names_is_refused_and_can_be_taken_again() {
    let one = Running::worker();
    let other_name = one.address.replace("127.0.0.1", "localhost");
    let mut twice = Running::coordinator_of(&["--worker", &one.address, "--worker", &other_name]);
    assert_eq!(twice.ended(), Some(1));
    assert!(twice.log().contains("name each worker once"), "{}", twice.log());
    for cells in ["1", "2"] {
        let mut twice =
            Running::coordinator_of(&["--replicas", cells, "--worker", &one.address, "--worker", &one.address]);
        assert_eq!(twice.ended(), Some(2));
        assert!(twice.log().contains("is named twice"), "{}", twice.log());
    }
    another_term();
    Running::coordinator(&[&one]).ready();
}

/// One of two coordinators of the same second: it is refused, and lets the workers of the other be.
#[test]
fn a_coordinator_that_is_refused_takes_nothing_from_the_other() {
    let one = Running::worker();
    // Two coordinators of one term: tried until both start within the same second.
    for _ in 0..20 {
        let first = Running::coordinator(&[&one]);
        let mut second = Running::coordinator(&[&one]);
        until("one of them is refused or takes over", || second.has_ended() || second.announced().is_some());
        if second.has_ended() {
            let refusal = second.log();
            assert!(refusal.contains("stop the other coordinator"), "{refusal}");
            let out = phalanx().args(["chat", "--url", &first.ready(), QUESTION]).output().unwrap();
            assert!(String::from_utf8_lossy(&out.stdout).contains("35"), "{out:?}\n{}", first.log());
            return;
        }
        another_term();
    }
    panic!("no two coordinators started within one second");
}

/// A worker hangs in a step, and those that wait for it there are let go at once.
#[test]
fn the_workers_that_are_left_by_one_that_hangs_serve_again() {
    let workers = [Running::worker(), Running::worker(), Running::worker()];
    let mut first = Running::coordinator(&[&workers[0], &workers[1], &workers[2]]);
    let ask = json!({"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Tell me a story."}],
                     "stream": true, "temperature": 2.0, "seed": 1, "n": 8});
    let mut stream = server::stream(&first.ready(), &ask);
    stream.next().unwrap();
    kill(workers[1].child.id(), "STOP");
    assert!(stream.last().unwrap().contains("worker 1"));
    assert_eq!(first.ended(), Some(1));
    let log = first.log();
    let late = log.lines().filter(|line| line.contains("release")).any(|line| !line.contains("rank 1 at"));
    assert!(!late, "the others answer: {log}");
    another_term();
    Running::coordinator(&[&workers[0], &workers[2]]).ready();
}

#[test]
fn an_idle_coordinator_whose_workers_are_taken_over_says_so_and_ends() {
    let one = Running::worker();
    let mut first = Running::coordinator(&[&one]);
    first.ready();
    another_term();
    let second = Running::coordinator(&[&one]);
    let url = second.ready();
    assert_eq!(first.ended(), Some(1));
    assert!(first.log().contains("belongs to cell 0 under term"), "{}", first.log());
    let out = phalanx().args(["chat", "--url", &url, QUESTION]).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("35"), "{out:?}");
}

#[test]
fn where_one_cell_cannot_be_the_workers_of_the_others_are_given_back() {
    let (one, other) = (Running::worker(), Running::worker_with(&["--precision", "exact"]));
    let mut first = Running::coordinator_of(&["--replicas", "2", "--worker", &one.address, "--worker", &other.address]);
    assert_eq!(first.ended(), Some(1));
    assert!(first.log().contains("give all workers the same model"), "{}", first.log());
    for worker in [one, other] {
        assert!(worker.log().contains("released"), "{}", worker.log());
    }
}

#[test]
fn who_is_slow_to_ask_does_not_keep_a_loaded_server_waiting() {
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (listen, worker) = (free(), free());
    let coordinator = Running::start(&["coordinator", "--listen", &listen, "--worker", &worker]);
    let slow = std::thread::spawn({
        let listen = listen.clone();
        move || {
            let mut slow = None;
            until("the coordinator listens", || {
                slow = TcpStream::connect(&listen).ok();
                slow.is_some()
            });
            let mut slow = slow.unwrap();
            slow.write_all(b"GET /livez").unwrap();
            // It was accepted before this one is answered.
            let mut probe = TcpStream::connect(&listen).unwrap();
            probe.write_all(b"GET /readyz HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            probe.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("\"loading\""), "{answer}");
            (slow, Running::start(&["worker", "--threads", "1", "--listen", &worker]))
        }
    });
    assert!(coordinator.ready().contains(&listen));
    let (mut slow, _worker) = slow.join().unwrap();
    slow.write_all(b" HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "the server was ready before the slow one was cut off: {answer}");
}

#[test]
fn beyond_loopback_a_token_is_needed() {
    for args in [vec!["worker", "--listen", "0.0.0.0:0"], vec!["worker", "--data-listen", "0.0.0.0:0"]] {
        let out = phalanx().args(&args).stdin(Stdio::null()).output().unwrap();
        assert!(!out.status.success(), "{args:?}");
        assert!(String::from_utf8_lossy(&out.stderr).contains("cluster token"), "{out:?}");
    }
}

/// Until the next coordinator has a higher term than the last: terms are counted in seconds.
fn another_term() {
    std::thread::sleep(Duration::from_secs(1));
}

/// A worker or coordinator, which ends with its test.
struct Running {
    child: Child,
    address: String,
    log: NamedTempFile,
    out: NamedTempFile,
}

const TOKEN: &str = "a-token-for-this-test";

impl Running {
    fn start(args: &[&str]) -> Self {
        let (out, log) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        let child = phalanx()
            .args(args)
            .args(["--cluster-token", TOKEN, "--log", "info"])
            .stdin(Stdio::null())
            .stdout(out.reopen().unwrap())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        Self { child, address: String::new(), log, out }
    }

    fn worker() -> Self {
        Self::worker_with(&[])
    }

    fn worker_with(args: &[&str]) -> Self {
        let mut worker = Self::start(&[&["worker", "--threads", "1"], args].concat());
        until("the worker listens", || worker.announced().is_some());
        worker.address = worker.announced().unwrap();
        worker
    }

    fn coordinator(workers: &[&Self]) -> Self {
        let workers: Vec<&str> = workers.iter().flat_map(|worker| ["--worker", &worker.address]).collect();
        Self::coordinator_of(&workers)
    }

    fn coordinator_of(args: &[&str]) -> Self {
        Self::start(&[&["coordinator", "--listen", "127.0.0.1:0"], args].concat())
    }

    /// Where it says that it listens.
    fn announced(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.out.path()).unwrap();
        let address = text.split(" on ").nth(1)?.split_once([';', ',']).map(|(address, _)| address)?;
        Some(address.trim_end_matches("/v1").to_owned())
    }

    /// Waits until a coordinator serves; gives its URL.
    fn ready(&self) -> String {
        until("the coordinator serves", || self.announced().is_some());
        self.announced().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end; gives its exit code.
    fn ended(&mut self) -> Option<i32> {
        until("the process ends", || self.has_ended());
        self.child.wait().unwrap().code()
    }

    fn end(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// The value of a metric with these labels.
fn metric(serve: &Serve, line: &str) -> f64 {
    let (_, text) = serve.get("/metrics");
    let found = text.lines().find(|found| found.starts_with(line)).unwrap_or_else(|| panic!("no {line}"));
    found.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn cells_share_the_requests_and_one_outlives_the_other() {
    let serve = Serve::start(&["--replicas", "2", "--workers", "1"]);
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let asked: Vec<_> =
            (0..12).map(|_| scope.spawn(|| serve.post("/v1/chat/completions", &chat(QUESTION)))).collect();
        asked.into_iter().map(|answer| answer.join().unwrap().1).collect()
    });
    for answer in &answers {
        assert_eq!(answer["choices"], answers[0]["choices"]);
    }
    for cell in ["0", "1"] {
        let prompts = metric(&serve, &format!("vllm:prompt_tokens_total{{engine=\"{cell}\""));
        assert!(prompts > 0.0, "cell {cell} had nothing to do");
        let blocks = metric(
            &serve,
            &format!("vllm:cache_config_info{{block_size=\"16\",enable_prefix_caching=\"True\",engine=\"{cell}\""),
        );
        assert_eq!(blocks, 1.0);
    }
    kill(serve.workers()[0], "KILL");
    until("the lost cell is noticed", || metric(&serve, "phalanx_cell_workers{state=\"lost\"}") == 1.0);
    for _ in 0..4 {
        let (status, answer) = serve.post("/v1/chat/completions", &chat(QUESTION));
        assert_eq!((status, &answer["choices"]), (200, &answers[0]["choices"]), "{answer}");
    }
    assert_eq!(serve.get("/readyz").0, 200, "one cell serves");
    let (status, health) = serve.get("/health");
    let health: Value = serde_json::from_str(&health).unwrap();
    assert_eq!(status, 200, "{health}");
    let states: Vec<&Value> = health["cells"].as_array().unwrap().iter().map(|cell| &cell["status"]).collect();
    assert_eq!(states, [&json!("failed"), &json!("ok")], "{health}");
    assert!(health["cells"][0]["reason"].as_str().unwrap().contains("worker 0"), "{health}");
}
