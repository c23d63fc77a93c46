//! The host's half over a stand-in for the driver, which ends the process where the true one would wait for ever, or take
//! away what a device still uses.
//!
//! The stand-in is compiled by the C compiler and found before any other driver: the test runs itself once more with its
//! folder first on the path of libraries.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "functions of a C library")]

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use phalanx_kernels::cuda::compile::Cache;
use phalanx_kernels::cuda::driver::Driver;
use phalanx_kernels::cuda::{Device as _, Node, Sequence};
use phalanx_kernels::memory::Source;
use phalanx_kernels::{Backend, Cuda, KernelError, Precision};

/// Names the stand-in's folder to the process that is to use it.
const FOLDER: &str = "PHALANX_STAND_IN_DRIVER";
/// So short that no device meets it.
const SOON: Duration = Duration::from_millis(5);

/// Compiles the stand-in, under the names by which libraries are looked for.
fn build(folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/fake.c");
    let library = folder.join("libcuda.so");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let arguments = ["-std=c11", "-O1", "-w", "-shared", "-fPIC", "-o"];
    let compiled = Command::new(compiler).args(arguments).arg(&library).arg(source).status().unwrap();
    assert!(compiled.success());
    for name in ["libcuda.so.1", "libnvrtc.so", "libnvrtc.so.13"] {
        std::fs::copy(&library, folder.join(name)).unwrap();
    }
}

#[test]
fn nothing_waits_for_a_device_that_hangs_nor_takes_away_what_it_uses() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return with(&StandIn::load(folder.into()));
    }
    let folder = std::env::temp_dir().join(format!("phalanx-driver-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    build(&folder);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "nothing_waits_for_a_device_that_hangs_nor_takes_away_what_it_uses", "--nocapture"])
        .envs([(FOLDER, &folder), ("LD_LIBRARY_PATH", &folder)])
        .output()
        .unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success() && said[0].contains("1 passed"), "{}", said.join("\n"));
}

/// The stand-in's own functions.
struct StandIn {
    library: libloading::Library,
    folder: PathBuf,
}

impl StandIn {
    fn load(folder: PathBuf) -> Self {
        // SAFETY: it has no initialisers. It is the one that the backend loads: they have one name.
        let library = unsafe { libloading::Library::new("libcuda.so") }.unwrap();
        Self { library, folder }
    }

    fn set(&self, hangs: bool, events_fail: bool) {
        // SAFETY: the type is that of the source.
        let set = unsafe { self.library.get::<unsafe extern "C" fn(i32, i32)>(b"fake_set") }.unwrap();
        // SAFETY: it sets two numbers.
        unsafe { set(i32::from(hangs), i32::from(events_fail)) };
    }

    fn number(&self, name: &str) -> i64 {
        // SAFETY: the type is that of the source.
        let number = unsafe { self.library.get::<unsafe extern "C" fn() -> i64>(name.as_bytes()) }.unwrap();
        // SAFETY: it returns a number.
        unsafe { number() }
    }

    /// Contexts, modules, pieces of pinned memory, streams and graphs that are held.
    fn held(&self) -> [i64; 5] {
        ["fake_contexts", "fake_modules", "fake_pinned", "fake_streams", "fake_graphs"].map(|name| self.number(name))
    }

    /// As a library does: sets bytes, in the order of the stream it is told.
    fn enqueue(&self, stream: *mut c_void, to: u64, value: u8, bytes: usize) -> Result<(), KernelError> {
        type MemsetD8Async = unsafe extern "C" fn(u64, u8, usize, *mut c_void) -> i32;
        // SAFETY: the type is that of the source.
        let set = unsafe { self.library.get::<MemsetD8Async>(b"cuMemsetD8Async") }.unwrap();
        // SAFETY: the test allocates as many bytes.
        assert_eq!(unsafe { set(to, value, bytes, stream) }, 0);
        Ok(())
    }

    fn open(&self) -> Driver {
        Driver::open(0, &Cache::new(&self.folder), &mut |_, _| ()).unwrap()
    }

    fn backend(&self) -> Cuda {
        let mut cuda = Cuda::new(Arc::new(self.open()), Precision::Fast).unwrap();
        cuda.set_patience(SOON);
        cuda
    }
}

fn is_late<T>(result: Result<T, KernelError>) -> bool {
    matches!(result, Err(KernelError::Late { .. }))
}

fn with(stand_in: &StandIn) {
    what_is_done_is_given_back(stand_in);
    pinned_memory_waits_for_its_copies(stand_in);
    a_copy_without_an_event_is_under_way(stand_in);
    graphs_do_what_their_nodes_are_now(stand_in);
    norms_start_while_the_kernel_before_runs(stand_in);
    what_a_library_enqueues_is_done_alone_and_within_graphs(stand_in);
    what_is_not_captured_leaves_nothing(stand_in);
    a_stream_that_a_library_still_uses_is_left_to_it(stand_in);
    a_device_that_hangs_keeps_what_it_uses(stand_in);
}

fn read(driver: &Driver, at: u64) -> [u8; 64] {
    let mut bytes = [0; 64];
    // SAFETY: as many bytes are allocated.
    unsafe { driver.download(at, &mut bytes) }.unwrap();
    bytes
}

/// As many bytes of each value.
fn bytes_of(values: [(u8, usize); 2]) -> Vec<u8> {
    values.into_iter().flat_map(|(value, count)| std::iter::repeat_n(value, count)).collect()
}

fn graphs_do_what_their_nodes_are_now(stand_in: &StandIn) {
    let driver = stand_in.open();
    let at = driver.allocate(64).unwrap();
    // SAFETY: as many bytes were just allocated.
    unsafe { driver.upload(&bytes_of([(5, 48), (6, 16)]), at) }.unwrap();
    let mut nodes = Sequence::default();
    nodes.push(Node::Zero { to: at, bytes: 16 });
    nodes.push(Node::Copy { from: at + 48, to: at + 16, bytes: 16 });
    let mut graph = driver.graph(&nodes).unwrap();
    // SAFETY: both nodes are within the allocation, before and after.
    unsafe {
        graph.launch().unwrap();
        assert_eq!(read(&driver, at)[..32], bytes_of([(0, 16), (6, 16)]));
        graph.update(0, Node::Zero { to: at + 48, bytes: 16 }).unwrap();
        graph.update(1, Node::Copy { from: at + 16, to: at, bytes: 32 }).unwrap();
        graph.launch().unwrap();
        driver.free(at, 64);
    }
    drop((graph, driver));
    assert_eq!(stand_in.held(), [0; 5]);
}

fn norms_start_while_the_kernel_before_runs(stand_in: &StandIn) {
    let mut b = stand_in.backend();
    let (mut x, mut out) = (b.rows(1, 64), b.rows(1, 64));
    let norm = b.vector(Source::memory(&[0; 128])).unwrap();
    b.write(&mut x, &[1.0; 64]);
    for _ in 0..3 {
        b.norm(&x, &norm, 1e-5, &mut out);
        b.gather(&out, &[0], &mut x);
        for _ in 0..4 {
            b.norm(&x, &norm, 1e-5, &mut out);
        }
        b.finish().unwrap();
    }
    // The stand-in refuses chains with a gap, and such edges elsewhere than between kernels.
    assert!(b.counts().graphs > 0 && b.take_warning().is_none(), "{:?}", b.counts());
    // Of one graph: none before its first node, nor to the gather.
    assert_eq!(stand_in.number("fake_edges_ahead"), 4);
    drop((b, x, out, norm));
    assert_eq!(stand_in.held(), [0; 5]);
}

fn what_a_library_enqueues_is_done_alone_and_within_graphs(stand_in: &StandIn) {
    let driver = stand_in.open();
    let at = driver.allocate(64).unwrap();
    // SAFETY: as many bytes were just allocated.
    unsafe { driver.zero(at, 64) }.unwrap();
    let captured = driver.capture(&mut |stream| stand_in.enqueue(stream, at, 7, 32)).unwrap();
    assert_eq!(read(&driver, at), [0; 64], "nothing was done yet");
    // SAFETY: the bytes are still allocated, here and below.
    unsafe { captured.launch() }.unwrap();
    assert_eq!(read(&driver, at)[..], bytes_of([(7, 32), (0, 32)]));
    let mut nodes = Sequence::default();
    nodes.push(Node::Zero { to: at, bytes: 64 });
    nodes.push(Node::Captured(&captured));
    nodes.push(Node::Copy { from: at, to: at + 32, bytes: 32 });
    let mut graph = driver.graph(&nodes).unwrap();
    // A graph has a copy of it.
    drop((nodes, captured));
    // SAFETY: as above.
    unsafe { graph.launch() }.unwrap();
    assert_eq!(read(&driver, at), [7; 64]);
    // SAFETY: allocated above, and not used again.
    unsafe { driver.free(at, 64) };
    drop((graph, driver));
    assert_eq!(stand_in.held(), [0; 5]);
}

fn what_is_not_captured_leaves_nothing(stand_in: &StandIn) {
    let driver = stand_in.open();
    let planted = || KernelError::Device { what: "enqueue", why: "planted".to_owned() };
    assert_eq!(driver.capture(&mut |_| Err(planted())).unwrap_err(), planted());
    // The device's own stream is left.
    assert_eq!(stand_in.held()[3..], [1, 0]);
    drop(driver);
    assert_eq!(stand_in.held(), [0; 5]);
}

fn what_is_done_is_given_back(stand_in: &StandIn) {
    let mut b = stand_in.backend();
    let values: Vec<f32> = (0..640_000).map(|i| i as f32).collect();
    let mut rows = b.rows(10_000, 64);
    b.write(&mut rows, &values);
    assert!(b.read(&rows) == values, "more than one piece of pinned memory, there and back");
    b.finish().unwrap();
    let [contexts, modules, pinned, ..] = stand_in.held();
    assert!(contexts == 1 && modules > 5 && pinned > 1, "{:?}", stand_in.held());
    drop((b, rows));
    assert_eq!(stand_in.held(), [0; 5]);
}

fn pinned_memory_waits_for_its_copies(stand_in: &StandIn) {
    let driver = stand_in.open();
    let at = driver.allocate(64).unwrap();
    stand_in.set(true, false);
    let mut pinned = driver.pin(64).unwrap();
    assert!(pinned.bytes().is_ok());
    // SAFETY: as many bytes were just allocated.
    unsafe { pinned.fetch(at, 0, 64) }.unwrap();
    assert!(!pinned.is_done().unwrap() && is_late(pinned.bytes().map(drop)));
    drop(pinned);
    assert_eq!(stand_in.held()[2], 1, "the device may still write there");
    stand_in.set(false, false);
    // It is given back when the next one is made.
    let next = driver.pin(64).unwrap();
    assert_eq!(stand_in.held()[2], 1);
    // SAFETY: allocated above, and not used again.
    unsafe { driver.free(at, 64) };
    drop((next, driver));
    assert_eq!(stand_in.held(), [0; 5]);
}

fn a_copy_without_an_event_is_under_way(stand_in: &StandIn) {
    let driver = stand_in.open();
    let at = driver.allocate(64).unwrap();
    let mut pinned = driver.pin(64).unwrap();
    stand_in.set(true, true);
    // SAFETY: as many bytes were just allocated.
    assert!(unsafe { pinned.fetch(at, 0, 64) }.is_err());
    assert!(!pinned.is_done().unwrap() && is_late(pinned.bytes().map(drop)));
    stand_in.set(false, false);
    assert!(pinned.is_done().unwrap() && pinned.bytes().is_ok());
    // SAFETY: allocated above, and not used again.
    unsafe { driver.free(at, 64) };
    drop((pinned, driver));
    assert_eq!(stand_in.held(), [0; 5]);
}

fn a_stream_that_a_library_still_uses_is_left_to_it(stand_in: &StandIn) {
    let driver = stand_in.open();
    assert!(is_late(driver.capture(&mut |_| Err(KernelError::Late { what: "enqueue" }))));
    drop(driver);
    assert_eq!(stand_in.held(), [0, 0, 0, 1, 1]);
}

fn a_device_that_hangs_keeps_what_it_uses(stand_in: &StandIn) {
    let mut b = stand_in.backend();
    let (mut x, mut out) = (b.rows(1, 64), b.rows(1, 64));
    let norm = b.vector(Source::memory(&[0; 128])).unwrap();
    b.finish().unwrap();
    stand_in.set(true, false);
    b.write(&mut x, &[1.0; 64]);
    for _ in 0..2000 {
        b.norm(&x, &norm, 1e-5, &mut out);
    }
    let ended = b.end();
    assert!(is_late(b.result(ended)) && is_late(b.finish()));
    let held = stand_in.held();
    drop((b, x, out, norm));
    // The driver itself keeps graphs that are in flight.
    assert_eq!(stand_in.held()[..4], held[..4]);

    // The next epoch on the same device.
    let mut b = stand_in.backend();
    assert!(is_late(b.finish()));
}
