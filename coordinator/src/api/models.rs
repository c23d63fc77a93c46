//! `/v1/models`.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::json;

use super::App;
use super::error::ApiError;
use super::types::Model;

/// `GET /v1/models`.
pub(super) async fn list(State(app): State<App>) -> Json<serde_json::Value> {
    Json(json!({"object": "list", "data": [model(&app)]}))
}

/// `GET /v1/models/{id}`. Names may contain slashes.
pub(super) async fn one(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::invalid("model", "the model's name must be valid UTF-8"))?;
    check(&app, &id)?;
    Ok(Json(model(&app)))
}

/// Whether `asked` is the model that is served.
pub(super) fn check(app: &App, asked: &str) -> Result<(), ApiError> {
    let served = &app.config().served_model_name;
    if asked == served { Ok(()) } else { Err(ApiError::unknown_model(asked, served)) }
}

fn model(app: &App) -> Model {
    let config = app.config();
    Model {
        id: config.served_model_name.clone(),
        object: "model",
        created: config.created,
        owned_by: "phalanx",
        max_model_len: config.context,
    }
}
