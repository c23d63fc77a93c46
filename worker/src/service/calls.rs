//! The calls: each checks what it is given, asks the model thread, and passes on what it answers.

use std::pin::Pin;
use std::sync::Arc;

use phalanx_proto::{LayerIdx, ModelConfig, StepPlan};
use phalanx_wire::{Join, Prepare, PrepareEvent, Release, StepReply, WireError, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::thread::Command;
use super::{Held, Owner, STREAMS_MAX, Shared};
use crate::runner::STEPS_IN_FLIGHT;
use crate::tenure::Tenure;

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
        let mut held = self.shared.held();
        match held.as_ref().map(|held| held.owner) {
            Some(owner) if owner == joined => {}
            Some(owner) if owner.term >= term => {
                warn!(theirs = term.0, ours = owner.term.0, "join refused");
                return Err(Status::failed_precondition(format!(
                    "this worker belongs to cell {} under term {}, not below {}: stop the other coordinator, or start \
                     this one again",
                    owner.cell, owner.term.0, term.0
                )));
            }
            _ => *held = Some(Held::by(joined)),
        }
        info!(%cell, term = term.0, version, "joined");
        drop(held);
        Ok(Response::new(self.shared.description.clone().into()))
    }

    type PrepareStream = Answers<v1::PrepareEvent>;

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Result<Response<Self::PrepareStream>, Status> {
        let request: Prepare = request.into_inner().try_into().map_err(invalid)?;
        fits(&request, &self.shared.description.config)?;
        let tenure = self.shared.ask(&request).map_err(Status::failed_precondition)?;
        let (events, answers) = mpsc::channel(EVENTS_WAITING);
        let last = events.clone().reserve_owned().await.expect("the receiver is at hand");
        let mut asker =
            Asker { shared: Arc::clone(&self.shared), commands: self.commands.clone(), tenure, waits: true };
        self.command(Command::Prepare { request, tenure: asker.tenure.clone(), events, last }).await?;
        let answers = ReceiverStream::new(answers).map(move |event| {
            asker.hears(&event);
            event.map(v1::PrepareEvent::from)
        });
        Ok(Response::new(Box::pin(answers)))
    }

    type StepsStream = Answers<v1::Envelope>;

    async fn steps(&self, request: Request<Streaming<v1::Envelope>>) -> Result<Response<Self::StepsStream>, Status> {
        let tenure = self.shared.held().as_ref().map(|held| held.tenure.clone());
        let Some(tenure) = tenure else { return Err(Status::failed_precondition(self.shared.gone())) };
        let Ok(place) = Arc::clone(&self.streams).try_acquire_owned() else {
            return Err(Status::resource_exhausted(format!("{STREAMS_MAX} streams of steps are open: close one")));
        };
        let (replies, answers) = mpsc::channel(STEPS_IN_FLIGHT);
        let plans = request.into_inner();
        let ends = Ends { shared: Arc::clone(&self.shared), tenure, closing: self.closing.clone() };
        tokio::spawn(forward(plans, self.commands.clone(), replies, ends, place));
        let answers = ReceiverStream::new(answers).map(|reply| reply.map(v1::Envelope::from));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn health(&self, _request: Request<v1::HealthRequest>) -> Result<Response<v1::HealthReply>, Status> {
        Ok(Response::new(self.shared.health().into()))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        let Release { cell, term, instance } = request.into_inner().into();
        if !self.shared.release(Owner { cell, term, instance }) {
            // What belongs to another has nothing of this one's any more.
            return Ok(Response::new(v1::ReleaseReply {}));
        }
        let (done, released) = oneshot::channel();
        self.command(Command::Release { done }).await?;
        released.await.map_err(|_| Status::unavailable("the worker is ending"))?;
        Ok(Response::new(v1::ReleaseReply {}))
    }
}

impl Shared {
    /// Ends the tenure of `owner`. False if the worker belongs to another.
    fn release(&self, owner: Owner) -> bool {
        let mut held = self.held();
        let is_theirs = held.as_ref().is_none_or(|held| held.owner == owner);
        if is_theirs {
            *held = None;
        }
        is_theirs
    }

    /// Notes that an epoch is to be prepared, by whom the worker belongs to, and once.
    fn ask(&self, request: &Prepare) -> Result<Tenure, String> {
        let Prepare { cell, fence, rank, .. } = request;
        let mut held = self.held();
        let theirs = held.as_ref().map_or_else(
            || "nobody".to_owned(),
            |Held { owner, .. }| format!("cell {} term {}", owner.cell, owner.term.0),
        );
        let Some(held) = held.as_mut().filter(|held| (held.owner.cell, held.owner.term) == (*cell, fence.term)) else {
            let term = fence.term.0;
            return Err(format!(
                "cell {cell} term {term} must join before it prepares; this worker belongs to {theirs}"
            ));
        };
        match held.asked {
            Some((epoch, other)) if epoch == fence.epoch && other != *rank => {
                Err(format!("this worker is rank {other} already: name each worker once, whatever names it has"))
            }
            Some((epoch, _)) if epoch >= fence.epoch => {
                Err(format!("{fence} is prepared after epoch {}: use a higher epoch", epoch.0))
            }
            _ => {
                held.asked = Some((fence.epoch, *rank));
                Ok(held.tenure.clone())
            }
        }
    }
}

/// Who waits for a prepare. Gives the worker back if it is dropped meanwhile.
struct Asker {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    tenure: Tenure,
    waits: bool,
}

impl Asker {
    /// Progress is followed by something, all else is the last word.
    const fn hears(&mut self, event: &Result<PrepareEvent, Status>) {
        self.waits = matches!(event, Ok(PrepareEvent::Progress(_)));
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        if !self.waits {
            return;
        }
        // While the tenure lasts it is the one that holds.
        if self.shared.held().take_if(|_| !self.tenure.is_over()).is_some() {
            warn!("its coordinator has given up what was being prepared");
        }
        // Without a place in the queue the memory is kept for the next epoch.
        drop(self.commands.try_send(Command::Release { done: oneshot::channel().0 }));
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

/// What ends a stream of steps.
struct Ends {
    shared: Arc<Shared>,
    tenure: Tenure,
    closing: watch::Receiver<()>,
}

/// Passes plans on to the model thread. A plan is read only when there is a place for its reply, so the model
/// thread never waits for whoever reads the replies.
async fn forward(
    mut plans: Streaming<v1::Envelope>,
    commands: mpsc::Sender<Command>,
    replies: mpsc::Sender<Result<StepReply, Status>>,
    Ends { shared, mut tenure, mut closing }: Ends,
    _place: OwnedSemaphorePermit,
) {
    loop {
        let next = async {
            let reply = replies.clone().reserve_owned().await.ok()?;
            Some((plans.message().await, reply))
        };
        let next = tokio::select! {
            next = next => next,
            () = tenure.over() => {
                // Where no place is free the stream just ends, and none is opened in its stead.
                drop(replies.try_send(Err(Status::failed_precondition(shared.gone()))));
                return;
            }
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
