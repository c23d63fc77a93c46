//! A device's end of exchanges that go from device to device: where parts lie, room for what comes, and slots.
//!
//! Parts of sizes that the host knows lie one after the other. Where it does not know them, parts travel in [`Slot`]s of
//! one size: a header says how much of a slot counts and what it belongs to, and the device looks at it.

use std::ffi::c_void;
use std::sync::Arc;

use super::device::{Buffer, Captured, Memory, Pinned, bytes_of};
use super::ops::{PACK, PackArgs, UNPACK, UnpackArgs};
use super::parts::{PART_ALIGNMENT, Parts};
use super::{Cuda, ops, status};
use crate::KernelError;
use crate::cuda::Launch;

/// Bytes of a slot's header.
pub const SLOT_HEADER: usize = 64;
/// Blocks that fill a slot, at most.
const BLOCKS_MAX: usize = 32;
/// Bytes of a slot for each block that fills it.
const BLOCK_BYTES: usize = 16 << 10;

/// The slots of one exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Bytes of payload that one has room for; a multiple of 16.
    pub bytes: usize,
    /// Bytes of which every part is a multiple.
    pub row_bytes: usize,
    /// Which exchange of the moment it is.
    pub exchange: u32,
}

impl Slot {
    /// Bytes of a slot with its header.
    #[must_use]
    pub const fn stride(self) -> usize {
        SLOT_HEADER + self.bytes
    }
}

/// Parts on their way out; they stay where they are as long as this lives.
#[derive(Clone, Debug)]
pub struct Outgoing(Arc<Buffer>);

impl Outgoing {
    /// Where the parts begin.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.0.address()
    }
}

/// A look of the host at a point of the stream, which the device may not have reached yet.
#[derive(Debug)]
pub struct Look {
    status: Box<dyn Pinned>,
    /// What the device had been given there.
    given: u64,
}

impl Look {
    /// Whether the device has come there; does not wait.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn is_done(&self) -> Result<bool, KernelError> {
        self.status.is_done()
    }
}

/// A device's end of exchanges.
#[derive(Debug)]
pub struct Port {
    memory: Arc<Memory>,
    /// What slots belong to, `[3]` u64.
    moment: Buffer,
    /// Slots on their way out.
    slots: Buffer,
    status: Buffer,
    /// Pinned memory for the status, while no look uses it.
    looks: Vec<Box<dyn Pinned>>,
}

impl Port {
    /// A port of the device of `cuda`, in the order of its stream, with room for `slots_bytes` of slots on their way out.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn new(cuda: &Cuda, slots_bytes: usize) -> Result<Self, KernelError> {
        let memory = Arc::clone(&cuda.memory);
        let (moment, slots) = (memory.zeroed(24)?, memory.zeroed(slots_bytes)?);
        Ok(Self { moment, slots, status: memory.zeroed(status::BYTES)?, looks: Vec::new(), memory })
    }

    /// Makes the pinned memory for so many looks at once, and what steps send goes through: no memory is pinned later, while
    /// ranks wait for each other.
    ///
    /// # Errors
    /// [`KernelError::Device`]: the device has no such memory.
    pub fn ready(&mut self, looks: usize) -> Result<(), KernelError> {
        self.memory.queue.pin_steps()?;
        while self.looks.len() < looks {
            self.looks.push(self.memory.queue.device().pin(status::BYTES)?);
        }
        Ok(())
    }

    /// Makes the device the calling thread's, and gives its stream, with all on it that was enqueued so far.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn stream(&self) -> Result<*mut c_void, KernelError> {
        self.memory.queue.submit()?;
        self.memory.queue.device().stream()
    }

    /// Keeps what `enqueue` puts onto the stream that it is told, instead of doing it.
    ///
    /// # Errors
    /// [`KernelError::Device`]: it cannot be captured; and what `enqueue` says, [`KernelError::Late`] if the stream still is in use.
    pub fn capture(
        &self,
        enqueue: &mut dyn FnMut(*mut c_void) -> Result<(), KernelError>,
    ) -> Result<Captured, KernelError> {
        self.memory.queue.device().capture(enqueue)
    }

    /// Enqueues what was captured, as one of the ops of the step: its graphs hold it.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// What the library read and wrote when it was captured is still allocated, and the library is there for it until
    /// [`Port::forget_captured`].
    pub unsafe fn enqueue(&self, captured: &Captured) -> Result<(), KernelError> {
        // SAFETY: the caller promises it.
        unsafe { self.memory.queue.enqueue_captured(captured) }
    }

    /// Forgets all that was captured, and the graphs that hold it: the library that it calls may end.
    pub fn forget_captured(&self) {
        self.memory.queue.forget_captured();
    }

    /// Which device it is of all there are.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn uuid(&self) -> Result<[u8; 16], KernelError> {
        self.memory.queue.device().uuid()
    }

    /// Memory that is left on the device, if it says.
    #[must_use]
    pub fn free_memory(&self) -> Option<u64> {
        self.memory.queue.device().free_memory()
    }

    /// Whether everything on the stream is done.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn is_idle(&self) -> Result<bool, KernelError> {
        self.memory.queue.is_idle()
    }

    /// Bytes to each rank, `[ranks]`; waits for what writes them.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn sizes(&self, parts: &Parts) -> Result<Vec<usize>, KernelError> {
        Ok(parts.places()?.into_iter().map(|(_, bytes)| bytes).collect())
    }

    /// Keeps the parts where they are.
    #[must_use]
    pub fn take(&self, parts: &Parts) -> Outgoing {
        Outgoing(Arc::clone(&parts.bytes))
    }

    /// Room for so many bytes of each rank, `[ranks]`, one part after the other; gives the address of the first.
    ///
    /// # Errors
    /// [`KernelError::Plan`] for another number of ranks, [`KernelError::Size`] without room, [`KernelError::Device`].
    pub fn room(&self, parts: &mut Parts, bytes: &[usize]) -> Result<u64, KernelError> {
        if bytes.len() != parts.ranks {
            return Err(KernelError::Plan { what: "rank", index: bytes.len(), len: parts.ranks });
        }
        let (mut end, mut places) = (0, Vec::with_capacity(2 * bytes.len()));
        for &bytes in bytes {
            let start = usize::next_multiple_of(end, PART_ALIGNMENT);
            places.extend([start as u64, bytes as u64]);
            end = start.saturating_add(bytes);
        }
        has_room(parts, end)?;
        parts.places_mut().upload(0, &bytes_of(&places))?;
        (parts.bytes_now, parts.is_room, parts.gathered, parts.fault) = (end, false, None, None);
        Ok(parts.bytes.address())
    }

    /// Copies from one place to another.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// The bytes at `from` and at `to` lie within parts or slots, and do not overlap.
    pub unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller promises it.
        unsafe { self.memory.queue.copy(from, to, bytes) }
    }

    /// Says what the slots from here on belong to.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn begin(&mut self, moment: [u64; 3]) -> Result<(), KernelError> {
        self.moment.upload(0, &bytes_of(&moment))
    }

    /// Whether the next dispatch into `parts` writes every row once, for all ranks; `me` is this rank.
    pub const fn gather(&self, parts: &mut Parts, me: Option<u32>) {
        parts.gathered = me;
    }

    /// Enqueues that slots are filled from parts: one for each rank, or one for all if they are gathered. Gives the
    /// address of the first slot.
    ///
    /// # Errors
    /// [`KernelError::Size`] without room for the slots, [`KernelError::Device`]; what went wrong in the step before the
    /// parts were written.
    pub fn pack(&mut self, parts: &Parts, slot: Slot, me: u32) -> Result<u64, KernelError> {
        if let Some(error) = &parts.fault {
            return Err(error.clone());
        }
        let count = if parts.gathered.is_some() { 1 } else { parts.ranks };
        let need = count * slot.stride();
        if need > self.slots.bytes() || !slot.bytes.is_multiple_of(16) {
            return Err(KernelError::Size { what: "the slots of an exchange", got: self.slots.bytes(), need });
        }
        let args = PackArgs {
            bytes: parts.bytes.address(),
            parts: parts.places_address(),
            moment: self.moment.address(),
            slots: self.slots.address_mut(),
            status: self.status.address_mut(),
            slot_bytes: slot.bytes as u64,
            exchange: slot.exchange,
            from: me,
        };
        let blocks = slot.bytes.div_ceil(BLOCK_BYTES).clamp(1, BLOCKS_MAX) as u32;
        self.launch(&PACK, [blocks, count as u32, 1], 0, &args)?;
        Ok(self.slots.address())
    }

    /// Room for a slot of each rank; gives the address of the first.
    ///
    /// # Errors
    /// [`KernelError::Size`].
    pub fn landing(&self, parts: &mut Parts, slot: Slot) -> Result<u64, KernelError> {
        has_room(parts, parts.ranks.saturating_mul(slot.stride()))?;
        Ok(parts.bytes.address())
    }

    /// Enqueues that the slots that have come become parts. Records are this rank's if they were `gathered`: `me`.
    /// What is wrong with a slot is found by [`Port::seen`], and its part is empty.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn unpack(&mut self, parts: &mut Parts, slot: Slot, gathered: Option<u32>) -> Result<(), KernelError> {
        // How much of the slots counts, the host does not know.
        (parts.bytes_now, parts.is_room) = (parts.ranks * slot.bytes, true);
        (parts.gathered, parts.fault) = (gathered, None);
        let args = UnpackArgs {
            slots: parts.bytes.address(),
            moment: self.moment.address(),
            parts: parts.places_mut().address_mut(),
            status: self.status.address_mut(),
            slot_bytes: slot.bytes as u64,
            row_bytes: slot.row_bytes.max(1) as u64,
            exchange: slot.exchange,
            ranks: parts.ranks as u32,
        };
        self.launch(&UNPACK, [1, 1, 1], parts.ranks as u32 * 4, &args)
    }

    /// Enqueues a look at what is wrong with the slots of a step so far.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn look(&mut self) -> Result<Look, KernelError> {
        let mut pinned = match self.looks.pop() {
            Some(pinned) => pinned,
            None => self.memory.queue.device().pin(status::BYTES)?,
        };
        self.status.fetch(status::BYTES, &mut *pinned, 0)?;
        Ok(Look { status: pinned, given: self.memory.queue.given() })
    }

    /// The same behind the last slots of a step: what is found from there on is the next one's.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn end(&mut self) -> Result<Look, KernelError> {
        let look = self.look()?;
        self.status.zero_now()?;
        Ok(look)
    }

    /// What was wrong with the slots when the device came there, as it has.
    ///
    /// # Errors
    /// [`KernelError::Received`] with the rank, [`KernelError::Device`]; [`KernelError::Late`] if it has not.
    pub fn seen(&mut self, Look { mut status, given }: Look) -> Result<(), KernelError> {
        let words = status::words(status.bytes()?);
        self.looks.push(status);
        self.memory.queue.note_done(given);
        status::read(words)
    }

    fn launch<A: Copy>(&self, op: &ops::Op<A>, grid: [u32; 3], shared: u32, args: &A) -> Result<(), KernelError> {
        let launch = Launch { kernel: &op.kernel, grid, shared };
        // SAFETY: `A` is the kernel's argument struct by the table in `ops`. Slots and parts were compared with the room
        // there is, and places are `[ranks]`; buffers that are dropped later are freed behind this launch.
        unsafe { self.memory.queue.launch(launch, ops::pointer(args), size_of::<A>()) }
    }
}

fn has_room(parts: &Parts, need: usize) -> Result<(), KernelError> {
    if need > parts.bytes.bytes() || !parts.has_places() {
        return Err(KernelError::Size { what: "the room for what other ranks send", got: parts.bytes.bytes(), need });
    }
    Ok(())
}
