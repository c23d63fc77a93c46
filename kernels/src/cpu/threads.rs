//! Dividing work: tasks of one op run on a pool of threads, each writing its own part of the result.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use crate::KernelError;

/// Multiplications below which waking other threads costs more than it gains.
const WORTH_SHARING: usize = 1 << 18;

/// The threads of a backend.
#[derive(Debug)]
pub(super) struct Threads {
    /// `None` for a single thread: the caller's.
    pool: Option<rayon::ThreadPool>,
}

impl Threads {
    /// Starts `threads` threads.
    pub(super) fn new(threads: usize) -> Result<Self, KernelError> {
        if threads <= 1 {
            return Ok(Self { pool: None });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|error| KernelError::Threads { threads, why: error.to_string() })?;
        Ok(Self { pool: Some(pool) })
    }

    /// Runs `task` for each of `0..tasks`; `work` is a rough count of multiplications of them all.
    /// What a task computes must not depend on the others: they run in any order, or one after the other.
    pub(super) fn each(&self, tasks: usize, work: usize, task: impl Fn(usize) + Send + Sync) {
        match &self.pool {
            Some(pool) if tasks > 1 && work >= WORTH_SHARING => {
                pool.install(|| (0..tasks).into_par_iter().for_each(task));
            }
            _ => (0..tasks).for_each(task),
        }
    }

    /// As [`Threads::each`], on consecutive chunks of `data`.
    pub(super) fn each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk: usize,
        work: usize,
        task: impl Fn(usize, &mut [T]) + Send + Sync,
    ) {
        let chunk = chunk.max(1);
        match &self.pool {
            Some(pool) if data.len() > chunk && work >= WORTH_SHARING => {
                pool.install(|| data.par_chunks_mut(chunk).enumerate().for_each(|(i, part)| task(i, part)));
            }
            _ => data.chunks_mut(chunk).enumerate().for_each(|(i, part)| task(i, part)),
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
