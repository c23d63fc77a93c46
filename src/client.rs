//! A small client of the chat API: what `phalanx chat` speaks, to its own server or to any other.

use std::io::{BufRead, BufReader, Read};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Longest line of a stream, in bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Longest error body, in bytes.
const ERROR_BYTES_MAX: u64 = 64 << 10;

/// A server and the model to ask there.
#[derive(Clone, Debug)]
pub struct ChatClient {
    agent: ureq::Agent,
    url: String,
    api_key: Option<String>,
    model: String,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Thinking.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// Tokens generated, at the end.
    Usage {
        /// How many.
        completion_tokens: u64,
    },
}

/// The URL of a server, from the command line.
///
/// # Errors
/// It is none that is spoken.
pub fn url(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    match host {
        Some(host) if !host.is_empty() => Ok(text.to_owned()),
        _ => Err("give it as in http://127.0.0.1:8000".to_owned()),
    }
}

impl ChatClient {
    /// A client of the server at `url`, which may end in `/v1`. Without `model` it asks for the first one served.
    ///
    /// # Errors
    /// The server does not answer, or serves nothing.
    pub fn connect(url: &str, api_key: Option<String>, model: Option<String>) -> Result<Self> {
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let mut client = Self { agent, url, api_key, model: String::new() };
        client.model = match model {
            Some(model) => model,
            None => client.first_model()?,
        };
        Ok(client)
    }

    /// The model asked for.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.api_key.as_deref().unwrap_or("none"))
    }

    fn first_model(&self) -> Result<String> {
        let url = format!("{}/v1/models", self.url);
        let response = self.agent.get(&url).header("authorization", self.authorization()).call();
        let models = body(response.with_context(|| format!("no server answers at {url}"))?)?;
        let models: Value = serde_json::from_reader(models).context("the list of models is not JSON")?;
        let id = models["data"][0]["id"].as_str().context("the server serves no model")?;
        Ok(id.to_owned())
    }

    /// Sends a conversation and hears the answer piece by piece.
    ///
    /// # Errors
    /// The server refuses, or the stream breaks off.
    pub fn chat(
        &self,
        messages: &[Value],
        effort: Option<&str>,
        mut on_piece: impl FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        let mut request = json!({
            "model": self.model, "messages": messages, "stream": true, "stream_options": {"include_usage": true},
        });
        if let Some(effort) = effort {
            request["reasoning_effort"] = json!(effort);
        }
        let url = format!("{}/v1/chat/completions", self.url);
        let response = self
            .agent
            .post(&url)
            .header("authorization", self.authorization())
            .header("content-type", "application/json")
            .send(request.to_string())
            .with_context(|| format!("no server answers at {url}"))?;
        let mut lines = BufReader::new(body(response)?);
        loop {
            let mut line = String::new();
            let read = lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line).context("the answer breaks off")?;
            if read == 0 {
                bail!("the answer breaks off before its end");
            }
            let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(());
            }
            let chunk: Value = serde_json::from_str(data).context("the server sent a strange event")?;
            if let Some(message) = chunk["error"]["message"].as_str() {
                bail!("{message}");
            }
            let delta = &chunk["choices"][0]["delta"];
            let reasoning = delta["reasoning_content"].as_str().or_else(|| delta["reasoning"].as_str());
            if let Some(text) = reasoning.filter(|text| !text.is_empty()) {
                on_piece(Piece::Reasoning(text.to_owned()))?;
            }
            if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
                on_piece(Piece::Content(text.to_owned()))?;
            }
            if let Some(completion_tokens) = chunk["usage"]["completion_tokens"].as_u64() {
                on_piece(Piece::Usage { completion_tokens })?;
            }
        }
    }
}

/// The body of a success, or the server's own words.
fn body(response: ureq::http::Response<ureq::Body>) -> Result<impl Read> {
    let status = response.status();
    let reader = response.into_body().into_reader();
    if status.is_success() {
        return Ok(reader);
    }
    let mut text = String::new();
    reader.take(ERROR_BYTES_MAX).read_to_string(&mut text).unwrap_or_default();
    let envelope: Value = serde_json::from_str(&text).unwrap_or_default();
    let message = envelope["error"]["message"].as_str().unwrap_or_else(|| text.trim());
    bail!("the server answers {status}: {message}")
}
