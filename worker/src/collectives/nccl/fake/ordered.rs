//! The emulated device with a stream: ops and the stand-in's exchanges follow each other, and the host is ahead of both.

use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::nccl::sys::cudaStream_t;
use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::{Capture, Captured, Device, Emulated, Family, Graph, Launch, Node, Pinned, Sequence};

use super::lock;
use super::stream::{Recording, Work, capture, enqueue, groups_max, new_stream, try_advance};

/// A device in the order of a stream of the stand-in's.
#[derive(Debug, Default)]
pub(in super::super) struct Ordered {
    stream: usize,
    /// What every look at the stream finds.
    pub(in super::super) fault: Mutex<Option<String>>,
    /// Nothing can be captured.
    pub(in super::super) no_captures: AtomicBool,
    /// How often the host found that the stream was not where it waits for it.
    pub(in super::super) waits: Arc<AtomicUsize>,
}

impl Ordered {
    pub(in super::super) fn new() -> Arc<Self> {
        let stream = new_stream().expose_provenance();
        Arc::new(Self { stream, ..Self::default() })
    }

    fn raw(&self) -> cudaStream_t {
        std::ptr::with_exposed_provenance_mut(self.stream)
    }

    /// The most exchanges that ever waited on the stream.
    pub(in super::super) fn exchanges_max(&self) -> usize {
        groups_max(self.raw())
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
        if !self.is_idle()? {
            return Err(KernelError::Device { what: "give bytes", why: "it is not done".to_owned() });
        }
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

    fn graph(&self, nodes: &Sequence) -> Result<Box<dyn Graph>, KernelError> {
        let device = Self { stream: self.stream, ..Self::default() };
        Ok(Box::new(OrderedGraph { device, nodes: nodes.nodes().map(alone).collect() }))
    }

    fn capture(
        &self,
        enqueue: &mut dyn FnMut(*mut c_void) -> Result<(), KernelError>,
    ) -> Result<Captured, KernelError> {
        if self.no_captures.load(Ordering::SeqCst) {
            return Err(KernelError::Device { what: "capture", why: "planted".to_owned() });
        }
        let recording = capture(|stream| enqueue(stream.cast()))?;
        Ok(Captured::new(OrderedCapture { stream: self.stream, recording }))
    }

    fn pin(&self, bytes: usize) -> Result<Box<dyn Pinned>, KernelError> {
        let (stream, waits) = (self.stream, Arc::clone(&self.waits));
        Ok(Box::new(OrderedPinned { stream, waits, bytes: vec![0; bytes], under_way: Arc::default() }))
    }

    fn is_idle(&self) -> Result<bool, KernelError> {
        match lock(&self.fault).clone() {
            Some(why) => Err(KernelError::Device { what: "finish", why }),
            None => {
                let idle = try_advance(self.raw())?;
                self.waits.fetch_add(usize::from(!idle), Ordering::SeqCst);
                Ok(idle)
            }
        }
    }

    fn stream(&self) -> Result<*mut c_void, KernelError> {
        Ok(self.raw().cast())
    }

    fn uuid(&self) -> Result<[u8; 16], KernelError> {
        Ok([0; 16])
    }
}

/// What the stand-in enqueued.
struct OrderedCapture {
    stream: usize,
    recording: Recording,
}

impl fmt::Debug for OrderedCapture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OrderedCapture").finish_non_exhaustive()
    }
}

impl Capture for OrderedCapture {
    unsafe fn launch(&self) -> Result<(), KernelError> {
        self.recording.enqueue(std::ptr::with_exposed_provenance_mut(self.stream));
        Ok(())
    }
}

fn alone(node: Node<'_>) -> Sequence {
    let mut sequence = Sequence::default();
    sequence.push(node);
    sequence
}

/// Puts its own copies of its nodes onto the stream.
#[derive(Debug)]
struct OrderedGraph {
    device: Ordered,
    nodes: Vec<Sequence>,
}

impl Graph for OrderedGraph {
    unsafe fn update(&mut self, at: usize, node: Node<'_>) -> Result<(), KernelError> {
        self.nodes[at] = alone(node);
        Ok(())
    }

    unsafe fn launch(&mut self) -> Result<(), KernelError> {
        // SAFETY: the caller promises that every node may be run.
        self.nodes.iter().flat_map(Sequence::nodes).try_for_each(|node| unsafe { node.enqueue(&self.device) })
    }
}

/// Memory that the stream reads, and what it brings back, when it comes there.
#[derive(Debug)]
struct OrderedPinned {
    stream: usize,
    waits: Arc<AtomicUsize>,
    bytes: Vec<u8>,
    under_way: Arc<Mutex<UnderWay>>,
}

/// Copies that the stream has not come to, and what those have brought that it has.
#[derive(Debug, Default)]
struct UnderWay {
    copies: usize,
    fetched: Vec<(usize, Vec<u8>)>,
}

impl OrderedPinned {
    fn enqueue(&self, op: impl FnOnce(&mut UnderWay) -> Result<(), KernelError> + Send + 'static) {
        let under_way = Arc::clone(&self.under_way);
        lock(&under_way).copies += 1;
        let work = move || {
            let mut under_way = lock(&under_way);
            under_way.copies -= 1;
            op(&mut under_way)
        };
        enqueue(std::ptr::with_exposed_provenance_mut(self.stream), Work::Op(Box::new(work)));
    }
}

impl Pinned for OrderedPinned {
    fn bytes(&mut self) -> Result<&mut [u8], KernelError> {
        let mut under_way = lock(&self.under_way);
        if under_way.copies > 0 {
            return Err(KernelError::Late { what: "finish a copy" });
        }
        for (at, fetched) in under_way.fetched.drain(..) {
            self.bytes[at..at + fetched.len()].copy_from_slice(&fetched);
        }
        drop(under_way);
        Ok(&mut self.bytes)
    }

    unsafe fn send(&mut self, bytes: usize, to: u64) -> Result<(), KernelError> {
        let from = self.bytes[..bytes].as_mut_ptr().expose_provenance();
        self.enqueue(move |_| {
            // SAFETY: the memory lives until its copies are done, and only its owner's thread works on the stream.
            let from = unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(from), bytes) };
            // SAFETY: the caller's promise.
            unsafe { emulated().upload(from, to) }
        });
        Ok(())
    }

    unsafe fn fetch(&mut self, from: u64, at: usize, bytes: usize) -> Result<(), KernelError> {
        self.enqueue(move |under_way| {
            let mut fetched = vec![0; bytes];
            // SAFETY: the caller's promise; what is freed later is freed behind this.
            unsafe { emulated().download(from, &mut fetched)? };
            under_way.fetched.push((at, fetched));
            Ok(())
        });
        Ok(())
    }

    fn is_done(&self) -> Result<bool, KernelError> {
        try_advance(std::ptr::with_exposed_provenance_mut(self.stream))?;
        let done = lock(&self.under_way).copies == 0;
        self.waits.fetch_add(usize::from(!done), Ordering::SeqCst);
        Ok(done)
    }
}

impl Drop for OrderedPinned {
    fn drop(&mut self) {
        if lock(&self.under_way).copies > 0 {
            // The stream will read it, should it come there.
            std::mem::forget(std::mem::take(&mut self.bytes));
        }
    }
}
