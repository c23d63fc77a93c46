//! How API tasks reach a cell's engine.
//!
//! The engine is owned by one driver task. Requests go to it through a bounded queue, tokens come back on a channel for
//! each request, and what the cell is doing is published on a watch channel. [`channel`] makes both ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use phalanx_planner::Class;
use phalanx_proto::{Epoch, Rank, Sampling, TokenId, TokenLogprobs};
use tokio::sync::{mpsc, oneshot, watch};

/// Longest wait for the engine's answer to a submission.
pub const SUBMIT_WAIT_MAX: Duration = Duration::from_secs(10);
/// When to come again after the queue of submissions was full, in milliseconds.
const RETRY_AFTER_MS: u64 = 1000;

/// One sequence to generate: one choice of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// Names the sequence in logs.
    pub request_id: String,
    /// What the model reads; at least one token.
    pub prompt: Vec<TokenId>,
    /// Most tokens to generate; at least one.
    pub max_tokens: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Added to the logits of these tokens, ascending.
    pub bias: Vec<(TokenId, f32)>,
    /// Tokens that end the generation; they are named by [`FinishReason::Stop`] and not among the tokens.
    pub stop_tokens: Vec<TokenId>,
    /// On whose behalf.
    pub tenant: String,
    /// How urgent it is.
    pub class: Class,
    /// Only requests with the same salt share cached prefixes; made of tenant and `cache_salt`.
    pub salt: u64,
}

/// Why a generation ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model wrote this stop token.
    Stop(TokenId),
    /// `max_tokens` were generated.
    Length,
    /// The [`Generation`] was dropped.
    Cancelled,
}

/// Why a generation ended badly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A worker that the cell needs is gone.
    #[error("worker {rank} at {address} was lost: {reason}")]
    WorkerLost {
        /// Its rank.
        rank: Rank,
        /// Its address.
        address: String,
        /// How that showed.
        reason: String,
    },
    /// The engine gave up for another reason.
    #[error("the engine failed: {reason}")]
    Failed {
        /// What happened.
        reason: String,
    },
    /// The engine ended without a last word.
    #[error("the engine stopped before the request was finished")]
    Gone,
}

/// What a generation tells.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerateEvent {
    /// The next tokens, at least one.
    Tokens {
        /// The tokens.
        tokens: Vec<TokenId>,
        /// How likely each was; empty unless asked for.
        logprobs: Vec<TokenLogprobs>,
    },
    /// It ended well; the last event.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// Prompt tokens whose keys and values were reused.
        cached_tokens: u32,
    },
    /// It ended badly; the last event.
    Failed(EngineError),
}

/// An event and when it happened, however late it is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Stamped {
    /// When the engine sent it.
    pub at: Instant,
    /// What happened.
    pub event: GenerateEvent,
}

impl GenerateEvent {
    /// Whether no event follows this one.
    #[must_use]
    pub const fn is_last(&self) -> bool {
        !matches!(self, Self::Tokens { .. })
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many requests wait already.
    #[error("too many requests are waiting, try again in {retry_after_ms} ms")]
    QueueFull {
        /// When to try again, in milliseconds.
        retry_after_ms: u64,
    },
    /// The sequence would not fit.
    #[error(
        "this model's context is {context} tokens, but the request asks for {prompt} of prompt and {max_tokens} of \
         completion, shorten either"
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt: u32,
        /// Tokens asked for.
        max_tokens: u32,
        /// Tokens of a sequence at most.
        context: u32,
    },
    /// The cell takes no more requests because it is being stopped.
    #[error("the server is shutting down, send the request elsewhere")]
    Draining,
    /// The cell cannot serve now.
    #[error("the model cannot serve now: {reason}")]
    Unavailable {
        /// Why, naming the worker if it is one.
        reason: String,
    },
}

/// What a cell is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CellState {
    /// Workers join and load; what is awaited.
    Loading(String),
    /// Requests are served.
    Ready,
    /// Requests taken are finished, new ones refused.
    Draining,
    /// Nothing can be served; why, naming the worker.
    Failed(String),
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkerState {
    /// It has not answered yet.
    Joining,
    /// It reads weights.
    Loading,
    /// It marches.
    Ready,
    /// It finishes its sequences and leaves.
    Draining,
    /// It is gone.
    Lost,
}

impl WorkerState {
    /// Every state, in the order of a worker's life.
    pub const ALL: [Self; 5] = [Self::Joining, Self::Loading, Self::Ready, Self::Draining, Self::Lost];

    /// The name in health reports and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Lost => "lost",
        }
    }
}

/// One worker of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerStatus {
    /// Its rank.
    pub rank: Rank,
    /// Its address.
    pub address: String,
    /// What it is doing.
    pub state: WorkerState,
}

/// What a cell is doing, as its driver published it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CellStatus {
    /// The cell as a whole.
    pub state: CellState,
    /// Its workers by rank.
    pub workers: Vec<WorkerStatus>,
    /// The epoch it marches in.
    pub epoch: Epoch,
    /// Two servers with the same one write the same tokens; absent until workers have joined.
    pub numerics: Option<String>,
    /// Steps applied since the start.
    pub steps: u64,
    /// When a step was applied last or, if that is later, when the cell last went from idle to busy.
    pub progress_at: Instant,
    /// Sequences that take part in steps.
    pub running: u32,
    /// Sequences admitted that no step has touched yet.
    pub waiting: u32,
}

impl CellStatus {
    /// A cell of which nothing is known yet.
    #[must_use]
    pub fn loading(waiting_for: impl Into<String>) -> Self {
        Self {
            state: CellState::Loading(waiting_for.into()),
            workers: Vec::new(),
            epoch: Epoch::default(),
            numerics: None,
            steps: 0,
            progress_at: Instant::now(),
            running: 0,
            waiting: 0,
        }
    }

    /// Whether there is work that steps should advance.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        self.running > 0 || self.waiting > 0
    }
}

/// The API's end. Clones share it.
#[derive(Clone, Debug)]
pub struct EngineClient {
    submissions: mpsc::Sender<Submission>,
    status: watch::Receiver<CellStatus>,
    answers: Arc<AtomicBool>,
}

/// The engine's end.
#[derive(Debug)]
pub struct EngineCommands {
    /// Requests to admit, each to be answered soon.
    pub submissions: mpsc::Receiver<Submission>,
    /// Where the driver publishes what the cell is doing.
    pub status: watch::Sender<CellStatus>,
}

/// A request on its way to the engine.
#[derive(Debug)]
pub struct Submission {
    /// What to generate.
    pub request: GenerateRequest,
    /// Where its events go.
    pub events: EventSender,
    /// Whether it was admitted.
    pub reply: oneshot::Sender<Result<(), SubmitError>>,
}

/// Where the engine puts the events of one generation.
#[derive(Debug)]
pub struct EventSender(mpsc::Sender<Stamped>);

impl EventSender {
    /// Sends the next event without waiting: there is room for every event that a request can have. Returns false when
    /// nobody listens any more, and the request should end.
    pub fn send(&self, event: GenerateEvent) -> bool {
        self.0.try_send(Stamped { at: Instant::now(), event }).is_ok()
    }

    /// Whether the [`Generation`] was dropped.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.is_closed()
    }
}

/// A request that was admitted. Dropping it cancels the request in the engine.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::Receiver<Stamped>,
    ended: bool,
}

impl Generation {
    /// The next event; none after the last. An engine that vanishes gives [`EngineError::Gone`].
    pub async fn next(&mut self) -> Option<Stamped> {
        if self.ended {
            return None;
        }
        let gone = || Stamped { at: Instant::now(), event: GenerateEvent::Failed(EngineError::Gone) };
        let stamped = self.events.recv().await.unwrap_or_else(gone);
        self.ended = stamped.event.is_last();
        Some(stamped)
    }
}

/// Makes both ends; at most `capacity` submissions await the driver's attention.
#[must_use]
pub fn channel(capacity: usize) -> (EngineClient, EngineCommands) {
    let (submit, submissions) = mpsc::channel(capacity.max(1));
    let (publish, status) = watch::channel(CellStatus::loading("waiting for the workers"));
    let client = EngineClient { submissions: submit, status, answers: Arc::new(AtomicBool::new(true)) };
    (client, EngineCommands { submissions, status: publish })
}

impl EngineClient {
    /// Hands a request to the engine and waits until it is admitted or refused.
    pub async fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        match self.status.borrow().state.clone() {
            CellState::Ready => {}
            CellState::Draining => return Err(SubmitError::Draining),
            CellState::Loading(reason) | CellState::Failed(reason) => return Err(SubmitError::Unavailable { reason }),
        }
        let room = usize::try_from(request.max_tokens).unwrap_or(usize::MAX).saturating_add(1);
        let (sender, events) = mpsc::channel(room.min(tokio::sync::Semaphore::MAX_PERMITS));
        let (reply, answer) = oneshot::channel();
        let submission = Submission { request, events: EventSender(sender), reply };
        self.submissions.try_send(submission).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SubmitError::QueueFull { retry_after_ms: RETRY_AFTER_MS },
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        let answer = tokio::time::timeout(SUBMIT_WAIT_MAX, answer).await;
        self.answers.store(answer.is_ok(), Ordering::Relaxed);
        match answer {
            Ok(Ok(admitted)) => admitted.map(|()| Generation { events, ended: false }),
            Ok(Err(_)) => Err(stopped()),
            Err(_) => Err(SubmitError::Unavailable { reason: "the engine does not answer".to_owned() }),
        }
    }

    /// What the cell is doing.
    #[must_use]
    pub fn status(&self) -> CellStatus {
        self.status.borrow().clone()
    }

    /// Whether the driver lives and answered the last submission in time.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        !self.submissions.is_closed() && self.answers.load(Ordering::Relaxed)
    }
}

fn stopped() -> SubmitError {
    SubmitError::Unavailable { reason: "the engine has stopped".to_owned() }
}
