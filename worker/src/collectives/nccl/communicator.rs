//! One rank's communicator: made without blocking, watched while it works, aborted when it is no longer needed.
//!
//! `cudarc`'s own communicator panics when it is dropped after a peer has died, which is when it is dropped. This one never
//! panics, never waits without a deadline, and calls the library only as far as its [`State`] allows.

use std::ffi::{c_int, c_void};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t};

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
    /// Starts to join `ranks` ranks, all of which have `id`; [`Communicator::settle`] waits for them. The current device
    /// of the calling thread is the rank's. `channels_max` bounds the multiprocessors that exchanges take.
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
        let mut handle = std::ptr::null_mut();
        let (n, r) = (c_int::try_from(ranks).unwrap_or(c_int::MAX), c_int::try_from(rank).unwrap_or(c_int::MAX));
        // SAFETY: handle and configuration are valid while the call lasts, which copies the configuration.
        let code = Code(unsafe { (api.0.init)(&mut handle, n, id.raw(), r, &mut config) });
        Self::made(api, handle, (rank, ranks), channels_max, ("ncclCommInitRankConfig", code))
    }

    /// A communicator as a function has made it, or has not.
    fn made(
        api: Api,
        handle: ncclComm_t,
        (rank, ranks): (usize, usize),
        channels_max: Option<u32>,
        (name, code): (&'static str, Code),
    ) -> Result<Self, NcclError> {
        if handle.is_null() {
            return Err(NcclError::Call { name, code });
        }
        // From here on it is aborted when it is dropped.
        let made = Self { api, handle: Handle(handle), rank, ranks, channels_max, state: State::Initialising };
        if code.is_failure() { Err(NcclError::Call { name, code }) } else { Ok(made) }
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

    /// Asks once how it is. False while something is still under way in the background.
    ///
    /// # Errors
    /// Something has failed; the communicator is then broken.
    pub fn poll(&mut self) -> Result<bool, NcclError> {
        if !self.state.is_alive() {
            return Err(NcclError::NotReady { state: self.state });
        }
        let mut code = 0;
        // SAFETY: the communicator is alive, and the function writes the integer it is given.
        let asked = Code(unsafe { (self.api.0.async_error)(self.handle.0, &mut code) });
        if asked.is_failure() {
            self.note("ncclCommGetAsyncError", asked)?;
        }
        let code = Code(code);
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
        let ended = Code(unsafe { (self.api.0.group_end)() });
        failed.and(self.note("ncclGroupEnd", ended))
    }

    /// Enqueues that every rank gets the same number of bytes from each: `source` of this rank ends up at `into + rank *
    /// bytes` of all. The other way to dispatch: every row to every rank.
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

    fn ready(&self) -> Result<(), NcclError> {
        if self.state.is_ready() { Ok(()) } else { Err(NcclError::NotReady { state: self.state }) }
    }

    /// A communicator of the ranks that are left, in their old order; all of them must ask for the same. What is under way
    /// on this one is given up, and it is of no use afterwards.
    ///
    /// # Errors
    /// The library has no shrink, this rank is one of those left out, a rank does not exist, the library refuses, or the
    /// deadline passed.
    pub fn shrink(&mut self, without: &[usize], deadline: Instant) -> Result<Self, NcclError> {
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
        let mut excluded: Vec<c_int> =
            without.iter().map(|&rank| c_int::try_from(rank).unwrap_or(c_int::MAX)).collect();
        let count = c_int::try_from(excluded.len()).unwrap_or(c_int::MAX);
        let mut config = config(self.channels_max);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the communicator is alive; list, handle and configuration are valid while the call lasts.
        let code =
            unsafe { shrink(self.handle.0, excluded.as_mut_ptr(), count, &mut handle, &mut config, SHRINK_ABORT) };
        let rank = self.rank - without.iter().filter(|&&other| other < self.rank).count();
        let ranks = self.ranks - without.len();
        let made = ("ncclCommShrink", Code(code));
        let mut shrunk = Self::made(self.api, handle, (rank, ranks), self.channels_max, made)?;
        self.give_up();
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
        // SAFETY: the communicator is finalised, and nothing touches it after its state has changed.
        let code = Code(unsafe { (self.api.0.destroy)(self.handle.0) });
        if code.is_failure() { Err(NcclError::Call { name: "ncclCommDestroy", code }) } else { Ok(()) }
    }

    /// Stops whatever is under way and gives the memory back. The library may take long over it when a peer is gone, so it
    /// has a thread and a bound for it; past the bound what it holds is left behind, as the process will be soon.
    pub fn abort(&mut self) {
        self.abort_within(ABORT_WAIT);
    }

    /// [`Communicator::abort`] with a bound of one's own. Whether the library was done in time.
    pub(super) fn abort_within(&mut self, wait: Duration) -> bool {
        if !self.state.is_alive() {
            return true;
        }
        self.state = self.state.after(Event::Aborted);
        let (abort, handle) = (self.api.0.abort, self.handle);
        let (done, ended) = mpsc::channel();
        let call = move || {
            let handle = handle;
            // SAFETY: the communicator was alive, and nothing touches it after its state has changed.
            let code = Code(unsafe { abort(handle.0) });
            // Nobody listens past the bound.
            let _ = done.send(code);
        };
        let thread = std::thread::Builder::new().name("nccl-abort".to_owned()).spawn(call);
        match thread.map(|_| ended.recv_timeout(wait)) {
            Ok(Ok(code)) if code.is_failure() => {
                tracing::warn!("ncclCommAbort failed: {code}");
                true
            }
            Ok(Ok(_)) => true,
            Ok(Err(_)) => {
                tracing::warn!("NCCL does not give the communicator back; its memory is lost until the process ends");
                false
            }
            Err(error) => {
                tracing::warn!("no thread to abort the communicator: {error}; its memory is lost");
                false
            }
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}
