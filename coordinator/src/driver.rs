//! One task for each cell: the sole owner of the cell's engine.
//!
//! Requests come in through [`EngineCommands`], plans go out over a [`CellLink`], results come back, events go to
//! the requests they belong to. All decisions are the engine's; this task only carries them out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_planner::{Engine, Event, FinishReason as EngineFinish, Refused, Request, Want};
use phalanx_proto::{NumericsId, Rank, SeqId, TokenId};
use tokio::sync::watch;

use crate::engine_client::{
    CellState, CellStatus, EngineCommands, EngineError, EventSender, FinishReason, GenerateEvent, Submission,
    SubmitError, WorkerState, WorkerStatus,
};
use crate::metrics::Metrics;
use crate::workers::{CellEvent, CellLink};

/// When a refused client should come again, in milliseconds.
const RETRY_AFTER_MS: u64 = 1000;
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
    /// Longest wait for a step.
    pub step_wait: Duration,
}

/// A request in the engine's hands.
struct Open {
    events: EventSender,
    stop_tokens: Vec<TokenId>,
}

/// The driver of one cell.
pub struct Driver<L> {
    engine: Engine,
    link: L,
    info: CellInfo,
    commands: EngineCommands,
    metrics: Arc<Metrics>,
    open: BTreeMap<SeqId, Open>,
    next_seq: u64,
    steps: u64,
    progress_at: Instant,
    /// Ranks whose result of the step under way is awaited, and since when.
    awaiting: Option<(usize, Instant)>,
}

impl<L: CellLink> Driver<L> {
    /// A driver over a cell that is ready to step.
    #[must_use]
    pub fn new(engine: Engine, link: L, info: CellInfo, commands: EngineCommands, metrics: Arc<Metrics>) -> Self {
        Self {
            engine,
            link,
            info,
            commands,
            metrics,
            open: BTreeMap::new(),
            next_seq: 1,
            steps: 0,
            progress_at: Instant::now(),
            awaiting: None,
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
        loop {
            self.drop_cancelled();
            self.step().await?;
            self.publish(if draining { CellState::Draining } else { CellState::Ready });
            if draining && self.open.is_empty() && self.awaiting.is_none() {
                return Ok(());
            }
            let late = self.awaiting.map(|(_, since)| since + self.info.step_wait + DEADLINE_GRACE);
            tokio::select! {
                event = self.link.recv() => self.heard(event).await?,
                submission = self.commands.submissions.recv() => match submission {
                    Some(submission) => self.admit(submission, draining),
                    None => return Ok(()),
                },
                changed = drain.changed(), if !draining => draining = changed.is_err() || *drain.borrow(),
                () = sleep_until(late), if late.is_some() => {
                    let reason = "no result of the step within its deadline".to_owned();
                    return Err(EngineError::Failed { reason });
                }
            }
        }
    }

    /// Hands a request to the engine.
    fn admit(&mut self, submission: Submission, draining: bool) {
        let Submission { request, events, reply } = submission;
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        let stop_tokens = request.stop_tokens.clone();
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
            self.engine.submit(request).map_err(refusal)
        };
        if answer.is_ok() {
            if self.open.is_empty() {
                self.progress_at = Instant::now();
            }
            self.open.insert(seq, Open { events, stop_tokens });
        }
        // A client that no longer waits for the answer has dropped its generation too.
        drop(reply.send(answer));
    }

    /// Ends the sequences that nobody listens to.
    fn drop_cancelled(&mut self) {
        let engine = &mut self.engine;
        self.open.retain(|&seq, open| {
            let gone = open.events.is_cancelled();
            if gone {
                engine.cancel(seq);
            }
            !gone
        });
    }

    /// Sends the next step out, if one is due.
    async fn step(&mut self) -> Result<(), EngineError> {
        let Some(plans) = self.engine.plan() else { return Ok(()) };
        self.metrics.step(plans.iter().map(phalanx_proto::StepPlan::row_count).sum());
        self.metrics.kv_usage(self.engine.kv_usage());
        self.awaiting = Some((plans.len(), Instant::now()));
        match self.link.send(plans).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.blame(None).await),
        }
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
        let events = self.engine.apply(result).map_err(|error| EngineError::Failed { reason: error.to_string() })?;
        if let Some((ranks, _)) = &mut self.awaiting {
            *ranks -= 1;
            if *ranks == 0 {
                self.awaiting = None;
                self.steps += 1;
                self.progress_at = Instant::now();
            }
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
            Event::Token { seq, token, logprobs } => {
                if let Some(open) = self.open.get(&seq)
                    && !open.stop_tokens.contains(&token)
                {
                    // A reader that is gone is noticed before the next step.
                    let logprobs = logprobs.into_iter().collect();
                    open.events.send(GenerateEvent::Tokens { tokens: vec![token], logprobs });
                }
            }
            Event::Finished { seq, reason } => {
                if let Some(open) = self.open.remove(&seq) {
                    let reason = match reason {
                        EngineFinish::Stop(token) => FinishReason::Stop(token),
                        EngineFinish::Length => FinishReason::Length,
                    };
                    open.events.send(GenerateEvent::Finished { reason, cached_tokens: 0 });
                }
            }
            Event::Started { .. } | Event::Logits { .. } => {}
        }
    }

    fn publish(&self, state: CellState) {
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
        }
    }

    /// Ends every request with the reason, and refuses new ones with it.
    async fn stay_failed(&mut self, error: &EngineError, drain: &mut watch::Receiver<bool>) {
        tracing::error!("the cell failed: {error}");
        let lost = if let EngineError::WorkerLost { rank, .. } = error { Some(*rank) } else { None };
        let mut status = self.status(CellState::Failed(error.to_string()), lost);
        (status.running, status.waiting) = (0, 0);
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
                changed = drain.changed() => if changed.is_err() || *drain.borrow() { return },
            }
        }
    }
}

fn refusal(refused: Refused) -> SubmitError {
    match refused {
        Refused::QueueFull { .. } => SubmitError::QueueFull { retry_after_ms: RETRY_AFTER_MS },
        Refused::ContextLength { prompt, max_tokens, context } => {
            SubmitError::ContextLength { prompt: u32::try_from(prompt).unwrap_or(u32::MAX), max_tokens, context }
        }
        Refused::Prompt | Refused::Twice(_) => SubmitError::Unavailable { reason: refused.to_string() },
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
