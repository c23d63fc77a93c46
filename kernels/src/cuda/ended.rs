//! Steps that were ended and may still be under way: what they drew and found wrong comes to the host behind them, while
//! the host enqueues the next one.

use std::time::Instant;

use super::Cuda;
use super::device::{Device, Pinned};
use super::pinned::ready;
use super::sample::{DRAWN, Drawn, Report, TOP};
use super::status;
use crate::{KernelError, Sampled};

/// Pinned memory that waits for the next steps.
const LANDINGS_MAX: usize = 4;
/// Its least size.
const LANDING_BYTES_MIN: usize = 16 << 10;
/// The most that it is made for; more is pinned when a step brings it.
const LANDING_BYTES_MAX: usize = 1 << 20;
/// What a row brings with as many likely tokens as are reported.
const ROW_BYTES: usize = DRAWN + 20 * TOP;

/// A step that was ended.
#[derive(Debug)]
pub struct Ended {
    landing: Landing,
    reports: Vec<Report>,
    /// What went wrong while it was enqueued.
    error: Option<KernelError>,
    /// Until when it may be waited for.
    deadline: Instant,
    /// What the device had been given when it ended.
    given: u64,
}

/// The status and what was drawn, one behind the other.
#[derive(Debug)]
enum Landing {
    /// On its way.
    Pinned(Pin),
    /// Here: the device has no pinned memory.
    Memory(Vec<u8>),
}

/// Pinned memory and its size.
#[derive(Debug)]
pub(super) struct Pin {
    memory: Box<dyn Pinned>,
    bytes: usize,
}

impl Pin {
    fn new(device: &dyn Device, bytes: usize) -> Result<Self, KernelError> {
        Ok(Self { memory: device.pin(bytes)?, bytes })
    }
}

impl Cuda {
    /// Makes what steps land in that draw for so many sequences: no memory is pinned while they run, which may wait for what
    /// the device waits for. Without pinned memory they land elsewhere.
    pub(super) fn make_landings(&mut self, sequences: usize) {
        let bytes = (status::BYTES + sequences * ROW_BYTES).next_power_of_two();
        let bytes = bytes.clamp(LANDING_BYTES_MIN, LANDING_BYTES_MAX);
        let pin = || Pin::new(self.memory.queue.device(), bytes).ok();
        let missing = LANDINGS_MAX.saturating_sub(self.landings.len());
        self.landings.extend(std::iter::from_fn(pin).take(missing));
    }

    pub(super) fn end_step(&mut self) -> Ended {
        let drawn = std::mem::take(&mut self.drawn);
        let landing = if self.broken { Ok(Landing::Memory(Vec::new())) } else { self.bring_back(&drawn) };
        let landing = self.made(landing, |_| Landing::Memory(Vec::new()));
        let error = if self.broken { self.error.clone() } else { self.error.take() };
        let queue = &self.memory.queue;
        let (deadline, given) = (queue.deadline(), queue.given());
        queue.set_deadline(None);
        Ended { landing, reports: drawn.into_iter().map(Drawn::into_report).collect(), error, deadline, given }
    }

    fn bring_back(&mut self, drawn: &[Drawn]) -> Result<Landing, KernelError> {
        let parts = || [(&self.status, status::BYTES)].into_iter().chain(drawn.iter().map(Drawn::part));
        let bytes = parts().map(|(_, bytes)| bytes).sum();
        let pinned = match self.landings.iter().position(|landing| landing.bytes >= bytes) {
            Some(kept) => Ok(self.landings.swap_remove(kept)),
            None => Pin::new(self.memory.queue.device(), bytes.next_power_of_two().max(LANDING_BYTES_MIN)),
        };
        let landing = match pinned {
            Ok(mut pinned) => {
                let mut at = 0;
                for (buffer, bytes) in parts() {
                    buffer.fetch(bytes, &mut *pinned.memory, at)?;
                    at += bytes;
                }
                Landing::Pinned(pinned)
            }
            Err(_) => {
                let parts: Result<Vec<_>, _> = parts().map(|(buffer, bytes)| buffer.download(bytes)).collect();
                Landing::Memory(parts?.concat())
            }
        };
        // What the next step finds wrong is its own.
        self.status.zero_now()?;
        Ok(landing)
    }

    pub(super) fn result_of(&mut self, ended: Ended) -> Result<Vec<Sampled>, KernelError> {
        let Ended { landing, reports, error, deadline, given } = ended;
        let bytes = match landing {
            Landing::Memory(bytes) => bytes,
            Landing::Pinned(mut pinned) => {
                let landed = ready(&mut pinned.memory, deadline).map(|bytes| bytes.to_vec());
                self.note(landed.as_ref().map(drop).map_err(KernelError::clone));
                let bytes = landed?;
                self.memory.queue.note_done(given);
                self.keep(pinned);
                bytes
            }
        };
        if let Some(error) = error {
            return Err(error);
        }
        let (words, mut drawn) = bytes.split_at_checked(status::BYTES).unwrap_or_default();
        status::read(status::words(words))?;
        let mut sampled = Vec::new();
        for report in &reports {
            let (own, rest) = drawn.split_at_checked(report.bytes()).unwrap_or_default();
            sampled.extend(report.read(own));
            drawn = rest;
        }
        Ok(sampled)
    }

    /// Keeps pinned memory for later steps: the largest that there was, which serves every step that any other does.
    fn keep(&mut self, landing: Pin) {
        self.landings.push(landing);
        if self.landings.len() > LANDINGS_MAX {
            self.landings.sort_unstable_by_key(|landing| std::cmp::Reverse(landing.bytes));
            self.landings.truncate(LANDINGS_MAX);
        }
    }
}

impl Ended {
    pub(super) fn is_done(&self) -> bool {
        match &self.landing {
            // Whoever waits for it hears what went wrong, or that it is late.
            Landing::Pinned(pinned) => pinned.memory.is_done().unwrap_or(true) || Instant::now() >= self.deadline,
            Landing::Memory(_) => true,
        }
    }
}

#[cfg(all(test, feature = "cuda-emu"))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cuda::Emulated;
    use crate::{Backend, Draw, Precision};

    /// Steps of small results leave room for what a step of large ones needs every time.
    #[test]
    fn large_landings_are_kept_instead_of_small_ones() {
        let mut b = Cuda::new(Arc::new(Emulated::default()), Precision::Exact).unwrap();
        b.token_slots(1);
        let mut logits = b.rows(200, 64);
        let step = |b: &mut Cuda, logits: &mut crate::cuda::Rows, rows: usize| {
            b.write(logits, &vec![1.0; rows * 64]);
            b.sample(logits, &vec![Draw { logprobs: Some(20), ..Draw::greedy(0, 0) }; rows]);
            b.end()
        };
        let small: Vec<Ended> = (0..LANDINGS_MAX).map(|_| step(&mut b, &mut logits, 1)).collect();
        small.into_iter().for_each(|small| assert_eq!(b.result(small).unwrap().len(), 1));
        let sizes = |b: &Cuda| b.landings.iter().map(|landing| landing.bytes).collect::<Vec<_>>();
        assert_eq!(sizes(&b), [LANDING_BYTES_MIN; LANDINGS_MAX]);
        for _ in 0..2 {
            let large = step(&mut b, &mut logits, 200);
            assert_eq!(b.result(large).unwrap().len(), 200);
            let sizes = sizes(&b);
            assert_eq!(sizes.len(), LANDINGS_MAX);
            assert_eq!(sizes.iter().filter(|&&bytes| bytes > LANDING_BYTES_MIN).count(), 1, "{sizes:?}");
        }
    }
}
