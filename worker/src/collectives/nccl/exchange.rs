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

use std::ffi::c_void;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::cudaStream_t;
use phalanx_kernels::cuda::{Captured, Outgoing, PART_ALIGNMENT, Parts, Port, Slot};
use phalanx_kernels::{HostParts, KernelError};
use phalanx_model::{CollectiveError, Collectives, Exchange, ExchangeKind};
use phalanx_proto::{ExchangeCounters, Fence, Rank};

use super::captures::{Captures, Key, Turn};
use super::communicator::{Communicator, NcclError};
use super::join::{JoinError, JoinOptions, agree, gather, tell};
use super::marks::{MARKS_MAX, Marks};
use super::schedule::{all_to_all, fixed, starts};
use super::table::{Api, Code};
use super::way::{Shape, Way};
use crate::collectives::step::Step;
use crate::collectives::tcp::{HEADER_BYTES, Tcp};

/// Bytes on the control connection for each part: a frame with the part's size.
pub const CONTROL_BYTES: usize = HEADER_BYTES + SIZE_BYTES;
const SIZE_BYTES: usize = 8;
/// How long bytes of a rank that is gone may still be on their way, and how long a failure may wait for its culprit.
const GRACE: Duration = Duration::from_millis(100);
/// Looks at the stream without a pause before the thread sleeps between them.
const SPINS: u32 = 200;
/// Sleep between two looks.
const POLL: Duration = Duration::from_micros(20);
/// What a wait waits for.
#[derive(Clone, Copy, PartialEq)]
enum Goal {
    /// What was enqueued is on the stream: what is enqueued now comes after it.
    Enqueued,
    /// The stream is through with it.
    Done,
    /// The stream has come to the oldest mark.
    Passed,
}

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
            captures: Captures::new(options.captures),
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

    /// Bytes to each rank, once the ops are done that write them.
    fn sizes(&self, exchange: Exchange, send: &Parts) -> Result<Vec<usize>, CollectiveError> {
        let failed = |error| self.device(error);
        for look in 0.. {
            if self.port.is_idle().map_err(failed)? {
                break;
            }
            if Instant::now() >= self.step.deadline {
                let why = "its device did not finish the rows in time".to_owned();
                let Exchange { layer, kind, .. } = exchange;
                return Err(CollectiveError::Lost { rank: self.control.rank(), layer, kind, why });
            }
            pause(look);
        }
        self.port.sizes(send).map_err(failed)
    }

    /// Puts the sizes of the parts on their way.
    fn announce(&mut self, exchange: Exchange, send: &Parts) -> Result<(), CollectiveError> {
        let sizes = self.sizes(exchange, send).map_err(|error| self.failed(error))?;
        assert_eq!(sizes.len(), self.sizes_out.by_rank.len(), "a part for each rank");
        let me = self.me();
        for (rank, (part, &bytes)) in self.sizes_out.by_rank.iter_mut().zip(&sizes).enumerate() {
            part.clear();
            part.extend_from_slice(&(bytes as u64).to_le_bytes());
            if rank != me {
                self.step.count_sent(exchange, bytes, CONTROL_BYTES);
            }
        }
        if sizes.iter().any(|&bytes| bytes > self.payload_max) {
            let what = "it would be longer than this epoch allows";
            return Err(self.failed(CollectiveError::Corrupt { rank: Rank(me as u32), what }));
        }
        self.sent = Some(Sent::Parts(self.port.take(send), sizes));
        let told = self.control.start(of_sizes(exchange), &mut self.sizes_out);
        told.map_err(|error| self.broken(error))
    }

    /// Enqueues that the parts are put into slots.
    fn pack(&mut self, send: &Parts, slot: Slot) -> Result<(), CollectiveError> {
        let packed = match self.fault.take() {
            Some(fault) => Err(fault),
            None => self.port.pack(send, slot, self.me() as u32),
        };
        let at = packed.map_err(|error| self.failed(self.device(error)))?;
        self.sent = Some(Sent::Slots(at, slot));
        Ok(())
    }

    /// The sizes of the parts that come from each rank, `[ranks]`.
    fn announced(&mut self, exchange: Exchange) -> Result<Vec<usize>, CollectiveError> {
        let came = self.control.finish(of_sizes(exchange), &mut self.sizes_in);
        came.map_err(|error| self.broken(error))?;
        let read = |(rank, part): (usize, &Vec<u8>)| {
            let corrupt = |what| CollectiveError::Corrupt { rank: Rank(rank as u32), what };
            let size = part.as_slice().try_into().map_err(|_| corrupt("it does not say how much it sends"))?;
            let size = usize::try_from(u64::from_le_bytes(size)).unwrap_or(usize::MAX);
            if size > self.payload_max {
                Err(corrupt("it is longer than this epoch allows"))
            } else if !size.is_multiple_of(exchange.row_bytes.max(1)) {
                Err(corrupt("its payload is not a whole number of rows"))
            } else {
                Ok(size)
            }
        };
        let sizes: Result<Vec<usize>, CollectiveError> = self.sizes_in.by_rank.iter().enumerate().map(read).collect();
        sizes.map_err(|error| self.failed(error))
    }

    /// Moves the parts, whose sizes all ranks know, and waits for them.
    fn transfer(
        &mut self,
        exchange: Exchange,
        (outgoing, sent): (&Outgoing, &[usize]),
        received: &mut Parts,
        sizes: &[usize],
    ) -> Result<(), CollectiveError> {
        let me = self.me();
        let into = self.port.room(received, sizes).map_err(|error| self.device(error))?;
        let stream = self.port.stream().map_err(|error| self.device(error))?;
        let transfers = all_to_all(me, sent, sizes, PART_ALIGNMENT);
        let source = outgoing.address();
        // SAFETY: both addresses are the port's and have room for the parts as the schedule lays them out; who frees them
        // does so in the order of the stream, and what is sent is kept until the exchange is over.
        let enqueued = unsafe { self.communicator.enqueue(&transfers, pointer(source), pointer(into), stream.cast()) };
        let (from, to) = (starts(sent, PART_ALIGNMENT)[me], starts(sizes, PART_ALIGNMENT)[me]);
        self.enqueued(exchange, enqueued)?;
        // SAFETY: this rank's own part, as both sides lay it out; source and room are different parts.
        let kept = unsafe { self.port.copy(source + from as u64, into + to as u64, sizes[me]) };
        kept.map_err(|error| self.device(error))?;
        self.wait(exchange, None, Goal::Done)
    }

    /// Enqueues that slots move and become parts; waits for nobody.
    fn deliver(
        &mut self,
        exchange: Exchange,
        at: u64,
        slot: Slot,
        received: &mut Parts,
    ) -> Result<(), CollectiveError> {
        let (me, ranks, stride) = (self.me(), self.shape.ranks, slot.stride());
        let gathered = self.gathers(exchange);
        let into = self.port.landing(received, slot).map_err(|error| self.device(error))?;
        let key = Key::new(exchange.kind, gathered, slot);
        let turn = match self.captures.turn(key, [at, into]) {
            Turn::Capture => {
                let captured = self.capture(exchange, (at, into), stride)?;
                self.captures.keep(key, [at, into], captured.clone());
                Turn::Again(captured)
            }
            turn => turn,
        };
        if let Turn::Again(captured) = turn {
            // SAFETY: it is of these addresses, which the port has checked as below; and it is forgotten before the
            // communicator ends.
            unsafe { self.port.enqueue(&captured) }.map_err(|error| self.device(error))?;
        } else {
            let stream = self.port.stream().map_err(|error| self.device(error))?.cast();
            // SAFETY: the port has checked that there is room at both for the slots; who frees them does so in the order of
            // the stream.
            let enqueued = unsafe { move_slots(&mut self.communicator, gathered, (at, into), stride, stream) };
            self.enqueued(exchange, enqueued)?;
            // Without blocking, NCCL may put its work on the stream later: what reads it must not come first.
            self.wait(exchange, None, Goal::Enqueued)?;
        }
        if !gathered {
            let own = (me * stride) as u64;
            // SAFETY: this rank's own slot, within the slots that are sent and the room for those that come.
            unsafe { self.port.copy(at + own, into + own, stride) }.map_err(|error| self.device(error))?;
        }
        let me = gathered.then_some(me as u32);
        self.port.unpack(received, slot, me).map_err(|error| self.device(error))?;
        self.step.count_slots((ranks - 1) * stride);
        self.marks.count(exchange);
        if self.marks.is_due() {
            self.mark(false)?;
        }
        while self.marks.are_too_many()
            && let Some(mark) = self.marks.oldest(self.step.fence)
        {
            self.wait(mark.exchange, None, Goal::Passed)?;
            self.passed()?;
        }
        Ok(())
    }

    /// Keeps what NCCL enqueues to move slots between these addresses.
    fn capture(&mut self, exchange: Exchange, at: (u64, u64), stride: usize) -> Result<Captured, CollectiveError> {
        let (gathered, deadline) = (self.gathers(exchange), self.step.deadline);
        let (communicator, mut outcome) = (&mut self.communicator, Ok(()));
        let captured = self.port.capture(&mut |stream| {
            // SAFETY: nothing moves yet; whoever enqueues what is captured vouches for the addresses.
            outcome = unsafe { move_slots(communicator, gathered, at, stride, stream.cast()) };
            if outcome.is_ok() {
                // What NCCL does from a thread of its own must be captured too.
                outcome = communicator.settle("while an exchange was captured", deadline, || Ok(()));
            }
            Ok(())
        });
        self.enqueued(exchange, outcome)?;
        captured.map_err(|error| {
            let why = format!("{error}; start workers with --exchange nccl");
            self.device(KernelError::Device { what: "take exchanges into graphs", why })
        })
    }

    /// Enqueues a mark behind the exchanges of the step so far, or behind its last one.
    fn mark(&mut self, ends: bool) -> Result<(), CollectiveError> {
        let (port, step) = (&mut self.port, (self.step.fence, self.step.deadline));
        let marked = self.marks.mark(step, ends, || if ends { port.end() } else { port.look() });
        marked.map_err(|error| self.device(error))
    }

    /// The stream has come to the oldest mark: of a step that ends there, it is seen whether all was its due.
    fn passed(&mut self) -> Result<(), CollectiveError> {
        let Some(mark) = self.marks.pass() else { return Ok(()) };
        let seen = self.port.seen(mark.look);
        if !mark.ends {
            return Ok(());
        }
        seen.map_err(|error| match error {
            KernelError::Received { rank, what } => CollectiveError::Corrupt { rank: Rank(rank as u32), what },
            other => self.device(other),
        })?;
        self.settled = mark.fence;
        if mark.fence != self.step.fence {
            // The time of the step that began meanwhile begins now.
            self.step.deadline = Instant::now() + self.allowed;
            self.marks.extend(self.step.deadline);
        }
        Ok(())
    }

    /// Why a step is not to be settled any more.
    fn failure(&self) -> CollectiveError {
        self.failure.clone().unwrap_or(CollectiveError::Broken)
    }

    /// Whether the exchange brings every rank all records of all.
    fn gathers(&self, exchange: Exchange) -> bool {
        matches!(self.way, Way::Gather { .. }) && exchange.kind == ExchangeKind::Dispatch
    }

    /// What comes of a call: where another rank failed, it is waited for the one to blame.
    fn enqueued(&mut self, exchange: Exchange, outcome: Result<(), NcclError>) -> Result<(), CollectiveError> {
        match outcome {
            Ok(()) => Ok(()),
            Err(error) if is_remote(&error) => self.wait(exchange, Some(error), Goal::Done),
            Err(error) => Err(self.lost(exchange, &error)),
        }
    }

    /// Waits for the goal, and looks at the communicator and at the other ranks meanwhile; or waits until one of them
    /// says what has failed there.
    fn wait(&mut self, exchange: Exchange, failed: Option<NcclError>, goal: Goal) -> Result<(), CollectiveError> {
        if let Some(error) = failed {
            let until = Instant::now() + self.grace;
            self.trouble.get_or_insert((until, error));
        }
        for look in 0_u32.. {
            // Work comes onto the stream in less time than the other ranks are heard.
            if self.look(exchange, goal, goal != Goal::Enqueued || look >= SPINS)? {
                return Ok(());
            }
            pause(look);
        }
        Err(CollectiveError::Broken)
    }

    /// Looks once whether the goal is reached, and why it may never be.
    fn look(&mut self, exchange: Exchange, goal: Goal, listens: bool) -> Result<bool, CollectiveError> {
        let Exchange { layer, kind, .. } = exchange;
        let me = self.control.rank();
        if self.trouble.is_none() {
            match self.communicator.poll() {
                Ok(settled) => {
                    if settled && self.is_reached(goal).map_err(|error| self.device(error))? {
                        return Ok(true);
                    }
                }
                Err(error) if is_remote(&error) => self.trouble = Some((Instant::now() + self.grace, error)),
                Err(error) => return Err(self.lost(exchange, &error)),
            }
        }
        let now = Instant::now();
        if self.gone.is_none() && (listens || self.trouble.is_some()) {
            self.gone = self.control.listen(exchange).err().map(|named| (now + self.grace, named));
        }
        if let Some((_, named)) = self.gone.take_if(|(until, _)| self.trouble.is_some() || *until <= now) {
            return Err(named);
        }
        let deadline = match goal {
            Goal::Passed => self.marks.oldest(self.step.fence).map_or(self.step.deadline, |mark| mark.deadline),
            Goal::Enqueued | Goal::Done => self.step.deadline,
        };
        match &self.trouble {
            Some((until, error)) if *until <= now => Err(self.lost(exchange, error)),
            None if deadline <= now => {
                let others = (0..self.control.size()).map(Rank).filter(|rank| *rank != me);
                Err(CollectiveError::Deadline { layer, kind, waiting_for: others.collect() })
            }
            _ => Ok(false),
        }
    }

    fn is_reached(&self, goal: Goal) -> Result<bool, KernelError> {
        match goal {
            Goal::Enqueued => Ok(true),
            Goal::Done => self.port.is_idle(),
            Goal::Passed => self.marks.oldest(self.step.fence).map_or(Ok(true), |mark| mark.look.is_done()),
        }
    }

    /// Tells the others whom this rank gave up on, and ends the exchange.
    fn failed(&mut self, error: CollectiveError) -> CollectiveError {
        let error = self.control.fail(error);
        self.broken(error)
    }

    /// Graphs with exchanges go before the communicator does: it waits for their end.
    fn forget_captured(&mut self) {
        self.captures.end();
        self.port.forget_captured();
    }

    /// The control connections have failed and said so: nothing is exchanged from here on.
    fn broken(&mut self, error: CollectiveError) -> CollectiveError {
        self.forget_captured();
        self.communicator.abort();
        self.step.fail();
        self.failure.get_or_insert_with(|| error.clone());
        error
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.forget_captured();
    }
}

/// Between two looks.
fn pause(look: u32) {
    if look < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::sleep(POLL);
    }
}

/// Puts slots of `stride` bytes on their way, from the first address to the second.
///
/// # Safety
/// As [`Communicator::enqueue`] and [`Communicator::all_gather`].
unsafe fn move_slots(
    communicator: &mut Communicator,
    gathered: bool,
    (at, into): (u64, u64),
    stride: usize,
    stream: cudaStream_t,
) -> Result<(), NcclError> {
    let (at, into) = (pointer(at), pointer(into));
    // SAFETY: as the caller promises.
    unsafe {
        if gathered {
            communicator.all_gather(at, into, stride, stream)
        } else {
            let transfers = fixed(communicator.rank(), communicator.ranks(), stride);
            communicator.enqueue(&transfers, at, into, stream)
        }
    }
}

/// A device's address as C has it; the host never reads there.
fn pointer(address: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

/// Whether another rank has failed, or the way to it.
const fn is_remote(error: &NcclError) -> bool {
    matches!(error, NcclError::Failed { code: Code::REMOTE_ERROR })
}

/// The exchange of sizes that goes before that of the rows.
const fn of_sizes(exchange: Exchange) -> Exchange {
    Exchange { row_bytes: SIZE_BYTES, ..exchange }
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
