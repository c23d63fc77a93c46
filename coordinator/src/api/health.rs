//! Whether the server lives, and whether it can serve.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::error::ApiError;
use super::{App, identify};
use crate::engine_client::{CellState, CellStatus};

/// What is answered before there is a model: the process lives, and nothing else can be served yet.
pub(super) fn loading(waits_for: watch::Receiver<String>) -> Router {
    let not_yet = async move || {
        let message = format!("the model is loading: {}", *waits_for.borrow());
        ApiError::unavailable("loading", message)
    };
    let lives = get(async || Json(json!({"status": "loading"})));
    Router::new().route("/livez", lives).fallback(not_yet).layer(middleware::from_fn(identify))
}

/// `/livez`: steps advance, or there is nothing to do. Anything else needs a restart: where no cell is left, too.
pub(super) async fn livez(State(app): State<App>) -> Response {
    if !app.engine().is_answered() {
        return ApiError::unavailable("stalled", "the engine does not answer").into_response();
    }
    let status = app.engine().status();
    if let (CellState::Failed(_), Some(failed)) = (&status.state, not_ready(&status)) {
        return failed.into_response();
    }
    let still = status.progress_at.elapsed();
    if status.is_busy() && still > app.config().limits.stall_max {
        let CellStatus { running, waiting, steps, .. } = status;
        let still = still.as_secs();
        let message =
            format!("no step for {still} s after step {steps}, while {running} sequences run and {waiting} wait");
        return ApiError::unavailable("stalled", message).into_response();
    }
    Json(json!({"status": "ok"})).into_response()
}

/// `/readyz`: requests can be served now.
pub(super) async fn readyz(State(app): State<App>) -> Response {
    match not_ready(&app.engine().status()) {
        Some(error) => error.into_response(),
        None => Json(json!({"status": "ok"})).into_response(),
    }
}

/// `/health`: as `/readyz`, with what the workers are doing.
pub(super) async fn health(State(app): State<App>) -> Response {
    let status = app.engine().status();
    let error = not_ready(&status);
    let mut body = json!({
        "status": status.state.name(),
        "model": app.config().served_model_name,
        "cells": app.engine().cells().iter().map(cell).collect::<Vec<_>>(),
    });
    let Some(error) = error else { return Json(body).into_response() };
    if let (Some(body), Ok(envelope)) = (body.as_object_mut(), serde_json::to_value(error.envelope())) {
        body.extend(envelope.as_object().cloned().unwrap_or_default());
    }
    let mut response = error.into_response();
    *response.body_mut() = body.to_string().into();
    response
}

/// What a cell is doing, and each of its workers.
fn cell(status: &CellStatus) -> Value {
    let workers: Vec<_> =
        status.workers.iter().map(|worker| json!({"rank": worker.rank.0, "state": worker.state.name()})).collect();
    let CellStatus { running, waiting, .. } = status;
    let reason = match &status.state {
        CellState::Loading(reason) | CellState::Failed(reason) => Some(reason),
        CellState::Ready | CellState::Draining => None,
    };
    json!({
        "status": status.state.name(),
        "reason": reason,
        "epoch": status.epoch.0,
        "workers": workers,
        "running": running,
        "waiting": waiting,
    })
}

/// `/metrics`: Prometheus's text format.
pub(super) async fn metrics(State(app): State<App>) -> Response {
    let text = app.metrics().render(&app.engine().cells());
    (StatusCode::OK, [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

fn not_ready(status: &CellStatus) -> Option<ApiError> {
    let message = match &status.state {
        CellState::Ready => return None,
        CellState::Loading(reason) => format!("the model is loading: {reason}"),
        CellState::Draining => "the server is shutting down".to_owned(),
        CellState::Failed(reason) => format!("the cell has failed: {reason}"),
    };
    Some(ApiError::unavailable(status.state.name(), message))
}
