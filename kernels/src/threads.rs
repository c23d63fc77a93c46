//! Dividing work: tasks of one op run on a pool of threads, each writing its own part of the result.
//!
//! A decode step is a few hundred ops of some ten to some hundred microseconds, one after the other, so what counts is how
//! soon the other threads begin. They look for the next op for a short while before they sleep, and no longer: an idle
//! worker costs nothing, and a core that another process needs is given up. Tasks are claimed in runs that
//! shorten, the last of them one task: a thread that never came by delays an op not at all.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::KernelError;

/// Multiplications below which telling other threads costs more than it gains.
const WORTH_SHARING: usize = 1 << 16;
/// How long a thread without work looks for the next op before it sleeps.
const LOOK: Duration = Duration::from_micros(100);
/// A run is this part of a thread's share of what is left: long at first, which keeps neighbouring memory together, and
/// short at last, so that threads end together.
const SHARE: usize = 2;
/// Looks between two glances at the clock.
const GLANCE: u32 = 64;

/// The threads of a backend.
#[derive(Debug)]
pub(super) struct Threads {
    shared: Arc<Shared>,
    helpers: Vec<Helper>,
    /// Held while an op is divided. A second caller at the same time works alone.
    calling: Mutex<()>,
    /// Core of the calling thread, if threads are pinned.
    core: Option<usize>,
}

/// A thread beside the caller's.
#[derive(Debug)]
struct Helper {
    thread: Thread,
    asleep: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// What the threads of a pool share.
struct Shared {
    /// Threads, the caller's included.
    threads: usize,
    /// Tasks of the present op that are not yet claimed. Whoever makes it less has claimed as many, of whatever op is
    /// present then.
    left: AtomicUsize,
    /// Tasks done.
    done: AtomicUsize,
    /// The caller sleeps until the last task is done.
    waiting: AtomicBool,
    /// The op. Written by the caller while no task is claimed or claimable; read by whoever has claimed a task of it.
    op: UnsafeCell<Op>,
    /// What a task panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Who waits for the last task.
    caller: Mutex<Option<Thread>>,
    stop: AtomicBool,
}

// SAFETY: `op` is written and read as its comment says: between a task's claim and its being counted as done the caller
// waits, so it does not write; before the claim, and after that, nobody else reads.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `op` is only followed while its closure, which is `Sync`, is borrowed by the caller.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// An op that is divided: its tasks are claimed in runs of neighbours, whose memory is often neighbouring too.
#[derive(Clone, Copy)]
struct Op {
    tasks: usize,
    /// The closure, borrowed by the caller until all tasks are done.
    task: *const (dyn Fn(usize) + Sync),
}

impl Shared {
    /// Does tasks of the present op until none is left; returns whether any was.
    fn work(&self) -> bool {
        let mut any = false;
        loop {
            let left = self.left.load(Ordering::Acquire);
            if left == 0 {
                return any;
            }
            let run = (left / (SHARE * self.threads)).max(1);
            if self.left.compare_exchange_weak(left, left - run, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            any = true;
            // SAFETY: a run of this op is claimed and not done, so the caller waits and does not write.
            let op = unsafe { *self.op.get() };
            // SAFETY: for the same reason the closure is still borrowed.
            let task = unsafe { &*op.task };
            let first = op.tasks - left;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (first..first + run).for_each(task))) {
                match &mut *lock(&self.panic) {
                    first @ None => *first = Some(panic),
                    // Dropping it could panic again, before the run counts as done.
                    Some(_) => std::mem::forget(panic),
                }
            }
            if self.done.fetch_add(run, Ordering::SeqCst) + run == op.tasks
                && self.waiting.load(Ordering::SeqCst)
                && let Some(caller) = &*lock(&self.caller)
            {
                caller.unpark();
            }
        }
    }

    /// A helper's life.
    fn help(&self, asleep: &AtomicBool) {
        while !self.stop.load(Ordering::Acquire) {
            if self.work() || self.look() {
                continue;
            }
            asleep.store(true, Ordering::SeqCst);
            // Whoever publishes an op after this sees that there is a sleeper.
            if !self.any_left() && !self.stop.load(Ordering::Acquire) {
                std::thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
    }

    fn any_left(&self) -> bool {
        self.left.load(Ordering::SeqCst) != 0
    }

    /// Waits a short while for tasks; returns whether there are any.
    fn look(&self) -> bool {
        let begun = Instant::now();
        loop {
            for _ in 0..GLANCE {
                if self.any_left() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if begun.elapsed() > LOOK {
                return false;
            }
        }
    }
}

/// A lock; what it guards is whole even if its holder panicked.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cores that this process may use, asked before any of its threads is bound to one.
fn cores() -> &'static [usize] {
    static CORES: OnceLock<Vec<usize>> = OnceLock::new();
    CORES.get_or_init(|| {
        #[cfg(target_os = "linux")]
        if let Ok(allowed) = rustix::thread::sched_getaffinity(None) {
            return (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
        }
        Vec::new()
    })
}

/// Binds the calling thread to cores; where that fails the system places it.
fn bind(cores: &[usize]) {
    #[cfg(target_os = "linux")]
    if !cores.is_empty() {
        let mut set = rustix::thread::CpuSet::new();
        cores.iter().for_each(|&core| set.set(core));
        let _placed_by_the_system = rustix::thread::sched_setaffinity(None, &set);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cores;
}

/// Frees the calling thread from the core that it has from the thread that started it: for threads beside a backend's.
pub fn unbind() {
    bind(cores());
}

impl Threads {
    /// Starts `threads` threads, the caller's included. With `first`, thread `i` is bound to the core of number
    /// `first + i` among those that this process may use, around again if there are fewer.
    pub(super) fn new(threads: usize, first: Option<usize>) -> Result<Self, KernelError> {
        let cores = cores();
        let core_of = |thread: usize| Some(cores[first?.wrapping_add(thread).checked_rem(cores.len())?]);
        let nothing: &'static (dyn Fn(usize) + Sync) = &|_| ();
        let shared = Arc::new(Shared {
            threads: threads.max(1),
            left: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            op: UnsafeCell::new(Op { tasks: 0, task: std::ptr::from_ref(nothing) }),
            panic: Mutex::new(None),
            caller: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut this = Self { shared, helpers: Vec::new(), calling: Mutex::new(()), core: core_of(0) };
        for i in 1..threads {
            let (shared, asleep) = (Arc::clone(&this.shared), Arc::new(AtomicBool::new(false)));
            let (core, asleep_too) = (core_of(i), Arc::clone(&asleep));
            let body = move || {
                bind(core.as_slice());
                shared.help(&asleep_too);
            };
            let handle = std::thread::Builder::new()
                .name(format!("cpu-{i}"))
                .spawn(body)
                .map_err(|error| KernelError::Threads { threads, why: error.to_string() })?;
            this.helpers.push(Helper { thread: handle.thread().clone(), asleep, handle: Some(handle) });
        }
        Ok(this)
    }

    /// Threads, the caller's included.
    pub(super) fn count(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `task` for each of `0..tasks`; `work` is a rough count of multiplications of them all.
    /// What a task computes must not depend on the others: they run in any order, or one after the other.
    ///
    /// # Panics
    /// If a task does; where others run at the time, after they have ended.
    pub(super) fn each(&self, tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
        if tasks > 1 && work >= WORTH_SHARING && !self.helpers.is_empty() {
            let calling = match self.calling.try_lock() {
                Ok(calling) => Some(calling),
                // A task panicked once; what the lock guards is whole.
                Err(TryLockError::Poisoned(calling)) => Some(calling.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            if let Some(_calling) = calling {
                return self.divide(tasks, &task);
            }
        }
        (0..tasks).for_each(task);
    }

    fn divide(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.meet_caller();
        let shared = &self.shared;
        // SAFETY: only the lifetime changes; this function does not return before all tasks are done, and afterwards
        // nobody follows the pointer, since no task of this op can be claimed any more.
        let task = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync + 'static)>(
                std::ptr::from_ref(task),
            )
        };
        // SAFETY: all tasks of the last op are done and none of the next can be claimed yet: nobody reads.
        unsafe { *shared.op.get() = Op { tasks, task } };
        shared.done.store(0, Ordering::Relaxed);
        shared.left.store(tasks, Ordering::SeqCst);
        for helper in self.helpers.iter().take(tasks - 1) {
            if helper.asleep.load(Ordering::SeqCst) {
                helper.thread.unpark();
            }
        }
        shared.work();
        let begun = Instant::now();
        while shared.done.load(Ordering::Acquire) < tasks {
            if begun.elapsed() < LOOK {
                std::hint::spin_loop();
            } else {
                // A thread was taken off its core within a task: there is room for it on this one.
                shared.waiting.store(true, Ordering::SeqCst);
                if shared.done.load(Ordering::SeqCst) < tasks {
                    std::thread::park();
                }
                shared.waiting.store(false, Ordering::SeqCst);
            }
        }
        if let Some(panic) = lock(&shared.panic).take() {
            resume_unwind(panic);
        }
    }

    /// Remembers who waits for the last task.
    fn meet_caller(&self) {
        let mut caller = lock(&self.shared.caller);
        let current = std::thread::current();
        if caller.as_ref().is_none_or(|known| known.id() != current.id()) {
            bind(self.core.as_slice());
            *caller = Some(current);
        }
    }

    /// As [`Threads::each`], on consecutive chunks of `data`.
    pub(super) fn each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk: usize,
        work: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (chunk, len) = (chunk.max(1), data.len());
        let data = Disjoint::new(data);
        self.each(len.div_ceil(chunk), work, |i| {
            // SAFETY: chunks of different tasks do not overlap.
            task(i, unsafe { data.slice(i * chunk..len.min((i + 1) * chunk)) });
        });
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for helper in &mut self.helpers {
            helper.thread.unpark();
            if let Some(handle) = helper.handle.take() {
                // A helper catches what its tasks panic with; it has nothing to say.
                drop(handle.join());
            }
        }
    }
}

/// A slice of which tasks write different parts that no iterator can express, such as column ranges.
pub(super) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts of a slice of `T`, and the caller of `slice` promises that no two overlap.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Borrows the slice for as long as parts are handed out.
    pub(super) const fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No two parts that live at the same time may overlap.
    ///
    /// # Panics
    /// If the range is outside the slice.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub(super) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part lies within its slice");
        // SAFETY: within the slice borrowed in `new`; not aliased, by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: usize = usize::MAX;

    #[test]
    fn every_task_runs_once_however_many_threads_there_are() {
        for threads in [0, 1, 2, 5] {
            let pool = Threads::new(threads, Some(0)).unwrap();
            assert_eq!(pool.count(), threads.max(1));
            for tasks in [0, 1, 2, 3, 100].into_iter().cycle().take(2000) {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.each(tasks, MANY, |i| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1), "{tasks} tasks, {threads} threads");
            }
        }
    }

    #[test]
    fn threads_that_fell_asleep_are_woken() {
        let pool = Threads::new(3, None).unwrap();
        let all_asleep = || pool.helpers.iter().all(|helper| helper.asleep.load(Ordering::SeqCst));
        for _ in 0..3 {
            while !all_asleep() {
                std::thread::yield_now();
            }
            meet(&pool, 3);
        }
    }

    /// Each task waits until all have begun: they run on as many threads, or this never ends.
    fn meet(pool: &Threads, threads: usize) {
        let begun = AtomicUsize::new(0);
        pool.each(threads, MANY, |_| {
            begun.fetch_add(1, Ordering::SeqCst);
            while begun.load(Ordering::SeqCst) < threads {
                std::thread::yield_now();
            }
        });
    }

    #[test]
    fn chunks_cover_the_data() {
        let pool = Threads::new(2, None).unwrap();
        let mut data = vec![0u32; 1003];
        pool.each_chunk(&mut data, 10, MANY, |i, chunk| chunk.fill(i as u32 + 1));
        assert!(data.iter().enumerate().all(|(at, &value)| value == at as u32 / 10 + 1));
        pool.each_chunk(&mut [0u8; 0], 10, MANY, |_, _| panic!("there is nothing to do"));
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_tasks_and_the_pool_goes_on() {
        let pool = Threads::new(3, None).unwrap();
        let ran = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.each(50, MANY, |i| {
                ran.fetch_add(1, Ordering::SeqCst);
                assert!(i != 7, "the seventh");
            });
        }));
        assert!(result.unwrap_err().downcast_ref::<&str>().unwrap().contains("the seventh"));
        assert!(ran.load(Ordering::SeqCst) > 30, "what was claimed ran, but for the rest of the run that panicked");
        meet(&pool, 3);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_second_pool_on_a_bound_thread_has_cores_of_its_own() {
        let bound = |pool: &Threads| {
            let cores = Mutex::new(Vec::new());
            pool.each(2, MANY, |_| {
                let set = rustix::thread::sched_getaffinity(None).unwrap();
                lock(&cores)
                    .push((0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect::<Vec<_>>());
                while lock(&cores).len() < 2 {
                    std::thread::yield_now();
                }
            });
            let mut cores = cores.into_inner().unwrap();
            cores.sort();
            cores
        };
        let first = bound(&Threads::new(2, Some(0)).unwrap());
        assert_eq!(first, bound(&Threads::new(2, Some(0)).unwrap()));
        assert!(first.iter().all(|cores| cores.len() == 1));
        assert!(cores().len() < 2 || first[0] != first[1], "{first:?}");
        unbind();
        assert_eq!(rustix::thread::sched_getaffinity(None).unwrap().count() as usize, cores().len());
    }

    #[test]
    fn two_callers_at_once_both_get_their_work_done() {
        let pool = Threads::new(2, None).unwrap();
        let ran = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.each(10, MANY, |_| {
                            ran.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(ran.load(Ordering::Relaxed), 10_000);
    }
}
