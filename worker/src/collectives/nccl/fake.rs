//! A stand-in for NCCL, for tests: the same table of functions over threads and host memory, with faults on request.
//!
//! It does what NCCL is documented to do, also what hurts: a peer's death is never noticed, ranks that disagree on a
//! size hang, and a communicator used after its end is misuse, which is kept and told to the test.

mod ordered;
mod stream;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclUniqueId};

use super::table::{Api, BYTES, SHRINK_ABORT, Table, UniqueId};
pub(super) use ordered::Ordered;
use stream::{Group, Pending, Sending, Work, enqueue};
pub(super) use stream::{advance, new_stream};

const SUCCESS: c_int = 0;
const INTERNAL_ERROR: c_int = 3;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const IN_PROGRESS: c_int = 7;
/// Whether all are sent the same, and most bytes to one.
type Connection = (bool, usize);
/// Longest that anything hangs here, so that a test that fails ends.
const HANG_MAX: Duration = Duration::from_secs(20);

/// NCCL, as new as can be.
pub(super) const API: Api = Api(&TABLE);
/// NCCL before 2.27.
pub(super) const OLD_API: Api = Api(&OLD_TABLE);

/// NCCL that lets nobody join.
pub(super) const REFUSING_API: Api = Api(&REFUSING_TABLE);

static REFUSING_TABLE: Table = Table { init: refuse, ..OLD_TABLE };
static TABLE: Table = Table { shrink: Some(shrink), ..OLD_TABLE };
const OLD_TABLE: Table = Table {
    get_unique_id,
    init,
    async_error,
    abort,
    finalize,
    destroy,
    group_start,
    group_end,
    send,
    receive,
    all_gather,
    shrink: None,
};

/// What goes wrong at a rank.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// Joining answers this.
    pub(super) init: c_int,
    /// Joining never ends.
    pub(super) joins_never: bool,
    /// The asynchronous state.
    pub(super) async_error: c_int,
    /// Sending answers this.
    pub(super) send: c_int,
    /// What is sent goes nowhere.
    pub(super) sends_nothing: bool,
    /// Aborting does not end until this is taken back.
    pub(super) abort_hangs: bool,
    /// Every call answers this.
    pub(super) all: c_int,
    /// The asynchronous state is asked so often before a call is through.
    pub(super) slow: u32,
    /// How often the asynchronous state was asked, and how often it was an error.
    pub(super) asked: u32,
    pub(super) asked_failed: u32,
}

/// The ranks that share an id.
pub(super) struct World {
    /// What goes wrong at each rank, `[ranks]`; grows when it is asked for.
    faults: Vec<Faults>,
    joined: usize,
    /// What was sent from a rank to a rank, in order.
    mail: HashMap<(usize, usize), VecDeque<Vec<u8>>>,
    /// What was done that must not be done.
    pub(super) misuse: Vec<String>,
    /// Exchanges that were called for, and of those how many to be captured.
    pub(super) called: usize,
    pub(super) captured: usize,
    /// Communicators that have ended, by abort or in good order.
    pub(super) aborted: usize,
    pub(super) destroyed: usize,
    /// Worlds of those who are left, by who is left out.
    shrunk: HashMap<Vec<c_int>, Arc<Mutex<World>>>,
}

impl World {
    fn new() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            faults: Vec::new(),
            joined: 0,
            mail: HashMap::new(),
            misuse: Vec::new(),
            called: 0,
            captured: 0,
            aborted: 0,
            destroyed: 0,
            shrunk: HashMap::new(),
        }))
    }

    /// What goes wrong at a rank.
    pub(super) fn faults(&mut self, rank: usize) -> &mut Faults {
        if self.faults.len() <= rank {
            self.faults.resize_with(rank + 1, Faults::default);
        }
        &mut self.faults[rank]
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

static WORLDS: Mutex<Vec<Arc<Mutex<World>>>> = Mutex::new(Vec::new());

/// The ranks that join by an id.
pub(super) fn world(id: UniqueId) -> Arc<Mutex<World>> {
    let number = usize::from_le_bytes(std::array::from_fn(|i| id.0[i]));
    Arc::clone(&lock(&WORLDS)[number])
}

/// What a communicator's pointer points to; never given back, so that use after its end is seen.
struct Comm {
    world: Arc<Mutex<World>>,
    rank: usize,
    ranks: usize,
    alive: AtomicBool,
    /// Questions left before what is under way is through.
    slow: AtomicU32,
    /// What it has connections for: exchanges of these kinds and sizes were called for before.
    connected: Mutex<HashSet<Connection>>,
    /// Captured calls that hold it.
    held: AtomicUsize,
    /// A smaller communicator under way, and where its pointer goes.
    child: Mutex<Option<(usize, Box<Comm>)>>,
}

impl Comm {
    fn new(world: Arc<Mutex<World>>, rank: usize, ranks: usize, slow: u32) -> Self {
        Self {
            world,
            rank,
            ranks,
            alive: AtomicBool::new(true),
            slow: AtomicU32::new(slow),
            connected: Mutex::default(),
            held: AtomicUsize::new(0),
            child: Mutex::default(),
        }
    }

    /// An exchange was called for, on a stream that captures or on one that does not.
    fn called(&self, connection: Connection, captures: bool) {
        let mut world = lock(&self.world);
        world.called += 1;
        world.captured += usize::from(captures);
        // NCCL allocates when it connects, which ends a capture as likely as not.
        if lock(&self.connected).insert(connection) && captures {
            world.misuse.push(format!("rank {} connects while it is captured", self.rank));
        }
    }

    /// It ends, and waits for the end of all graphs that hold it.
    fn end(&self) {
        self.alive.store(false, Ordering::SeqCst);
        let begun = Instant::now();
        while self.held.load(Ordering::SeqCst) > 0 {
            if begun.elapsed() > HANG_MAX {
                lock(&self.world).misuse.push(format!("graphs hold rank {} for ever", self.rank));
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The communicator behind a pointer, if it may be used.
fn comm(pointer: ncclComm_t, call: &str) -> Option<&'static Comm> {
    // SAFETY: tests use pointers of `init` and `shrink` alone, which are leaked.
    let comm = unsafe { pointer.cast::<Comm>().as_ref() }?;
    if comm.alive.load(Ordering::SeqCst) {
        return Some(comm);
    }
    lock(&comm.world).misuse.push(format!("{call} of rank {} after its end", comm.rank));
    None
}

/// The world of a communicator.
pub(super) fn world_of(pointer: ncclComm_t) -> Arc<Mutex<World>> {
    // SAFETY: tests use pointers of `init` and `shrink` alone, which are leaked.
    Arc::clone(unsafe { &(*pointer.cast::<Comm>()).world })
}

fn leak(comm: Comm) -> ncclComm_t {
    std::ptr::from_ref(Box::leak(Box::new(comm))).cast_mut().cast()
}

unsafe extern "C" fn get_unique_id(id: *mut ncclUniqueId) -> c_int {
    let mut worlds = lock(&WORLDS);
    let mut bytes = [0; UniqueId::BYTES];
    bytes[..8].copy_from_slice(&worlds.len().to_le_bytes());
    worlds.push(World::new());
    // SAFETY: the caller's id.
    unsafe { *id = UniqueId(bytes).raw() };
    SUCCESS
}

unsafe extern "C" fn init(
    out: *mut ncclComm_t,
    ranks: c_int,
    id: ncclUniqueId,
    rank: c_int,
    config: *mut ncclConfig_t,
) -> c_int {
    // SAFETY: the caller's configuration.
    let config = unsafe { &*config };
    let made = config.size == size_of::<ncclConfig_t>() && config.magic == 0xcafe_beef && config.version >= 22_800;
    if !made || config.blocking != 0 || config.trafficClass != c_int::MIN || !config.netName.is_null() {
        return INVALID_ARGUMENT;
    }
    let world = world(UniqueId(id.internal.map(|byte| byte.to_ne_bytes()[0])));
    let (Ok(rank), Ok(ranks)) = (usize::try_from(rank), usize::try_from(ranks)) else { return INVALID_ARGUMENT };
    if rank >= ranks {
        return INVALID_ARGUMENT;
    }
    let faults = lock(&world).faults(rank).clone();
    let code = faults.init.max(faults.all);
    if code != SUCCESS {
        return code;
    }
    lock(&world).joined += 1;
    // SAFETY: the caller's pointer.
    unsafe { *out = leak(Comm::new(world, rank, ranks, faults.slow)) };
    IN_PROGRESS
}

unsafe extern "C" fn refuse(
    _out: *mut ncclComm_t,
    _ranks: c_int,
    _id: ncclUniqueId,
    _rank: c_int,
    _config: *mut ncclConfig_t,
) -> c_int {
    INTERNAL_ERROR
}

unsafe extern "C" fn async_error(pointer: ncclComm_t, out: *mut c_int) -> c_int {
    let Some(comm) = comm(pointer, "ncclCommGetAsyncError") else { return INVALID_USAGE };
    let smaller = lock(&comm.child).take_if(|(_, child)| lock(&child.world).joined == child.ranks);
    if let Some((into, child)) = smaller {
        // SAFETY: the caller's pointer, which must be good until this communicator is through.
        unsafe { *std::ptr::with_exposed_provenance_mut::<ncclComm_t>(into) = leak(*child) };
    }
    let shrinking = lock(&comm.child).is_some();
    let mut world = lock(&comm.world);
    let failed = world.faults(comm.rank).async_error != SUCCESS;
    world.faults(comm.rank).asked += 1;
    world.faults(comm.rank).asked_failed += u32::from(failed);
    let (joined, faults) = (world.joined, world.faults(comm.rank).clone());
    let slow = comm.slow.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
    let waiting = shrinking || joined < comm.ranks || faults.joins_never || slow;
    // SAFETY: the caller's integer.
    unsafe { *out = if waiting && faults.async_error == SUCCESS { IN_PROGRESS } else { faults.async_error } };
    faults.all
}

unsafe extern "C" fn abort(pointer: ncclComm_t) -> c_int {
    let Some(comm) = comm(pointer, "ncclCommAbort") else { return INVALID_USAGE };
    comm.end();
    let begun = Instant::now();
    while lock(&comm.world).faults(comm.rank).abort_hangs && begun.elapsed() < HANG_MAX {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut world = lock(&comm.world);
    world.aborted += 1;
    world.faults(comm.rank).all
}

unsafe extern "C" fn finalize(pointer: ncclComm_t) -> c_int {
    comm(pointer, "ncclCommFinalize").map_or(INVALID_USAGE, |comm| lock(&comm.world).faults(comm.rank).all)
}

unsafe extern "C" fn destroy(pointer: ncclComm_t) -> c_int {
    let Some(comm) = comm(pointer, "ncclCommDestroy") else { return INVALID_USAGE };
    comm.end();
    lock(&comm.world).destroyed += 1;
    SUCCESS
}

thread_local! {
    /// The calls of the group that this thread has begun, and their stream.
    static GROUP: RefCell<Option<(Group, cudaStream_t)>> = const { RefCell::new(None) };
}

unsafe extern "C" fn group_start() -> c_int {
    let group = (Group::default(), std::ptr::null_mut());
    GROUP.with_borrow_mut(|slot| if slot.replace(group).is_some() { INVALID_USAGE } else { SUCCESS })
}

unsafe extern "C" fn group_end() -> c_int {
    let Some((group, stream)) = GROUP.take() else { return INVALID_USAGE };
    let mut slow = 0;
    for Sending { comm, .. } in &group.sends {
        slow = lock(&comm.world).faults(comm.rank).slow;
        comm.slow.store(slow, Ordering::SeqCst);
    }
    if !stream.is_null() {
        enqueue(stream, Work::Group(group));
    }
    if slow > 0 { IN_PROGRESS } else { SUCCESS }
}

unsafe extern "C" fn send(
    source: *const c_void,
    count: usize,
    kind: c_uint,
    to: c_int,
    pointer: ncclComm_t,
    stream: cudaStream_t,
) -> c_int {
    let Some(comm) = comm(pointer, "ncclSend") else { return INVALID_USAGE };
    let faults = lock(&comm.world).faults(comm.rank).clone();
    if faults.send.max(faults.all) != SUCCESS {
        return faults.send.max(faults.all);
    }
    let Some(to) = peer(comm, to).filter(|_| kind == BYTES) else { return INVALID_ARGUMENT };
    let sending = Sending { comm, to, from: source.expose_provenance(), bytes: count };
    in_group(stream, |group| group.sends.push(sending))
}

unsafe extern "C" fn receive(
    into: *mut c_void,
    count: usize,
    kind: c_uint,
    from: c_int,
    pointer: ncclComm_t,
    stream: cudaStream_t,
) -> c_int {
    let Some(comm) = comm(pointer, "ncclRecv") else { return INVALID_USAGE };
    let Some(from) = peer(comm, from).filter(|_| kind == BYTES) else { return INVALID_ARGUMENT };
    let pending = Pending { comm, from, into: into.expose_provenance(), bytes: count, refused: false };
    in_group(stream, |group| group.receives.push(pending))
}

unsafe extern "C" fn all_gather(
    source: *const c_void,
    into: *mut c_void,
    count: usize,
    kind: c_uint,
    pointer: ncclComm_t,
    stream: cudaStream_t,
) -> c_int {
    let Some(comm) = comm(pointer, "ncclAllGather").filter(|_| kind == BYTES) else { return INVALID_USAGE };
    let (from, into) = (source.expose_provenance(), into.expose_provenance());
    let receive = |rank| Pending { comm, from: rank, into: into + rank * count, bytes: count, refused: false };
    let sends = (0..comm.ranks).map(|to| Sending { comm, to, from, bytes: count }).collect();
    enqueue(stream, Work::Group(Group { sends, receives: (0..comm.ranks).map(receive).collect(), gathers: true }));
    let slow = lock(&comm.world).faults(comm.rank).slow;
    comm.slow.store(slow, Ordering::SeqCst);
    if slow > 0 { IN_PROGRESS } else { SUCCESS }
}

unsafe extern "C" fn shrink(
    pointer: ncclComm_t,
    excluded: *mut c_int,
    count: c_int,
    out: *mut ncclComm_t,
    config: *mut ncclConfig_t,
    flags: c_int,
) -> c_int {
    let Some(comm) = comm(pointer, "ncclCommShrink") else { return INVALID_USAGE };
    // SAFETY: the caller's list and configuration.
    let (excluded, config) =
        unsafe { (std::slice::from_raw_parts(excluded, usize::try_from(count).unwrap_or(0)).to_vec(), &*config) };
    if flags != SHRINK_ABORT || config.blocking != 0 {
        return INVALID_ARGUMENT;
    }
    let mut world = lock(&comm.world);
    let code = world.faults(comm.rank).all;
    if code != SUCCESS {
        return code;
    }
    let smaller = Arc::clone(world.shrunk.entry(excluded.clone()).or_insert_with(World::new));
    lock(&smaller).joined += 1;
    let below = excluded.iter().filter(|&&rank| usize::try_from(rank).is_ok_and(|rank| rank < comm.rank)).count();
    let child = Comm::new(smaller, comm.rank - below, comm.ranks - excluded.len(), 0);
    // As NCCL does: there is no pointer before all have joined, and the old communicator tells when.
    *lock(&comm.child) = Some((out.expose_provenance(), Box::new(child)));
    IN_PROGRESS
}

fn peer(comm: &Comm, rank: c_int) -> Option<usize> {
    usize::try_from(rank).ok().filter(|&rank| rank < comm.ranks && rank != comm.rank)
}

fn in_group(stream: cudaStream_t, add: impl FnOnce(&mut Group)) -> c_int {
    GROUP.with_borrow_mut(|group| {
        group.as_mut().map_or(INVALID_USAGE, |(group, of)| {
            *of = stream;
            add(group);
            SUCCESS
        })
    })
}
