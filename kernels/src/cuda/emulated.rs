//! A device that runs the kernels on the CPU, compiled by the C++ compiler from the same sources; for tests.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::device::{Device, Family, Graph, Launch, Pinned};
use super::ops::Kernel;
use super::sequence::{Node, Sequence};
use crate::KernelError;

unsafe extern "C" {
    fn phalanx_emu_find(name: *const c_char, args_bytes: *mut usize, threads: *mut u32) -> bool;
    fn phalanx_emu_broken() -> *const c_char;
    fn phalanx_emu_launch(
        name: *const c_char,
        args: *const c_void,
        args_bytes: usize,
        grid: *const u32,
        shared: usize,
        at_once: u32,
    ) -> c_int;
}

/// Alignment of allocations, as a driver's.
const ALIGNMENT: usize = 256;

/// A fault that is planted in a kernel, to see whether a test sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Attention does not wait for its keys.
    Barrier,
    /// Attention's window is longer by one.
    Window,
    /// The experts' two codes of a byte are exchanged.
    Nibbles,
    /// The device makes no graphs.
    NoGraphs,
    /// Graphs stay as they were made.
    Stale,
    /// Hopper's kernels do not wait for a stage of their ring.
    Wait,
    /// Those of the experts wait for the phase before.
    Phase,
    /// Those of the experts read the next stage.
    Stage,
    /// Those of the experts read items by a descriptor with another stride.
    Stride,
    /// They begin products without a fence.
    Fence,
    /// They load or decode into registers that a product under way reads.
    Registers,
    /// They give a stage back before its products are done.
    Early,
    /// Down does not wait for other blocks' activations; halves of dense matrices stay where they have met.
    Meet,
}

/// What emulated devices hold, and when they break.
#[derive(Debug)]
pub struct Meter {
    held: AtomicU64,
    peak: AtomicU64,
    launches_left: AtomicU64,
    hangs: AtomicBool,
}

impl Meter {
    /// A meter that lets so many launches pass; all later ones fail.
    #[must_use]
    pub const fn new(launches: u64) -> Self {
        Self {
            held: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            launches_left: AtomicU64::new(launches),
            hangs: AtomicBool::new(false),
        }
    }

    /// The most bytes that were ever held at once.
    #[must_use]
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Lets no more than so many further launches pass.
    pub fn leave(&self, launches: u64) {
        self.launches_left.store(launches, Ordering::Relaxed);
    }

    /// Lets devices hang: they take whatever is enqueued from here on, and are never done with it.
    pub fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
    }

    fn hold(&self, bytes: usize) {
        let held = self.held.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.peak.fetch_max(held, Ordering::Relaxed);
    }

    fn free(&self, bytes: usize) {
        self.held.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    fn lets_launch(&self) -> bool {
        let less = |left: u64| left.checked_sub(1);
        self.launches_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

/// Kernels on the CPU: every call is done when it returns, or never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Emulated {
    /// Kernels with this fault where there are such.
    pub fault: Option<Fault>,
    /// The largest allocation that succeeds.
    pub largest: Option<usize>,
    /// Kernels of this family.
    pub family: Family,
    /// Watches all devices that have it.
    pub meter: Option<&'static Meter>,
    /// Further blocks of a launch that run at once with the first.
    pub beside: u32,
}

impl Emulated {
    /// Whether it takes what is enqueued and does nothing of it.
    fn hangs(&self) -> bool {
        self.meter.is_some_and(|meter| meter.hangs.load(Ordering::Relaxed))
    }

    /// The name of the kernel to run.
    fn name(&self, kernel: &Kernel) -> CString {
        let plain = CString::new(kernel.name).expect("names of kernels have no zero");
        let Some(fault) = self.fault else { return plain };
        let suffix = match fault {
            Fault::Barrier => "barrier",
            Fault::Window => "window",
            Fault::Nibbles => "nibbles",
            Fault::NoGraphs | Fault::Stale => return plain,
            Fault::Wait => "wait",
            Fault::Phase => "phase",
            Fault::Stage => "stage",
            Fault::Stride => "stride",
            Fault::Fence => "fence",
            Fault::Registers => "registers",
            Fault::Early => "early",
            Fault::Meet => "meet",
        };
        let planted = CString::new(format!("{}!{suffix}", kernel.name)).expect("no zero either");
        if find(&planted).is_some() { planted } else { plain }
    }
}

/// Bytes of arguments and threads of a compiled kernel.
fn find(name: &CString) -> Option<(usize, u32)> {
    let (mut args_bytes, mut threads) = (0, 0);
    // SAFETY: the name ends with a zero, and both numbers outlive the call.
    let found = unsafe { phalanx_emu_find(name.as_ptr(), &raw mut args_bytes, &raw mut threads) };
    found.then_some((args_bytes, threads))
}

fn failed(what: &'static str, why: String) -> KernelError {
    KernelError::Device { what, why }
}

impl Device for Emulated {
    // Few, so that small tests take either way to walk attention's segments.
    fn multiprocessors(&self) -> u32 {
        16
    }

    fn family(&self) -> Family {
        self.family
    }

    fn allocate(&self, bytes: usize) -> Result<u64, KernelError> {
        if self.largest.is_some_and(|largest| bytes > largest) {
            return Err(failed("allocate", format!("no {bytes} bytes")));
        }
        let layout =
            Layout::from_size_align(bytes, ALIGNMENT).map_err(|error| failed("allocate", error.to_string()))?;
        // SAFETY: callers never ask for 0 bytes.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(failed("allocate", format!("no {bytes} bytes")));
        }
        if let Some(meter) = self.meter {
            meter.hold(bytes);
        }
        Ok(memory.addr() as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        if let Some(meter) = self.meter {
            meter.free(bytes);
        }
        if let Ok(layout) = Layout::from_size_align(bytes, ALIGNMENT) {
            // SAFETY: the caller promises that this is an allocation of this layout.
            unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address as usize), layout) };
        }
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        if self.hangs() {
            return Ok(());
        }
        // SAFETY: the caller promises that the destination is allocated; it is not the host's slice.
        unsafe { host(to).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        // SAFETY: the caller promises that the source is allocated; it is not the host's slice.
        unsafe { host(from).copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        if self.hangs() {
            return Ok(());
        }
        // SAFETY: the caller promises that both are allocated and apart.
        unsafe { host(from).copy_to_nonoverlapping(host(to), bytes) };
        Ok(())
    }

    unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), KernelError> {
        if self.hangs() {
            return Ok(());
        }
        // SAFETY: the caller promises that the destination is allocated.
        unsafe { host(to).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, launch: Launch<'_>, args: *const c_void, args_bytes: usize) -> Result<(), KernelError> {
        if self.meter.is_some_and(|meter| !meter.lets_launch()) {
            return Err(failed("run a kernel", format!("{}: the device is broken", launch.kernel.name)));
        }
        if self.hangs() {
            return Ok(());
        }
        let name = self.name(launch.kernel);
        // SAFETY: the caller promises that the arguments are the kernel's; the emulation checks their size.
        let done = unsafe {
            phalanx_emu_launch(
                name.as_ptr(),
                args,
                args_bytes,
                launch.grid.as_ptr(),
                launch.shared as usize,
                1 + self.beside,
            )
        };
        if done == 5 {
            // SAFETY: the text is a constant of the emulation.
            let rule = unsafe { CStr::from_ptr(phalanx_emu_broken()) };
            return Err(failed("run a kernel", format!("{}: {}", launch.kernel.name, rule.to_string_lossy())));
        }
        let why = match done {
            0 => return Ok(()),
            1 => "there is no such kernel",
            2 => "its arguments have another size",
            3 => "its blocks are too large",
            4 => "its threads wait for each other for ever",
            _ => "it failed",
        };
        Err(failed("run a kernel", format!("{}: {why}", launch.kernel.name)))
    }

    fn is_idle(&self) -> Result<bool, KernelError> {
        Ok(!self.hangs())
    }

    fn stream(&self) -> Result<*mut c_void, KernelError> {
        Ok(std::ptr::null_mut())
    }

    fn uuid(&self) -> Result<[u8; 16], KernelError> {
        Ok([0; 16])
    }

    fn pin(&self, bytes: usize) -> Result<Box<dyn Pinned>, KernelError> {
        let done = Cell::new(true);
        Ok(Box::new(EmulatedPinned { device: *self, bytes: vec![0; bytes], fetched: Vec::new(), done }))
    }

    fn graph(&self, nodes: &Sequence) -> Result<Box<dyn Graph>, KernelError> {
        if self.fault == Some(Fault::NoGraphs) {
            return Err(failed("make a graph", format!("none of {} nodes", nodes.len())));
        }
        let mut own = Vec::new();
        for node in nodes.nodes() {
            let mut one = Sequence::default();
            one.push(node);
            own.push(one);
        }
        Ok(Box::new(EmulatedGraph { device: *self, nodes: own }))
    }
}

/// Memory of the host, read at once; nobody sees it before the device was asked whether it is done.
#[derive(Debug)]
struct EmulatedPinned {
    device: Emulated,
    bytes: Vec<u8>,
    fetched: Vec<(usize, Vec<u8>)>,
    done: Cell<bool>,
}

impl Pinned for EmulatedPinned {
    fn bytes(&mut self) -> Result<&mut [u8], KernelError> {
        if !self.done.get() {
            return Err(KernelError::Late { what: "finish a copy" });
        }
        for (at, fetched) in self.fetched.drain(..) {
            self.bytes[at..at + fetched.len()].copy_from_slice(&fetched);
        }
        Ok(&mut self.bytes)
    }

    unsafe fn send(&mut self, bytes: usize, to: u64) -> Result<(), KernelError> {
        self.done.set(false);
        // SAFETY: the caller promises that the destination is allocated.
        unsafe { self.device.upload(&self.bytes[..bytes], to) }
    }

    unsafe fn fetch(&mut self, from: u64, at: usize, bytes: usize) -> Result<(), KernelError> {
        self.done.set(false);
        let mut fetched = vec![0; bytes];
        // SAFETY: the caller promises that the source is allocated.
        unsafe { self.device.download(from, &mut fetched)? };
        self.fetched.push((at, fetched));
        Ok(())
    }

    fn is_done(&self) -> Result<bool, KernelError> {
        if !self.device.hangs() {
            self.done.set(true);
        }
        Ok(self.done.get())
    }
}

/// A graph that runs its own copies of its nodes.
#[derive(Debug)]
struct EmulatedGraph {
    device: Emulated,
    nodes: Vec<Sequence>,
}

impl Graph for EmulatedGraph {
    unsafe fn update(&mut self, at: usize, node: Node<'_>) -> Result<(), KernelError> {
        if self.nodes[at].nodes().any(|own| !own.is_like(&node)) {
            return Err(failed("change a graph", format!("node {at} is another kernel's")));
        }
        if self.device.fault != Some(Fault::Stale) {
            self.nodes[at].clear();
            self.nodes[at].push(node);
        }
        Ok(())
    }

    unsafe fn launch(&mut self) -> Result<(), KernelError> {
        // SAFETY: the caller promises that every node may be run.
        self.nodes.iter().flat_map(Sequence::nodes).try_for_each(|node| unsafe { node.enqueue(&self.device) })
    }
}

/// An address as a pointer.
fn host(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::KERNELS;

    #[test]
    fn arguments_and_threads_are_the_compilers() {
        for kernel in KERNELS {
            let name = CString::new(kernel.name).unwrap();
            assert_eq!(find(&name), Some((kernel.args_bytes, kernel.threads)), "{}", kernel.name);
        }
    }

    #[test]
    fn faults_are_planted() {
        for (fault, name) in [
            (Fault::Barrier, "attention_f32!barrier"),
            (Fault::Window, "attention_few_64!window"),
            (Fault::Nibbles, "down_bf16!nibbles"),
            (Fault::Stride, "experts_wgmma_32!stride"),
            (Fault::Meet, "experts_wgmma_32!meet"),
            (Fault::Early, "dense_wgmma_8!early"),
        ] {
            let device = Emulated { fault: Some(fault), ..Emulated::default() };
            let kernel = KERNELS.iter().find(|kernel| name.starts_with(&format!("{}!", kernel.name))).unwrap();
            assert_eq!(device.name(kernel).to_str(), Ok(name));
            assert_eq!(device.name(&KERNELS[0]).to_str(), Ok(KERNELS[0].name));
        }
    }
}
