//! Every error that a client can see, in OpenAI's envelope.

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::engine_client::{EngineError, SubmitError};

/// When a client should come again after 503, in milliseconds.
const UNAVAILABLE_RETRY_AFTER_MS: u64 = 5000;
/// The same as `retry-after`, finer; OpenAI's clients read it first.
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
/// Longest piece of a request that an error repeats, in characters.
const QUOTE_CHARS_MAX: usize = 64;

/// An answer other than success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after_ms: Option<u64>,
}

/// `{"error": {...}}`.
#[derive(Debug, Serialize)]
pub(super) struct Envelope<'a> {
    error: EnvelopeError<'a>,
}

#[derive(Debug, Serialize)]
struct EnvelopeError<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        Self { status, kind, message: message.into(), param: None, code: Some(code), retry_after_ms: None }
    }

    /// 400 because of the field `param`.
    pub(super) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message) }
    }

    /// 400 because the field `param` asks for what this server cannot do.
    pub(super) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message) }
    }

    /// 400 because the field `param` is missing.
    pub(super) fn missing(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param} is required");
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, "missing_required_parameter", message) }
    }

    /// 400 because the body cannot be read at all.
    pub(super) fn bad_body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_json", message)
    }

    /// 401.
    pub(super) fn unauthorized() -> Self {
        let message = "give a valid API key in the header, as in: authorization: Bearer KEY";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    /// 404 because there is no such path.
    pub(super) fn unknown_path() -> Self {
        let message = "there is nothing at this path, use POST /v1/chat/completions, GET /v1/models, /health, /livez, \
                       /readyz or /metrics";
        Self::new(StatusCode::NOT_FOUND, "unknown_url", message)
    }

    /// 404 because another model is served.
    pub(super) fn unknown_model(asked: &str, served: &str) -> Self {
        let message = format!("the model {} does not exist here, use {served:?}", quote(asked));
        Self { param: Some("model".to_owned()), ..Self::new(StatusCode::NOT_FOUND, "model_not_found", message) }
    }

    /// 405.
    pub(super) fn wrong_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path does not take this method")
    }

    /// 408.
    pub(super) fn slow_body(seconds: u64) -> Self {
        let message = format!("the body did not arrive within {seconds} s");
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
    }

    /// 413.
    pub(super) fn large_body(bytes_max: usize) -> Self {
        let message = format!("the body is larger than {bytes_max} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    }

    /// 415.
    pub(super) fn media_type(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    }

    /// 500: a defect of this server.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// 503 with what is in the way.
    pub(super) fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        Self { retry_after_ms: Some(UNAVAILABLE_RETRY_AFTER_MS), ..error }
    }

    /// 400 because prompt and completion exceed the context.
    pub(super) fn context_length(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message);
        Self { param: Some("messages".to_owned()), ..error }
    }

    /// The body of the answer.
    pub(super) fn envelope(&self) -> Envelope<'_> {
        let Self { message, kind, param, code, .. } = self;
        Envelope { error: EnvelopeError { message, kind, param: param.as_deref(), code: *code } }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { retry_after_ms } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message);
                Self { retry_after_ms: Some(retry_after_ms), ..error }
            }
            SubmitError::ContextLength { .. } => Self::context_length(message),
            SubmitError::Draining => Self::unavailable("shutting_down", message),
            SubmitError::Unavailable { .. } => Self::unavailable("unavailable", message),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let code = match error {
            EngineError::WorkerLost { .. } => "worker_lost",
            EngineError::Failed { .. } | EngineError::Gone => "engine_failed",
        };
        Self::unavailable(code, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.envelope())).into_response();
        if let Some(ms) = self.retry_after_ms {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000).max(1)));
            response.headers_mut().insert(RETRY_AFTER_MS, HeaderValue::from(ms));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A client's text as errors repeat it: short, quoted and escaped.
pub(super) fn quote(text: &str) -> String {
    let mut shown: String = text.chars().take(QUOTE_CHARS_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}
