//! What a library puts onto a stream of the CUDA driver, captured.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::stream::StreamKind;
use cudarc::driver::{result, sys};

use super::device::Capture;
use super::driver::failed;
use super::stream::Stream;
use crate::KernelError;

/// A captured graph, and the stream it is launched on.
#[derive(Debug)]
pub(super) struct StreamCapture {
    stream: Arc<Stream>,
    graph: sys::CUgraph,
    /// Null until it is instantiated.
    exec: sys::CUgraphExec,
}

// SAFETY: graphs belong to the context, not to a thread, and every method makes the context current first.
unsafe impl Send for StreamCapture {}
// SAFETY: as above; the driver asks that no two threads use a graph at once. Launches do not by their promise, and what else
// is shared only reads the handle, with which a queue makes graphs under its lock.
unsafe impl Sync for StreamCapture {}

impl StreamCapture {
    /// What `enqueue` puts onto a stream that is made for it, to be launched on `stream`.
    pub(super) fn new(
        stream: &Arc<Stream>,
        enqueue: &mut dyn FnMut(*mut c_void) -> Result<(), KernelError>,
    ) -> Result<Self, KernelError> {
        let capture = failed("capture");
        stream.bind().map_err(&capture)?;
        let side = result::stream::create(StreamKind::NonBlocking).map_err(&capture)?;
        // From here on dropping it destroys the graph.
        let mut made = Self { stream: Arc::clone(stream), graph: ptr::null_mut(), exec: ptr::null_mut() };
        let capturing = begin(side);
        let enqueued = capturing.and_then(|()| enqueue(side.cast()));
        if let Err(late @ KernelError::Late { .. }) = enqueued {
            // The library still puts work there, from a thread of its own: the stream is left to it, and captures on.
            return Err(late);
        }
        // SAFETY: the stream was made above and nobody uses it any more; also a capture that failed has to end.
        let ended = unsafe { result::stream::end_capture(side) };
        made.graph = *ended.as_ref().unwrap_or(&ptr::null_mut());
        // SAFETY: as above, and nothing was ever done on it. Nothing can be done about an error.
        let _ = unsafe { result::stream::destroy(side) };
        enqueued?;
        ended.map_err(&capture)?;
        let flags = sys::CUgraphInstantiate_flags_enum(0);
        // SAFETY: the graph is valid and whole; no flag is set.
        made.exec = unsafe { result::graph::instantiate(made.graph, flags) }.map_err(&capture)?;
        Ok(made)
    }
}

/// Has a stream that does nothing yet capture what it is given.
fn begin(stream: sys::CUstream) -> Result<(), KernelError> {
    // A library may work from a thread of its own, and allocate meanwhile.
    let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the stream is valid.
    unsafe { result::stream::begin_capture(stream, relaxed) }.map_err(failed("capture"))
}

impl Capture for StreamCapture {
    unsafe fn launch(&self) -> Result<(), KernelError> {
        let launch = failed("launch a graph");
        self.stream.bind().map_err(&launch)?;
        // SAFETY: the executable graph and the stream are valid; the caller promises that it may run.
        unsafe { result::graph::launch(self.exec, self.stream.raw()) }.map_err(&launch)
    }

    fn graph(&self) -> *mut c_void {
        self.graph.cast()
    }
}

impl Drop for StreamCapture {
    fn drop(&mut self) {
        // Without a context nothing is left to destroy, and nothing can be done about an error.
        if self.stream.bind().is_ok() {
            if !self.exec.is_null() {
                // SAFETY: made by `new`, not used again; the driver keeps what is in flight until it is done.
                let _ = unsafe { result::graph::exec_destroy(self.exec) };
            }
            if !self.graph.is_null() {
                // SAFETY: made by `new`, not used again; graphs have copies of their own.
                let _ = unsafe { result::graph::destroy(self.graph) };
            }
        }
    }
}
