//! The emulated device with a stream: ops and the stand-in's exchanges follow each other, and the host is ahead of both.

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use cudarc::nccl::sys::cudaStream_t;
use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::{Device, Emulated, Family, Graph, Launch, Pinned, Sequence};

use super::stream::{Work, enqueue, new_stream, try_advance};
use super::{HANG_MAX, lock};

/// A device in the order of a stream of the stand-in's.
#[derive(Debug)]
pub(in super::super) struct Ordered {
    stream: usize,
    /// What every look at the stream finds.
    pub(in super::super) fault: Mutex<Option<String>>,
    /// Waits of the host for the stream.
    pub(in super::super) waits: AtomicUsize,
}

impl Ordered {
    pub(in super::super) fn new() -> Arc<Self> {
        let (stream, waits) = (new_stream().expose_provenance(), AtomicUsize::new(0));
        Arc::new(Self { stream, fault: Mutex::default(), waits })
    }

    fn raw(&self) -> cudaStream_t {
        std::ptr::with_exposed_provenance_mut(self.stream)
    }

    fn finish(&self) -> Result<(), KernelError> {
        self.waits.fetch_add(1, Ordering::SeqCst);
        let begun = Instant::now();
        while !try_advance(self.raw())? {
            if begun.elapsed() > HANG_MAX {
                return Err(KernelError::Device { what: "finish", why: "the host waits for another rank".to_owned() });
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn enqueue(&self, op: impl FnOnce() -> Result<(), KernelError> + Send + 'static) {
        enqueue(self.raw(), Work::Op(Box::new(op)));
    }
}

/// What the ops run on.
fn emulated() -> Emulated {
    Emulated::default()
}

impl Device for Ordered {
    fn multiprocessors(&self) -> u32 {
        emulated().multiprocessors()
    }

    fn allocate(&self, bytes: usize) -> Result<u64, KernelError> {
        emulated().allocate(bytes)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the caller's promise, once all that was enqueued before is done.
        self.enqueue(move || unsafe {
            emulated().free(address, bytes);
            Ok(())
        });
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        let from = from.to_vec();
        // SAFETY: the caller's promise; what is freed later is freed behind this.
        self.enqueue(move || unsafe { emulated().upload(&from, to) });
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        self.finish()?;
        // SAFETY: the caller's promise.
        unsafe { emulated().download(from, to) }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        // SAFETY: the caller's promise; what is freed later is freed behind this.
        self.enqueue(move || unsafe { emulated().copy(from, to, bytes) });
        Ok(())
    }

    unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), KernelError> {
        // SAFETY: the caller's promise; what is freed later is freed behind this.
        self.enqueue(move || unsafe { emulated().zero(to, bytes) });
        Ok(())
    }

    unsafe fn launch(&self, launch: Launch<'_>, args: *const c_void, args_bytes: usize) -> Result<(), KernelError> {
        let (kernel, grid, shared) = (*launch.kernel, launch.grid, launch.shared);
        let mut copied = vec![0_u64; args_bytes.div_ceil(8)];
        // SAFETY: the caller promises so many bytes of arguments; the copy has as many.
        unsafe { std::ptr::copy_nonoverlapping(args.cast::<u8>(), copied.as_mut_ptr().cast(), args_bytes) };
        // SAFETY: the caller's promise; what is freed later is freed behind this.
        self.enqueue(move || unsafe {
            emulated().launch(Launch { kernel: &kernel, grid, shared }, copied.as_ptr().cast(), args_bytes)
        });
        Ok(())
    }

    fn family(&self) -> Family {
        emulated().family()
    }

    fn graph(&self, _nodes: &Sequence) -> Result<Box<dyn Graph>, KernelError> {
        Err(KernelError::Device { what: "make graphs", why: "its stream takes one op after the other".to_owned() })
    }

    fn pin(&self, _bytes: usize) -> Result<Box<dyn Pinned>, KernelError> {
        Err(KernelError::Device { what: "pin memory", why: "it copies what it takes".to_owned() })
    }

    fn is_idle(&self) -> Result<bool, KernelError> {
        match lock(&self.fault).clone() {
            Some(why) => Err(KernelError::Device { what: "finish", why }),
            None => try_advance(self.raw()),
        }
    }

    fn stream(&self) -> Result<*mut c_void, KernelError> {
        Ok(self.raw().cast())
    }

    fn uuid(&self) -> Result<[u8; 16], KernelError> {
        Ok([0; 16])
    }
}
