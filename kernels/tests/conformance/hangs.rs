//! A device that takes whatever it is given and is never done: every wait ends, with an error that stays.

use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_kernels::cuda::{Emulated, Fault, Meter};
use phalanx_kernels::memory::{Packed, Source};
use phalanx_kernels::{Backend, Cuda, DenseUse, Draw, KernelError, Precision, StepInputs};

use crate::data::rope_table;

/// Bounds so short that no device meets them.
const SOON: Duration = Duration::from_millis(5);

/// A backend, launches one by one, and what lets its device hang.
fn backend() -> (Cuda, &'static Meter) {
    let meter: &'static Meter = Box::leak(Box::new(Meter::new(u64::MAX)));
    let device = Emulated { meter: Some(meter), fault: Some(Fault::NoGraphs), ..Emulated::default() };
    let mut cuda = Cuda::new(Arc::new(device), Precision::Fast).unwrap();
    cuda.set_patience(SOON);
    (cuda, meter)
}

fn is_late<T>(result: Result<T, KernelError>) -> bool {
    matches!(result, Err(KernelError::Late { .. }))
}

#[test]
fn a_step_is_late_at_its_deadline() {
    let (mut b, meter) = backend();
    b.set_patience(Duration::from_secs(3600));
    b.token_slots(1);
    let mut logits = b.rows(1, 64);
    b.write(&mut logits, &[1.0; 64]);
    let step = |b: &mut Cuda| {
        b.set_deadline(Instant::now() + SOON);
        b.begin(&StepInputs::default(), &rope_table(8));
        b.sample(&logits, &[Draw::greedy(0, 0)]);
        b.end()
    };
    let whole = step(&mut b);
    assert!(b.is_done(&whole));
    assert_eq!(b.result(whole).unwrap().len(), 1);
    meter.hang();
    let (hung, next) = (step(&mut b), step(&mut b));
    // As a worker does, which has other things to do meanwhile.
    while !b.is_done(&hung) {
        std::thread::yield_now();
    }
    let error = b.result(hung).unwrap_err();
    assert!(matches!(error, KernelError::Late { .. }) && error.to_string().contains("restart the worker"), "{error}");
    assert!(is_late(b.result(next)), "the step behind it");
    let refused = step(&mut b);
    assert!(is_late(b.result(refused)), "nothing is enqueued any more");
}

#[test]
fn whatever_else_waits_is_late_too() {
    let (mut b, meter) = backend();
    let mut rows = b.rows(1, 64);
    b.write(&mut rows, &[1.0; 64]);
    b.finish().unwrap();
    meter.hang();
    assert_eq!(b.read(&rows), Vec::<f32>::new());
    assert!(is_late(b.finish()) && is_late(b.finish()));

    let (b, meter) = &mut backend();
    meter.hang();
    assert!(is_late(b.finish()), "asking for the status");

    // As many pieces of pinned memory as there are leave without waiting.
    let (b, meter) = &mut backend();
    meter.hang();
    let weights = |b: &mut Cuda| {
        let bytes = b.dense_bytes(DenseUse::Projection, 4096, 4096);
        b.hold_dense(DenseUse::Projection, 4096, 4096, Packed::filled(bytes, |_| Ok(()))?)
    };
    let loaded = (0..9).try_for_each(|_| weights(b).map(drop));
    assert!(is_late(loaded), "loading");
}

/// A stream takes about a thousand launches; one more waits within the driver, for ever.
#[test]
fn no_more_is_launched_than_a_device_takes_at_once() {
    let (mut b, meter) = backend();
    let (mut x, mut out) = (b.rows(1, 64), b.rows(1, 64));
    let norm = b.vector(Source::memory(&[0; 128])).unwrap();
    b.write(&mut x, &[1.0; 64]);
    b.finish().unwrap();
    meter.hang();
    // One more than these is an error of another kind.
    meter.leave(1000);
    for _ in 0..2000 {
        b.norm(&x, &norm, 1e-5, &mut out);
    }
    assert!(is_late(b.finish()));
}
