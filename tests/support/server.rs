//! A real server with real worker processes.

#[allow(clippy::duplicate_mod, reason = "a test binary may have `support` beside this")]
pub(crate) mod paths;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest wait for anything that must happen.
pub(crate) const WAIT: Duration = Duration::from_secs(60);

/// A running `phalanx serve`.
pub(crate) struct Serve {
    pub(crate) child: Child,
    pub(crate) url: String,
}

impl Serve {
    /// Starts a server on a port of the system's choice.
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut child = Command::new(paths::binary())
            .args(["serve", "--listen", "127.0.0.1:0", "--threads", "2"])
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let url = line.split("http://").nth(1).and_then(|rest| rest.split("/v1").next());
        let url = url.unwrap_or_else(|| panic!("the server announced {line:?}"));
        Self { url: format!("http://{url}"), child }
    }

    /// Process ids of the workers, in the order of their ranks.
    pub(crate) fn workers(&self) -> Vec<u32> {
        children(self.child.id())
    }

    pub(crate) fn signal(&self, signal: &str) {
        kill(self.child.id(), signal);
    }

    /// Status and body of a GET.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut response = agent().get(format!("{}{path}", self.url)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    /// Status and body of a POST.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let mut response = agent()
            .post(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .send(body.to_string())
            .unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(json!({"text": text})))
    }

    /// Opens a stream; its lines of data come one by one.
    pub(crate) fn stream(&self, body: &Value) -> impl Iterator<Item = String> + use<> {
        stream(&self.url, body)
    }

    /// Waits for the end of the process and returns its exit code.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        let mut code = None;
        until("the server ends", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.and_then(|status| status.code())
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Opens a stream at a server; its lines of data come one by one.
pub(crate) fn stream(url: &str, body: &Value) -> impl Iterator<Item = String> + use<> {
    let response = agent()
        .post(format!("{url}/v1/chat/completions"))
        .header("content-type", "application/json")
        .send(body.to_string())
        .unwrap();
    assert_eq!(response.status(), 200);
    let lines = BufReader::new(response.into_body().into_reader()).lines();
    lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("data: ").map(str::to_owned))
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_recv_body(Some(WAIT)).build().new_agent()
}

/// Polls until `done`, for as long as anything may take.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited {WAIT:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn kill(pid: u32, signal: &str) {
    let status = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

/// Child processes, oldest first.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let text = std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
    }
    found.sort_unstable();
    found
}

/// Whether the process runs; one that has ended and was not waited for does not.
pub(crate) fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Largest memory of a process so far, in bytes.
pub(crate) fn memory_peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// A chat request to nano.
pub(crate) fn chat(text: &str) -> Value {
    json!({"model": "gpt-oss-nano", "messages": [{"role": "user", "content": text}], "temperature": 0})
}
