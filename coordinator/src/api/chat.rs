//! `POST /v1/chat/completions`.

use std::collections::HashSet;
use std::time::{Instant, SystemTime};

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use phalanx_proto::{Sampling, TokenId};
use tokio::sync::oneshot;

use super::auth::Tenant;
use super::choice::{Choice, ChoiceEvent, Piece, total_usage};
use super::error::ApiError;
use super::request::ChatRequest;
use super::types::{
    Completion, CompletionChoice, FunctionCall, Head, Logprobs, Message, TokenLogprob, ToolCall, Usage,
};
use super::{ApiConfig, App, RequestId, body, models, random, random_id, stream};
use crate::engine_client::{EngineError, GenerateRequest, SubmitError};
use crate::harmony::{self, Bounds, Prompt, TurnDelta, TurnReader, special};

/// Answers in one piece, or with a stream of pieces.
pub(super) async fn completions(
    State(app): State<App>,
    Extension(Tenant(tenant)): Extension<Tenant>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let bytes = body::read_json(request, &app.config().limits).await?;
    let (request, prompt) = read(app.clone(), bytes).await?;
    let prompt_tokens = u32::try_from(prompt.tokens.len()).unwrap_or(u32::MAX);
    let max_tokens = max_tokens(&request, prompt_tokens, app.config())?;
    let choosing = &request.choosing;
    let seed = if choosing.seeded { choosing.sampling.seed } else { random() };
    tracing::info!(request_id, tenant, prompt_tokens, max_tokens, seed, choices = request.choices, "chat completion");

    let sequence = |choice| GenerateRequest {
        request_id: format!("{request_id}/{choice}"),
        prompt: prompt.tokens.clone(),
        max_tokens,
        sampling: Sampling { seed, choice, ..choosing.sampling },
        bias: choosing.bias.clone(),
        stop_tokens: if choosing.ignore_eos { Vec::new() } else { stop_tokens(app.config()) },
        tenant: tenant.clone(),
        class: choosing.class,
        salt: choosing.salt(&tenant),
    };
    let generations = try_join_all((0..request.choices).map(|choice| app.engine().submit(sequence(choice)))).await?;
    app.metrics().asked(request.choices, max_tokens);
    let choices = generations.into_iter().map(|generation| {
        let reader = TurnReader::new(app.tokenizer(), prompt.start, prompt.may_call);
        let logprobs = request.choosing.sampling.logprobs.map(|_| app.tokenizer());
        let clock = (app.metrics().clone(), arrived);
        Choice::new(generation, reader, &request.stops, (prompt_tokens, logprobs), clock)
    });
    let choices: Vec<Choice> = choices.collect();
    let head = head(&app, if request.stream { "chat.completion.chunk" } else { "chat.completion" });
    if request.stream {
        return Ok(stream::respond(head, choices, request.include_usage, app.config().limits.keep_alive));
    }
    let (choices, usages): (Vec<_>, Vec<_>) =
        try_join_all((0..).zip(choices).map(|(index, choice)| collect(index, choice))).await?.into_iter().unzip();
    Ok(Json(Completion { head, choices, usage: total_usage(usages) }).into_response())
}

/// Parses the body and renders the prompt, on a thread where nobody's tokens wait for it, for as long as the client
/// waits.
async fn read(app: App, bytes: Vec<u8>) -> Result<(ChatRequest, Prompt), ApiError> {
    let wait = app.config().limits.encoder_wait;
    let permit = tokio::time::timeout(wait, app.encoders().acquire_owned()).await.map_err(|_| {
        let retry_after_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        SubmitError::QueueFull { retry_after_ms }
    })?;
    let permit = permit.expect("the semaphore is never closed");
    let (reply, answer) = oneshot::channel();
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let read = read_now(&app, &bytes, &|| !reply.is_closed());
        // Nobody waits for it if the client has left.
        drop(reply.send(read));
    });
    answer.await.map_err(|_| ApiError::internal("the request could not be read, please report this"))?
}

fn read_now(app: &App, bytes: &[u8], wanted: &dyn Fn() -> bool) -> Result<(ChatRequest, Prompt), ApiError> {
    let config = app.config();
    let request = ChatRequest::parse(&body::parse_json(bytes)?, config)?;
    models::check(app, &request.model)?;
    let bounds = Bounds { tokens: config.context as usize, wanted };
    let prompt = harmony::prompt(app.tokenizer(), &request.messages, bounds).ok_or_else(|| {
        let context = config.context;
        ApiError::context_length(format!(
            "this model's context is {context} tokens, but messages and tools take more, shorten them"
        ))
    })?;
    Ok((request, prompt))
}

/// Most tokens of each choice. What cannot fit the context is refused here, before it takes a place in the queue.
fn max_tokens(request: &ChatRequest, prompt: u32, config: &ApiConfig) -> Result<u32, ApiError> {
    let context = config.context;
    let room = context.saturating_sub(prompt);
    let wanted = request.max_tokens.unwrap_or_else(|| room.max(1));
    if wanted <= room {
        return Ok(wanted);
    }
    Err(ApiError::context_length(format!(
        "this model's context is {context} tokens, but the messages take {prompt} and the completion may take {wanted}, \
         shorten either"
    )))
}

fn stop_tokens(config: &ApiConfig) -> Vec<TokenId> {
    let mut seen = HashSet::new();
    special::STOP.iter().chain(&config.eos).copied().filter(|token| seen.insert(*token)).collect()
}

fn head(app: &App, object: &'static str) -> Head {
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Head {
        id: random_id("chatcmpl-"),
        object,
        created: created.as_secs(),
        model: app.config().served_model_name.clone(),
        system_fingerprint: app.engine().status().numerics.map(|numerics| format!("fp_{numerics}")),
    }
}

/// Waits for the whole of a choice.
async fn collect(index: u32, mut choice: Choice) -> Result<(CompletionChoice, Usage), ApiError> {
    let wants_logprobs = choice.wants_logprobs();
    let mut answer = Answer::default();
    while let Some(event) = choice.next().await {
        match event {
            ChoiceEvent::Piece(piece) => answer.extend(piece),
            ChoiceEvent::Finished(piece, finish_reason, usage) => {
                answer.extend(piece);
                let logprobs = wants_logprobs.then(|| Logprobs::new(std::mem::take(&mut answer.logprobs)));
                return Ok((CompletionChoice { index, message: answer.message(), logprobs, finish_reason }, usage));
            }
            ChoiceEvent::Failed(error) => return Err(error.into()),
        }
    }
    Err(EngineError::Gone.into())
}

/// An answer that grows.
#[derive(Debug, Default)]
struct Answer {
    reasoning: String,
    content: String,
    tool_calls: Vec<ToolCall>,
    logprobs: Vec<TokenLogprob>,
}

impl Answer {
    fn extend(&mut self, piece: Piece) {
        self.logprobs.extend(piece.logprobs);
        for delta in piece.deltas {
            match delta {
                TurnDelta::Reasoning(text) => self.reasoning += &text,
                TurnDelta::Content(text) => self.content += &text,
                TurnDelta::ToolCall { name, .. } => self.tool_calls.push(ToolCall {
                    id: random_id("call_"),
                    kind: "function",
                    function: FunctionCall { name, arguments: String::new() },
                }),
                TurnDelta::Arguments { index, text } => {
                    if let Some(call) = self.tool_calls.get_mut(index) {
                        call.function.arguments += &text;
                    }
                }
            }
        }
    }

    fn message(self) -> Message {
        let Self { reasoning, content, tool_calls, .. } = self;
        let reasoning = Some(reasoning).filter(|text| !text.is_empty());
        let only_calls = content.is_empty() && !tool_calls.is_empty();
        Message {
            role: "assistant",
            content: Some(content).filter(|_| !only_calls),
            refusal: (),
            reasoning_content: reasoning.clone(),
            reasoning,
            tool_calls,
        }
    }
}
