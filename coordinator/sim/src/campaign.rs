//! Many seeds, on all cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::faults::{Failure, Seen, run};
use crate::scenario::Scenario;

/// Runs the scenarios of `seeds` on `threads` threads and sums what they saw. `done` is told how many have ended so far,
/// from any of the threads.
///
/// # Errors
/// The first seed that fails, whatever the threads, and how.
pub fn campaign(
    seeds: std::ops::Range<u64>,
    threads: usize,
    done: impl Fn(u64) + Sync,
) -> Result<Seen, (u64, Failure)> {
    let (next, ended, end) = (AtomicU64::new(seeds.start), AtomicU64::new(0), AtomicU64::new(seeds.end));
    let total = Mutex::new(Seen::default());
    let first: Mutex<Option<(u64, Failure)>> = Mutex::new(None);
    let worker = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            // Seeds before a failing one are run to their end: one of them may fail, too.
            if seed >= end.load(Ordering::Relaxed) {
                return;
            }
            match run(&Scenario::of(seed), false) {
                Ok(seen) => *lock(&total) += seen,
                Err(failure) => {
                    end.fetch_min(seed, Ordering::Relaxed);
                    let mut first = lock(&first);
                    if first.as_ref().is_none_or(|(other, _)| seed < *other) {
                        *first = Some((seed, failure));
                    }
                }
            }
            done(ended.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    std::thread::scope(|scope| {
        (0..threads.max(1)).for_each(|_| drop(scope.spawn(worker)));
    });
    let first = lock(&first).take();
    let total = *lock(&total);
    first.map_or(Ok(total), Err)
}

/// Whoever held it and panicked left a whole value behind.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
