//! One rank's communicator: made without blocking, watched while it works, aborted when it is no longer needed.
//!
//! `cudarc`'s own communicator panics when it is dropped after a peer has died, which is when it is dropped. This one
//! never panics, never waits without a deadline, and calls the library only as far as its [`State`] allows.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{cudaStream_t, ncclComm, ncclComm_t};

use super::schedule::{Direction, Transfer};
use super::state::{Event, State};
use super::table::{Api, BYTES, Code, SHRINK_ABORT, UniqueId, config};

/// Longest wait for the library to take a communicator back; after it the communicator is left to it.
const ABORT_WAIT: Duration = Duration::from_secs(5);
/// How often the state is asked for while waiting.
const POLL: Duration = Duration::from_micros(50);

/// Why a communicator does not do what is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// A function of the library failed.
    #[error("{name} failed: {code}; run with NCCL_DEBUG=WARN to see why")]
    Call {
        /// The function.
        name: &'static str,
        /// What it answered.
        code: Code,
    },
    /// What was under way failed.
    #[error("the communicator failed: {code}; run with NCCL_DEBUG=WARN to see why")]
    Failed {
        /// What the library says of it.
        code: Code,
    },
    /// The deadline passed.
    #[error("the deadline passed {what}; check that every rank is there and reaches the others")]
    Late {
        /// In the middle of what.
        what: &'static str,
    },
    /// The call before is not through.
    #[error("the communicator's last call is still under way; wait until it settles")]
    Busy,
    /// The communicator is not in a state for that.
    #[error("a communicator that is {state:?} can exchange nothing; make one for a new epoch")]
    NotReady {
        /// Its state.
        state: State,
    },
    /// The library cannot shrink communicators, or not so.
    #[error("the communicator cannot go on without these ranks: {why}; make one for a new epoch")]
    Shrink {
        /// Why not.
        why: &'static str,
    },
}

/// A pointer of the library that is used by one thread at a time.
#[derive(Clone, Copy, Debug)]
struct Handle(ncclComm_t);

// SAFETY: NCCL binds a communicator to no thread; calls must not overlap, and each goes through `&mut Communicator`.
unsafe impl Send for Handle {}

/// A rank's end of a group of GPUs. Dropping it aborts it.
#[derive(Debug)]
pub struct Communicator {
    api: Api,
    handle: Handle,
    rank: usize,
    ranks: usize,
    channels_max: Option<u32>,
    state: State,
}

impl Communicator {
    /// Starts to join `ranks` ranks, all of which have `id`; [`Communicator::settle`] waits for them. The current
    /// device of the calling thread is the rank's. `channels_max` bounds the multiprocessors that exchanges take.
    ///
    /// # Errors
    /// The library refuses.
    pub fn join(
        api: Api,
        id: UniqueId,
        rank: usize,
        ranks: usize,
        channels_max: Option<u32>,
    ) -> Result<Self, NcclError> {
        let mut config = config(channels_max);
        let handle = cell();
        let (n, r) = (c_int::try_from(ranks).unwrap_or(c_int::MAX), c_int::try_from(rank).unwrap_or(c_int::MAX));
        // SAFETY: the cell is valid for ever, and the configuration while the call lasts, which copies it.
        let code = Code(unsafe { (api.0.init)(handle.as_ptr(), n, id.raw(), r, &mut config) });
        let handle = handle.load(Ordering::Acquire);
        if handle.is_null() {
            return Err(NcclError::Call { name: "ncclCommInitRankConfig", code });
        }
        // From here on it is aborted when it is dropped.
        let made = Self { api, handle: Handle(handle), rank, ranks, channels_max, state: State::Initialising };
        if code.is_failure() { Err(NcclError::Call { name: "ncclCommInitRankConfig", code }) } else { Ok(made) }
    }

    /// The library's pointer.
    #[cfg(test)]
    pub(super) const fn raw(&self) -> ncclComm_t {
        self.handle.0
    }

    /// This rank.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks, this one too.
    #[must_use]
    pub const fn ranks(&self) -> usize {
        self.ranks
    }

    /// What it may do next.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    fn note(&mut self, name: &'static str, code: Code) -> Result<(), NcclError> {
        self.state = self.state.after(Event::Answered(code));
        if code.is_failure() { Err(NcclError::Call { name, code }) } else { Ok(()) }
    }

    /// How it is, by the library; it must be alive.
    fn ask(&self) -> Code {
        let mut code = 0;
        // SAFETY: the communicator is alive, and the function writes the integer it is given.
        let asked = Code(unsafe { (self.api.0.async_error)(self.handle.0, &mut code) });
        if asked.is_failure() { asked } else { Code(code) }
    }

    /// Asks once how it is. False while something is still under way in the background.
    ///
    /// # Errors
    /// Something has failed; the communicator is then broken.
    pub fn poll(&mut self) -> Result<bool, NcclError> {
        if !self.state.is_alive() {
            return Err(NcclError::NotReady { state: self.state });
        }
        let code = self.ask();
        self.state = self.state.after(Event::Answered(code));
        match self.state {
            State::Broken if code.is_failure() => Err(NcclError::Failed { code }),
            State::Broken | State::Aborted => Err(NcclError::NotReady { state: self.state }),
            State::Initialising | State::Ready => Ok(code == Code::SUCCESS),
        }
    }

    /// Waits until nothing is under way in the background any more: all ranks have joined, or a call is through.
    /// `watch` is asked again and again and may end the wait.
    ///
    /// # Errors
    /// Something has failed, the deadline passed, or what `watch` says. The communicator is then broken.
    pub fn settle<E: From<NcclError>>(
        &mut self,
        what: &'static str,
        deadline: Instant,
        mut watch: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        while !self.poll()? {
            if Instant::now() >= deadline {
                self.state = self.state.after(Event::Late);
                return Err(NcclError::Late { what }.into());
            }
            watch().inspect_err(|_| self.state = self.state.after(Event::Late))?;
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Gives the communicator up: whatever is under way is worthless, also if it should still end well.
    pub fn give_up(&mut self) {
        self.state = self.state.after(Event::Late);
    }

    /// Enqueues transfers on a stream, all at once. What is sent begins at `source`, what is received at `into`.
    ///
    /// # Errors
    /// The communicator is not ready, or the library refuses; then it is broken.
    ///
    /// # Safety
    /// Both addresses have room for the transfers in memory of the device, and stay valid and otherwise untouched until
    /// the stream is through with them. `stream` is a stream of the communicator's device.
    pub unsafe fn enqueue(
        &mut self,
        transfers: &[Transfer],
        source: *const c_void,
        into: *mut c_void,
        stream: cudaStream_t,
    ) -> Result<(), NcclError> {
        self.ready()?;
        // SAFETY: a group's calls have no demands.
        self.note("ncclGroupStart", Code(unsafe { (self.api.0.group_start)() }))?;
        let mut failed = Ok(());
        for &Transfer { direction, peer, at, bytes } in transfers {
            let rank = c_int::try_from(peer).unwrap_or(c_int::MAX);
            let (table, comm) = (self.api.0, self.handle.0);
            // SAFETY: the communicator is alive; the caller vouches for addresses and stream.
            failed = unsafe {
                match direction {
                    Direction::Send => {
                        let code = (table.send)(source.byte_add(at), bytes, BYTES, rank, comm, stream);
                        self.note("ncclSend", Code(code))
                    }
                    Direction::Receive => {
                        let code = (table.receive)(into.byte_add(at), bytes, BYTES, rank, comm, stream);
                        self.note("ncclRecv", Code(code))
                    }
                }
            };
            if failed.is_err() {
                break;
            }
        }
        // A group that was begun is ended, else it would take up the thread's next calls.
        // SAFETY: a group was begun by this thread.
        let code = Code(unsafe { (self.api.0.group_end)() });
        let ended = self.note("ncclGroupEnd", code);
        failed.and(ended)
    }

    /// Enqueues that every rank gets the same number of bytes from each: `source` of this rank ends up at `into + rank
    /// * bytes` of all. The other way to dispatch: every row to every rank.
    ///
    /// # Errors
    /// The communicator is not ready, or the library refuses; then it is broken.
    ///
    /// # Safety
    /// As for [`Communicator::enqueue`], with room for `bytes` at `source` and `ranks * bytes` at `into`.
    pub unsafe fn all_gather(
        &mut self,
        source: *const c_void,
        into: *mut c_void,
        bytes: usize,
        stream: cudaStream_t,
    ) -> Result<(), NcclError> {
        self.ready()?;
        // SAFETY: the communicator is alive; the caller vouches for addresses and stream.
        let code = unsafe { (self.api.0.all_gather)(source, into, bytes, BYTES, self.handle.0, stream) };
        self.note("ncclAllGather", Code(code))
    }

    fn ready(&mut self) -> Result<(), NcclError> {
        match self.state.is_ready() {
            true if self.poll()? => Ok(()),
            true => Err(NcclError::Busy),
            false => Err(NcclError::NotReady { state: self.state }),
        }
    }

    /// A communicator of the ranks that are left, in their old order; all of them must ask for the same. What is under
    /// way on this one is given up, and it is of no use afterwards.
    ///
    /// # Errors
    /// The library has no shrink, this rank is one of those left out, a rank does not exist, the library refuses, as it
    /// may after an asynchronous error, or the deadline passed.
    pub fn shrink(&mut self, without: &[usize], deadline: Instant) -> Result<Self, NcclError> {
        const LATE: NcclError = NcclError::Late { what: "while the ranks that are left joined" };
        let Some(shrink) = self.api.0.shrink else {
            return Err(NcclError::Shrink { why: "this NCCL is older than 2.27" });
        };
        if !self.state.is_alive() {
            return Err(NcclError::NotReady { state: self.state });
        }
        let mut without = without.to_vec();
        without.sort_unstable();
        without.dedup();
        if without.is_empty() || without.last().is_some_and(|&last| last >= self.ranks) || without.contains(&self.rank)
        {
            return Err(NcclError::Shrink { why: "they are no other ranks of it" });
        }
        self.give_up();
        let (parent, made, channels_max) = (self.handle, cell(), self.channels_max);
        let mut excluded: Vec<c_int> =
            without.iter().map(|&rank| c_int::try_from(rank).unwrap_or(c_int::MAX)).collect();
        let call = move || {
            let (parent, mut config) = (parent, config(channels_max));
            let count = c_int::try_from(excluded.len()).unwrap_or(c_int::MAX);
            // SAFETY: the communicator is alive and nothing else touches it meanwhile; the cell is valid for ever, list
            // and configuration while the call lasts, which copies them.
            unsafe { shrink(parent.0, excluded.as_mut_ptr(), count, made.as_ptr(), &mut config, SHRINK_ABORT) }
        };
        let Some(code) = bounded("nccl-shrink", deadline.saturating_duration_since(Instant::now()), call, || ()) else {
            // A thread is still within it: nobody may touch it any more.
            self.state = self.state.after(Event::Aborted);
            return Err(LATE);
        };
        // It is the old communicator that says how far the new one is.
        let mut code = Code(code);
        while code == Code::IN_PROGRESS {
            if Instant::now() >= deadline {
                return Err(LATE);
            }
            std::thread::sleep(POLL);
            code = self.ask();
        }
        let handle = made.load(Ordering::Acquire);
        if code.is_failure() || handle.is_null() {
            return Err(NcclError::Call { name: "ncclCommShrink", code });
        }
        let rank = self.rank - without.iter().filter(|&&other| other < self.rank).count();
        let (ranks, state) = (self.ranks - without.len(), State::Initialising);
        let mut shrunk = Self { api: self.api, handle: Handle(handle), rank, ranks, channels_max, state };
        shrunk.settle("while the ranks that are left joined", deadline, || Ok::<_, NcclError>(()))?;
        Ok(shrunk)
    }

    /// Ends it in good order: everything enqueued is done first. All ranks must do so.
    ///
    /// # Errors
    /// The communicator is not ready, something failed, or the deadline passed. It is aborted then.
    pub fn finish(mut self, deadline: Instant) -> Result<(), NcclError> {
        self.ready()?;
        // SAFETY: the communicator is alive.
        self.note("ncclCommFinalize", Code(unsafe { (self.api.0.finalize)(self.handle.0) }))?;
        self.settle("while the communicator ended", deadline, || Ok::<_, NcclError>(()))?;
        self.state = self.state.after(Event::Aborted);
        let (destroy, handle) = (self.api.0.destroy, self.handle);
        let call = move || {
            let handle = handle;
            // SAFETY: the communicator is finalised, and nothing touches it after its state has changed.
            unsafe { destroy(handle.0) }
        };
        let code = bounded("nccl-destroy", deadline.saturating_duration_since(Instant::now()), call, || ()).map(Code);
        match code {
            Some(code) if code.is_failure() => Err(NcclError::Call { name: "ncclCommDestroy", code }),
            Some(_) => Ok(()),
            None => Err(NcclError::Late { what: "while the communicator ended" }),
        }
    }

    /// Stops whatever is under way and gives the memory back. The library may take long over it when a peer is gone, so
    /// it has a thread and a bound for it; past the bound what it holds is left behind, as the process will be soon.
    pub fn abort(&mut self) {
        self.abort_while(|| ());
    }

    /// [`Communicator::abort`], and what is done once the library was told to stop.
    pub(super) fn abort_while(&mut self, meanwhile: impl FnOnce()) {
        self.abort_within(ABORT_WAIT, meanwhile);
    }

    /// The same with a bound of one's own. Whether the library was done in time.
    pub(super) fn abort_within(&mut self, wait: Duration, meanwhile: impl FnOnce()) -> bool {
        if !self.state.is_alive() {
            meanwhile();
            return true;
        }
        self.state = self.state.after(Event::Aborted);
        let (abort, handle) = (self.api.0.abort, self.handle);
        let call = move || {
            let handle = handle;
            // SAFETY: the communicator was alive, and nothing touches it after its state has changed.
            unsafe { abort(handle.0) }
        };
        match bounded("nccl-abort", wait, call, meanwhile).map(Code) {
            Some(code) => {
                if code.is_failure() {
                    tracing::warn!("ncclCommAbort failed: {code}");
                }
                true
            }
            None => {
                tracing::warn!("NCCL does not give the communicator back; its memory is lost until the process ends");
                false
            }
        }
    }
}

/// Where the library puts the pointer of a communicator that it makes, perhaps later and from a thread of its own; so
/// these few bytes are never given back.
fn cell() -> &'static AtomicPtr<ncclComm> {
    Box::leak(Box::new(AtomicPtr::new(std::ptr::null_mut())))
}

/// What a call answers that may take long, if it does so in time. It goes on without us otherwise. `meanwhile` is done while
/// it is under way.
fn bounded<T: Send + 'static>(
    name: &str,
    wait: Duration,
    call: impl FnOnce() -> T + Send + 'static,
    meanwhile: impl FnOnce(),
) -> Option<T> {
    let (done, ended) = mpsc::channel();
    // Nobody listens past the bound.
    let body = move || drop(done.send(call()));
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    meanwhile();
    // Without a thread the call is not made: the library keeps what it has.
    spawned.ok()?;
    ended.recv_timeout(wait).ok()
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}
