//! OpenAI's HTTP API over one cell.
//!
//! A request is read field by field and bounded (`request`), rendered by [`harmony`](crate::harmony), handed to the
//! engine through [`EngineClient`], and its tokens are read back choice by choice (`choice`) into one answer (`chat`) or
//! server-sent events (`stream`). Nothing here fetches anything, and nothing here decides about steps.

mod auth;
mod body;
mod chat;
mod choice;
mod error;
mod fields;
mod health;
mod messages;
mod models;
mod request;
mod sampling;
mod server;
mod stream;
mod types;

use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use phalanx_proto::TokenId;
use tokio::sync::Semaphore;

pub use auth::ApiKeys;
pub use server::{serve, serve_loading};

use crate::engine_client::EngineClient;
use crate::harmony::{ReasoningEffort, Tokenizer};
use crate::metrics::Metrics;
use error::ApiError;

/// The header that names a request in logs and answers.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id taken over from a client, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Every path that is served, as the label `route` of metrics; all else is [`OTHER_ROUTE`].
const ROUTES: [&str; 8] =
    ["/v1/chat/completions", "/v1/models", MODEL_ROUTE, "/health", "/livez", "/readyz", "/metrics", OTHER_ROUTE];
const MODEL_ROUTE: &str = "/v1/models/{id}";
const OTHER_ROUTE: &str = "other";

/// What is served, and to whom.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// The name that requests must give as `model`.
    pub served_model_name: String,
    /// When the model was made, in seconds since 1970.
    pub created: u64,
    /// Tokens of a sequence at most, prompt and completion together.
    pub context: u32,
    /// Tokens there are.
    pub vocab: u32,
    /// Tokens of the model's `eos_token_id`; they stop a generation beside harmony's own.
    pub eos: Vec<TokenId>,
    /// Who the model is told to be; absent, harmony's own sentence.
    pub model_identity: Option<String>,
    /// Today, as the model is told; absent, it is told no date and prefixes stay reusable for longer than a day.
    pub current_date: Option<String>,
    /// How long the model thinks where a request does not say.
    pub reasoning_effort: ReasoningEffort,
    /// Keys, one of which a request must bear.
    pub api_keys: ApiKeys,
    /// How much of everything.
    pub limits: ApiLimits,
}

/// Bounds of what clients may send, and of waiting.
#[derive(Clone, Debug)]
pub struct ApiLimits {
    /// Connections open at once; further ones wait to be accepted.
    pub connections_max: usize,
    /// Bytes of a request's head.
    pub header_bytes_max: usize,
    /// Header fields of a request.
    pub headers_max: usize,
    /// Longest wait for a request's head, an idle connection's included.
    pub header_wait: Duration,
    /// Bytes of a body.
    pub body_bytes_max: usize,
    /// Longest wait for a body.
    pub body_wait: Duration,
    /// Longest wait for a client to take what is sent to it.
    pub write_wait: Duration,
    /// Messages of a conversation.
    pub messages_max: usize,
    /// Functions of a request.
    pub tools_max: usize,
    /// Stop strings of a request.
    pub stops_max: usize,
    /// Bytes of a stop string.
    pub stop_bytes_max: usize,
    /// Choices of a request.
    pub choices_max: u32,
    /// Prompts encoded at once. That keeps a core busy each.
    pub encoders: usize,
    /// Longest wait of a request for its turn to be encoded.
    pub encoder_wait: Duration,
    /// Silence after which a stream carries a comment, so that nobody in between closes it.
    pub keep_alive: Duration,
    /// How long a cell with work may go without a step before `/livez` reports it.
    pub stall_max: Duration,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            connections_max: 4096,
            header_bytes_max: 64 << 10,
            headers_max: 100,
            header_wait: Duration::from_secs(20),
            body_bytes_max: 4 << 20,
            body_wait: Duration::from_secs(20),
            write_wait: Duration::from_secs(60),
            messages_max: 4096,
            tools_max: 128,
            stops_max: 4,
            stop_bytes_max: 1024,
            choices_max: 8,
            encoders: std::thread::available_parallelism().map_or(1, NonZero::get),
            encoder_wait: Duration::from_secs(10),
            keep_alive: Duration::from_secs(15),
            stall_max: Duration::from_secs(60),
        }
    }
}

/// What the handlers share. Clones share it.
#[derive(Clone, Debug)]
pub struct App(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: ApiConfig,
    engine: EngineClient,
    metrics: Arc<Metrics>,
    tokenizer: Tokenizer,
    encoders: Arc<Semaphore>,
}

impl App {
    /// An API over `engine`. Parses the vocabulary if nobody has yet, which takes about a second.
    #[must_use]
    pub fn new(config: ApiConfig, engine: EngineClient, metrics: Arc<Metrics>) -> Self {
        metrics.expect_routes(&ROUTES);
        let encoders = Arc::new(Semaphore::new(config.limits.encoders));
        Self(Arc::new(Shared { config, engine, metrics, tokenizer: Tokenizer::shared(), encoders }))
    }

    fn config(&self) -> &ApiConfig {
        &self.0.config
    }

    fn engine(&self) -> &EngineClient {
        &self.0.engine
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    fn tokenizer(&self) -> Tokenizer {
        self.0.tokenizer
    }

    fn encoders(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0.encoders)
    }
}

/// Names a request in logs and in the engine.
#[derive(Clone, Debug)]
struct RequestId(String);

/// The routes. Whatever is not served gets an error in the envelope, and whatever comes back bears a request id.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(health::metrics))
        .fallback(async || ApiError::unknown_path())
        .method_not_allowed_fallback(async || ApiError::wrong_method())
        .layer(middleware::from_fn_with_state(app.clone(), auth::require_key))
        .layer(middleware::from_fn_with_state(app.clone(), count))
        .layer(middleware::from_fn(identify))
        .with_state(app)
}

/// Counts the answer.
async fn count(
    State(app): State<App>,
    Extension(RequestId(id)): Extension<RequestId>,
    request: Request,
    next: Next,
) -> Response {
    let route = route_of(request.uri().path());
    let response = next.run(request).await;
    app.metrics().answered(route, response.status().as_u16());
    tracing::debug!(request_id = id, route, status = response.status().as_u16(), "answered");
    response
}

/// Gives the request its id, and the answer the same.
async fn identify(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let id = given.filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX);
    let id = id.map_or_else(|| random_id("req_"), str::to_owned);
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

fn route_of(path: &str) -> &'static str {
    let known = ROUTES.into_iter().find(|route| *route == path);
    let is_model = || path.strip_prefix("/v1/models/").is_some_and(|id| !id.is_empty());
    known.unwrap_or_else(|| if is_model() { MODEL_ROUTE } else { OTHER_ROUTE })
}

/// 64 bits that nobody can guess.
fn random() -> u64 {
    getrandom::u64().expect("the operating system has random numbers")
}

fn random_id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:016x}", random(), random())
}
