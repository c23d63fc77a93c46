//! Many seeds, on all cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::faults::{Failure, Seen};

/// Runs each of `seeds` on one of `threads` threads and sums what they saw. `done` is told how many have ended so far,
/// from any of the threads.
///
/// # Errors
/// The first seed that fails, whatever the threads, and how.
pub fn campaign(
    seeds: std::ops::Range<u64>,
    threads: usize,
    run: impl Fn(u64) -> Result<Seen, Failure> + Sync,
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
            match run(seed) {
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
    std::thread::scope(|scope| (0..threads.max(1)).for_each(|_| _ = scope.spawn(worker)));
    let first = lock(&first).take();
    let total = *lock(&total);
    first.map_or(Ok(total), Err)
}

/// Whoever held it and panicked left a whole value behind.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(seed: u64) -> Seen {
        Seen { steps: seed, ..Seen::default() }
    }

    #[test]
    fn every_seed_runs_once_and_is_counted() {
        let ended = AtomicU64::new(0);
        let seen = campaign(10..20, 3, |seed| Ok(one(seed)), |done| _ = ended.fetch_max(done, Ordering::Relaxed));
        assert_eq!(seen, Ok(one((10..20).sum())));
        assert_eq!(ended.into_inner(), 10);
    }

    #[test]
    fn the_first_failing_seed_is_told_whatever_the_threads() {
        for threads in [1, 2, 7] {
            let failure = |seed: u64| Failure { why: seed.to_string(), log: Vec::new() };
            let run = |seed| if seed >= 30 { Err(failure(seed)) } else { Ok(one(seed)) };
            let (seed, failure) = campaign(0..1000, threads, run, |_| ()).unwrap_err();
            assert_eq!((seed, failure.why.as_str()), (30, "30"));
        }
    }
}
