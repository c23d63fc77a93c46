//! The thread that owns the model. It does one thing after another, in the order asked; only the next step may begin before
//! the last one is done.

use std::sync::Arc;
use std::time::Duration;

use phalanx_proto::{Fence, Outputs, StepPlan, StepResult};
use phalanx_wire::{Prepare, PrepareEvent, StepFailure, StepReply, WireError, WorkerState, logit_rows_max};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{OwnedPermit, Receiver, Sender};
use tokio::sync::oneshot;
use tonic::{Code, Status};
use tracing::{info, warn};

use super::{Host, HostError, NO_EPOCH, NoResult, Shared};
use crate::panics::{Panic, catch};
use crate::tenure::Tenure;

/// Looks without a pause whether a step is done: more than a decode step takes.
const LOOKS: u32 = 20_000;
/// Between later looks.
const PAUSE: Duration = Duration::from_micros(20);

type Event = Result<PrepareEvent, Status>;

/// What the thread is asked to do. Every answer has its place already, so giving it never waits.
pub(super) enum Command {
    Prepare {
        request: Prepare,
        tenure: Tenure,
        events: Sender<Event>,
        last: OwnedPermit<Event>,
    },
    Step {
        plan: Result<StepPlan, WireError>,
        reply: Reply,
    },
    /// Drops the epoch, if it is of a tenure that is over.
    Release {
        done: oneshot::Sender<()>,
    },
}

pub(super) struct ModelThread<H> {
    host: H,
    shared: Arc<Shared>,
    /// Whose epoch is here.
    tenure: Tenure,
    /// A step that has begun and is not answered.
    under_way: Option<(Fence, Reply)>,
    /// The state once no step is under way.
    resting: WorkerState,
}

type Reply = OwnedPermit<Result<StepReply, Status>>;

impl<H: Host> ModelThread<H> {
    pub(super) fn new(host: H, shared: Arc<Shared>) -> Self {
        Self { host, shared, tenure: Tenure::default(), under_way: None, resting: WorkerState::Idle }
    }

    /// Does what it is asked until nobody can ask any more, or the host panics: it is not touched again then.
    pub(super) fn run(mut self, mut commands: Receiver<Command>) -> Result<(), Panic> {
        while let Some(command) = self.next(&mut commands)? {
            match command {
                Command::Prepare { request, tenure, events, last } => {
                    self.answer()?;
                    // Whoever asked may have given up while others were served.
                    if !tenure.is_over() {
                        self.tenure = tenure;
                        self.prepare(&request, &events, last)?;
                    }
                }
                Command::Step { plan, reply } => self.step(plan, reply)?,
                Command::Release { done } => {
                    self.answer()?;
                    self.release(done)?;
                }
            }
        }
        self.answer()
    }

    /// What is asked next; a step that is done meanwhile is answered.
    fn next(&mut self, commands: &mut Receiver<Command>) -> Result<Option<Command>, Panic> {
        let mut looks = 0_u32;
        while self.under_way.is_some() {
            if self.ask(H::is_done)? {
                self.answer()?;
                continue;
            }
            looks = looks.saturating_add(1);
            match commands.try_recv() {
                Ok(command) => return Ok(Some(command)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                // Both are waited for, and a device says no more than whether it is done.
                Err(TryRecvError::Empty) if looks < LOOKS => std::thread::yield_now(),
                Err(TryRecvError::Empty) => std::thread::sleep(PAUSE),
            }
        }
        Ok(commands.blocking_recv())
    }

    fn prepare(&mut self, request: &Prepare, events: &Sender<Event>, last: OwnedPermit<Event>) -> Result<(), Panic> {
        info!(fence = %request.fence, rank = %request.rank, "preparing");
        self.set(WorkerState::Loading, request.fence, None);
        // Progress that nobody has read yet is as good as the newest.
        let on_progress = |progress| drop(events.try_send(Ok(PrepareEvent::Progress(progress))));
        let Self { host, tenure, .. } = self;
        match catch(|| host.prepare(request, tenure, &on_progress)) {
            Ok(Ok(allocated_bytes)) => {
                info!(allocated_bytes, "ready");
                self.set(WorkerState::Ready, request.fence, None);
                last.send(Ok(PrepareEvent::Ready { allocated_bytes }));
                Ok(())
            }
            Ok(Err(error)) => {
                self.prepare_failed(request.fence, chain(&error), last);
                Ok(())
            }
            Err(panic) => {
                self.prepare_failed(request.fence, format!("the worker panicked: {panic}"), last);
                Err(panic)
            }
        }
    }

    fn prepare_failed(&self, fence: Fence, error: String, last: OwnedPermit<Event>) {
        warn!(%error, "cannot prepare");
        self.set(WorkerState::Failed, fence, Some(error.clone()));
        last.send(Err(Status::failed_precondition(error)));
    }

    fn step(&mut self, plan: Result<StepPlan, WireError>, reply: Reply) -> Result<(), Panic> {
        let plan = match plan {
            Ok(plan) => plan,
            Err(error) => {
                self.answer()?;
                warn!(%error, "plan refused");
                let damaged = matches!(error, WireError::Checksum { .. });
                let code = if damaged { Code::DataLoss } else { Code::InvalidArgument };
                reply.send(Err(Status::new(code, format!("the plan is refused: {error}"))));
                return Ok(());
            }
        };
        let fence = plan.header.fence;
        if let Err(why) = self.has_epoch(fence) {
            self.answer()?;
            warn!(%fence, %why, "plan refused");
            reply.send(Err(Status::failed_precondition(why)));
            return Ok(());
        }
        if let Err(why) = self.fits(&plan) {
            self.answer()?;
            warn!(%fence, %why, "plan refused");
            reply.send(Ok(Err(failure(fence, why))));
            return Ok(());
        }
        let overlaps = match self.ask(|host| host.overlaps(&plan.header)) {
            Ok(overlaps) => overlaps,
            Err(panic) => return self.panicked(fence, panic, reply),
        };
        // What came of a step is not held back by one that waits for it, or for its own logits.
        if !overlaps || all_logits(&plan) > 0 {
            self.answer()?;
        }
        if self.under_way.is_none() {
            self.resting = self.shared.status().state;
        }
        self.show_stepping();
        let host = &mut self.host;
        match catch(|| host.begin(&plan)) {
            Ok(begun) => {
                self.answer()?;
                match begun {
                    Ok(()) => {
                        self.under_way = Some((fence, reply));
                        self.show_stepping();
                    }
                    Err(no_result) => self.tell(fence, Err(no_result), reply),
                }
                Ok(())
            }
            Err(panic) => self.panicked(fence, panic, reply),
        }
    }

    /// Waits for the step under way, if there is one, and answers it.
    fn answer(&mut self) -> Result<(), Panic> {
        let Some((fence, reply)) = self.under_way.take() else { return Ok(()) };
        let host = &mut self.host;
        match catch(|| host.finish(fence)) {
            Ok(outcome) => {
                self.tell(fence, outcome, reply);
                Ok(())
            }
            Err(panic) => self.panicked(fence, panic, reply),
        }
    }

    /// Asks the host something; a panic is the answer to the step under way.
    fn ask<T>(&mut self, ask: impl FnOnce(&mut H) -> T) -> Result<T, Panic> {
        let host = &mut self.host;
        catch(|| ask(host)).inspect_err(|panic| {
            if let Some((fence, reply)) = self.under_way.take() {
                self.tell_panic(fence, panic, reply);
            }
        })
    }

    /// A step is under way; after one that failed, it is worth nothing.
    fn show_stepping(&self) {
        if self.resting != WorkerState::Failed {
            self.shared.status().state = WorkerState::Stepping;
        }
    }

    fn panicked(&mut self, fence: Fence, panic: Panic, reply: Reply) -> Result<(), Panic> {
        self.tell_panic(fence, &panic, reply);
        Err(panic)
    }

    fn tell_panic(&mut self, fence: Fence, panic: &Panic, reply: Reply) {
        let failed = NoResult::Failed(failure(fence, format!("the worker panicked: {panic}")));
        self.tell(fence, Err(failed), reply);
    }

    fn tell(&mut self, fence: Fence, outcome: Result<StepResult, NoResult>, reply: Reply) {
        let mut status = self.shared.status();
        let outcome = outcome.map_err(|no_result| match no_result {
            NoResult::Refused(failure) => {
                warn!(%failure, "plan refused");
                failure
            }
            NoResult::Failed(failure) => {
                if self.resting != WorkerState::Failed {
                    warn!(%failure, "the epoch is over");
                    self.resting = WorkerState::Failed;
                    status.last_error = Some(failure.to_string());
                }
                failure
            }
        });
        // What is told again changes nothing.
        status.state = self.resting;
        if outcome.is_ok() {
            status.fence = status.fence.max(fence);
        }
        drop(status);
        reply.send(Ok(outcome));
    }

    /// Whether the epoch of a plan is the one here. Which of its steps is next is the host's to say.
    fn has_epoch(&self, fence: Fence) -> Result<(), String> {
        if self.tenure.is_over() {
            return Err(self.shared.gone());
        }
        let status = self.shared.status();
        match status.state {
            WorkerState::Idle | WorkerState::Loading => Err(NO_EPOCH.to_owned()),
            _ if !fence.same_epoch(status.fence) => Err(format!("the last step here is of {}", status.fence)),
            WorkerState::Ready | WorkerState::Stepping | WorkerState::Failed => Ok(()),
        }
    }

    /// Whether what a plan asks for fits a reply.
    fn fits(&self, plan: &StepPlan) -> Result<(), String> {
        let asked = all_logits(plan);
        let max = logit_rows_max(self.shared.description.config.vocab);
        if asked > max {
            return Err(format!("the logits of {asked} rows do not fit a reply: ask for {max} at most in a step"));
        }
        Ok(())
    }

    fn release(&mut self, done: oneshot::Sender<()>) -> Result<(), Panic> {
        // A coordinator that took over meanwhile keeps what it prepared.
        if self.tenure.is_over() {
            let host = &mut self.host;
            if let Err(panic) = catch(|| host.release()) {
                self.set(WorkerState::Failed, Fence::default(), Some(format!("panicked: {panic}")));
                return Err(panic);
            }
            info!("released");
            self.set(WorkerState::Idle, Fence::default(), None);
        }
        // Whoever asked may have given up.
        let _ = done.send(());
        Ok(())
    }

    /// The last error stays readable until the next one, or a new epoch.
    fn set(&self, state: WorkerState, fence: Fence, error: Option<String>) {
        let mut status = self.shared.status();
        status.state = state;
        status.fence = fence;
        if error.is_some() || state == WorkerState::Loading {
            status.last_error = error;
        }
    }
}

/// Rows whose logits a plan asks for: a step waits for them as soon as it begins.
fn all_logits(plan: &StepPlan) -> usize {
    plan.rows.iter().filter(|rows| rows.outputs == Outputs::AllLogits).map(|rows| rows.tokens.rows()).sum()
}

const fn failure(fence: Fence, message: String) -> StepFailure {
    StepFailure { fence, message, blamed: Vec::new() }
}

/// An error with its causes.
fn chain(error: &HostError) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        // Some errors tell their cause themselves.
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}
