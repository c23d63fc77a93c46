//! A device that is host memory.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use cudarc::nccl::sys::cudaStream_t;

use super::super::device::{ALIGN, Device, DeviceFault};
use super::super::schedule::starts;
use super::{advance, lock, new_stream};

/// Parts in host memory as a device has them: one buffer.
#[derive(Debug, Default)]
pub(in super::super) struct FakeParts {
    pub(in super::super) bytes: Vec<u8>,
    pub(in super::super) sizes: Vec<usize>,
}

/// A device that is host memory.
pub(in super::super) struct FakeDevice {
    stream: usize,
    /// Most bytes that parts have room for.
    pub(in super::super) room: usize,
    /// What every look at the stream finds.
    pub(in super::super) fault: Arc<Mutex<Option<String>>>,
}

impl FakeDevice {
    pub(in super::super) fn new() -> Self {
        let stream = new_stream();
        Self { stream: stream.expose_provenance(), room: usize::MAX, fault: Arc::default() }
    }
}

// SAFETY: a buffer's memory stays where it is while the parts change hands, and tests drop none before its stream is
// idle or its communicator has ended, which takes its work off the stream.
unsafe impl Device for FakeDevice {
    type Parts = FakeParts;

    fn stream(&self) -> cudaStream_t {
        std::ptr::with_exposed_provenance_mut(self.stream)
    }

    fn sizes(&mut self, parts: &FakeParts, _deadline: Instant) -> Result<Vec<usize>, DeviceFault> {
        Ok(parts.sizes.clone())
    }

    fn source(&self, parts: &FakeParts) -> *const c_void {
        parts.bytes.as_ptr().cast()
    }

    fn room(&mut self, parts: &mut FakeParts, bytes: &[usize]) -> Result<*mut c_void, DeviceFault> {
        let total = starts(bytes, ALIGN).last().zip(bytes.last()).map_or(0, |(start, len)| start + len);
        if total > self.room {
            return Err(DeviceFault(format!("{total} bytes have no room")));
        }
        parts.sizes = bytes.to_vec();
        parts.bytes.clear();
        parts.bytes.resize(total, 0);
        parts.bytes.as_mut_ptr().expose_provenance();
        Ok(parts.bytes.as_mut_ptr().cast())
    }

    unsafe fn copy(&mut self, from: *const c_void, to: *mut c_void, bytes: usize) -> Result<(), DeviceFault> {
        // SAFETY: the caller vouches for both.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), bytes) };
        Ok(())
    }

    fn clear(&mut self, parts: &mut FakeParts) {
        parts.bytes.clear();
        parts.sizes.clear();
    }

    fn is_idle(&mut self) -> Result<bool, DeviceFault> {
        lock(&self.fault).clone().map_or_else(|| Ok(advance(self.stream())), |why| Err(DeviceFault(why)))
    }
}
