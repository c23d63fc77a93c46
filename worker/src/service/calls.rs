//! The calls: each checks what it is given, asks the model thread, and passes on what it answers.

use std::pin::Pin;
use std::sync::Arc;

use phalanx_proto::{LayerIdx, ModelConfig, StepPlan, Term};
use phalanx_wire::{Join, Prepare, StepReply, WireError, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::thread::Command;
use super::{Owner, STREAMS_MAX, Shared};
use crate::runner::STEPS_IN_FLIGHT;

/// Events of a prepare that wait to be sent; more are dropped, except the last.
const EVENTS_WAITING: usize = 16;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service, as many calls at once as there are.
pub(super) struct Calls {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    /// Places for streams of steps.
    streams: Arc<Semaphore>,
    closing: watch::Receiver<()>,
}

impl Calls {
    pub(super) fn new(shared: Arc<Shared>, commands: mpsc::Sender<Command>, closing: watch::Receiver<()>) -> Self {
        Self { shared, commands, streams: Arc::new(Semaphore::new(STREAMS_MAX)), closing }
    }

    async fn command(&self, command: Command) -> Result<(), Status> {
        self.commands.send(command).await.map_err(|_| Status::unavailable("the worker is ending"))
    }
}

fn invalid(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// A message longer than accepted is too much, not beyond an end.
fn inbound(status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => Status::resource_exhausted(status.message()),
        _ => status,
    }
}

#[tonic::async_trait]
impl v1::worker_server::Worker for Calls {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinReply>, Status> {
        let Join { cell, term, instance, version } = request.into_inner().try_into().map_err(invalid)?;
        let joined = Owner { cell, term, instance };
        let mut owner = self.shared.owner();
        if let Some(owner) = *owner
            && owner != joined
            && owner.term >= term
        {
            warn!(theirs = term.0, ours = owner.term.0, "join refused");
            return Err(Status::failed_precondition(format!(
                "this worker belongs to cell {} under term {}: release it first, or join with a higher term than {}",
                owner.cell, owner.term.0, term.0
            )));
        }
        info!(%cell, term = term.0, version, "joined");
        *owner = Some(joined);
        Ok(Response::new(self.shared.description.clone().into()))
    }

    type PrepareStream = Answers<v1::PrepareEvent>;

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Result<Response<Self::PrepareStream>, Status> {
        let request: Prepare = request.into_inner().try_into().map_err(invalid)?;
        let owner = *self.shared.owner();
        if owner.map(|owner| (owner.cell, owner.term)) != Some((request.cell, request.fence.term)) {
            let theirs = owner.map_or_else(|| "nobody".to_owned(), |o| format!("cell {} term {}", o.cell, o.term.0));
            return Err(Status::failed_precondition(format!(
                "cell {} term {} must join before it prepares; this worker belongs to {theirs}",
                request.cell, request.fence.term.0
            )));
        }
        fits(&request, &self.shared.description.config)?;
        let (events, answers) = mpsc::channel(EVENTS_WAITING);
        let last = events.clone().reserve_owned().await.expect("the receiver is at hand");
        self.command(Command::Prepare { request, events, last }).await?;
        let answers = ReceiverStream::new(answers).map(|event| event.map(v1::PrepareEvent::from));
        Ok(Response::new(Box::pin(answers)))
    }

    type StepsStream = Answers<v1::Envelope>;

    async fn steps(&self, request: Request<Streaming<v1::Envelope>>) -> Result<Response<Self::StepsStream>, Status> {
        let Ok(place) = Arc::clone(&self.streams).try_acquire_owned() else {
            return Err(Status::resource_exhausted(format!("{STREAMS_MAX} streams of steps are open: close one")));
        };
        let (replies, answers) = mpsc::channel(STEPS_IN_FLIGHT);
        let plans = request.into_inner();
        tokio::spawn(forward(plans, self.commands.clone(), replies, self.closing.clone(), place));
        let answers = ReceiverStream::new(answers).map(|reply| reply.map(v1::Envelope::from));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn health(&self, _request: Request<v1::HealthRequest>) -> Result<Response<v1::HealthReply>, Status> {
        Ok(Response::new(self.shared.health().into()))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        let term = Term(request.into_inner().term);
        let owner = *self.shared.owner();
        if let Some(owner) = owner
            && owner.term > term
        {
            return Err(Status::failed_precondition(format!(
                "this worker belongs to term {}, which term {} cannot release",
                owner.term.0, term.0
            )));
        }
        let (done, released) = oneshot::channel();
        self.command(Command::Release { term, done }).await?;
        released.await.map_err(|_| Status::unavailable("the worker is ending"))?;
        Ok(Response::new(v1::ReleaseReply {}))
    }
}

/// The placement must be of this model, and the limits within it.
fn fits(request: &Prepare, config: &ModelConfig) -> Result<(), Status> {
    let entries = request.placement.table().len();
    let (layers, experts) = (config.layers.len(), config.experts as usize);
    if entries != layers * experts || request.placement.of_layer(LayerIdx(0)).len() != experts {
        return Err(Status::invalid_argument(format!(
            "the placement has {entries} entries, which are not {layers} layers of {experts} experts"
        )));
    }
    if request.limits.context > config.context {
        return Err(Status::invalid_argument(format!(
            "a context of {} tokens, this model has {} at most",
            request.limits.context, config.context
        )));
    }
    Ok(())
}

/// Passes plans on to the model thread. A plan is read only when there is a place for its reply, so the model
/// thread never waits for whoever reads the replies.
async fn forward(
    mut plans: Streaming<v1::Envelope>,
    commands: mpsc::Sender<Command>,
    replies: mpsc::Sender<Result<StepReply, Status>>,
    mut closing: watch::Receiver<()>,
    _place: OwnedSemaphorePermit,
) {
    loop {
        let next = async {
            let reply = replies.clone().reserve_owned().await.ok()?;
            Some((plans.message().await, reply))
        };
        let next = tokio::select! {
            next = next => next,
            _ = closing.changed() => return,
        };
        let Some((message, reply)) = next else { return };
        match message {
            Ok(Some(envelope)) => {
                let plan = StepPlan::try_from(envelope);
                // What follows a plan that cannot be read must not run: the stream ends with it.
                let last = plan.is_err();
                if commands.send(Command::Step { plan, reply }).await.is_err() || last {
                    return;
                }
            }
            Ok(None) => return,
            Err(status) => {
                reply.send(Err(inbound(status)));
                return;
            }
        }
    }
}
