//! How API tasks reach the engines of the cells.
//!
//! The engine of a cell is owned by one driver task. Requests go to it through a bounded queue, tokens come back on a
//! channel for each request, and what the cell is doing is published on a watch channel. [`channels`] makes both ends. The
//! router, which picks the cell, is shared by all API tasks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use phalanx_planner::Class;
use phalanx_planner::prefix::{BlockHash, chain};
use phalanx_planner::router::{Load, Router};
use phalanx_proto::{Epoch, Limits, Rank, Sampling, SeqId, TokenId, TokenLogprobs};
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// Longest wait for the engine's answer to a submission.
pub const SUBMIT_WAIT_MAX: Duration = Duration::from_secs(10);
/// When to come again if a cell has not said so, in milliseconds.
pub(crate) const RETRY_AFTER_MS: u64 = 1000;
/// Blocks of prompts of which the router remembers where they went.
const ROUTER_BLOCKS: usize = 1 << 18;

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
    /// It left the queue; the first event, and there is one at most.
    Started {
        /// Prompt tokens whose keys and values are reused.
        cached_tokens: u32,
    },
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
        matches!(self, Self::Finished { .. } | Self::Failed(_))
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

impl CellState {
    /// Every name, in the order of a cell's life.
    pub const NAMES: [&str; 4] = ["loading", "ok", "draining", "failed"];

    /// The name in health reports and metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Loading(_) => Self::NAMES[0],
            Self::Ready => Self::NAMES[1],
            Self::Draining => Self::NAMES[2],
            Self::Failed(_) => Self::NAMES[3],
        }
    }
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkerState {
    /// It marches.
    Ready,
    /// It is gone.
    Lost,
}

impl WorkerState {
    /// Every state, in the order of a worker's life.
    pub const ALL: [Self; 2] = [Self::Ready, Self::Lost];

    /// The name in health reports and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
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
    /// Tokens to be read before a new request's first, sequences counted as the router does.
    pub load: u64,
    /// When a refused client should come again, in milliseconds.
    pub retry_after_ms: u64,
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
            load: 0,
            retry_after_ms: RETRY_AFTER_MS,
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
    cells: Arc<[CellClient]>,
    router: Arc<Mutex<Router>>,
    next_seq: Arc<AtomicU64>,
}

/// The way to one cell.
#[derive(Debug)]
struct CellClient {
    submissions: mpsc::Sender<Submission>,
    status: watch::Receiver<CellStatus>,
    hangups: Arc<Hangups>,
    answers: AtomicBool,
    /// Tokens of requests that the published status does not count yet.
    in_transit: AtomicU64,
}

/// The engine's end, for one cell.
#[derive(Debug)]
pub struct EngineCommands {
    /// Requests to admit, each to be answered soon.
    pub submissions: mpsc::Receiver<Submission>,
    /// Where the driver publishes what the cell is doing.
    pub status: watch::Sender<CellStatus>,
    /// Generations that nobody listens to any more.
    pub hangups: Arc<Hangups>,
}

/// A request on its way to the engine.
#[derive(Debug)]
pub struct Submission {
    /// The sequence it will be.
    pub seq: SeqId,
    /// What to generate.
    pub request: GenerateRequest,
    /// Where its events go.
    pub events: EventSender,
    /// Whether it was admitted.
    pub reply: oneshot::Sender<Result<(), SubmitError>>,
}

/// A sequence whose events nobody awaits any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hangup {
    /// Which.
    pub seq: SeqId,
    /// Whether the answer is complete, and not abandoned.
    pub complete: bool,
}

/// Sequences whose [`Generation`] was completed or dropped before its end.
#[derive(Debug, Default)]
pub struct Hangups {
    hangups: Mutex<Vec<Hangup>>,
    notify: Notify,
}

impl Hangups {
    fn add(&self, hangup: Hangup) {
        self.hangups.lock().unwrap_or_else(PoisonError::into_inner).push(hangup);
        self.notify.notify_one();
    }

    /// Those since the last call; as many at most as there are open requests.
    #[must_use]
    pub fn take(&self) -> Vec<Hangup> {
        std::mem::take(&mut *self.hangups.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until there may be some.
    pub async fn wait(&self) {
        self.notify.notified().await;
    }
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
    cell: usize,
    seq: SeqId,
    events: mpsc::Receiver<Stamped>,
    hangups: Arc<Hangups>,
    ended: bool,
}

impl Generation {
    /// The cell that serves it.
    #[must_use]
    pub const fn cell(&self) -> usize {
        self.cell
    }

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

    /// Ends the generation: the answer is complete without the tokens to come.
    pub fn complete(&mut self) {
        self.hang_up(true);
    }

    fn hang_up(&mut self, complete: bool) {
        if !std::mem::replace(&mut self.ended, true) {
            self.events.close();
            self.hangups.add(Hangup { seq: self.seq, complete });
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.hang_up(false);
    }
}

/// Makes both ends for one cell; at most `capacity` submissions await the driver's attention.
#[must_use]
pub fn channel(capacity: usize) -> (EngineClient, EngineCommands) {
    let (client, mut commands) = channels(1, capacity);
    (client, commands.remove(0))
}

/// Makes both ends for `cells` cells; at most `capacity` submissions await the attention of each driver.
#[must_use]
pub fn channels(cells: usize, capacity: usize) -> (EngineClient, Vec<EngineCommands>) {
    let (cells, commands): (Vec<_>, Vec<_>) = (0..cells)
        .map(|_| {
            let (submit, submissions) = mpsc::channel(capacity.max(1));
            let (publish, status) = watch::channel(CellStatus::loading("waiting for the workers"));
            let hangups = Arc::new(Hangups::default());
            let cell = CellClient {
                submissions: submit,
                status,
                hangups: Arc::clone(&hangups),
                answers: AtomicBool::new(true),
                in_transit: AtomicU64::new(0),
            };
            (cell, EngineCommands { submissions, status: publish, hangups })
        })
        .unzip();
    let client = EngineClient {
        cells: cells.into(),
        router: Arc::new(Mutex::new(Router::new(Limits::BLOCK_SIZE, ROUTER_BLOCKS))),
        next_seq: Arc::new(AtomicU64::new(1)),
    };
    (client, commands)
}

/// Tokens on their way to a cell, for as long as somebody waits for their admission.
struct InTransit<'a>(&'a AtomicU64, u64);

impl<'a> InTransit<'a> {
    fn new(count: &'a AtomicU64, tokens: u64) -> Self {
        count.fetch_add(tokens, Ordering::Relaxed);
        Self(count, tokens)
    }
}

impl Drop for InTransit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl CellClient {
    fn load(&self) -> Load {
        let status = self.status.borrow();
        let open = status.state == CellState::Ready && !self.submissions.is_closed();
        Load { open, tokens: status.load + self.in_transit.load(Ordering::Relaxed) }
    }
}

impl EngineClient {
    /// Hands a request to the engine of a cell and waits until it is admitted or refused.
    pub async fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        let index = self.choose(&request)?;
        let cell = &self.cells[index];
        let seq = SeqId(self.next_seq.fetch_add(1, Ordering::Relaxed));
        // The start, each token by itself, and the end.
        let room = usize::try_from(request.max_tokens).unwrap_or(usize::MAX).saturating_add(2);
        let (sender, events) = mpsc::channel(room.min(tokio::sync::Semaphore::MAX_PERMITS));
        let (reply, answer) = oneshot::channel();
        let tokens = request.prompt.len() as u64;
        let submission = Submission { seq, request, events: EventSender(sender), reply };
        // From here on whoever gives up waiting takes the request back.
        let mut generation = Generation { cell: index, seq, events, hangups: Arc::clone(&cell.hangups), ended: true };
        cell.submissions.try_send(submission).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                SubmitError::QueueFull { retry_after_ms: cell.status.borrow().retry_after_ms }
            }
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        generation.ended = false;
        let in_transit = InTransit::new(&cell.in_transit, tokens);
        let answer = tokio::time::timeout(SUBMIT_WAIT_MAX, answer).await;
        drop(in_transit);
        cell.answers.store(answer.is_ok(), Ordering::Relaxed);
        match answer {
            Ok(Ok(Ok(()))) => Ok(generation),
            Ok(Ok(Err(refused))) => {
                generation.ended = true;
                Err(refused)
            }
            Ok(Err(_)) => Err(stopped()),
            Err(_) => Err(SubmitError::Unavailable { reason: "the engine does not answer".to_owned() }),
        }
    }

    /// The cell for a request.
    fn choose(&self, request: &GenerateRequest) -> Result<usize, SubmitError> {
        let loads: Vec<Load> = self.cells.iter().map(CellClient::load).collect();
        // What cells compute with is the same for all; only the salt divides.
        let chain = chain(&request.prompt, Limits::BLOCK_SIZE, BlockHash::root(request.salt, 0));
        let mut router = self.router.lock().unwrap_or_else(PoisonError::into_inner);
        router.choose(&chain, &loads).ok_or_else(|| match self.status().state {
            CellState::Draining => SubmitError::Draining,
            CellState::Loading(reason) | CellState::Failed(reason) => SubmitError::Unavailable { reason },
            CellState::Ready => stopped(),
        })
    }

    /// What each cell is doing.
    #[must_use]
    pub fn cells(&self) -> Vec<CellStatus> {
        self.cells.iter().map(|cell| cell.status.borrow().clone()).collect()
    }

    /// What all cells together are doing: ready if one is, and as long without progress as the worst that is busy.
    #[must_use]
    pub fn status(&self) -> CellStatus {
        self.cells().into_iter().reduce(CellStatus::with).unwrap_or_else(|| CellStatus::loading("there is no cell"))
    }

    /// Whether every driver lives and answered its last submission in time. One whose cell has failed answers, too; those
    /// of a server that drains end one by one.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        let answers = |cell: &CellClient| !cell.submissions.is_closed() && cell.answers.load(Ordering::Relaxed);
        self.cells.iter().all(answers) || self.cells().iter().any(|cell| cell.state == CellState::Draining)
    }
}

impl CellStatus {
    /// Both together.
    fn with(mut self, other: Self) -> Self {
        let rank = |state: &CellState| match state {
            CellState::Ready => 0,
            CellState::Draining => 1,
            CellState::Loading(_) => 2,
            CellState::Failed(_) => 3,
        };
        self.progress_at = match (self.is_busy(), other.is_busy()) {
            (true, true) => self.progress_at.min(other.progress_at),
            (true, false) => self.progress_at,
            (false, true) => other.progress_at,
            (false, false) => self.progress_at.max(other.progress_at),
        };
        if rank(&other.state) < rank(&self.state) {
            self.state = other.state;
        }
        self.workers.extend(other.workers);
        self.epoch = self.epoch.max(other.epoch);
        self.numerics = self.numerics.or(other.numerics);
        self.steps += other.steps;
        self.running += other.running;
        self.waiting += other.waiting;
        self.load += other.load;
        self
    }
}

fn stopped() -> SubmitError {
    SubmitError::Unavailable { reason: "the engine has stopped".to_owned() }
}
