//! One choice of an answer: tokens in, pieces of the answer out.

use std::sync::Arc;
use std::time::Instant;

use super::types::{CompletionDetails, FinishReason, PromptDetails, Usage};
use crate::engine_client::{self, EngineError, GenerateEvent, Generation, Stamped};
use crate::harmony::{Start, StopScanner, Tokenizer, TurnDelta, TurnReader, special};
use crate::metrics::{Metrics, Outcome};

/// What a choice tells.
#[derive(Debug)]
pub(super) enum ChoiceEvent {
    /// More of the answer; possibly nothing to show yet.
    Deltas(Vec<TurnDelta>),
    /// The answer is complete; the last event.
    Finished(Vec<TurnDelta>, FinishReason, Usage),
    /// The engine failed; the last event.
    Failed(EngineError),
}

/// Reads a generation. Dropping it before the end cancels the generation.
#[derive(Debug)]
pub(super) struct Choice {
    generation: Generation,
    /// Gone when the answer is complete.
    reader: Option<TurnReader>,
    stops: StopScanner,
    calls: bool,
    usage: Counts,
    clock: Clock,
}

/// Tokens so far.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    prompt: u32,
    completion: u32,
    reasoning: u32,
    /// Tokens since the last that gave a piece of the answer: they belong to the next piece.
    undecided: u32,
}

/// Tells the metrics when tokens came and how it ended.
#[derive(Debug)]
struct Clock {
    metrics: Arc<Metrics>,
    cell: usize,
    arrived: Instant,
    last_tokens: Option<Instant>,
    ended: bool,
}

impl Choice {
    /// A choice of a request that `arrived` with a prompt of so many tokens, which left off at `start`.
    pub(super) fn new(
        generation: Generation,
        (tokenizer, start): (Tokenizer, Start),
        stops: &[String],
        prompt_tokens: u32,
        (metrics, arrived): (Arc<Metrics>, Instant),
    ) -> Self {
        let cell = generation.cell();
        Self {
            generation,
            reader: Some(TurnReader::new(tokenizer, start)),
            stops: StopScanner::new(stops),
            calls: false,
            usage: Counts { prompt: prompt_tokens, ..Counts::default() },
            clock: Clock { metrics, cell, arrived, last_tokens: None, ended: false },
        }
    }

    /// The next event; none after the last.
    pub(super) async fn next(&mut self) -> Option<ChoiceEvent> {
        self.reader.as_ref()?;
        let Stamped { at, event } = self.generation.next().await?;
        let mut reader = self.reader.take()?;
        match event {
            GenerateEvent::Tokens { tokens, .. } => {
                self.clock.tokens(tokens.len() as u64, at);
                let mut deltas = Vec::new();
                for token in tokens {
                    let read = reader.push(token);
                    self.usage.token(&read);
                    deltas.extend(read.into_iter().filter_map(|delta| self.shown(delta)));
                    if self.stops.stopped() {
                        self.clock.metrics.repaired(reader.repairs());
                        return Some(self.finished(deltas, FinishReason::Stop, at, 0));
                    }
                }
                self.reader = Some(reader);
                Some(ChoiceEvent::Deltas(deltas))
            }
            GenerateEvent::Finished { reason, cached_tokens } => {
                let mut read = Vec::new();
                let reason = match reason {
                    engine_client::FinishReason::Cancelled => {
                        let reason = "the server cancelled the request".to_owned();
                        return Some(self.failed(EngineError::Failed { reason }, at));
                    }
                    engine_client::FinishReason::Length => FinishReason::Length,
                    engine_client::FinishReason::Stop(token) => {
                        // Any other token that ends the text is not for the reader: it would take it for text.
                        if token >= special::FIRST_SPECIAL {
                            read = reader.push(token);
                        }
                        self.usage.token(&read);
                        self.clock.tokens(1, at);
                        FinishReason::Stop
                    }
                };
                let (last, turn) = reader.finish();
                self.clock.metrics.repaired(&turn.repairs);
                let mut deltas: Vec<_> = read.into_iter().chain(last).filter_map(|delta| self.shown(delta)).collect();
                let held = self.stops.finish();
                if !held.is_empty() {
                    deltas.push(TurnDelta::Content(held));
                }
                let reason = if self.calls && reason == FinishReason::Stop { FinishReason::ToolCalls } else { reason };
                Some(self.finished(deltas, reason, at, cached_tokens))
            }
            GenerateEvent::Failed(error) => Some(self.failed(error, at)),
        }
    }

    /// What of a piece may be shown, now that stop strings were looked for. Nothing follows a stop string.
    fn shown(&mut self, delta: TurnDelta) -> Option<TurnDelta> {
        match delta {
            _ if self.stops.stopped() => None,
            TurnDelta::Content(text) => {
                Some(self.stops.push(&text)).filter(|text| !text.is_empty()).map(TurnDelta::Content)
            }
            TurnDelta::ToolCall { .. } => {
                self.calls = true;
                Some(delta)
            }
            TurnDelta::Reasoning(_) | TurnDelta::Arguments { .. } => Some(delta),
        }
    }

    fn finished(&mut self, deltas: Vec<TurnDelta>, reason: FinishReason, at: Instant, cached: u32) -> ChoiceEvent {
        let outcome = if reason == FinishReason::Length { Outcome::Length } else { Outcome::Stop };
        self.clock.end(outcome, at);
        ChoiceEvent::Finished(deltas, reason, self.usage.total(cached))
    }

    fn failed(&mut self, error: EngineError, at: Instant) -> ChoiceEvent {
        self.clock.end(Outcome::Error, at);
        ChoiceEvent::Failed(error)
    }
}

impl Counts {
    /// One more token, which gave these pieces.
    fn token(&mut self, deltas: &[TurnDelta]) {
        self.completion += 1;
        self.undecided += 1;
        if let Some(delta) = deltas.first() {
            let tokens = std::mem::take(&mut self.undecided);
            if matches!(delta, TurnDelta::Reasoning(_)) {
                self.reasoning += tokens;
            }
        }
    }

    fn total(self, cached_tokens: u32) -> Usage {
        Usage {
            prompt_tokens: self.prompt,
            completion_tokens: self.completion,
            total_tokens: self.prompt + self.completion,
            prompt_tokens_details: PromptDetails { cached_tokens },
            completion_tokens_details: CompletionDetails { reasoning_tokens: self.reasoning },
        }
    }
}

impl Clock {
    fn tokens(&mut self, count: u64, at: Instant) {
        match self.last_tokens.replace(at) {
            None => self.metrics.cell(self.cell).first_tokens(count, at.saturating_duration_since(self.arrived)),
            Some(before) => self.metrics.cell(self.cell).next_tokens(count, at.saturating_duration_since(before)),
        }
    }

    fn end(&mut self, outcome: Outcome, at: Instant) {
        self.ended = true;
        self.metrics.cell(self.cell).ended(outcome, at.saturating_duration_since(self.arrived));
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Outcome::Abort, Instant::now());
        }
    }
}

/// The usage of a request whose choices used these: they share the prompt.
pub(super) fn total_usage(choices: impl IntoIterator<Item = Usage>) -> Usage {
    choices.into_iter().fold(Usage::default(), |mut total, one| {
        total.prompt_tokens = one.prompt_tokens;
        total.completion_tokens += one.completion_tokens;
        total.total_tokens = total.prompt_tokens + total.completion_tokens;
        let cached = &mut total.prompt_tokens_details.cached_tokens;
        *cached = (*cached).max(one.prompt_tokens_details.cached_tokens);
        total.completion_tokens_details.reasoning_tokens += one.completion_tokens_details.reasoning_tokens;
        total
    })
}
