//! A server over a scripted engine, and a client that sends exact bytes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use phalanx_coordinator::api::{ApiConfig, ApiKeys, ApiLimits, App, serve};
use phalanx_coordinator::engine_client::{
    CellState, EngineCommands, EngineError, FinishReason, GenerateEvent, GenerateRequest, Submission, SubmitError,
    channel,
};
use phalanx_coordinator::harmony::{ReasoningEffort, Tokenizer, special};
use phalanx_coordinator::metrics::Metrics;
use phalanx_proto::{TokenId, TokenLogprobs};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

pub(crate) const MODEL: &str = "gpt-oss-test";
pub(crate) const CONTEXT: u32 = 4096;

/// What the scripted engine does for a request.
#[derive(Clone)]
pub(crate) enum Play {
    /// Sends these tokens at once.
    Tokens(Vec<TokenId>),
    /// The same, and how likely they were.
    Likely(Vec<TokenId>, Vec<TokenLogprobs>),
    /// Waits for the test.
    Wait(Arc<Notify>),
    /// Waits until nobody listens.
    UntilCancelled,
    /// Begins, with so many tokens of the prompt from the cache.
    Begin(u32),
    Finish(FinishReason),
    Fail(EngineError),
}

pub(crate) type Plays = Result<Vec<Play>, SubmitError>;

/// Everything a test may want to touch.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Requests that reached the engine.
    pub(crate) seen: mpsc::UnboundedReceiver<GenerateRequest>,
    /// One message for each generation that was cancelled.
    pub(crate) cancelled: mpsc::UnboundedReceiver<()>,
    pub(crate) status: Arc<watch::Sender<phalanx_coordinator::engine_client::CellStatus>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) served: JoinHandle<()>,
}

pub(crate) fn config() -> ApiConfig {
    ApiConfig {
        served_model_name: MODEL.to_owned(),
        created: 1_700_000_000,
        context: CONTEXT,
        vocab: 201_088,
        eos: vec![special::RETURN, special::END_OF_TEXT, special::CALL],
        model_identity: None,
        current_date: None,
        reasoning_effort: ReasoningEffort::Medium,
        api_keys: ApiKeys::default(),
        limits: ApiLimits::default(),
    }
}

/// A server whose engine does for every request what `script` says.
pub(crate) async fn start(
    config: ApiConfig,
    script: impl Fn(&GenerateRequest) -> Plays + Send + Sync + 'static,
) -> Server {
    let (client, EngineCommands { mut submissions, status, .. }) = channel(4);
    status.send_modify(|status| {
        status.state = CellState::Ready;
        status.numerics = Some("test-1".to_owned());
    });
    let (saw, seen) = mpsc::unbounded_channel();
    let (cancel, cancelled) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Submission { request, events, reply, .. }) = submissions.recv().await {
            let plays = script(&request);
            saw.send(request).ok();
            reply.send(plays.as_ref().map(|_| ()).map_err(Clone::clone)).ok();
            let cancel = cancel.clone();
            tokio::spawn(async move {
                for play in plays.unwrap_or_default() {
                    match play {
                        Play::Tokens(tokens) => {
                            events.send(GenerateEvent::Tokens { tokens, logprobs: Vec::new() });
                        }
                        Play::Likely(tokens, logprobs) => {
                            events.send(GenerateEvent::Tokens { tokens, logprobs });
                        }
                        Play::Wait(gate) => gate.notified().await,
                        Play::UntilCancelled => {
                            while !events.is_cancelled() {
                                tokio::time::sleep(Duration::from_millis(2)).await;
                            }
                            cancel.send(()).ok();
                        }
                        Play::Begin(cached_tokens) => {
                            events.send(GenerateEvent::Started { cached_tokens });
                        }
                        Play::Finish(reason) => drop(events.send(GenerateEvent::Finished { reason })),
                        Play::Fail(error) => drop(events.send(GenerateEvent::Failed(error))),
                    }
                }
            });
        }
    });
    let metrics = Arc::new(Metrics::new(MODEL, 1));
    let app = App::new(config, client, Arc::clone(&metrics));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(serve(listener, app, async move { drop(stopped.await) }));
    Server { address, seen, cancelled, status: Arc::new(status), metrics, stop: Some(stop), served }
}

/// A server whose model always writes `text`, token by token, and then its stop token.
pub(crate) async fn start_writing(text: &str) -> Server {
    let plays = writing(text);
    start(config(), move |_| Ok(plays.clone())).await
}

/// The plays of a model that writes `text`; a stop token at its end is the engine's to name.
pub(crate) fn writing(text: &str) -> Vec<Play> {
    let mut tokens = harmony(text);
    let stop = tokens.pop_if(|token| special::STOP.contains(token));
    let mut plays: Vec<Play> = tokens.into_iter().map(|token| Play::Tokens(vec![token])).collect();
    plays.push(Play::Finish(stop.map_or(FinishReason::Length, FinishReason::Stop)));
    plays
}

/// The tokens of `text`, with markers such as `<|channel|>` as control tokens.
pub(crate) fn harmony(text: &str) -> Vec<TokenId> {
    let markers = [
        ("<|return|>", special::RETURN),
        ("<|constrain|>", special::CONSTRAIN),
        ("<|channel|>", special::CHANNEL),
        ("<|start|>", special::START),
        ("<|end|>", special::END),
        ("<|message|>", special::MESSAGE),
        ("<|call|>", special::CALL),
    ];
    let mut tokens = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let next = markers.iter().filter_map(|(marker, token)| Some((rest.find(marker)?, marker.len(), *token))).min();
        let (at, len, token) = next.map_or((rest.len(), 0, None), |(at, len, token)| (at, len, Some(token)));
        tokens.extend(Tokenizer::shared().encode_ordinary(&rest[..at]));
        tokens.extend(token);
        rest = &rest[at + len..];
    }
    tokens
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
        Some(line[name.len() + 1..].trim())
    }

    /// The data of every server-sent event.
    pub(crate) fn events(&self) -> Vec<String> {
        let text = self.text();
        let events = text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        events.map(str::to_owned).collect()
    }

    /// Every event but `[DONE]`, which must be the last.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.text());
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// Checks that this is an error in OpenAI's envelope, and returns it.
    pub(crate) fn error(&self) -> Value {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("no envelope: {json}"));
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{json}");
        assert!(error["type"].is_string(), "{json}");
        assert!(error["param"].is_string() || error["param"].is_null(), "{json}");
        assert!(error["code"].is_string() || error["code"].is_null(), "{json}");
        assert!(self.header("x-request-id").is_some_and(|id| !id.is_empty()), "{}", self.head);
        assert_eq!(self.header("retry-after").is_some(), matches!(self.status, 429 | 503), "{}", self.head);
        json["error"].clone()
    }
}

impl Server {
    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").as_bytes()).await
    }

    pub(crate) async fn chat(&self, body: &Value) -> Reply {
        self.post(body.to_string().as_bytes()).await
    }

    /// A question to the model, with `more` fields.
    pub(crate) async fn ask(&self, more: Value) -> Reply {
        self.chat(&question(more)).await
    }

    /// The same with an API key.
    pub(crate) async fn ask_as(&self, key: &str, more: Value) -> Reply {
        let request = String::from_utf8(post_bytes(question(more).to_string().as_bytes())).unwrap();
        let bearer = format!("authorization: Bearer {key}\r\ncontent-length:");
        self.send(request.replacen("content-length:", &bearer, 1).as_bytes()).await
    }

    pub(crate) async fn post(&self, body: &[u8]) -> Reply {
        self.send(&post_bytes(body)).await
    }

    /// Sends exactly `bytes` and reads until the server closes.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect(bytes).await;
        let mut answer = Vec::new();
        // A server that has answered may reset a client that still talks.
        while stream.read_buf(&mut answer).await.unwrap_or(0) > 0 {}
        parse(&answer)
    }

    /// Sends exactly `bytes` and leaves the rest to the caller.
    pub(crate) async fn connect(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes).await.ok();
        stream
    }
}

pub(crate) fn question(more: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "What is 3 + 4?"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

pub(crate) fn post_bytes(body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Reads from `stream` until `text` has come.
pub(crate) async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(text) {
        let count = stream.read_buf(&mut read).await.unwrap();
        assert!(count > 0, "the server closed before {text:?}: {}", String::from_utf8_lossy(&read));
    }
    String::from_utf8(read).unwrap()
}

/// The texts of `field` over all chunks of choice `index`.
pub(crate) fn joined(chunks: &[Value], index: u32, field: &str) -> String {
    let choices = chunks.iter().filter_map(|chunk| chunk["choices"].get(0)).filter(|choice| choice["index"] == index);
    choices.filter_map(|choice| choice["delta"][field].as_str()).collect()
}

fn parse(answer: &[u8]) -> Reply {
    let Some(at) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Reply { status: 0, head: String::from_utf8_lossy(answer).into_owned(), body: Vec::new() };
    };
    let head = String::from_utf8(answer[..at].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = &answer[at + 4..];
    let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Reply { status, head, body: if is_chunked { unchunk(body) } else { body.to_vec() } }
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(at) = body.windows(2).position(|window| window == b"\r\n") {
        let len = usize::from_str_radix(std::str::from_utf8(&body[..at]).unwrap(), 16).unwrap();
        out.extend_from_slice(&body[at + 2..at + 2 + len]);
        body = &body[at + 4 + len..];
        if len == 0 {
            break;
        }
    }
    out
}
