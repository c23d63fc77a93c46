//! Answers as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream::{self, BoxStream, SelectAll};
use serde::Serialize;

use super::choice::{Choice, ChoiceEvent, Piece, total_usage};
use super::error::ApiError;
use super::random_id;
use super::types::{Chunk, ChunkChoice, Delta, FinishReason, FunctionDelta, Head, Logprobs, ToolCallDelta, Usage};
use crate::harmony::TurnDelta;

/// Asks proxies to pass each event on at once.
const NO_BUFFERING: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

/// Streams `choices`. When the client leaves, the stream is dropped and the choices with it.
pub(super) fn respond(head: Head, choices: Vec<Choice>, include_usage: bool, keep_alive: Duration) -> Response {
    let transcript = Transcript::new(head, choices, include_usage);
    let events = stream::unfold(transcript, async |mut transcript| {
        let event = transcript.next().await?;
        Some((Ok::<_, Infallible>(event), transcript))
    });
    let keep_alive = KeepAlive::new().interval(keep_alive).text("keep-alive");
    let no_cache = (CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    ([no_cache, NO_BUFFERING], Sse::new(events).keep_alive(keep_alive)).into_response()
}

/// What is still to be sent.
struct Transcript {
    head: Head,
    include_usage: bool,
    choices: SelectAll<BoxStream<'static, (u32, ChoiceEvent)>>,
    usages: Vec<Usage>,
    queue: VecDeque<Event>,
    ended: bool,
}

impl Transcript {
    fn new(head: Head, choices: Vec<Choice>, include_usage: bool) -> Self {
        let indices = 0..choices.len() as u32;
        let choices = indices.clone().zip(choices).map(|(index, choice)| {
            let next = move |mut choice: Choice| async move { Some(((index, choice.next().await?), choice)) };
            stream::unfold(choice, next).boxed()
        });
        let choices = stream::select_all(choices);
        let (usages, queue) = (Vec::new(), VecDeque::new());
        let mut transcript = Self { head, include_usage, choices, usages, queue, ended: false };
        for index in indices {
            let begin = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            transcript.push_delta(index, begin, None, None);
        }
        transcript
    }

    /// The next event, or none after the last.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.choices.next().await {
                Some((index, event)) => self.push(index, event),
                None => self.finish(),
            }
        }
    }

    fn push(&mut self, index: u32, event: ChoiceEvent) {
        match event {
            ChoiceEvent::Piece(piece) => drop(self.push_piece(index, piece)),
            ChoiceEvent::Finished(piece, reason, usage) => {
                let logprobs = self.push_piece(index, piece);
                self.push_delta(index, Delta::default(), logprobs, Some(reason));
                self.usages.push(usage);
            }
            ChoiceEvent::Failed(error) => {
                tracing::warn!(id = self.head.id, %error, "a stream ends with an error");
                self.queue.push_back(json_event(&ApiError::from(error).envelope()));
                self.choices.clear();
                self.ended = true;
            }
        }
    }

    fn finish(&mut self) {
        if self.include_usage {
            let usage = Some(Some(total_usage(self.usages.drain(..))));
            self.queue.push_back(json_event(&Chunk { head: &self.head, choices: Vec::new(), usage }));
        }
        self.queue.push_back(Event::default().data("[DONE]"));
        self.ended = true;
    }

    /// Logprobs go with the first piece of content, and are given back if there is none.
    fn push_piece(&mut self, index: u32, piece: Piece) -> Option<Logprobs> {
        let mut logprobs = Some(piece.logprobs).filter(|entries| !entries.is_empty()).map(Logprobs::new);
        for delta in piece.deltas {
            let of_delta = if matches!(delta, TurnDelta::Content(_)) { logprobs.take() } else { None };
            self.push_delta(index, wire_delta(delta), of_delta, None);
        }
        logprobs
    }

    fn push_delta(
        &mut self,
        index: u32,
        delta: Delta,
        logprobs: Option<Logprobs>,
        finish_reason: Option<FinishReason>,
    ) {
        let choices = vec![ChunkChoice { index, delta, logprobs, finish_reason }];
        let usage = self.include_usage.then_some(None);
        self.queue.push_back(json_event(&Chunk { head: &self.head, choices, usage }));
    }
}

fn wire_delta(delta: TurnDelta) -> Delta {
    match delta {
        TurnDelta::Reasoning(text) => {
            Delta { reasoning: Some(text.clone()), reasoning_content: Some(text), ..Delta::default() }
        }
        TurnDelta::Content(text) => Delta { content: Some(text), ..Delta::default() },
        TurnDelta::ToolCall { index, name } => {
            let function = FunctionDelta { name: Some(name), arguments: String::new() };
            let call = ToolCallDelta { index, id: Some(random_id("call_")), kind: Some("function"), function };
            Delta { tool_calls: Some([call]), ..Delta::default() }
        }
        TurnDelta::Arguments { index, text } => {
            let function = FunctionDelta { name: None, arguments: text };
            Delta { tool_calls: Some([ToolCallDelta { index, id: None, kind: None, function }]), ..Delta::default() }
        }
    }
}

fn json_event(value: &impl Serialize) -> Event {
    Event::default().json_data(value).expect("these objects have only string keys, and JSON has no line breaks")
}
