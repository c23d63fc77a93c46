//! Page-locked memory of the CUDA driver, with an event behind each copy out of it or into it.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result, sys};

use super::device::Pinned;
use super::driver::failed;
use crate::KernelError;

/// Host memory that copies of a stream read or write.
#[derive(Debug)]
pub(super) struct PageLocked {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    memory: *mut u8,
    bytes: usize,
    /// Recorded behind the last copy.
    event: sys::CUevent,
    sent: bool,
}

// SAFETY: the memory is this value's alone; memory and event belong to the context, not to a thread, and every method that
// calls the driver makes the context current first.
unsafe impl Send for PageLocked {}

impl PageLocked {
    pub(super) fn new(context: &Arc<CudaContext>, stream: &Arc<CudaStream>, bytes: usize) -> Result<Self, KernelError> {
        let pin = failed("pin memory");
        context.bind_to_thread().map_err(&pin)?;
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
        Ok(Self { context: Arc::clone(context), stream: Arc::clone(stream), memory, bytes, event, sent: false })
    }
}

impl Pinned for PageLocked {
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation, initialized by `new`, and borrowed as long as this value. The device may still read it,
        // which writing spoils but does not make unsound: bytes have no wrong value.
        unsafe { std::slice::from_raw_parts_mut(self.memory, self.bytes) }
    }

    unsafe fn send(&mut self, bytes: usize, to: u64) -> Result<(), KernelError> {
        let send = failed("take bytes");
        self.context.bind_to_thread().map_err(&send)?;
        let (stream, bytes) = (self.stream.cu_stream(), bytes.min(self.bytes));
        // SAFETY: the first bytes of the allocation.
        let from = unsafe { std::slice::from_raw_parts(self.memory, bytes) };
        // SAFETY: the caller promises that the destination is allocated; the source lives until this is dropped, which
        // waits for the event.
        unsafe { result::memcpy_htod_async(to, from, stream) }.map_err(&send)?;
        self.sent = true;
        // SAFETY: event and stream are valid and of one context.
        unsafe { result::event::record(self.event, stream) }.map_err(&send)
    }

    unsafe fn fetch(&mut self, from: u64, at: usize, bytes: usize) -> Result<(), KernelError> {
        let fetch = failed("give bytes");
        self.context.bind_to_thread().map_err(&fetch)?;
        let stream = self.stream.cu_stream();
        let Some(to) = self.bytes().get_mut(at..at.saturating_add(bytes)) else {
            return Err(KernelError::Size { what: "pinned memory", got: self.bytes, need: at.saturating_add(bytes) });
        };
        // SAFETY: the caller promises that the source is allocated; the destination lives until this is dropped, which
        // waits for the event.
        unsafe { result::memcpy_dtoh_async(to, from, stream) }.map_err(&fetch)?;
        self.sent = true;
        // SAFETY: event and stream are valid and of one context.
        unsafe { result::event::record(self.event, stream) }.map_err(&fetch)
    }

    fn is_done(&self) -> Result<bool, KernelError> {
        if !self.sent {
            return Ok(true);
        }
        let query = failed("give bytes");
        self.context.bind_to_thread().map_err(&query)?;
        // SAFETY: the event is valid.
        let status = unsafe { sys::cuEventQuery(self.event) };
        if status == sys::CUresult::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        status.result().map(|()| true).map_err(query)
    }

    fn wait(&mut self) -> Result<(), KernelError> {
        if self.sent {
            let wait = failed("take bytes");
            self.context.bind_to_thread().map_err(&wait)?;
            // SAFETY: the event is valid.
            unsafe { result::event::synchronize(self.event) }.map_err(&wait)?;
            self.sent = false;
        }
        Ok(())
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        // After an error of the device nothing reads the memory any more; nothing can be done about one here.
        let _ = self.wait();
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by `new` and not used again; the last copy was waited for.
            unsafe {
                let _ = result::event::destroy(self.event);
                let _ = result::free_host(self.memory.cast());
            }
        }
    }
}
