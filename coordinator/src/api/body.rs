//! Bodies of requests, bounded in size and time.

use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;

use super::ApiLimits;
use super::error::ApiError;

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
