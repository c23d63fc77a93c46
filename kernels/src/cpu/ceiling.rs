//! What this machine can do at most, measured with the threads and instructions that the ops use: the yardstick of
//! benchmarks. Nothing here is on the way of a step.

use std::hint::black_box;
use std::time::Instant;

use super::Cpu;
use super::lanes::{Kernel, LANES, Lanes};
use crate::memory::{Packed, view};

/// Bytes that are read: beyond any cache.
const READ_BYTES: usize = 512 << 20;
/// Bytes of a task.
const TASK_BYTES: usize = 1 << 20;
/// Rounds of a peak's inner loop.
const ROUNDS: usize = 20_000;
/// Sums at work at once: enough to hide the latency of a multiplication.
const SUMS: usize = 12;
/// Tasks of a peak for each thread.
const TASKS: usize = 16;

/// What a machine can do at most.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes read from memory a second.
    pub read: f64,
    /// Operations (two a multiplication) a second of the dot product of MXFP4 codes and int8.
    pub mxfp4: f64,
    /// Operations (two a multiplication) a second of the dot product of q8 weights and int8.
    pub q8: f64,
    /// Operations (two a multiplication) in f32 a second.
    pub f32: f64,
}

/// Measures a machine again and again, so that a benchmark and its ceiling are of the same minute.
#[derive(Debug)]
pub struct Yardstick(Packed);

impl Yardstick {
    /// Takes the memory that is read.
    #[must_use]
    pub fn new() -> Self {
        let filled = Packed::filled(READ_BYTES, |bytes| {
            // Every page has to exist; zeros would all be one page.
            bytes.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
            Ok::<_, std::convert::Infallible>(())
        });
        match filled {
            Ok(packed) => Self(packed),
            Err(never) => match never {},
        }
    }

    /// Measures once, about a fifth of a second.
    #[must_use]
    pub fn measure(&self, cpu: &Cpu) -> Ceilings {
        let begun = Instant::now();
        cpu.threads.each(READ_BYTES / TASK_BYTES, usize::MAX, |task| {
            let bytes = &self.0[task * TASK_BYTES..(task + 1) * TASK_BYTES];
            black_box(cpu.simd.run(Read(view(bytes))));
        });
        let read = READ_BYTES as f64 / begun.elapsed().as_secs_f64();
        let tasks = cpu.threads.count() * TASKS;
        let operations = |lane: usize| (2 * LANES * lane * SUMS * ROUNDS * tasks) as f64;
        let mxfp4 = operations(4) / timed(cpu, tasks, Peak::<MXFP4>);
        let q8 = operations(4) / timed(cpu, tasks, Peak::<Q8>);
        let f32 = operations(1) / timed(cpu, tasks, Peak::<F32>);
        Ceilings { read, mxfp4, q8, f32 }
    }
}

impl Default for Yardstick {
    fn default() -> Self {
        Self::new()
    }
}

fn timed<K: Kernel<Output = f32> + Copy + Send + Sync>(cpu: &Cpu, tasks: usize, kernel: K) -> f64 {
    let begun = Instant::now();
    cpu.threads.each(tasks, usize::MAX, |_| {
        black_box(cpu.simd.run(kernel));
    });
    begun.elapsed().as_secs_f64()
}

/// Reads and adds.
struct Read<'a>(&'a [[f32; LANES]]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> f32 {
        let mut sums = [l.splat(0.0); 4];
        for vectors in self.0.as_chunks::<4>().0 {
            for (sum, vector) in sums.iter_mut().zip(vectors) {
                *sum = l.add(*sum, l.load(vector));
            }
        }
        first(l, sums[0]) + first(l, sums[1]) + first(l, sums[2]) + first(l, sums[3])
    }
}

const MXFP4: u8 = 0;
const Q8: u8 = 1;
const F32: u8 = 2;

/// Multiplies what is in registers.
#[derive(Clone, Copy)]
struct Peak<const KIND: u8>;

impl<const KIND: u8> Kernel for Peak<KIND> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> f32 {
        if KIND == F32 {
            let (a, b) = (l.splat(black_box(0.5)), l.splat(black_box(0.25)));
            let mut sums = [l.splat(0.0); SUMS];
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = l.fma(a, b, *sum);
                }
            }
            return sums.into_iter().fold(0.0, |total, sum| total + first(l, sum));
        }
        let b = l.splat_i32(black_box(0x0001_0001));
        let mut sums = [l.splat_i32(0); SUMS];
        for round in 0..ROUNDS {
            // Another operand each round: else its products would be computed once and for all.
            let a = l.splat_i32(black_box((round & 1) as i32));
            for sum in &mut sums {
                *sum = if KIND == Q8 { l.dot_bytes(*sum, a, b) } else { l.dot(*sum, a, b) };
            }
        }
        sums.into_iter().fold(0.0, |total, sum| total + first(l, l.to_f32(sum)))
    }
}

#[inline(always)]
fn first<L: Lanes>(l: L, v: L::F) -> f32 {
    let mut out = [0.0; LANES];
    l.store(v, &mut out);
    out[0]
}
