//! What the backend asks of a device: memory, copies, launches, all in the order of one stream.

use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::arena::{ALIGNMENT, Arena};
use super::ops::Kernel;
use super::queue::Queue;
use super::sequence::{Node, Sequence};
use crate::KernelError;

/// Bytes of ordinary memory that a driver takes at once, whatever is under way on the device.
//= CUDA C++ Programming Guide, Concurrent Execution between Host and Device
pub const STAGED_MAX: usize = 64 << 10;

/// A launch of a kernel; its blocks have the kernel's number of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch<'a> {
    /// What runs.
    pub kernel: &'a Kernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// By what a device multiplies: kernels of one family add in one order, those of another may not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// `mma.sync`, everywhere.
    #[default]
    Mma,
    /// `wgmma` for all matrices but the router in fast precision, on Hopper.
    Wgmma,
}

impl Family {
    /// The family of a compute capability.
    #[must_use]
    pub const fn of(capability: (i32, i32)) -> Self {
        if matches!(capability, (9, 0)) { Self::Wgmma } else { Self::Mma }
    }

    /// Rows of a tile of choices in fast precision; 0 where the experts read each row once.
    #[must_use]
    pub const fn item_tile(self) -> u32 {
        match self {
            Self::Mma => 0,
            Self::Wgmma => super::exchange::ITEM_TILE as u32,
        }
    }
}

/// A device with one stream: calls take effect in their order, and none waits for what was enqueued. Addresses are the
/// device's own.
pub trait Device: fmt::Debug + Send + Sync + 'static {
    /// Multiprocessors: blocks that run side by side, at least.
    fn multiprocessors(&self) -> u32;

    /// By what it multiplies.
    fn family(&self) -> Family;

    /// Memory of undefined content; `bytes` is not 0.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn allocate(&self, bytes: usize) -> Result<u64, KernelError>;

    /// Gives memory back once all that was enqueued before is done.
    ///
    /// # Safety
    /// `address` and `bytes` are those of one [`Device::allocate`], and it is not used afterwards.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Copies to the device; `from` may change as soon as this returns. More than [`STAGED_MAX`] bytes only where all that
    /// was enqueued is done: a driver may wait for it.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// The bytes at `to` are allocated.
    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError>;

    /// Copies from the device, which is done with all that was enqueued.
    ///
    /// # Errors
    /// [`KernelError::Device`]; also for what failed before on the stream.
    ///
    /// # Safety
    /// The bytes at `from` are allocated.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError>;

    /// Copies on the device.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// The bytes at `from` and at `to` are allocated and do not overlap.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError>;

    /// Sets bytes to zero.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// The bytes at `to` are allocated.
    unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), KernelError>;

    /// Enqueues a kernel.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// `args` points to the kernel's argument struct, `args_bytes` long, and all that it points to is allocated and
    /// as large as the kernel's shapes say.
    unsafe fn launch(&self, launch: Launch<'_>, args: *const c_void, args_bytes: usize) -> Result<(), KernelError>;

    /// Makes a graph that does what these nodes do, in their order.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn graph(&self, nodes: &Sequence) -> Result<Box<dyn Graph>, KernelError>;

    /// Keeps what `enqueue` puts onto the stream that it is told, which is not this one, instead of doing it.
    ///
    /// # Errors
    /// [`KernelError::Device`]: what is put onto the stream cannot be captured; and what `enqueue` says. With
    /// [`KernelError::Late`] it says that the stream still is in use: it is left behind.
    fn capture(
        &self,
        enqueue: &mut dyn FnMut(*mut c_void) -> Result<(), KernelError>,
    ) -> Result<Captured, KernelError> {
        let _ = enqueue;
        Err(KernelError::Device { what: "capture", why: "it runs no libraries".to_owned() })
    }

    /// Host memory that the device reads while the host goes on; `bytes` is not 0.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn pin(&self, bytes: usize) -> Result<Box<dyn Pinned>, KernelError>;

    /// Whether all that was enqueued is done; does not wait.
    ///
    /// # Errors
    /// [`KernelError::Device`]; also for what failed before on the stream.
    fn is_idle(&self) -> Result<bool, KernelError>;

    /// Makes the device the calling thread's, and gives its stream, as CUDA's libraries want it; null where there is
    /// none.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn stream(&self) -> Result<*mut c_void, KernelError>;

    /// Memory that is left, whoever uses the rest; `None` where nothing says.
    fn free_memory(&self) -> Option<u64> {
        None
    }

    /// Which device of all there are.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn uuid(&self) -> Result<[u8; 16], KernelError>;
}

/// Pinned host memory and the copies out of it or into it.
pub trait Pinned: fmt::Debug + Send {
    /// The memory, which no copy reads or writes.
    ///
    /// # Errors
    /// [`KernelError::Late`] while a copy is under way, [`KernelError::Device`].
    fn bytes(&mut self) -> Result<&mut [u8], KernelError>;

    /// Enqueues a copy of the first `bytes` to the device.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// As many bytes at `to` are allocated.
    unsafe fn send(&mut self, bytes: usize, to: u64) -> Result<(), KernelError>;

    /// Enqueues a copy of `bytes` of the device to the memory, `at` bytes from its beginning.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// As many bytes at `from` are allocated.
    unsafe fn fetch(&mut self, from: u64, at: usize, bytes: usize) -> Result<(), KernelError>;

    /// Whether all of its copies are done; does not wait: what was sent has been read, and what was fetched is here.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn is_done(&self) -> Result<bool, KernelError>;
}

/// What a library put onto a stream: done as often as it is enqueued, alone or as a node of graphs.
pub trait Capture: fmt::Debug + Send + Sync {
    /// Enqueues it by itself.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// What the library read and wrote when it was captured is still allocated, and the library still there for it. No two
    /// threads do so at once.
    unsafe fn launch(&self) -> Result<(), KernelError>;

    /// The driver's graph of it; null where there is no driver.
    fn graph(&self) -> *mut c_void {
        std::ptr::null_mut()
    }
}

/// A handle to a [`Capture`]; equal only to its clones.
#[derive(Clone, Debug)]
pub struct Captured(Arc<dyn Capture>);

impl Captured {
    /// A handle to it.
    #[must_use]
    pub fn new(capture: impl Capture + 'static) -> Self {
        Self(Arc::new(capture))
    }
}

impl std::ops::Deref for Captured {
    type Target = dyn Capture;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for Captured {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Captured {}

impl std::hash::Hash for Captured {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).cast::<()>().hash(state);
    }
}

/// Nodes that a device launches as one, each after the one before. Those in flight outlive it when it is dropped.
pub trait Graph: fmt::Debug + Send {
    /// Changes a node for launches from now on; what is in flight is not touched.
    ///
    /// # Errors
    /// [`KernelError::Device`]; the graph must not be launched any more.
    ///
    /// # Safety
    /// The node at this place is [like](Node::is_like) the new one, which may be run.
    unsafe fn update(&mut self, at: usize, node: Node<'_>) -> Result<(), KernelError>;

    /// Enqueues it.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// Every node may be run, as [`Device::launch`], [`Device::copy`] and [`Device::zero`] have it.
    unsafe fn launch(&mut self) -> Result<(), KernelError>;
}

/// The size of a buffer that grows to hold `bytes`: up to a quarter more, so that it seldom grows again. Never less for
/// more.
pub(super) fn grown(bytes: usize) -> usize {
    let step = bytes.checked_next_power_of_two().unwrap_or(0) / 8;
    bytes.checked_next_multiple_of(step.max(ALIGNMENT)).unwrap_or(bytes)
}

/// A device and the bytes held of it.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) queue: Queue,
    held: AtomicU64,
    /// Where buffers lie from when it was made on; until then each is an allocation of its own.
    arena: Mutex<Option<Arena>>,
}

impl Memory {
    pub(super) fn new(device: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { queue: Queue::new(device), held: AtomicU64::new(0), arena: Mutex::new(None) })
    }

    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn arena(&self) -> MutexGuard<'_, Option<Arena>> {
        // No call on an arena panics halfway.
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an allocation of `bytes` in which all further buffers lie.
    pub(super) fn make_arena(&self, bytes: u64) -> Result<(), KernelError> {
        let refused = |why: &str| KernelError::Device { what: "allocate", why: format!("{bytes} bytes: {why}") };
        let mut arena = self.arena();
        if arena.is_some() {
            return Err(refused("its memory is one allocation already"));
        }
        let bytes = usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT));
        let bytes = bytes.filter(|&bytes| bytes > 0).ok_or_else(|| refused("no such allocation is possible"))?;
        *arena = Some(Arena::new(self.queue.device().allocate(bytes)?, bytes));
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64, KernelError> {
        let mut arena = self.arena();
        let Some(arena) = arena.as_mut() else { return self.queue.device().allocate(bytes) };
        if let Some(address) = arena.take(bytes) {
            return Ok(address);
        }
        // Beyond what was planned, or in pieces too small: an allocation of its own, as long as the device has one.
        self.queue.device().allocate(bytes).map_err(|_| {
            let (free, longest) = arena.room();
            let all = arena.range().end - arena.range().start;
            let why = format!("{bytes} bytes: of {all} planned, {free} are free, {longest} in one piece");
            KernelError::Device { what: "allocate", why }
        })
    }

    /// Gives back what [`Memory::allocate`] gave.
    fn free(&self, address: u64, bytes: usize) {
        match self.arena().as_mut() {
            Some(arena) if arena.range().contains(&address) => arena.give(address, bytes),
            // SAFETY: an allocation of its own, made before the arena, or without one; its only user is gone.
            _ => unsafe { self.queue.free(address, bytes) },
        }
    }

    /// `bytes` of undefined content.
    pub(super) fn unfilled(self: &Arc<Self>, bytes: usize) -> Result<Buffer, KernelError> {
        if bytes == 0 {
            return Ok(self.nothing());
        }
        let address = self.allocate(bytes)?;
        self.held.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Buffer { memory: Arc::clone(self), address, bytes })
    }

    /// `bytes` zeros.
    pub(super) fn zeroed(self: &Arc<Self>, bytes: usize) -> Result<Buffer, KernelError> {
        let buffer = self.unfilled(bytes)?;
        if bytes > 0 {
            // SAFETY: just allocated.
            unsafe { self.queue.zero(buffer.address, bytes)? };
        }
        Ok(buffer)
    }

    /// A buffer of no bytes.
    pub(super) fn nothing(self: &Arc<Self>) -> Buffer {
        Buffer { memory: Arc::clone(self), address: 0, bytes: 0 }
    }

    /// A buffer that holds `bytes`.
    pub(super) fn filled(self: &Arc<Self>, bytes: &[u8]) -> Result<Buffer, KernelError> {
        let mut buffer = self.unfilled(bytes.len())?;
        buffer.upload(0, bytes)?;
        Ok(buffer)
    }

    /// A buffer of `bytes` that `make` writes.
    pub(super) fn made(
        self: &Arc<Self>,
        bytes: usize,
        make: impl FnOnce(&mut [u8]) -> Result<(), KernelError>,
    ) -> Result<Buffer, KernelError> {
        let buffer = self.unfilled(bytes)?;
        // SAFETY: just allocated.
        unsafe { self.queue.upload_made(bytes, buffer.address, make)? };
        Ok(buffer)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(arena) = self.arena().take() {
            let range = arena.range();
            // SAFETY: the arena's allocation; every buffer in it held this memory and is gone.
            unsafe { self.queue.free(range.start, (range.end - range.start) as usize) };
        }
    }
}

/// Memory of a device; given back when dropped, in the order of the stream.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: Arc<Memory>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Where it is on the device.
    pub(super) const fn address(&self) -> u64 {
        self.address
    }

    /// Where it is, to be written there.
    #[allow(clippy::needless_pass_by_ref_mut, reason = "who writes there must own it alone")]
    pub(super) const fn address_mut(&mut self) -> u64 {
        self.address
    }

    /// Its size.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes it at least `bytes` long; what it held is lost if it grows.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), KernelError> {
        if bytes > self.bytes {
            // What was there goes first: both together are never held.
            *self = self.memory.nothing();
            *self = self.memory.zeroed(grown(bytes))?;
        }
        Ok(())
    }

    /// Makes it at least `bytes` long and no longer; what it held is lost if it grows.
    pub(super) fn reserve_exactly(&mut self, bytes: usize) -> Result<(), KernelError> {
        if bytes > self.bytes {
            // As above.
            *self = self.memory.nothing();
            *self = self.memory.zeroed(bytes)?;
        }
        Ok(())
    }

    fn check(&self, at: usize, bytes: usize) -> Result<(), KernelError> {
        match at.checked_add(bytes).filter(|&end| end <= self.bytes) {
            Some(_) => Ok(()),
            None => Err(KernelError::Size { what: "a device buffer", got: self.bytes, need: at.saturating_add(bytes) }),
        }
    }

    /// Copies to it, `at` bytes from its beginning.
    pub(super) fn upload(&mut self, at: usize, from: &[u8]) -> Result<(), KernelError> {
        self.check(at, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the range was checked to lie within this allocation.
        unsafe { self.memory.queue.upload(from, self.address + at as u64) }
    }

    /// Copies to it, ahead of what is recorded, which must not touch these bytes: they would be others for it.
    pub(super) fn upload_ahead(&mut self, at: usize, from: &[u8]) -> Result<(), KernelError> {
        self.check(at, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the range was checked to lie within this allocation.
        unsafe { self.memory.queue.upload_ahead(from, self.address + at as u64) }
    }

    /// Its first bytes; waits.
    pub(super) fn download(&self, bytes: usize) -> Result<Vec<u8>, KernelError> {
        self.check(0, bytes)?;
        let mut out = vec![0; bytes];
        if bytes > 0 {
            // SAFETY: the range was checked to lie within this allocation.
            unsafe { self.memory.queue.download(self.address, &mut out)? };
        }
        Ok(out)
    }

    /// Copies its first bytes to pinned memory, behind what is recorded; does not wait.
    pub(super) fn fetch(&self, bytes: usize, to: &mut dyn Pinned, at: usize) -> Result<(), KernelError> {
        self.check(0, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range was checked to lie within this allocation.
        unsafe { self.memory.queue.fetch(self.address, to, at, bytes) }
    }

    /// Sets it to zero, behind what is recorded.
    pub(super) fn zero_now(&mut self) -> Result<(), KernelError> {
        self.memory.queue.submit()?;
        // SAFETY: this allocation.
        unsafe { self.memory.queue.device().zero(self.address, self.bytes) }
    }

    /// Copies `bytes` within it, to a place that does not overlap.
    pub(super) fn copy_within(&mut self, from: usize, to: usize, bytes: usize) -> Result<(), KernelError> {
        self.check(from, bytes)?;
        self.check(to, bytes)?;
        if bytes == 0 || from == to {
            return Ok(());
        }
        if from.abs_diff(to) < bytes {
            return Err(KernelError::Size { what: "a copy that overlaps itself", got: from.abs_diff(to), need: bytes });
        }
        // SAFETY: both ranges were checked to lie within this allocation, and not to overlap.
        unsafe { self.memory.queue.copy(self.address + from as u64, self.address + to as u64, bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.memory.held.fetch_sub(self.bytes as u64, Ordering::Relaxed);
            self.memory.free(self.address, self.bytes);
        }
    }
}

/// Numbers as the device reads them: little endian, without padding.
pub(super) trait Plain: Copy {
    /// Appends the bytes.
    fn append(self, out: &mut Vec<u8>);
}

macro_rules! plain {
    ($($number:ty),*) => {
        $(impl Plain for $number {
            fn append(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        })*
    };
}

plain!(u8, u32, u64, f32, f64);

/// The bytes of numbers.
pub(super) fn bytes_of<T: Plain>(values: &[T]) -> Vec<u8> {
    let mut out = Vec::with_capacity(size_of_val(values));
    values.iter().for_each(|value| value.append(&mut out));
    out
}
