//! One request, measured.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::workload::Asked;

/// Longest line of a stream, in bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Longest answer in one piece, in bytes.
const BODY_BYTES_MAX: u64 = 64 << 20;

/// Where and how requests are sent.
#[derive(Clone, Debug)]
pub struct Target {
    /// The HTTP client.
    pub agent: ureq::Agent,
    /// `http://HOST:PORT`.
    pub url: String,
    /// The key, if one is asked for.
    pub api_key: Option<String>,
    /// The model asked for.
    pub model: String,
    /// Whether answers are streamed.
    pub stream: bool,
    /// The temperature.
    pub temperature: f64,
    /// Whether the model's own end of an answer is passed over.
    pub ignore_eos: bool,
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// From its sending to the first piece of the answer.
    pub ttft: Option<Duration>,
    /// Between the pieces.
    pub gaps: Vec<Duration>,
    /// From its sending to the end.
    pub e2e: Duration,
    /// Tokens of the prompt, as the server counts.
    pub prompt_tokens: u64,
    /// Those found in the server's cache.
    pub cached_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// What went wrong: a kind, to be counted.
    pub error: Option<String>,
    /// When the server asked to come again.
    pub retry_after_s: Option<f64>,
}

impl Outcome {
    /// Time of each token after the first.
    #[must_use]
    pub fn tpot(&self) -> Option<Duration> {
        let after = self.e2e.checked_sub(self.ttft?)?;
        let tokens = u32::try_from(self.completion_tokens.checked_sub(1)?).ok()?;
        after.checked_div(tokens)
    }
}

impl Target {
    /// Sends the request and waits for its end.
    #[must_use]
    pub fn ask(&self, asked: &Asked, seed: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let begun = Instant::now();
        if let Err(kind) = self.exchange(asked, seed, begun, &mut outcome) {
            outcome.error = Some(kind);
        }
        outcome.e2e = begun.elapsed();
        outcome
    }

    fn exchange(&self, asked: &Asked, seed: u64, begun: Instant, outcome: &mut Outcome) -> Result<(), String> {
        let mut body = json!({
            "model": self.model, "messages": asked.messages, "max_tokens": asked.max_tokens,
            "temperature": self.temperature, "seed": seed >> 1, "stream": self.stream,
        });
        if self.stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        let mut request = self.agent.post(format!("{}/v1/chat/completions", self.url));
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let sent = request.header("content-type", "application/json").send(body.to_string());
        let response = sent.map_err(|error| format!("transport: {}", short(&error)))?;
        let status = response.status().as_u16();
        if status != 200 {
            let header = |name| response.headers().get(name)?.to_str().ok()?.parse::<f64>().ok();
            outcome.retry_after_s = header("retry-after-ms").map(|ms| ms / 1000.0).or_else(|| header("retry-after"));
            return Err(format!("status {status}"));
        }
        let reader = response.into_body().into_reader();
        if self.stream { read_stream(reader, begun, outcome) } else { read_whole(reader, outcome) }
    }
}

fn read_stream(reader: impl Read, begun: Instant, outcome: &mut Outcome) -> Result<(), String> {
    let mut lines = BufReader::new(reader);
    let (mut last, mut finished) = (None::<Instant>, false);
    loop {
        let mut line = String::new();
        let read = lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line);
        if read.map_err(|error| format!("stream: {}", error.kind()))? == 0 {
            return Err("stream: ended early".to_owned());
        }
        let Some(data) = line.trim_end().strip_prefix("data:").map(str::trim_start) else { continue };
        if data == "[DONE]" {
            return if finished { Ok(()) } else { Err("stream: no finish_reason".to_owned()) };
        }
        let chunk: Value = serde_json::from_str(data).map_err(|_| "stream: no JSON".to_owned())?;
        if chunk.get("error").is_some_and(|error| !error.is_null()) {
            return Err("stream: error event".to_owned());
        }
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        let text = |key: &str| delta[key].as_str().is_some_and(|text| !text.is_empty());
        if text("content") || text("reasoning_content") || text("reasoning") || delta["tool_calls"].is_array() {
            let now = Instant::now();
            match last.replace(now) {
                None => outcome.ttft = Some(now - begun),
                Some(before) => outcome.gaps.push(now - before),
            }
        }
        finished |= choice["finish_reason"].is_string();
        read_usage(&chunk["usage"], outcome);
    }
}

fn read_whole(reader: impl Read, outcome: &mut Outcome) -> Result<(), String> {
    let answer: Value =
        serde_json::from_reader(reader.take(BODY_BYTES_MAX)).map_err(|_| "answer: no JSON".to_owned())?;
    read_usage(&answer["usage"], outcome);
    let finished = answer["choices"][0]["finish_reason"].is_string();
    if finished { Ok(()) } else { Err("answer: no finish_reason".to_owned()) }
}

fn read_usage(usage: &Value, outcome: &mut Outcome) {
    if let Some(tokens) = usage["completion_tokens"].as_u64() {
        outcome.completion_tokens = tokens;
        outcome.prompt_tokens = usage["prompt_tokens"].as_u64().unwrap_or(0);
        outcome.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    }
}

/// An error as a kind: without addresses or numbers that differ from one to the next.
fn short(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => error.kind().to_string(),
        ureq::Error::Timeout(_) => "timeout".to_owned(),
        ureq::Error::HostNotFound => "host not found".to_owned(),
        ureq::Error::ConnectionFailed => "connection refused".to_owned(),
        _ => "protocol error".to_owned(),
    }
}
