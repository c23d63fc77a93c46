//! Ranks that are threads of one process. Buffers change hands; no byte is copied.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use phalanx_kernels::HostParts;
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::{ExchangeCounters, Fence, Rank};

use super::step::Step;

/// A communicator for each of `n` ranks, in order.
#[must_use]
pub fn group(n: u32) -> Vec<Local> {
    let size = n as usize;
    let board =
        Board { lanes: (0..size * size).map(|_| Lane::default()).collect(), gone: vec![false; size], failure: None };
    let shared = Arc::new(Shared { board: Mutex::new(board), changed: Condvar::new() });
    let rank = |r| Local { rank: Rank(r), size, shared: Arc::clone(&shared), own: Vec::new(), step: Step::new() };
    (0..n).map(rank).collect()
}

/// One rank's end of a group of threads. Dropping it makes the exchanges of the others fail.
///
/// Its counters hold payload alone: between threads there are no frames.
#[derive(Debug)]
pub struct Local {
    rank: Rank,
    size: usize,
    shared: Arc<Shared>,
    own: Vec<u8>,
    step: Step,
}

#[derive(Debug)]
struct Shared {
    board: Mutex<Board>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What lies between the ranks.
#[derive(Debug)]
struct Board {
    /// From rank and to rank, `[size, size]`.
    lanes: Vec<Lane>,
    /// Ranks whose communicator was dropped.
    gone: Vec<bool>,
    /// The first failure; it ends the group.
    failure: Option<Failure>,
}

#[derive(Clone, Copy, Debug)]
struct Failure {
    by: Rank,
    blamed: Rank,
}

/// The way from one rank to another. A sender is at most one exchange ahead of the receiver, so at most two
/// parcels wait here.
#[derive(Debug, Default)]
struct Lane {
    parcels: VecDeque<Parcel>,
    /// Buffers on their way back to the sender.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Parcel {
    fence: Fence,
    exchange: Exchange,
    bytes: Vec<u8>,
}

impl Local {
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let me = self.rank.index();
        (0..self.size).filter(move |&r| r != me)
    }

    /// Waits until every other rank's parcel of this exchange is there, and takes them all.
    fn receive(&self, exchange: Exchange, received: &mut HostParts) -> Result<usize, CollectiveError> {
        let Exchange { layer, kind, .. } = exchange;
        let lane_of = |from: usize| from * self.size + self.rank.index();
        let mut board = self.shared.lock();
        loop {
            for from in self.others() {
                if let Some(parcel) = board.lanes[lane_of(from)].parcels.front() {
                    let theirs = (parcel.fence, parcel.exchange);
                    self.step.check(exchange, Rank(from as u32), theirs, parcel.bytes.len())?;
                }
            }
            let missing = |board: &Board, from: usize| board.lanes[lane_of(from)].parcels.is_empty();
            if !self.others().any(|from| missing(&board, from)) {
                break;
            }
            if let Some(Failure { by, blamed }) = board.failure {
                let why = format!("rank {by} gave up on it");
                return Err(CollectiveError::Lost { rank: blamed, layer, kind, why });
            }
            if let Some(from) = self.others().find(|&from| board.gone[from] && missing(&board, from)) {
                let why = "its thread has ended".to_owned();
                return Err(CollectiveError::Lost { rank: Rank(from as u32), layer, kind, why });
            }
            let left = self.step.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let late = self.others().filter(|&from| missing(&board, from));
                let waiting_for = late.map(|from| Rank(from as u32)).collect();
                return Err(CollectiveError::Deadline { layer, kind, waiting_for });
            }
            board = self.shared.changed.wait_timeout(board, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut bytes = 0;
        for from in self.others() {
            let lane = &mut board.lanes[lane_of(from)];
            if let Some(parcel) = lane.parcels.pop_front() {
                bytes += parcel.bytes.len();
                let mut spare = std::mem::replace(&mut received.by_rank[from], parcel.bytes);
                spare.clear();
                lane.spare.push(spare);
            }
        }
        Ok(bytes)
    }

    /// Tells the others whom this rank gave up on.
    fn fail(&mut self, error: CollectiveError) -> CollectiveError {
        let blamed = error.blamed().first().copied().unwrap_or(self.rank);
        self.shared.lock().failure.get_or_insert(Failure { by: self.rank, blamed });
        self.shared.changed.notify_all();
        self.step.fail();
        error
    }
}

impl Collectives<HostParts> for Local {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size as u32
    }

    fn begin(&mut self, fence: Fence, deadline: Instant) {
        self.step.begin(fence, deadline);
    }

    fn start(&mut self, exchange: Exchange, send: &mut HostParts) -> Result<(), CollectiveError> {
        assert_eq!(send.by_rank.len(), self.size, "a part for each rank");
        self.step.open(exchange)?;
        let me = self.rank.index();
        std::mem::swap(&mut self.own, &mut send.by_rank[me]);
        send.by_rank[me].clear();
        let mut board = self.shared.lock();
        for to in self.others() {
            let lane = &mut board.lanes[me * self.size + to];
            let bytes = std::mem::replace(&mut send.by_rank[to], lane.spare.pop().unwrap_or_default());
            self.step.count_sent(exchange, bytes.len(), 0);
            lane.parcels.push_back(Parcel { fence: self.step.fence, exchange, bytes });
        }
        drop(board);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn finish(&mut self, exchange: Exchange, received: &mut HostParts) -> Result<(), CollectiveError> {
        self.step.close(exchange)?;
        received.by_rank.resize_with(self.size, Vec::new);
        let bytes = self.receive(exchange, received).map_err(|error| self.fail(error))?;
        self.step.count_received(bytes, 0);
        std::mem::swap(&mut self.own, &mut received.by_rank[self.rank.index()]);
        Ok(())
    }

    fn counters(&self) -> ExchangeCounters {
        self.step.counters
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.shared.lock().gone[self.rank.index()] = true;
        self.shared.changed.notify_all();
    }
}
