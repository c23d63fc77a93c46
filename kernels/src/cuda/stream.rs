//! A context of the CUDA driver and one stream on it, whose end waits for nothing that hangs.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::driver::failed;
use super::wait::until;
use crate::KernelError;

/// Longest wait for a stream before what it may still use is left to it.
const END_WAIT: Duration = Duration::from_secs(2);

/// A stream. What belongs to it is given back only once the stream is through with everything: the driver would wait for
/// that without a bound, and a device may still write where memory was given back.
pub(super) struct Stream {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Did not end in time, or failed: it is not waited for again.
    lost: AtomicBool,
    /// What it may still read and write.
    left: Mutex<Vec<Left>>,
}

/// Page-locked memory that nobody uses any more, and its event.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) memory: *mut u8,
    pub(super) event: sys::CUevent,
}

// SAFETY: memory and event belong to the context, not to a thread, and whoever left them uses them no more.
unsafe impl Send for Left {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("device", &self.context.ordinal()).finish_non_exhaustive()
    }
}

impl Stream {
    pub(super) fn new(context: Arc<CudaContext>) -> Result<Self, DriverError> {
        // SAFETY: nothing of what events would track is made on this context: memory and streams are used in one order.
        // With them, making a stream waits for all that an earlier epoch may have left on the device.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        Ok(Self { context, stream, lost: AtomicBool::new(false), left: Mutex::default() })
    }

    pub(super) const fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The driver's handle.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Makes the context current on this thread.
    pub(super) fn bind(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()
    }

    /// Whether it is through with everything; does not wait.
    pub(super) fn is_idle(&self) -> Result<bool, KernelError> {
        let finish = failed("finish");
        self.bind().map_err(&finish)?;
        // SAFETY: the stream belongs to the context, which is current.
        is_done(unsafe { sys::cuStreamQuery(self.raw()) }).map_err(finish)
    }

    /// Takes over memory that copies of the stream may still use; waits for nothing.
    pub(super) fn leave(&self, left: Left) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(left);
    }

    /// Gives back what was left, if the stream is through with everything.
    pub(super) fn sweep(&self) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if !left.is_empty() && self.is_idle() == Ok(true) {
            for Left { memory, event } in left.drain(..) {
                // SAFETY: made by the driver in this context, which is current, and used by nobody; nothing is under way on
                // the stream that could use them. Nothing can be done about an error.
                unsafe {
                    let _ = result::event::destroy(event);
                    let _ = result::free_host(memory.cast());
                }
            }
        }
    }

    /// Whether what belongs to it may be given back, and the context is current for it. Waits a little if it must; who is
    /// told that it may not leaves it to the driver, as the process will be soon.
    pub(super) fn is_over(&self) -> bool {
        if self.lost.load(Ordering::Relaxed) {
            return false;
        }
        match until("end", Instant::now() + END_WAIT, || self.is_idle()) {
            Ok(()) => true,
            Err(error) => {
                if !self.lost.swap(true, Ordering::Relaxed) {
                    let gpu = self.context.ordinal();
                    tracing::warn!(gpu, %error, "memory of the GPU and of the host is lost until the worker ends");
                }
                false
            }
        }
    }
}

/// What a query says: done, or not yet.
pub(super) fn is_done(query: sys::CUresult) -> Result<bool, DriverError> {
    if query == sys::CUresult::CUDA_ERROR_NOT_READY { Ok(false) } else { query.result().map(|()| true) }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_over() {
            self.sweep();
        } else {
            // The end of a context waits for its streams.
            std::mem::forget((Arc::clone(&self.context), Arc::clone(&self.stream)));
        }
    }
}
