//! Plans to one rank and replies from it, over a stream of steps, or over several if streams break.
//!
//! A broken stream is not a lost worker. The plans that were not answered are kept, at most [`PLANS_AHEAD_MAX`]; when
//! the stream breaks, another is opened and they are sent again, in order. This is safe because every plan carries its
//! fence: a worker does the step after its last one, tells again what came of those that it keeps, and refuses
//! all others. It keeps results until a plan says that they have arrived, and at least as many as there are
//! plans here. So nothing has to be said about which plans, or which replies, were lost on the way: it does not matter. A
//! reply that is passed on has taken its plan away, so none is passed on twice.
//!
//! What cannot be mended is a loss at once: nobody listens at the worker's address any more, or the worker has another
//! epoch or none, because it was started anew or belongs to somebody else. Anything else may pass, damaged bytes as
//! well, and is a loss when no reply has come through for a while.
//!
//! A reply that never comes is not noticed here: the driver knows when it is late.

use std::collections::VecDeque;
use std::time::Duration;

use phalanx_proto::{Fence, Rank, StepPlan};
use phalanx_wire::v1;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Code;

use super::handle::{CALL_WAIT, StepReplies, WorkerError, WorkerHandle};
use super::link::{CellEvent, PLANS_AHEAD_MAX, RankPort};

/// How long a worker may be out of reach before it counts as lost.
const RESUME_WAIT: Duration = Duration::from_secs(1);
/// Before each attempt to open another stream.
const RESUME_PAUSE: Duration = Duration::from_millis(20);

/// A stream of steps.
struct Stream {
    plans: mpsc::Sender<v1::Envelope>,
    replies: StepReplies,
    opened: Instant,
    /// A reply has come.
    answers: bool,
}

/// Why nothing more comes of a stream.
enum End {
    /// Nobody sends plans or wants replies any more.
    Done,
    /// Another stream may help.
    Broken(WorkerError),
    /// The worker answers something that cannot be.
    Nonsense(String),
}

/// The way between a driver and one of its ranks.
pub(super) struct Carrier {
    worker: WorkerHandle,
    rank: Rank,
    plans: mpsc::Receiver<StepPlan>,
    events: mpsc::Sender<CellEvent>,
    /// Plans that were sent and not answered, as they travel.
    unanswered: VecDeque<(Fence, v1::Envelope)>,
}

impl Carrier {
    /// Opens the first stream and lets a task carry plans and replies until either end is gone.
    pub(super) async fn start(worker: WorkerHandle, port: RankPort) -> Result<(), WorkerError> {
        let RankPort { rank, plans, events } = port;
        let carrier = Self { worker, rank, plans, events, unanswered: VecDeque::new() };
        let stream = carrier.open(CALL_WAIT).await?;
        tokio::spawn(carrier.run(stream));
        Ok(())
    }

    async fn run(mut self, mut stream: Stream) {
        // When the worker is given up, while nothing comes through.
        let mut until = None;
        let why = loop {
            let error = match self.carry(&mut stream).await {
                End::Done => return,
                End::Broken(error) => error,
                End::Nonsense(why) => break why,
            };
            if stream.answers || stream.opened.elapsed() >= RESUME_WAIT {
                until = None;
            }
            let until = *until.get_or_insert_with(|| Instant::now() + RESUME_WAIT);
            match self.resume(error, until).await {
                Ok(another) => stream = another,
                Err(why) => break why,
            }
        };
        let lost = CellEvent::Lost { rank: self.rank, address: self.worker.address().to_owned(), why };
        // If nobody hears it, nobody needs to.
        drop(self.events.send(lost).await);
    }

    /// Carries until the stream ends.
    async fn carry(&mut self, stream: &mut Stream) -> End {
        loop {
            let reply = tokio::select! {
                plan = self.plans.recv(), if self.unanswered.len() < PLANS_AHEAD_MAX => {
                    let Some(plan) = plan else { return End::Done };
                    let fence = plan.header.fence;
                    let plan = v1::Envelope::from(plan);
                    self.unanswered.push_back((fence, plan.clone()));
                    // There is a place for each plan here. A stream that takes none has broken, as its replies will say.
                    drop(stream.plans.try_send(plan));
                    continue;
                }
                reply = stream.replies.next() => reply,
                () = self.events.closed() => return End::Done,
            };
            let reply = match reply {
                Ok(reply) => reply,
                Err(error) => return End::Broken(error),
            };
            let fence = reply.as_ref().map_or_else(|failure| failure.fence, |result| result.fence);
            match self.unanswered.iter().position(|(asked, _)| *asked == fence) {
                Some(0) => drop(self.unanswered.pop_front()),
                // Bytes that were damaged can hide whole messages.
                Some(missing) => return End::Broken(self.gap(missing)),
                None => return End::Nonsense(format!("it answers for {fence}, which was not asked")),
            }
            if let Ok(result) = &reply
                && result.rank != self.rank
            {
                return End::Nonsense(format!("it answers as rank {}", result.rank));
            }
            stream.answers = true;
            if self.events.send(CellEvent::Reply { rank: self.rank, reply }).await.is_err() {
                return End::Done;
            }
        }
    }

    fn gap(&self, missing: usize) -> WorkerError {
        let (who, why) = (self.worker.who().clone(), format!("{missing} replies are missing from its stream"));
        WorkerError::Failed { who, call: "steps", code: Code::DataLoss, why }
    }

    /// Another stream in place of the one that broke, with all plans that were not answered; or why there is none.
    async fn resume(&self, broken: WorkerError, until: Instant) -> Result<Stream, String> {
        let first = brief(&broken);
        if is_final(&broken) {
            return Err(first);
        }
        tracing::warn!("{broken}; resuming");
        let mut last = None;
        loop {
            tokio::time::sleep(RESUME_PAUSE).await;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match self.open(left).await {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    let over = is_final(&error);
                    last = Some(brief(&error));
                    if over {
                        break;
                    }
                }
            }
        }
        Err(last.map_or_else(|| first.clone(), |last| format!("{first}; its steps cannot be resumed: {last}")))
    }

    async fn open(&self, wait: Duration) -> Result<Stream, WorkerError> {
        let (to, plans) = mpsc::channel(PLANS_AHEAD_MAX);
        for (_, plan) in &self.unanswered {
            // As many places as plans.
            drop(to.try_send(plan.clone()));
        }
        let replies = self.worker.steps(plans, wait).await?;
        Ok(Stream { plans: to, replies, opened: Instant::now(), answers: false })
    }
}

/// Whether another attempt cannot help.
fn is_final(error: &WorkerError) -> bool {
    match error {
        WorkerError::Unreachable { .. } | WorkerError::Failed { code: Code::FailedPrecondition, .. } => true,
        WorkerError::Address { .. }
        | WorkerError::Deadline { .. }
        | WorkerError::Failed { .. }
        | WorkerError::Reply { .. } => false,
    }
}

/// The error without the name of the worker, which is told beside it.
fn brief(error: &WorkerError) -> String {
    match error {
        WorkerError::Failed { why, .. } | WorkerError::Unreachable { why, .. } => why.clone(),
        WorkerError::Reply { why, .. } => why.to_string(),
        WorkerError::Deadline { waited, .. } => format!("no answer within {:.1} s", waited.as_secs_f32()),
        WorkerError::Address { .. } => error.to_string(),
    }
}
