//! The worker as a coordinator sees it: joins, prepares an epoch, runs its steps, says how it is.
//!
//! One OS thread owns the [`Host`], and with it the model; calls reach it through a bounded queue and never wait
//! within it. So [`Health`] answers while a step works or hangs.
//!
//! A worker belongs to one coordinator at a time, and a [`Tenure`] is how long. It ends when the worker is released, when a
//! higher term joins, and when the coordinator gives up a prepare, as a coordinator does that is lost. With it end at once
//! the streams of steps, and whatever the model thread waits for of other ranks; so nothing of a former coordinator keeps
//! the next one waiting.
//!
//! A stream of steps may break at any time, and another be opened in its place: the coordinator sends the plans that
//! were not answered once more, and the host tells what came of those that ran (see [`crate::runner::Outcomes`]). The
//! fence in each plan makes that safe, also while plans of the broken stream are still on their way. So nothing
//! is said to resume a stream. A plan that was damaged on its way ends its stream for the same reason: it will
//! be sent again. A plan of an epoch that is not here ends it with [`tonic::Code::FailedPrecondition`], which says that
//! sending it again is of no use; after a restart, a worker answers so.

mod accept;
mod calls;
mod thread;

use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use phalanx_proto::{CellId, Epoch, Fence, Rank, StepHeader, StepPlan, StepResult, Term};
use phalanx_wire::token::{CheckToken, check_listener};
use phalanx_wire::v1::worker_server::WorkerServer;
use phalanx_wire::{
    ClusterToken, Description, Health, Prepare, Progress, REPLY_BYTES_MAX, REQUEST_BYTES_MAX, StepFailure, TokenError,
    WorkerState,
};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tracing::{error, info};

use crate::progress::ProgressCell;
use crate::runner::STEPS_IN_FLIGHT;
use crate::tenure::{Hold, Tenure};
use calls::Calls;
use thread::ModelThread;

/// Streams of steps at once: the coordinator's, and some that have been given up but not yet ended.
const STREAMS_MAX: usize = 4;
/// Calls at once on one connection.
const CALLS_MAX: u32 = 16;
/// Bytes of a call's headers.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// A connection on which nothing came for this long is asked whether it still lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// It then has this long to answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long calls may take to end when the worker ends.
const GRACE: Duration = Duration::from_secs(2);

/// What is told whoever asks for an epoch that is not here.
const NO_EPOCH: &str = "the worker has no epoch: it was started anew or given back";

/// Why an epoch could not be made ready; its chain of causes is told to the coordinator.
pub type HostError = Box<dyn Error + Send + Sync>;

/// What a worker is made of: a model that can be loaded and stepped. Owned by one thread.
pub trait Host: Send + 'static {
    /// What a coordinator is told when it joins. Asked once.
    fn describe(&self) -> Description;

    /// Where it says how far a step is. Asked once.
    fn progress(&self) -> ProgressCell;

    /// Makes an epoch ready in place of the one there was: loads, connects to the other ranks. Whatever waits for those,
    /// now or in a step, gives up when `tenure` is over. Returns the bytes of weights, KV and buffers held.
    ///
    /// # Errors
    /// What does not load, or which rank cannot be reached. There is no epoch afterwards.
    fn prepare(&mut self, request: &Prepare, tenure: &Tenure, on_progress: &dyn Fn(Progress))
    -> Result<u64, HostError>;

    /// Begins a step of the epoch, unless it ran before. The one before may still be under way.
    ///
    /// # Errors
    /// It is refused, or fails.
    fn begin(&mut self, plan: &StepPlan) -> Result<(), NoResult>;

    /// Whether the oldest step under way is done or has failed, so that finishing it does not wait.
    fn is_done(&mut self) -> bool;

    /// Whether this step can begin before the one under way has ended. Where it cannot, what came of that one is told first.
    fn overlaps(&self, header: &StepHeader) -> bool;

    /// Waits for a step that was begun, and tells what came of it; steps are finished in their order.
    ///
    /// # Errors
    /// It fails.
    fn finish(&mut self, fence: Fence) -> Result<StepResult, NoResult>;

    /// Begins a step and waits for it.
    ///
    /// # Errors
    /// Those of both.
    fn run(&mut self, plan: &StepPlan) -> Result<StepResult, NoResult> {
        self.begin(plan)?;
        self.finish(plan.header.fence)
    }

    /// Drops the epoch, its memory and its connections.
    fn release(&mut self);
}

/// Why a plan has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoResult {
    /// It cannot be done; nothing was touched, and the epoch goes on.
    Refused(StepFailure),
    /// The step failed, and the epoch is over on this rank.
    Failed(StepFailure),
}

/// Why a worker does not serve, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It may not listen there.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The system refuses something.
    #[error("cannot {what}: {why}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        why: std::io::Error,
    },
    /// The server failed.
    #[error("the worker's server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    /// A defect: the process must not go on.
    #[error("the model thread panicked: {0}; please report this")]
    Panicked(String),
}

/// The coordinator that a worker belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    cell: CellId,
    term: Term,
    instance: u64,
}

/// To whom a worker belongs, and how long.
#[derive(Debug)]
struct Held {
    owner: Owner,
    /// The newest epoch it was asked to prepare, and as which rank.
    asked: Option<(Epoch, Rank)>,
    tenure: Tenure,
    _hold: Hold,
}

impl Held {
    fn by(owner: Owner) -> Self {
        let (hold, tenure) = Tenure::begin();
        Self { owner, asked: None, tenure, _hold: hold }
    }
}

/// What a worker is at. Written by the model thread only.
#[derive(Clone, Debug, Default)]
struct Status {
    state: WorkerState,
    /// The last step applied.
    fence: Fence,
    last_error: Option<String>,
}

/// What calls and model thread both see.
struct Shared {
    description: Description,
    held: Mutex<Option<Held>>,
    status: Mutex<Status>,
    progress: ProgressCell,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is told whoever the worker does not belong to any more.
    fn gone(&self) -> String {
        match self.held().as_ref().map(|held| held.owner) {
            Some(Owner { cell, term, .. }) => format!("the worker belongs to cell {cell} under term {} now", term.0),
            None => NO_EPOCH.to_owned(),
        }
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> Health {
        let Status { state, fence, last_error } = self.status().clone();
        Health { state, fence, progress: self.progress.get(), last_error }
    }
}

/// Serves `host` on `listener` until `shutdown` completes. Beyond loopback a token is needed.
///
/// # Errors
/// A listener beyond loopback without a token; a server that fails; a model thread that panics, after which the
/// process should end with an error.
pub async fn serve(
    listener: TcpListener,
    host: impl Host,
    token: Option<ClusterToken>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let system = |what| move |why| ServeError::System { what, why };
    let address = listener.local_addr().map_err(system("tell the listener's address"))?;
    check_listener(address, token.as_ref())?;

    let shared = Arc::new(Shared {
        description: host.describe(),
        held: Mutex::default(),
        status: Mutex::default(),
        progress: host.progress(),
    });
    let (commands, queue) = mpsc::channel(STREAMS_MAX * STEPS_IN_FLIGHT);
    let (ended, mut thread) = oneshot::channel();
    let model = ModelThread::new(host, Arc::clone(&shared));
    let body = move || drop(ended.send(model.run(queue)));
    std::thread::Builder::new().name("model".to_owned()).spawn(body).map_err(system("start the model thread"))?;

    let (close, closing) = watch::channel(());
    let calls = Calls::new(shared, commands, closing.clone());
    let worker = WorkerServer::new(calls)
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(REPLY_BYTES_MAX);
    let server = Server::builder()
        .max_concurrent_streams(CALLS_MAX)
        .http2_max_pending_accept_reset_streams(Some(CALLS_MAX as usize))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(InterceptedService::new(worker, CheckToken::new(token)))
        .serve_with_incoming_shutdown(accept::connections(listener), closed(closing));
    let mut server = std::pin::pin!(server);

    info!(%address, "worker listens");
    let outcome = tokio::select! {
        served = &mut server => return Ok(served?),
        outcome = &mut thread => outcome,
        () = shutdown => Ok(Ok(())),
    };
    // Streams of steps end now, then their connections, then the queue of the model thread.
    drop(close);
    let all_ended = tokio::time::timeout(GRACE, server).await;
    if all_ended.is_err() {
        info!("connections are still open; leaving them");
    }
    match outcome {
        Ok(Err(panic)) => {
            error!(%panic, "the model thread panicked");
            Err(ServeError::Panicked(panic))
        }
        // The sender lives as long as the thread's body, which always sends.
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

/// Completes when the worker ends.
async fn closed(mut closing: watch::Receiver<()>) {
    while closing.changed().await.is_ok() {}
}
