//! One task for each cell: the sole owner of the cell's engine.
//!
//! Requests come in through [`EngineCommands`], plans go out over a [`CellLink`], as many steps ahead as the engine plans,
//! results come back, events go to the requests they belong to. All decisions are the engine's; this task only carries
//! them out.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use phalanx_planner::{Engine, Event, FinishReason as EngineFinish, Refused, Request, Stats, Want};
use phalanx_proto::{NumericsId, Rank, SeqId, StepPlan, TokenId};
use tokio::sync::watch;

use crate::engine_client::{
    CellState, CellStatus, EngineCommands, EngineError, EventSender, FinishReason, GenerateEvent, Hangup, Submission,
    SubmitError, WorkerState, WorkerStatus,
};
use crate::metrics::{CellMetrics, RequestTimes};
use crate::pace::Pace;
use crate::workers::{CellEvent, CellLink};

/// How long a failed step waits for the news of which worker was lost, before the word of the others is taken.
const BLAME_WAIT: Duration = Duration::from_millis(700);
/// How long beyond a step's deadline its results may be on their way.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// What the driver knows of its cell besides what the engine does.
#[derive(Clone, Debug)]
pub struct CellInfo {
    /// Address of each rank.
    pub addresses: Vec<String>,
    /// Which bits the cell computes.
    pub numerics: NumericsId,
}

/// A request in the engine's hands.
struct Open {
    events: EventSender,
    stop_tokens: Vec<TokenId>,
    prompt_tokens: u32,
    generated: u32,
    submitted: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
}

/// A step whose results are awaited.
struct Awaited {
    /// Ranks that have not answered.
    ranks: usize,
    rows: usize,
    /// Longest wait, from when it is the first step awaited.
    wait: Duration,
    step: u64,
}

/// The driver of one cell.
pub struct Driver<L> {
    engine: Engine,
    link: L,
    info: CellInfo,
    commands: EngineCommands,
    metrics: CellMetrics,
    open: BTreeMap<SeqId, Open>,
    steps: u64,
    /// When a step was applied last, or work came after there was none.
    progress_at: Instant,
    awaited: VecDeque<Awaited>,
    pace: Pace,
}

impl<L: CellLink> Driver<L> {
    /// A driver over a cell that is ready to step.
    #[must_use]
    pub fn new(engine: Engine, link: L, info: CellInfo, commands: EngineCommands, metrics: CellMetrics) -> Self {
        Self {
            engine,
            link,
            info,
            commands,
            metrics,
            open: BTreeMap::new(),
            steps: 0,
            progress_at: Instant::now(),
            awaited: VecDeque::new(),
            pace: Pace::default(),
        }
    }

    /// Drives the cell until `drain` turns true and all requests have ended, or all clients are gone.
    /// A failed cell stays up to tell why.
    pub async fn run(mut self, mut drain: watch::Receiver<bool>) {
        match self.serve(&mut drain).await {
            Ok(()) => {}
            Err(error) => self.stay_failed(&error, &mut drain).await,
        }
    }

    async fn serve(&mut self, drain: &mut watch::Receiver<bool>) -> Result<(), EngineError> {
        let mut draining = *drain.borrow();
        let hangups = std::sync::Arc::clone(&self.commands.hangups);
        loop {
            self.drop_cancelled();
            self.step().await?;
            self.publish(if draining { CellState::Draining } else { CellState::Ready });
            if draining && self.open.is_empty() && self.awaited.is_empty() {
                return Ok(());
            }
            let late = self.awaited.front().map(|step| self.progress_at + step.wait);
            tokio::select! {
                event = self.link.recv() => self.heard(event).await?,
                submission = self.commands.submissions.recv() => match submission {
                    Some(submission) => {
                        self.admit(submission, draining);
                        // Those who came together share a step.
                        while let Ok(submission) = self.commands.submissions.try_recv() {
                            self.admit(submission, draining);
                        }
                    }
                    None => return Ok(()),
                },
                () = hangups.wait() => {}
                changed = drain.changed(), if !draining => draining = changed.is_err() || *drain.borrow(),
                () = sleep_until(late), if late.is_some() => {
                    let step = self.awaited.front().map_or(0, |step| step.step);
                    let reason = format!("no result of step {step} within its deadline");
                    return Err(EngineError::Failed { reason });
                }
            }
        }
    }

    /// Hands a request to the engine.
    fn admit(&mut self, submission: Submission, draining: bool) {
        let Submission { seq, request, events, reply } = submission;
        if events.is_cancelled() {
            return;
        }
        let stop_tokens = request.stop_tokens.clone();
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let answer = if draining {
            Err(SubmitError::Draining)
        } else {
            let request = Request {
                seq,
                prompt: request.prompt,
                max_tokens: request.max_tokens,
                sampling: request.sampling,
                bias: request.bias,
                constraint: None,
                stop_tokens: request.stop_tokens,
                want: Want::Tokens,
                class: request.class,
                salt: request.salt,
            };
            self.engine.submit(request).map_err(|refused| self.refusal(refused))
        };
        if answer.is_ok() {
            let now = Instant::now();
            if self.open.is_empty() && self.awaited.is_empty() {
                self.progress_at = now;
            }
            self.metrics.admitted(u64::from(prompt_tokens));
            let open =
                Open { events, stop_tokens, prompt_tokens, generated: 0, submitted: now, started: None, first: None };
            self.open.insert(seq, open);
            // Before the answer: whoever it reaches sees the request counted.
            self.publish(CellState::Ready);
        }
        // A client that no longer waits for the answer has dropped its generation too.
        drop(reply.send(answer));
    }

    fn refusal(&self, refused: Refused) -> SubmitError {
        match refused {
            Refused::QueueFull { .. } => SubmitError::QueueFull { retry_after_ms: self.retry_after_ms() },
            Refused::ContextLength { prompt, max_tokens, context } => {
                SubmitError::ContextLength { prompt: u32::try_from(prompt).unwrap_or(u32::MAX), max_tokens, context }
            }
            Refused::Prompt | Refused::Sampling { .. } | Refused::Twice(_) => {
                SubmitError::Unavailable { reason: refused.to_string() }
            }
        }
    }

    /// When half of what there is to do will be done.
    fn retry_after_ms(&self) -> u64 {
        self.pace.retry_after_ms(self.engine.stats().load)
    }

    /// Ends the sequences that nobody listens to.
    fn drop_cancelled(&mut self) {
        for Hangup { seq, complete } in self.commands.hangups.take() {
            if let Some(open) = self.open.remove(&seq) {
                self.engine.cancel(seq);
                if complete {
                    self.metrics.finished(&open.times());
                }
            }
        }
    }

    /// Sends out the steps that are due.
    async fn step(&mut self) -> Result<(), EngineError> {
        while let Some(plans) = self.engine.plan() {
            let rows = plans.iter().map(StepPlan::row_count).sum();
            self.metrics.step(rows);
            self.metrics.imbalance(self.engine.stats().imbalance);
            let header = plans.first().map(|plan| &plan.header);
            let (step, wait) = header.map_or((0, 0), |header| (header.fence.step.0, header.deadline_ms));
            if self.awaited.is_empty() {
                self.progress_at = Instant::now();
            }
            let wait = Duration::from_millis(u64::from(wait)) + DEADLINE_GRACE;
            self.awaited.push_back(Awaited { ranks: plans.len(), rows, wait, step });
            if self.link.send(plans).await.is_err() {
                return Err(self.blame(None).await);
            }
        }
        Ok(())
    }

    async fn heard(&mut self, event: CellEvent) -> Result<(), EngineError> {
        let (rank, reply) = match event {
            CellEvent::Lost { rank, address, why } => {
                return Err(EngineError::WorkerLost { rank, address, reason: why });
            }
            CellEvent::Reply { rank, reply } => (rank, reply),
        };
        let result = match reply {
            Ok(result) => result,
            Err(failure) => return Err(self.blame(Some((rank, failure.message, failure.blamed))).await),
        };
        self.metrics.result(&result);
        let step = result.fence.step.0;
        let events = self.engine.apply(result).map_err(|error| EngineError::Failed { reason: error.to_string() })?;
        if let Some(awaited) = self.awaited.iter_mut().find(|awaited| awaited.step == step) {
            awaited.ranks -= 1;
        }
        while self.awaited.front().is_some_and(|awaited| awaited.ranks == 0)
            && let Some(done) = self.awaited.pop_front()
        {
            let now = Instant::now();
            self.pace.observe(done.rows, now.saturating_duration_since(self.progress_at));
            self.steps += 1;
            self.progress_at = now;
            self.metrics.step_applied();
        }
        for event in events {
            self.emit(event);
        }
        Ok(())
    }

    /// A step failed: finds out who is to blame. News of a lost worker weigh more than what the others saw.
    async fn blame(&mut self, failure: Option<(Rank, String, Vec<Rank>)>) -> EngineError {
        let until = tokio::time::Instant::now() + BLAME_WAIT;
        while let Ok(event) = tokio::time::timeout_at(until, self.link.recv()).await {
            if let CellEvent::Lost { rank, address, why } = event {
                return EngineError::WorkerLost { rank, address, reason: why };
            }
        }
        let Some((rank, message, blamed)) = failure else {
            return EngineError::Failed { reason: "a worker takes no more plans".to_owned() };
        };
        match blamed.first() {
            Some(&lost) => {
                let address = self.info.addresses.get(lost.index()).cloned().unwrap_or_default();
                EngineError::WorkerLost { rank: lost, address, reason: format!("as rank {rank} says: {message}") }
            }
            None => EngineError::Failed { reason: format!("rank {rank}: {message}") },
        }
    }

    fn emit(&mut self, event: Event) {
        match event {
            Event::Started { seq, cached } => {
                if let Some(open) = self.open.get_mut(&seq) {
                    open.started = Some(Instant::now());
                    open.events.send(GenerateEvent::Started { cached_tokens: cached });
                    self.metrics.started(cached);
                }
            }
            Event::Token { seq, token, logprobs } => {
                if let Some(open) = self.open.get_mut(&seq) {
                    open.generated += 1;
                    open.first.get_or_insert_with(Instant::now);
                    if !open.stop_tokens.contains(&token) {
                        let logprobs = logprobs.into_iter().collect();
                        // A reader that is gone is noticed before the next step.
                        open.events.send(GenerateEvent::Tokens { tokens: vec![token], logprobs });
                    }
                }
            }
            Event::Finished { seq, reason } => {
                if let Some(open) = self.open.remove(&seq) {
                    let reason = match reason {
                        EngineFinish::Stop(token) => FinishReason::Stop(token),
                        EngineFinish::Length => FinishReason::Length,
                    };
                    self.metrics.finished(&open.times());
                    open.events.send(GenerateEvent::Finished { reason });
                }
            }
            Event::Logits { .. } => {}
        }
    }

    fn publish(&self, state: CellState) {
        self.metrics.engine(&self.engine.stats());
        self.commands.status.send_replace(self.status(state, None));
    }

    fn status(&self, state: CellState, lost: Option<Rank>) -> CellStatus {
        let worker = |(rank, address): (u32, &String)| WorkerStatus {
            rank: Rank(rank),
            address: address.clone(),
            state: if lost == Some(Rank(rank)) { WorkerState::Lost } else { WorkerState::Ready },
        };
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        CellStatus {
            state,
            workers: (0..).zip(&self.info.addresses).map(worker).collect(),
            epoch: self.engine.fence().epoch,
            numerics: Some(self.info.numerics.to_string()),
            steps: self.steps,
            progress_at: self.progress_at,
            running: count(self.engine.running()),
            waiting: count(self.engine.waiting()),
            load: self.engine.stats().load,
            retry_after_ms: self.retry_after_ms(),
        }
    }

    /// Ends every request with the reason, and refuses new ones with it.
    async fn stay_failed(&mut self, error: &EngineError, drain: &mut watch::Receiver<bool>) {
        tracing::error!("the cell failed: {error}");
        let lost = if let EngineError::WorkerLost { rank, .. } = error { Some(*rank) } else { None };
        let mut status = self.status(CellState::Failed(error.to_string()), lost);
        (status.running, status.waiting, status.load) = (0, 0, 0);
        self.metrics.engine(&Stats {
            imbalance: 1.0,
            kv_usage: 0.0,
            cache_usage: 0.0,
            waiting: [0, 0],
            ..self.engine.stats()
        });
        self.commands.status.send_replace(status);
        for open in std::mem::take(&mut self.open).into_values() {
            open.events.send(GenerateEvent::Failed(error.clone()));
        }
        loop {
            tokio::select! {
                submission = self.commands.submissions.recv() => match submission {
                    Some(Submission { reply, .. }) => {
                        drop(reply.send(Err(SubmitError::Unavailable { reason: error.to_string() })));
                    }
                    None => return,
                },
                // Also of a drain that was heard before the cell failed; an error means that nobody is left to ask.
                _ = drain.wait_for(|&drains| drains) => return,
            }
        }
    }
}

impl Open {
    fn times(&self) -> RequestTimes {
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let first = self.first.unwrap_or(now);
        RequestTimes {
            queued: started.saturating_duration_since(self.submitted),
            prefill: first.saturating_duration_since(started),
            decode: now.saturating_duration_since(first),
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated,
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
