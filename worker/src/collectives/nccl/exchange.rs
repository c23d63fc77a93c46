//! The exchanges of a step over NCCL.
//!
//! The ranks of an epoch are joined twice: over TCP, which is the control connection, and over NCCL, which carries the
//! rows. The control connections bring NCCL's id from rank 0 to all, and all the time the news that a rank is gone, which
//! NCCL itself never gives.
//!
//! A step goes one of two [`Way`]s. Where there are many rows, only as many bytes travel as there are: fence and sizes of
//! the parts go over the control connections first, and each exchange ends on the host, so that fences, checks and blame
//! are those of [`super::super::tcp`]. Where there are few, they travel in slots of one size: the host only enqueues, the
//! device checks to which step and exchange a slot belongs, and [`Collectives::settle`] waits once for all.
//!
//! So a step in slots may begin before the one before it is settled. What is on the stream is alike on all ranks, whichever of
//! them are ahead: a rank issues the exchanges of its plans in their order, and each step has as many as there are layers. A
//! rank that is not ahead only lets the others' streams wait; no host waits for another rank's but to settle, or when it is
//! too far ahead, each with the deadline of the step waited for.
//!
//! Where ranks are asked to, exchanges in slots are captured ([`Captures`]) and go with the step's graphs: then the host
//! calls NCCL for none of them.
//!
//! NCCL moves bytes only while sender and receiver both have called it, in one group, else large parts block each
//! other. So rows move when all ranks finish the exchange, and none finishes it before all are there. All follows the
//! order of the backend's stream.

mod exact;
mod slots;
mod watch;

use std::ffi::c_void;
use std::time::{Duration, Instant};

use phalanx_kernels::cuda::{Outgoing, Parts, Port, Slot};
use phalanx_kernels::{HostParts, KernelError};
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::{ExchangeCounters, Fence, Rank};

use super::captures::Captures;
use super::communicator::{Communicator, NcclError};
use super::join::{JoinError, JoinOptions, agree, gather, tell};
use super::marks::{MARKS_MAX, Marks};
use super::table::Api;
use super::way::{Shape, Way};
use crate::collectives::step::Step;
use crate::collectives::tcp::{HEADER_BYTES, Tcp};
use watch::{Goal, pause};

/// Bytes on the control connection for each part: a frame with the part's size.
pub const CONTROL_BYTES: usize = HEADER_BYTES + SIZE_BYTES;
const SIZE_BYTES: usize = 8;
/// How long bytes of a rank that is gone may still be on their way, and how long a failure may wait for its culprit.
const GRACE: Duration = Duration::from_millis(100);

/// What is on its way out in the exchange under way.
enum Sent {
    /// Parts, and the bytes of each, `[ranks]`.
    Parts(Outgoing, Vec<usize>),
    /// Slots, from this address on.
    Slots(u64, Slot),
}

/// One rank's ends of the connections to all others of an epoch, on a GPU. Dropping it makes the exchanges of the
/// others fail.
pub struct Nccl {
    control: Tcp,
    communicator: Communicator,
    port: Port,
    shape: Shape,
    way: Way,
    /// Why slots cannot be sent in this step.
    fault: Option<KernelError>,
    sent: Option<Sent>,
    /// Exchanges in slots that go with the step's graphs.
    captures: Captures,
    /// Exchanges that are on the stream and were not waited for.
    marks: Marks,
    /// The last step that was settled.
    settled: Fence,
    /// How long the step that has begun may take, once the one before it is settled.
    allowed: Duration,
    /// A rank that is gone, and until when its bytes may still arrive. Farewells are said once, so it is kept.
    gone: Option<(Instant, CollectiveError)>,
    /// What failed here, and until when another rank may still say who is to blame for it.
    trouble: Option<(Instant, NcclError)>,
    /// What ended all exchanges.
    failure: Option<CollectiveError>,
    /// Sizes on their way.
    sizes_out: HostParts,
    sizes_in: HostParts,
    payload_max: usize,
    grace: Duration,
    step: Step,
}

impl Nccl {
    /// Joins the ranks that `control` has joined. `port` is of the backend that writes and reads the parts, with room for
    /// [`Shape::slots_bytes`].
    ///
    /// # Errors
    /// NCCL or a rank failed, or the deadline passed.
    pub fn join(api: Api, mut control: Tcp, mut port: Port, options: JoinOptions) -> Result<Self, JoinError> {
        let id = agree(api, &mut control, options.fence, options.deadline)?;
        let ranks = control.size() as usize;
        // Told before it ends, so that all name the rank that was lost first.
        let joined = port.ready(MARKS_MAX).and_then(|()| port.stream()).map_err(JoinError::from);
        let joined = joined.and_then(|_| gather(api, id, &mut control, &options));
        let communicator = joined.map_err(|error| tell(&mut control, error))?;
        Ok(Self {
            control,
            communicator,
            port,
            shape: options.shape,
            way: Way::Exact,
            fault: None,
            sent: None,
            captures: Captures::new(options.captures && ranks > 1),
            marks: Marks::default(),
            settled: options.fence,
            allowed: Duration::ZERO,
            gone: None,
            trouble: None,
            failure: None,
            sizes_out: HostParts::new(ranks),
            sizes_in: HostParts::new(ranks),
            payload_max: options.payload_max as usize,
            grace: GRACE,
            step: Step::new(),
        })
    }

    /// Memory that is left on the device, if it says.
    pub(super) fn free_memory(&self) -> Option<u64> {
        self.port.free_memory()
    }

    /// NCCL's communicator.
    #[must_use]
    pub const fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// Waits this long for the culprit of a failure, instead of [`GRACE`].
    #[cfg(test)]
    pub(super) fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Closes the connections to the other ranks; `alone` takes their place.
    #[cfg(test)]
    pub(super) fn hang_up(&mut self, alone: Tcp) {
        self.control = alone;
    }

    /// Goes this way in the step that has begun.
    #[cfg(test)]
    pub(super) fn go(&mut self, way: Way) {
        self.way = way;
        let Fence { term, epoch, step } = self.step.fence;
        self.port.begin([term.0, epoch.0, step.0]).unwrap();
    }

    fn lost(&self, exchange: Exchange, why: &dyn std::error::Error) -> CollectiveError {
        let Exchange { layer, kind, .. } = exchange;
        CollectiveError::Lost { rank: self.control.rank(), layer, kind, why: why.to_string() }
    }

    fn device(&self, error: KernelError) -> CollectiveError {
        CollectiveError::Device { rank: self.control.rank(), error }
    }

    fn me(&self) -> usize {
        self.control.rank().index()
    }

    /// Why a step is not to be settled any more.
    fn failure(&self) -> CollectiveError {
        self.failure.clone().unwrap_or(CollectiveError::Broken)
    }

    /// Tells the others whom this rank gave up on, and ends the exchange.
    fn failed(&mut self, error: CollectiveError) -> CollectiveError {
        let error = self.control.fail(error);
        self.broken(error)
    }

    /// Ends the communicator. It waits for the end of graphs that hold exchanges, so these go meanwhile: not before, as those
    /// in flight end only when it is told.
    fn abort(&mut self) {
        let Self { communicator, captures, port, .. } = self;
        communicator.abort_while(|| {
            captures.end();
            port.forget_captured();
        });
    }

    /// The control connections have failed and said so: nothing is exchanged from here on.
    fn broken(&mut self, error: CollectiveError) -> CollectiveError {
        self.abort();
        self.step.fail();
        self.failure.get_or_insert_with(|| error.clone());
        error
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
    }
}

/// A device's address as C has it; the host never reads there.
fn pointer(address: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

impl Collectives<Parts> for Nccl {
    fn rank(&self) -> Rank {
        self.control.rank()
    }

    fn size(&self) -> u32 {
        self.control.size()
    }

    fn begin(&mut self, fence: Fence, deadline: Instant) {
        self.step.begin(fence, deadline);
        self.allowed = deadline.saturating_duration_since(Instant::now());
        if !self.marks.leave_room() {
            // A step that nobody ended, or waited for.
            self.step.fail();
        }
        if let Some(before) = self.marks.newest() {
            self.step.deadline = before.deadline + self.allowed;
        }
        self.way = Way::Exact;
        self.control.begin(fence, deadline);
    }

    fn overlaps(&self, rows_of_rank: &[u32]) -> bool {
        self.shape.way(rows_of_rank) != Way::Exact
    }

    fn expect(&mut self, rows_of_rank: &[u32]) {
        self.way = self.shape.way(rows_of_rank);
        if self.way != Way::Exact {
            let Fence { term, epoch, step } = self.step.fence;
            self.fault = self.port.begin([term.0, epoch.0, step.0]).err();
        }
    }

    fn prepare(&mut self, exchange: Exchange, send: &mut Parts) {
        let me = self.gathers(exchange).then_some(self.me() as u32);
        self.port.gather(send, me);
    }

    fn start(&mut self, exchange: Exchange, send: &mut Parts) -> Result<(), CollectiveError> {
        self.step.open(exchange)?;
        match self.shape.slot(self.way, exchange) {
            None => self.announce(exchange, send),
            Some(slot) => self.pack(send, slot),
        }
    }

    fn finish(&mut self, exchange: Exchange, received: &mut Parts) -> Result<(), CollectiveError> {
        self.step.close(exchange)?;
        match self.sent.take() {
            Some(Sent::Parts(outgoing, sent)) => {
                let sizes = self.announced(exchange)?;
                let moved = self.transfer(exchange, (&outgoing, &sent), received, &sizes);
                moved.map_err(|error| self.failed(error))?;
                let me = self.me();
                let others = sizes.iter().enumerate().filter(|(rank, _)| *rank != me);
                others.for_each(|(_, &bytes)| self.step.count_received(bytes, CONTROL_BYTES));
                Ok(())
            }
            Some(Sent::Slots(at, slot)) => {
                self.deliver(exchange, at, slot, received).map_err(|error| self.failed(error))
            }
            None => Err(CollectiveError::Broken),
        }
    }

    fn end(&mut self) -> Result<(), CollectiveError> {
        self.mark(true).map_err(|error| self.failed(error))?;
        if self.marks.newest().is_none() {
            self.settled = self.step.fence;
        }
        Ok(())
    }

    fn is_settled(&mut self, fence: Fence) -> Result<bool, CollectiveError> {
        while self.settled < fence {
            if self.step.is_broken() {
                return Err(self.failure());
            }
            let Some(mark) = self.marks.oldest(fence) else { return Ok(true) };
            let looked = self.look(mark.exchange, Goal::Passed, true);
            let passed = looked.and_then(|there| if there { self.passed().map(|()| true) } else { Ok(false) });
            if !passed.map_err(|error| self.failed(error))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn settle(&mut self, fence: Fence) -> Result<(), CollectiveError> {
        for look in 0_u32.. {
            if self.is_settled(fence)? {
                break;
            }
            pause(look);
        }
        Ok(())
    }

    fn counters(&self) -> ExchangeCounters {
        self.step.counters
    }
}
