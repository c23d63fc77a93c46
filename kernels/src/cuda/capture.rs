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
        let captured = made.take(side, enqueue);
        // SAFETY: made above, and nothing was ever done on it. Nothing can be done about an error.
        let _ = unsafe { result::stream::destroy(side) };
        captured.map(|()| made)
    }

    fn take(
        &mut self,
        side: sys::CUstream,
        enqueue: &mut dyn FnMut(*mut c_void) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let capture = failed("capture");
        // A library may work from a thread of its own, and allocate meanwhile.
        let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is valid and does nothing yet.
        unsafe { result::stream::begin_capture(side, relaxed) }.map_err(&capture)?;
        let enqueued = enqueue(side.cast());
        // SAFETY: the stream captures; also what failed has to end.
        let ended = unsafe { result::stream::end_capture(side) };
        self.graph = *ended.as_ref().unwrap_or(&ptr::null_mut());
        enqueued?;
        ended.map_err(&capture)?;
        if self.graph.is_null() {
            return Err(KernelError::Device { what: "capture", why: "nothing was enqueued".to_owned() });
        }
        let flags = sys::CUgraphInstantiate_flags_enum(0);
        // SAFETY: the graph is valid and whole; no flag is set.
        self.exec = unsafe { result::graph::instantiate(self.graph, flags) }.map_err(&capture)?;
        Ok(())
    }
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
                // SAFETY: made by `take`, not used again; the driver keeps what is in flight until it is done.
                let _ = unsafe { result::graph::exec_destroy(self.exec) };
            }
            if !self.graph.is_null() {
                // SAFETY: made by `take`, not used again; graphs have copies of their own.
                let _ = unsafe { result::graph::destroy(self.graph) };
            }
        }
    }
}
