//! The ways in slots: the host only enqueues, and looks at marks behind what it has enqueued.

use std::time::Instant;

use cudarc::nccl::sys::cudaStream_t;
use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::{Captured, Parts, Slot};
use phalanx_model::{CollectiveError, Exchange, ExchangeKind};
use phalanx_proto::Rank;

use super::watch::Goal;
use super::{Nccl, Sent, pointer};
use crate::collectives::nccl::captures::{Key, Turn};
use crate::collectives::nccl::communicator::{Communicator, NcclError};
use crate::collectives::nccl::schedule::fixed;
use crate::collectives::nccl::way::Way;

impl Nccl {
    /// Enqueues that the parts are put into slots.
    pub(super) fn pack(&mut self, send: &Parts, slot: Slot) -> Result<(), CollectiveError> {
        let packed = match self.fault.take() {
            Some(fault) => Err(fault),
            None => self.port.pack(send, slot, self.me() as u32),
        };
        let at = packed.map_err(|error| self.failed(self.device(error)))?;
        self.sent = Some(Sent::Slots(at, slot));
        Ok(())
    }

    /// Enqueues that slots move and become parts; waits for nobody.
    pub(super) fn deliver(
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
        match self.captures.turn(key, [at, into]) {
            Turn::Plain => {
                let stream = self.port.stream().map_err(|error| self.device(error))?.cast();
                // SAFETY: the port has checked that there is room at both for the slots; who frees them does so in the order
                // of the stream.
                let enqueued = unsafe { move_slots(&mut self.communicator, gathered, (at, into), stride, stream) };
                self.enqueued(exchange, enqueued)?;
                // Without blocking, NCCL may put its work on the stream later: what reads it must not come first.
                self.wait(exchange, None, Goal::Enqueued)?;
            }
            Turn::Capture => {
                let captured = self.capture(exchange, (at, into), stride)?;
                self.captures.keep(key, captured.clone());
                self.enqueue(&captured)?;
            }
            Turn::Again(captured) => self.enqueue(&captured)?,
            Turn::Moved => return Err(self.no_graphs("its buffers have moved")),
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

    /// Enqueues an exchange that was captured at the addresses that are its turn's.
    fn enqueue(&self, captured: &Captured) -> Result<(), CollectiveError> {
        // SAFETY: the port has checked that there is room at both addresses; and it is forgotten before the communicator has
        // ended.
        unsafe { self.port.enqueue(captured) }.map_err(|error| self.device(error))
    }

    /// Keeps what NCCL enqueues to move slots between these addresses. NCCL may wait for other ranks meanwhile, so this listens
    /// to them.
    fn capture(&mut self, exchange: Exchange, at: (u64, u64), stride: usize) -> Result<Captured, CollectiveError> {
        let (gathered, deadline) = (self.gathers(exchange), self.step.deadline);
        let Self { port, communicator, control, .. } = self;
        let mut outcome = Ok(());
        let captured = port.capture(&mut |stream| {
            // SAFETY: nothing moves yet; whoever enqueues what is captured vouches for the addresses.
            let enqueued = unsafe { move_slots(communicator, gathered, at, stride, stream.cast()) };
            let listen = || control.listen(exchange).map_err(Interrupted::Named);
            // What NCCL does from a thread of its own must be captured too.
            let settle = |()| communicator.settle("while an exchange was captured", deadline, listen);
            outcome = enqueued.map_err(Interrupted::Nccl).and_then(settle);
            // NCCL may still be at it: then the stream is left to it.
            if outcome.is_ok() { Ok(()) } else { Err(KernelError::Late { what: "capture" }) }
        });
        match outcome {
            Ok(()) => captured.map_err(|error| self.no_graphs(&error.to_string())),
            Err(Interrupted::Named(named)) => Err(named),
            Err(Interrupted::Nccl(NcclError::Late { .. })) => Err(self.late(exchange)),
            Err(Interrupted::Nccl(error)) => {
                self.enqueued(exchange, Err(error))?;
                Err(CollectiveError::Broken)
            }
        }
    }

    /// Why exchanges cannot be part of graphs here, and what to do about it.
    fn no_graphs(&self, why: &str) -> CollectiveError {
        let why = format!("{why}; start workers with --exchange nccl");
        self.device(KernelError::Device { what: "take exchanges into graphs", why })
    }

    /// Enqueues a mark behind the exchanges of the step so far, or behind its last one.
    pub(super) fn mark(&mut self, ends: bool) -> Result<(), CollectiveError> {
        let (port, step) = (&mut self.port, (self.step.fence, self.step.deadline));
        let marked = self.marks.mark(step, ends, || if ends { port.end() } else { port.look() });
        marked.map_err(|error| self.device(error))
    }

    /// The stream has come to the oldest mark: of a step that ends there, it is seen whether all was its due.
    pub(super) fn passed(&mut self) -> Result<(), CollectiveError> {
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

    /// Whether the exchange brings every rank all records of all.
    pub(super) fn gathers(&self, exchange: Exchange) -> bool {
        matches!(self.way, Way::Gather { .. }) && exchange.kind == ExchangeKind::Dispatch
    }
}

/// What ends a wait for NCCL.
enum Interrupted {
    /// NCCL.
    Nccl(NcclError),
    /// Another rank, which says who is to blame.
    Named(CollectiveError),
}

impl From<NcclError> for Interrupted {
    fn from(error: NcclError) -> Self {
        Self::Nccl(error)
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
