//! What an exchange needs of a device: a stream, and parts in its memory.

use std::ffi::c_void;
use std::time::Instant;

use cudarc::nccl::sys::cudaStream_t;

/// Parts lie one after the other in a buffer, each on a border of this many bytes.
pub const ALIGN: usize = 4;

/// Something failed on the device; the step is worthless.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceFault(pub String);

/// A device with one stream, on which the backend's ops and the exchanges follow each other.
///
/// # Safety
/// [`Device::source`] and [`Device::room`] give addresses in the device's memory with room for all parts as
/// [`super::starts`] lays them out with [`ALIGN`]; they stay valid until the stream is idle or the device is dropped,
/// also if the parts are not.
pub unsafe trait Device: Send + 'static {
    /// Bytes to or from each rank, in the device's memory.
    type Parts: Send + 'static;

    /// The stream.
    fn stream(&self) -> cudaStream_t;

    /// Bytes to each rank, `[ranks]`. Waits for the ops that write them, and not beyond the deadline.
    ///
    /// # Errors
    /// The ops failed or are late.
    fn sizes(&mut self, parts: &Self::Parts, deadline: Instant) -> Result<Vec<usize>, DeviceFault>;

    /// Where the parts to all ranks begin.
    fn source(&self, parts: &Self::Parts) -> *const c_void;

    /// Makes room for so many bytes of each rank, `[ranks]`, tells the ops that follow on the stream where they are,
    /// and gives the address at which they begin.
    ///
    /// # Errors
    /// The parts have not that much room, or the device failed.
    fn room(&mut self, parts: &mut Self::Parts, bytes: &[usize]) -> Result<*mut c_void, DeviceFault>;

    /// Enqueues a copy of `bytes` from one address to another, as [`Device::source`] and [`Device::room`] gave them.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// Both lie within one of the parts and do not overlap.
    unsafe fn copy(&mut self, from: *const c_void, to: *mut c_void, bytes: usize) -> Result<(), DeviceFault>;

    /// Empties parts that have been sent.
    fn clear(&mut self, parts: &mut Self::Parts);

    /// Whether everything on the stream is done.
    ///
    /// # Errors
    /// An op failed.
    fn is_idle(&mut self) -> Result<bool, DeviceFault>;
}
