//! Between a cell's driver and its ranks, wherever they are.

use std::future::Future;

use phalanx_proto::{Rank, StepPlan};
use phalanx_wire::StepReply;
use tokio::sync::mpsc;

/// Plans that may be on their way to a rank at once.
pub const PLANS_AHEAD_MAX: usize = 8;

/// What a driver hears of its ranks.
#[derive(Clone, Debug, PartialEq)]
pub enum CellEvent {
    /// A rank has answered a plan.
    Reply {
        /// The rank.
        rank: Rank,
        /// What came of the step.
        reply: StepReply,
    },
    /// A rank is gone; the last that is heard of it.
    Lost {
        /// The rank.
        rank: Rank,
        /// Where it was.
        address: String,
        /// How that was noticed.
        why: String,
    },
}

/// Why plans were not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Each rank must have its plan.
    #[error("{plans} plans for {ranks} ranks; every rank needs one")]
    Count {
        /// Plans given.
        plans: usize,
        /// Ranks there are.
        ranks: usize,
    },
    /// A rank takes no more plans; why is told by [`CellEvent::Lost`].
    #[error("rank {rank} takes no more plans")]
    Closed {
        /// The rank.
        rank: Rank,
    },
}

/// The ranks of one epoch.
pub trait CellLink: Send {
    /// Sends each rank its plan, in the order of ranks. Waits while a rank has [`PLANS_AHEAD_MAX`] plans before it.
    fn send(&mut self, plans: Vec<StepPlan>) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// The next event. May be given up and asked again without losing one; waits forever when all ranks are lost.
    fn recv(&mut self) -> impl Future<Output = CellEvent> + Send;
}

/// A link whose ranks are the other ends of channels: threads of this process, or tasks that speak to processes.
#[derive(Debug)]
pub struct ChannelLink {
    plans: Vec<mpsc::Sender<StepPlan>>,
    events: mpsc::Receiver<CellEvent>,
    /// Keeps `events` from ending.
    _events: mpsc::Sender<CellEvent>,
}

/// A rank's end of a [`ChannelLink`]. Whoever holds it answers each plan, or says that the rank is lost.
#[derive(Debug)]
pub struct RankPort {
    /// The rank.
    pub rank: Rank,
    /// Plans to be done, in order; ends when the driver has gone.
    pub plans: mpsc::Receiver<StepPlan>,
    /// What comes of them.
    pub events: mpsc::Sender<CellEvent>,
}

impl ChannelLink {
    /// A link to `ranks` ranks, and their ends of it.
    #[must_use]
    pub fn new(ranks: u32) -> (Self, Vec<RankPort>) {
        let (report, events) = mpsc::channel((PLANS_AHEAD_MAX + 1) * (ranks as usize).max(1));
        let (plans, ports) = (0..ranks)
            .map(|rank| {
                let (plan, plans) = mpsc::channel(PLANS_AHEAD_MAX);
                (plan, RankPort { rank: Rank(rank), plans, events: report.clone() })
            })
            .unzip();
        (Self { plans, events, _events: report }, ports)
    }
}

impl CellLink for ChannelLink {
    async fn send(&mut self, plans: Vec<StepPlan>) -> Result<(), LinkError> {
        if plans.len() != self.plans.len() {
            return Err(LinkError::Count { plans: plans.len(), ranks: self.plans.len() });
        }
        for (rank, (to, plan)) in (0..).map(Rank).zip(self.plans.iter().zip(plans)) {
            to.send(plan).await.map_err(|_| LinkError::Closed { rank })?;
        }
        Ok(())
    }

    async fn recv(&mut self) -> CellEvent {
        self.events.recv().await.expect("a sender is kept beside the receiver")
    }
}
