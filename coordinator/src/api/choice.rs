//! One choice of an answer: tokens in, pieces of the answer out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use phalanx_proto::{TokenId, TokenLogprobs};

use super::types::{CompletionDetails, FinishReason, LikelyToken, PromptDetails, TokenLogprob, Usage};
use crate::engine_client::{self, EngineError, GenerateEvent, Generation, Stamped};
use crate::harmony::{StopScanner, Tokenizer, TurnDelta, TurnReader, special};
use crate::metrics::{Metrics, Outcome};

/// Stands for what is less likely, and for what JSON cannot say.
const LOGPROB_MIN: f32 = -9999.0;

/// What a choice tells.
#[derive(Debug)]
pub(super) enum ChoiceEvent {
    /// More of the answer; possibly nothing to show yet.
    Piece(Piece),
    /// The answer is complete; the last event.
    Finished(Piece, FinishReason, Usage),
    /// The engine failed; the last event.
    Failed(EngineError),
}

/// A piece of an answer.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) deltas: Vec<TurnDelta>,
    /// Of the tokens whose text begins in the content of `deltas`.
    pub(super) logprobs: Vec<TokenLogprob>,
}

/// Reads a generation. Dropping it before the end cancels the generation.
#[derive(Debug)]
pub(super) struct Choice {
    generation: Generation,
    /// Gone when the answer is complete.
    reader: Option<TurnReader>,
    stops: StopScanner,
    calls: bool,
    logprobs: Option<Likelihoods>,
    usage: Counts,
    clock: Clock,
}

/// Logprobs of tokens of the content that have not been shown yet.
#[derive(Debug)]
struct Likelihoods {
    tokenizer: Tokenizer,
    /// With the byte of the content at which each token begins.
    waiting: VecDeque<(usize, TokenLogprob)>,
    /// Bytes of the content read, and shown.
    read: usize,
    shown: usize,
}

impl Likelihoods {
    /// A token of the content.
    fn read(&mut self, token: TokenId, logprobs: &TokenLogprobs) {
        let likely = |token: TokenId, logprob: f32| {
            let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            LikelyToken { token: text, logprob: logprob.max(LOGPROB_MIN), bytes }
        };
        let entry = TokenLogprob {
            token: likely(token, logprobs.logprob),
            top_logprobs: logprobs.top.iter().map(|&(token, logprob)| likely(token, logprob)).collect(),
        };
        let len = entry.token.bytes.len();
        self.waiting.push_back((self.read, entry));
        self.read += len;
    }

    /// More of the content is shown: the tokens that begin in it.
    fn show(&mut self, bytes: usize) -> Vec<TokenLogprob> {
        self.shown += bytes;
        let count = self.waiting.partition_point(|(start, _)| *start < self.shown);
        self.waiting.drain(..count).map(|(_, entry)| entry).collect()
    }
}

/// Tokens so far.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    prompt: u32,
    cached: u32,
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
    /// A choice of a request that `arrived` with a prompt of so many tokens; logprobs, if asked for, need the tokenizer.
    pub(super) fn new(
        generation: Generation,
        reader: TurnReader,
        stops: &[String],
        (prompt_tokens, logprobs): (u32, Option<Tokenizer>),
        (metrics, arrived): (Arc<Metrics>, Instant),
    ) -> Self {
        let cell = generation.cell();
        let likelihoods = |tokenizer| Likelihoods { tokenizer, waiting: VecDeque::new(), read: 0, shown: 0 };
        Self {
            generation,
            logprobs: logprobs.map(likelihoods),
            reader: Some(reader),
            stops: StopScanner::new(stops),
            calls: false,
            usage: Counts { prompt: prompt_tokens, ..Counts::default() },
            clock: Clock { metrics, cell, arrived, last_tokens: None, ended: false },
        }
    }

    /// Whether logprobs were asked for.
    pub(super) const fn wants_logprobs(&self) -> bool {
        self.logprobs.is_some()
    }

    /// The next event; none after the last.
    pub(super) async fn next(&mut self) -> Option<ChoiceEvent> {
        self.reader.as_ref()?;
        let Stamped { at, event } = self.generation.next().await?;
        let mut reader = self.reader.take()?;
        match event {
            GenerateEvent::Started { cached_tokens } => {
                self.usage.cached = cached_tokens;
                self.reader = Some(reader);
                Some(ChoiceEvent::Piece(Piece::default()))
            }
            GenerateEvent::Tokens { tokens, logprobs } => {
                self.clock.tokens(tokens.len() as u64, at);
                let mut piece = Piece::default();
                let mut logprobs = logprobs.iter();
                for token in tokens {
                    let likely = logprobs.next();
                    if let (Some(likelihoods), Some(likely), true) =
                        (&mut self.logprobs, likely, reader.answers() && token < special::FIRST_SPECIAL)
                    {
                        likelihoods.read(token, likely);
                    }
                    let read = reader.push(token);
                    self.usage.token(&read);
                    read.into_iter().for_each(|delta| self.show(delta, &mut piece));
                    if self.stops.stopped() {
                        self.clock.metrics.repaired(reader.repairs());
                        self.generation.complete();
                        return Some(self.finished(piece, FinishReason::Stop, at));
                    }
                }
                self.reader = Some(reader);
                Some(ChoiceEvent::Piece(piece))
            }
            GenerateEvent::Finished { reason } => {
                let mut read = Vec::new();
                let reason = match reason {
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
                let mut piece = Piece::default();
                read.into_iter().chain(last).for_each(|delta| self.show(delta, &mut piece));
                let held = self.stops.finish();
                if !held.is_empty() {
                    piece.deltas.push(TurnDelta::Content(held));
                }
                if let Some(likelihoods) = &mut self.logprobs {
                    piece.logprobs.extend(likelihoods.waiting.drain(..).map(|(_, entry)| entry));
                }
                let reason = if self.calls && reason == FinishReason::Stop { FinishReason::ToolCalls } else { reason };
                Some(self.finished(piece, reason, at))
            }
            GenerateEvent::Failed(error) => Some(self.failed(error, at)),
        }
    }

    /// Adds what may be shown to a piece, now that stop strings were looked for. Nothing follows a stop string.
    fn show(&mut self, delta: TurnDelta, piece: &mut Piece) {
        if self.stops.stopped() {
            return;
        }
        let delta = match delta {
            TurnDelta::Content(text) => {
                let text = self.stops.push(&text);
                if text.is_empty() {
                    return;
                }
                if let Some(likelihoods) = &mut self.logprobs {
                    piece.logprobs.extend(likelihoods.show(text.len()));
                }
                TurnDelta::Content(text)
            }
            TurnDelta::ToolCall { .. } => {
                self.calls = true;
                delta
            }
            TurnDelta::Reasoning(_) | TurnDelta::Arguments { .. } => delta,
        };
        piece.deltas.push(delta);
    }

    fn finished(&mut self, piece: Piece, reason: FinishReason, at: Instant) -> ChoiceEvent {
        let outcome = if reason == FinishReason::Length { Outcome::Length } else { Outcome::Stop };
        self.clock.end(outcome, at);
        ChoiceEvent::Finished(piece, reason, self.usage.total())
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

    fn total(self) -> Usage {
        Usage {
            prompt_tokens: self.prompt,
            completion_tokens: self.completion,
            total_tokens: self.prompt + self.completion,
            prompt_tokens_details: PromptDetails { cached_tokens: self.cached },
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
