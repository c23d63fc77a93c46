//! How ranks exchange rows. Collectives move bytes and never add.

use std::time::Instant;

use phalanx_kernels::KernelError;
use phalanx_proto::{ExchangeCounters, Fence, LayerIdx, Rank};

/// What is exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExchangeKind {
    /// Rows to the ranks of their experts.
    Dispatch,
    /// One row per chosen expert back to the home ranks.
    Combine,
}

/// One exchange of a step. Every rank takes part in every exchange of a step, in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The layer.
    pub layer: LayerIdx,
    /// The kind.
    pub kind: ExchangeKind,
    /// Bytes of a row on the wire, for the counters; every part is a multiple of it.
    pub row_bytes: usize,
}

/// Why an exchange failed. The step is then worthless on every rank, and so is the communicator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank is gone.
    #[error("rank {rank} is lost in {kind:?} of layer {layer}: {why}")]
    Lost {
        /// The rank.
        rank: Rank,
        /// The layer.
        layer: LayerIdx,
        /// The exchange.
        kind: ExchangeKind,
        /// What was seen.
        why: String,
    },
    /// Ranks did not answer in time.
    #[error("deadline passed in {kind:?} of layer {layer} while waiting for {}", ranks(.waiting_for))]
    Deadline {
        /// The layer.
        layer: LayerIdx,
        /// The exchange.
        kind: ExchangeKind,
        /// Who was waited for.
        waiting_for: Vec<Rank>,
    },
    /// A rank speaks of another moment.
    #[error("rank {rank} is at {theirs}, this rank at {ours}")]
    Fence {
        /// The rank.
        rank: Rank,
        /// Its moment.
        theirs: Fence,
        /// Ours.
        ours: Fence,
    },
    /// Bytes were damaged on the way, or are not a frame.
    #[error("rank {rank} sent a damaged frame: {what}")]
    Corrupt {
        /// The rank.
        rank: Rank,
        /// What does not hold.
        what: &'static str,
    },
    /// The device that holds the rows of this rank failed.
    #[error("rank {rank} cannot exchange rows: {error}")]
    Device {
        /// This rank.
        rank: Rank,
        /// What the backend says.
        error: KernelError,
    },
    /// Nobody wants the step any more.
    #[error("the epoch is over: this worker was released, taken over or given up while it waited for other ranks")]
    Over,
    /// The communicator failed before and takes part in nothing any more.
    #[error("the communicator failed earlier; it serves no further step of this epoch")]
    Broken,
}

fn ranks(ranks: &[Rank]) -> String {
    let names: Vec<String> = ranks.iter().map(|r| format!("rank {r}")).collect();
    names.join(", ")
}

impl CollectiveError {
    /// The ranks to blame.
    #[must_use]
    pub fn blamed(&self) -> &[Rank] {
        match self {
            Self::Lost { rank, .. }
            | Self::Fence { rank, .. }
            | Self::Corrupt { rank, .. }
            | Self::Device { rank, .. } => std::slice::from_ref(rank),
            Self::Deadline { waiting_for, .. } => waiting_for,
            Self::Over | Self::Broken => &[],
        }
    }
}

/// The ranks of one epoch. `P` holds the bytes to or from each rank, where the backend keeps them.
///
/// An exchange is started, other work may be enqueued, and it is finished; exchanges do not overlap each other.
pub trait Collectives<P>: Send + 'static {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Ranks of the epoch.
    fn size(&self) -> u32;

    /// Begins a step: every frame carries `fence`, and no wait lasts beyond `deadline`; where the step before is not settled
    /// yet, beyond as much time from then on.
    fn begin(&mut self, fence: Fence, deadline: Instant);

    /// Tells how many rows each rank has in the step that has begun, `[ranks]`: every rank knows it of all from its
    /// plan. A transport may choose by it how rows travel, alike on all ranks; without it none chooses.
    fn expect(&mut self, _rows_of_rank: &[u32]) {}

    /// Told before the backend writes what `exchange` sends into `send`.
    fn prepare(&mut self, _exchange: Exchange, _send: &mut P) {}

    /// Starts to send `send.by_rank[r]` to every rank `r`. The part of this rank stays here.
    /// Takes the bytes: `send` is to be written anew, once the exchange is finished.
    ///
    /// # Errors
    /// A rank is lost, late, or out of step.
    fn start(&mut self, exchange: Exchange, send: &mut P) -> Result<(), CollectiveError>;

    /// Waits until `received` holds the bytes of every rank for this one; or, where a device works in order, sees to it
    /// that the ops enqueued from here on find them there.
    ///
    /// # Errors
    /// A rank is lost, late, out of step, or sent damaged bytes. Nothing received is then used.
    fn finish(&mut self, exchange: Exchange, received: &mut P) -> Result<(), CollectiveError>;

    /// Starts an exchange and finishes it.
    ///
    /// # Errors
    /// Those of either.
    fn exchange(&mut self, exchange: Exchange, send: &mut P, received: &mut P) -> Result<(), CollectiveError> {
        self.start(exchange, send)?;
        self.finish(exchange, received)
    }

    /// Whether a step with so many rows on each rank, `[ranks]`, may begin before the one before it is settled: none of its
    /// exchanges waits on the host for another rank. Ranks may do so or not, each as it likes.
    fn overlaps(&self, _rows_of_rank: &[u32]) -> bool {
        self.size() == 1
    }

    /// Ends the step that has begun: all of its exchanges were finished. Waits for nobody.
    ///
    /// # Errors
    /// This rank's device failed.
    fn end(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Looks without waiting whether the exchanges of all steps up to this one are done.
    ///
    /// # Errors
    /// Those of [`Collectives::settle`], which then does not wait.
    fn is_settled(&mut self, _fence: Fence) -> Result<bool, CollectiveError> {
        Ok(true)
    }

    /// Waits until the exchanges of all steps up to this one are done; each has ended. Nothing of a step is used, and nothing
    /// waits for the device, before. A step that is not settled when another one fails has failed with it.
    ///
    /// # Errors
    /// A rank is lost, late, out of step, or sent what is not its due.
    fn settle(&mut self, _fence: Fence) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// What was sent and received since [`Collectives::begin`].
    fn counters(&self) -> ExchangeCounters;
}
