//! Page-locked memory of the CUDA driver, with an event behind each copy out of it or into it.

use std::cell::Cell;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::Pinned;
use super::driver::failed;
use super::stream::{Left, Stream, is_done};
use crate::KernelError;

/// Host memory that copies of a stream read or write.
#[derive(Debug)]
pub(super) struct PageLocked {
    stream: Arc<Stream>,
    memory: *mut u8,
    bytes: usize,
    event: sys::CUevent,
    copies: Cell<Copies>,
}

/// What is known of the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copies {
    /// None is under way.
    Done,
    /// The event is behind the last one.
    Marked,
    /// Some may be under way that the event is not behind: they are done when all on the stream is.
    Unmarked,
}

// SAFETY: the memory is this value's alone; memory and event belong to the context, not to a thread, and every method that
// calls the driver makes the context current first.
unsafe impl Send for PageLocked {}

impl PageLocked {
    pub(super) fn new(stream: &Arc<Stream>, bytes: usize) -> Result<Self, KernelError> {
        let pin = failed("pin memory");
        stream.bind().map_err(&pin)?;
        stream.sweep();
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(&pin)?;
        // SAFETY: nothing is assumed of what the memory holds but that it can be read and written, as memory of the system
        // can; no flag is set.
        let memory = unsafe { result::malloc_host(bytes, 0) };
        let memory = match memory {
            Ok(memory) => memory.cast::<u8>(),
            Err(error) => {
                // SAFETY: just made, and used nowhere. Nothing can be done about an error.
                let _ = unsafe { result::event::destroy(event) };
                return Err(pin(error));
            }
        };
        // SAFETY: as many bytes were just allocated; from now on they are initialized.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Self { stream: Arc::clone(stream), memory, bytes, event, copies: Cell::new(Copies::Done) })
    }

    /// Where a copy of `bytes` begins.
    fn place(&self, at: usize, bytes: usize) -> Result<*mut u8, KernelError> {
        match at.checked_add(bytes).filter(|&end| end <= self.bytes) {
            // SAFETY: within the allocation, as was just checked.
            Some(_) => Ok(unsafe { self.memory.add(at) }),
            None => Err(KernelError::Size { what: "pinned memory", got: self.bytes, need: at.saturating_add(bytes) }),
        }
    }

    /// Marks that a copy was enqueued. Where that fails, the copy is under way all the same.
    fn mark(&self) -> Result<(), KernelError> {
        self.copies.set(Copies::Unmarked);
        // SAFETY: event and stream are valid and of one context, which is current.
        unsafe { result::event::record(self.event, self.stream.raw()) }.map_err(failed("say when a copy is done"))?;
        self.copies.set(Copies::Marked);
        Ok(())
    }
}

impl Pinned for PageLocked {
    fn bytes(&mut self) -> Result<&mut [u8], KernelError> {
        if !self.is_done()? {
            return Err(KernelError::Late { what: "finish a copy" });
        }
        // SAFETY: the allocation, initialized by `new`, and borrowed as long as this value. No copy is under way, and none
        // can be enqueued meanwhile.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.memory, self.bytes) })
    }

    unsafe fn send(&mut self, bytes: usize, to: u64) -> Result<(), KernelError> {
        let send = failed("take bytes");
        self.stream.bind().map_err(&send)?;
        let from = self.place(0, bytes)?;
        // SAFETY: the caller promises that the destination is allocated; the source lives until the copy is done: dropping
        // this leaves it to the stream.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream.raw()) }.result().map_err(&send)?;
        self.mark()
    }

    unsafe fn fetch(&mut self, from: u64, at: usize, bytes: usize) -> Result<(), KernelError> {
        let fetch = failed("give bytes");
        self.stream.bind().map_err(&fetch)?;
        let to = self.place(at, bytes)?;
        // SAFETY: the caller promises that the source is allocated; the destination lives until the copy is done, as above,
        // and nobody has a reference to it until then.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream.raw()) }.result().map_err(&fetch)?;
        self.mark()
    }

    fn is_done(&self) -> Result<bool, KernelError> {
        let done = match self.copies.get() {
            Copies::Done => true,
            Copies::Marked => {
                let query = failed("finish a copy");
                self.stream.bind().map_err(&query)?;
                // SAFETY: the event is valid.
                is_done(unsafe { sys::cuEventQuery(self.event) }).map_err(query)?
            }
            Copies::Unmarked => self.stream.is_idle()?,
        };
        if done {
            self.copies.set(Copies::Done);
        }
        Ok(done)
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        // The driver waits for a stream before it takes such memory back.
        self.stream.leave(Left { memory: self.memory, event: self.event });
        self.stream.sweep();
    }
}
