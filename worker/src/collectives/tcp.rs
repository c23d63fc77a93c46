//! Ranks that are processes, on any hosts, over TCP.
//!
//! [`connect`] joins every two ranks of an epoch by one connection, on which both prove that they know the
//! cluster token, if there is one. The token guards who may join; **payload crosses the wire in plain bytes**,
//! unencrypted and protected against damage, not against forgery, so the network between the ranks must be trusted.
//!
//! One thread serves all connections. It waits in `poll` for whichever socket can be read or written, so large
//! frames in both directions never block each other, and it reads from a peer no further than the frame of the
//! exchange under way, so what a fast peer sends ahead is bounded by the socket. In steady state nothing is allocated:
//! buffers change places with the caller's parts. Frames carry the fence and checksums; see [`HEADER_BYTES`].
//!
//! A rank whose exchange fails tells the others whom it blames before it ends its connections, so that they name
//! the rank that was lost first and not the one that noticed it first.

mod connect;
pub(super) mod frame;
mod handshake;
mod peer;

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use phalanx_kernels::HostParts;
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::{ExchangeCounters, Fence, Rank};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::step::Step;
use crate::progress::ProgressCell;
use crate::tenure::Tenure;
pub use connect::{ConnectError, Listener, connect};
pub use frame::HEADER_BYTES;
use frame::{Header, Kind};
pub use handshake::Refusal;
use peer::{Peer, Trouble};

/// Longest time to tell the others of a failure. It passes only where a large frame is on its way to a rank that is
/// not to blame and reads nothing; that rank would otherwise blame this one.
const FAREWELL: Duration = Duration::from_secs(1);

/// One rank's connections to all others of an epoch. Dropping it makes the exchanges of the others fail.
#[derive(Debug)]
pub struct Tcp {
    rank: Rank,
    peers: Vec<Peer>,
    /// Whether a peer's socket may have something to do, `[peers]`.
    ready: Vec<bool>,
    /// Empty; its memory serves every `poll`.
    polled: Vec<PollFd<'static>>,
    own: Vec<u8>,
    payload_max: usize,
    step: Step,
    /// As long as it lasts somebody wants the exchanges.
    tenure: Tenure,
    /// Told whom this rank waits for.
    progress: ProgressCell,
}

impl Tcp {
    fn new(rank: Rank, peers: Vec<Peer>, payload_max: u32, tenure: Tenure) -> Self {
        let ready = vec![false; peers.len()];
        let payload_max = payload_max as usize;
        let (step, progress) = (Step::new(), ProgressCell::default());
        Self { rank, peers, ready, polled: Vec::new(), own: Vec::new(), payload_max, step, tenure, progress }
    }

    /// Says in `progress` which step has begun and whom it waits for.
    #[must_use]
    pub fn watched_by(self, progress: ProgressCell) -> Self {
        Self { progress, ..self }
    }

    /// Allows itself parts of another length than the others do.
    #[cfg(test)]
    pub(super) fn allowing(self, payload_max: u32) -> Self {
        Self { payload_max: payload_max as usize, ..self }
    }

    fn send(&mut self, exchange: Exchange, send: &mut HostParts) -> Result<(), CollectiveError> {
        std::mem::swap(&mut self.own, &mut send.by_rank[self.rank.index()]);
        send.by_rank[self.rank.index()].clear();
        for peer in &mut self.peers {
            let part = &mut send.by_rank[peer.rank.index()];
            if part.len() > self.payload_max {
                return Err(CollectiveError::Corrupt {
                    rank: self.rank,
                    what: "it would be longer than this epoch allows",
                });
            }
            self.step.count_sent(exchange, part.len(), HEADER_BYTES);
            peer.enqueue(&Header::rows(exchange, self.step.fence, self.rank, part), part);
        }
        for at in 0..self.peers.len() {
            let written = self.peers[at].write(self.payload_max);
            written.map_err(|trouble| self.blame(exchange, at, trouble))?;
        }
        Ok(())
    }

    fn receive(&mut self, exchange: Exchange, received: &mut HostParts) -> Result<(), CollectiveError> {
        self.ready.fill(true);
        loop {
            for at in 0..self.peers.len() {
                if !self.ready[at] || self.peers[at].wants().is_empty() {
                    continue;
                }
                let progress = self.peers[at].progress(self.payload_max);
                progress.map_err(|trouble| self.blame(exchange, at, trouble))?;
                if let Some(Header { kind: Kind::Rows(kind, layer), fence, len, .. }) = self.peers[at].arrived() {
                    let theirs = (fence, Exchange { layer, kind, row_bytes: exchange.row_bytes });
                    self.step.check(exchange, self.peers[at].rank, theirs, len as usize)?;
                }
            }
            if self.peers.iter().all(|peer| peer.wants().is_empty()) {
                break;
            }
            let Exchange { layer, kind, .. } = exchange;
            self.progress.waiting_for(self.peers.iter().filter(|peer| peer.owes()).map(|peer| peer.rank));
            match self.poll(Peer::wants, self.tenure.next_look(self.step.deadline)) {
                Ok(true) => {}
                Ok(false) if self.tenure.is_over() => return Err(CollectiveError::Over),
                Ok(false) if Instant::now() < self.step.deadline => {}
                Ok(false) => {
                    let owing = self.peers.iter().filter(|peer| peer.owes());
                    let mut waiting_for: Vec<Rank> = owing.map(|peer| peer.rank).collect();
                    if waiting_for.is_empty() {
                        let unread = self.peers.iter().filter(|peer| !peer.wants().is_empty());
                        waiting_for = unread.map(|peer| peer.rank).collect();
                    }
                    return Err(CollectiveError::Deadline { layer, kind, waiting_for });
                }
                Err(e) => {
                    return Err(CollectiveError::Lost { rank: self.rank, layer, kind, why: format!("poll: {e}") });
                }
            }
        }
        for peer in &mut self.peers {
            let len = peer.deliver(received);
            self.step.count_received(len, HEADER_BYTES);
        }
        std::mem::swap(&mut self.own, &mut received.by_rank[self.rank.index()]);
        Ok(())
    }

    /// Waits until a socket can do some of what is wanted of it, and marks it. False if the time is over.
    fn poll(&mut self, wants: impl Fn(&Peer) -> PollFlags, until: Instant) -> io::Result<bool> {
        let mut polled = recycle(std::mem::take(&mut self.polled));
        let wanting = || self.peers.iter().enumerate().filter(|(_, peer)| !wants(peer).is_empty());
        polled.extend(wanting().map(|(_, peer)| PollFd::from_borrowed_fd(peer.as_fd(), wants(peer))));
        let in_time = wait(&mut polled, until);
        self.ready.fill(false);
        for ((at, _), fd) in wanting().zip(&polled) {
            self.ready[at] = !fd.revents().is_empty();
        }
        self.polled = recycle(polled);
        in_time
    }

    fn blame(&self, exchange: Exchange, at: usize, trouble: Trouble) -> CollectiveError {
        let Exchange { layer, kind, .. } = exchange;
        let rank = self.peers[at].rank;
        match trouble {
            Trouble::Gone(why) => CollectiveError::Lost { rank, layer, kind, why },
            Trouble::Corrupt(what) => CollectiveError::Corrupt { rank, what },
            Trouble::Farewell(blamed) if blamed.index() <= self.peers.len() => {
                CollectiveError::Lost { rank: blamed, layer, kind, why: format!("rank {rank} gave up on it") }
            }
            Trouble::Farewell(_) => {
                CollectiveError::Corrupt { rank, what: "its farewell blames a rank that does not exist" }
            }
        }
    }

    /// Looks without waiting whether a rank is gone or has given up, or nobody wants the epoch any more, between two
    /// exchanges over these connections. What a fast peer has sent for the next one is kept for it.
    pub(super) fn listen(&mut self, exchange: Exchange) -> Result<(), CollectiveError> {
        if self.tenure.is_over() {
            return Err(CollectiveError::Over);
        }
        for at in 0..self.peers.len() {
            let progress = self.peers[at].progress(self.payload_max);
            progress.map_err(|trouble| self.blame(exchange, at, trouble))?;
        }
        Ok(())
    }

    /// Tells the others whom this rank gave up on, and ends the connections.
    pub(super) fn fail(&mut self, error: CollectiveError) -> CollectiveError {
        let blamed = error.blamed().first().copied().unwrap_or(self.rank);
        let farewell = Header::farewell(blamed, self.step.fence, self.rank);
        self.peers.iter_mut().for_each(|peer| peer.enqueue_farewell(&farewell));
        self.ready.fill(true);
        let until = Instant::now() + FAREWELL;
        loop {
            for (peer, _) in self.peers.iter_mut().zip(&self.ready).filter(|(_, ready)| **ready) {
                let written = peer.write(self.payload_max);
                if written.is_err() || peer.wants_out().is_empty() || peer.rank == blamed {
                    peer.end();
                }
            }
            let told = self.peers.iter().all(|peer| peer.wants_out().is_empty());
            if told || !matches!(self.poll(Peer::wants_out, until), Ok(true)) {
                break;
            }
        }
        self.peers.iter_mut().for_each(Peer::end);
        self.step.fail();
        error
    }
}

/// Waits for one of the sockets. False if the time is over.
fn wait(polled: &mut [PollFd<'_>], until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(polled, Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The memory of an emptied vector for borrows of another lifetime.
fn recycle<'a>(mut polled: Vec<PollFd<'_>>) -> Vec<PollFd<'a>> {
    polled.clear();
    // Collecting in place keeps the memory.
    polled.into_iter().map_while(|_| None).collect()
}

impl Collectives<HostParts> for Tcp {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> u32 {
        self.peers.len() as u32 + 1
    }

    fn begin(&mut self, fence: Fence, deadline: Instant) {
        self.step.begin(fence, deadline);
        self.progress.begin(fence.step);
    }

    fn start(&mut self, exchange: Exchange, send: &mut HostParts) -> Result<(), CollectiveError> {
        assert_eq!(send.by_rank.len(), self.peers.len() + 1, "a part for each rank");
        self.step.open(exchange)?;
        self.send(exchange, send).map_err(|error| self.fail(error))
    }

    fn finish(&mut self, exchange: Exchange, received: &mut HostParts) -> Result<(), CollectiveError> {
        self.step.close(exchange)?;
        received.by_rank.resize_with(self.peers.len() + 1, Vec::new);
        self.receive(exchange, received).map_err(|error| self.fail(error))
    }

    fn counters(&self) -> ExchangeCounters {
        self.step.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_again_and_again_allocates_once() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut polled = Vec::with_capacity(8);
        polled.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
        let memory = polled.as_ptr().addr();
        let again: Vec<PollFd<'static>> = recycle(polled);
        assert_eq!((again.len(), again.capacity(), again.as_ptr().addr()), (0, 8, memory));
    }
}
