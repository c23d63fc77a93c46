//! What every communicator knows of the step it is in.

use std::time::Instant;

use phalanx_model::{CollectiveError, Exchange, ExchangeKind};
use phalanx_proto::{ExchangeCounters, Fence, Rank};

/// The step, the exchange under way, and whether anything can still be exchanged.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) fence: Fence,
    pub(super) deadline: Instant,
    pub(super) counters: ExchangeCounters,
    open: Option<Exchange>,
    broken: bool,
}

impl Step {
    /// Before the first step.
    pub(super) fn new() -> Self {
        Self {
            fence: Fence::default(),
            deadline: Instant::now(),
            counters: ExchangeCounters::default(),
            open: None,
            broken: false,
        }
    }

    /// Enters a step. An exchange left open breaks the communicator: its frames are still on the way.
    pub(super) fn begin(&mut self, fence: Fence, deadline: Instant) {
        self.broken |= self.open.take().is_some();
        self.fence = fence;
        self.deadline = deadline;
        self.counters = ExchangeCounters::default();
    }

    /// Opens an exchange.
    pub(super) fn open(&mut self, exchange: Exchange) -> Result<(), CollectiveError> {
        assert_eq!(self.open, None, "exchanges do not overlap");
        if self.broken {
            return Err(CollectiveError::Broken);
        }
        self.open = Some(exchange);
        Ok(())
    }

    /// Closes the exchange.
    pub(super) fn close(&mut self, exchange: Exchange) -> Result<(), CollectiveError> {
        if self.broken {
            return Err(CollectiveError::Broken);
        }
        assert_eq!(self.open.take(), Some(exchange), "an exchange is started before it is finished");
        Ok(())
    }

    /// Nothing is exchanged from here on.
    pub(super) fn fail(&mut self) {
        self.open = None;
        self.broken = true;
    }

    /// Whether nothing is exchanged any more.
    pub(super) const fn is_broken(&self) -> bool {
        self.broken
    }

    /// Counts a part sent to another rank, with `overhead` bytes of framing.
    pub(super) fn count_sent(&mut self, exchange: Exchange, bytes: usize, overhead: usize) {
        let rows = (bytes / exchange.row_bytes.max(1)) as u64;
        match exchange.kind {
            ExchangeKind::Dispatch => self.counters.dispatch_rows += rows,
            ExchangeKind::Combine => self.counters.combine_rows += rows,
        }
        self.counters.bytes_sent += (bytes + overhead) as u64;
    }

    /// Counts a part received from another rank, with `overhead` bytes of framing.
    pub(super) fn count_received(&mut self, bytes: usize, overhead: usize) {
        self.counters.bytes_received += (bytes + overhead) as u64;
    }

    /// Counts slots sent and received, in bytes alone: which rows are in them the device knows.
    pub(super) fn count_slots(&mut self, bytes: usize) {
        self.counters.bytes_sent += bytes as u64;
        self.counters.bytes_received += bytes as u64;
    }

    /// Whether what `rank` sent belongs here: same moment, same exchange, whole rows.
    pub(super) fn check(
        &self,
        exchange: Exchange,
        rank: Rank,
        theirs: (Fence, Exchange),
        bytes: usize,
    ) -> Result<(), CollectiveError> {
        let (fence, other) = theirs;
        if fence != self.fence {
            Err(CollectiveError::Fence { rank, theirs: fence, ours: self.fence })
        } else if (other.layer, other.kind) != (exchange.layer, exchange.kind) {
            Err(CollectiveError::Corrupt { rank, what: "it belongs to another exchange of the step" })
        } else if !bytes.is_multiple_of(exchange.row_bytes.max(1)) {
            Err(CollectiveError::Corrupt { rank, what: "its payload is not a whole number of rows" })
        } else {
            Ok(())
        }
    }
}
