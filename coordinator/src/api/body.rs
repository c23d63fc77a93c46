//! Bodies of requests, bounded in size and time.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use serde_json::Value;
use tokio::runtime::Handle;

use super::ApiLimits;
use super::error::ApiError;

/// How many bodies of the largest size are read of one that was answered before its end.
const REST_BODIES: usize = 8;

/// Reads a JSON body. What the headers promise is refused before a byte of it is read.
pub(super) async fn read_json(request: Request, limits: &ApiLimits) -> Result<Vec<u8>, ApiError> {
    let (head, body) = request.into_parts();
    check_headers(&head.headers, limits)?;
    let read = Limited::new(body, limits.body_bytes_max).collect();
    let late = || ApiError::slow_body(limits.body_wait.as_secs());
    match tokio::time::timeout(limits.body_wait, read).await.map_err(|_| late())? {
        Ok(body) => Ok(body.to_bytes().into()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::large_body(limits.body_bytes_max)),
        Err(_) => Err(ApiError::bad_body("the body broke off")),
    }
}

/// The JSON of a body. Nesting beyond serde_json's bound of 128 is an error, so nothing overflows the stack.
pub(super) fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::bad_body(format!("the body is not valid JSON: {error}")))
}

fn check_headers(headers: &HeaderMap, limits: &ApiLimits) -> Result<(), ApiError> {
    let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limits.body_bytes_max as u64) {
        return Err(ApiError::large_body(limits.body_bytes_max));
    }
    if headers.get(CONTENT_ENCODING).is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(ApiError::media_type("send the body without content-encoding"));
    }
    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::media_type("send JSON with the header content-type: application/json"));
    }
    Ok(())
}

/// Has the rest of a body read that is answered before its end, as one that is too large is: most clients read the answer
/// only after they have sent everything. Who waits to be told to go on, which the first look at the body does, sends nothing
/// until then.
pub(super) async fn read_rest(State(limits): State<ApiLimits>, request: Request) -> Request {
    let is_read = request.headers().contains_key(EXPECT);
    let rest_bytes_max = limits.body_bytes_max.saturating_mul(REST_BODIES);
    let wait = limits.body_wait;
    request.map(|body| Body::new(WholeBody { body, rest_bytes_max, wait, is_read }))
}

/// A body whose rest is read and thrown away when it is dropped, up to a bound.
struct WholeBody {
    body: Body,
    rest_bytes_max: usize,
    wait: Duration,
    /// Nothing is left of it, or nothing comes unless it is asked for.
    is_read: bool,
}

impl HttpBody for WholeBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.is_read = !matches!(frame, Some(Ok(_)));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for WholeBody {
    fn drop(&mut self) {
        let body = std::mem::take(&mut self.body);
        let is_hopeless = body.size_hint().lower() > self.rest_bytes_max as u64;
        if self.is_read || is_hopeless || body.is_end_stream() {
            return;
        }
        let (rest, wait) = (Limited::new(body, self.rest_bytes_max), self.wait);
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let mut rest = std::pin::pin!(rest);
                let read = async { while let Some(Ok(_)) = rest.frame().await {} };
                // What is not read in time is not read.
                drop(tokio::time::timeout(wait, read).await);
            });
        }
    }
}
