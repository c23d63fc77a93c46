//! Exchanges in slots that are kept, to be enqueued among the ops of a step and become part of its graphs.
//!
//! An exchange is captured when it comes a second time: by the first, NCCL has made the connections that it needs. All ranks
//! issue the same exchanges in the same order, so they capture alike, as NCCL demands. Therefore what was captured is never
//! captured anew, and buffers must not move.
//
//= NCCL User Guide, Using NCCL with CUDA Graphs

use phalanx_kernels::cuda::{Captured, Slot};
use phalanx_model::ExchangeKind;

/// What an exchange is, as all ranks see it alike. There are few: a step's bucket is a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) kind: ExchangeKind,
    pub(super) gathered: bool,
    pub(super) slot_bytes: usize,
}

impl Key {
    pub(super) const fn new(kind: ExchangeKind, gathered: bool, slot: Slot) -> Self {
        Self { kind, gathered, slot_bytes: slot.bytes }
    }
}

/// Where this rank's slots lie, on their way out and when they come.
pub(super) type Addresses = [u64; 2];

/// How an exchange is enqueued.
#[derive(Debug, PartialEq)]
pub(super) enum Turn {
    /// Call by call.
    Plain,
    /// It is to be captured first.
    Capture,
    /// As it was captured.
    Again(Captured),
    /// Not at all: it was seen at another place, and other ranks may have it captured.
    Moved,
}

/// The exchanges seen so far.
#[derive(Debug, Default)]
pub(super) struct Captures {
    /// Whether any are captured.
    enabled: bool,
    seen: Vec<(Key, Addresses, Option<Captured>)>,
}

impl Captures {
    pub(super) const fn new(enabled: bool) -> Self {
        Self { enabled, seen: Vec::new() }
    }

    /// How the exchange is enqueued that comes now.
    pub(super) fn turn(&mut self, key: Key, at: Addresses) -> Turn {
        if !self.enabled {
            return Turn::Plain;
        }
        match self.seen.iter().find(|(seen, ..)| *seen == key) {
            None => {
                self.seen.push((key, at, None));
                Turn::Plain
            }
            Some((_, place, _)) if *place != at => Turn::Moved,
            Some((_, _, None)) => Turn::Capture,
            Some((_, _, Some(captured))) => Turn::Again(captured.clone()),
        }
    }

    /// Keeps what was captured.
    pub(super) fn keep(&mut self, key: Key, captured: Captured) {
        if let Some((.., kept)) = self.seen.iter_mut().find(|(seen, ..)| *seen == key) {
            *kept = Some(captured);
        }
    }

    /// Forgets all, and captures nothing from here on.
    pub(super) fn end(&mut self) {
        *self = Self::new(false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use phalanx_kernels::KernelError;
    use phalanx_kernels::cuda::Capture;

    use super::*;

    #[derive(Debug, Default)]
    struct Fake(AtomicU32);

    impl Capture for Fake {
        unsafe fn launch(&self) -> Result<(), KernelError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn key(kind: ExchangeKind, bytes: usize) -> Key {
        Key::new(kind, false, Slot { bytes, row_bytes: 16, exchange: 7 })
    }

    #[test]
    fn what_comes_a_second_time_is_captured_and_then_kept() {
        let mut captures = Captures::new(true);
        let (dispatch, combine) = (key(ExchangeKind::Dispatch, 64), key(ExchangeKind::Combine, 64));
        let captured = Captured::new(Fake::default());
        assert_eq!(captures.turn(dispatch, [1, 2]), Turn::Plain);
        assert_eq!(captures.turn(dispatch, [1, 2]), Turn::Capture);
        captures.keep(dispatch, captured.clone());
        assert_eq!(captures.turn(dispatch, [1, 2]), Turn::Again(captured));
        // Another exchange, another size.
        assert_eq!(captures.turn(combine, [1, 2]), Turn::Plain);
        assert_eq!(captures.turn(key(ExchangeKind::Dispatch, 128), [1, 2]), Turn::Plain);
        // Another place, captured or not.
        assert_eq!(captures.turn(dispatch, [1, 3]), Turn::Moved);
        assert_eq!(captures.turn(combine, [2, 2]), Turn::Moved);
        captures.end();
        assert_eq!(captures.turn(dispatch, [1, 3]), Turn::Plain);
        assert_eq!(captures.turn(dispatch, [1, 3]), Turn::Plain);
    }
}
