//! Steps that were ended and may still be under way: what they drew and found wrong comes to the host behind them, while
//! the host enqueues the next one.

use super::Cuda;
use super::device::Pinned;
use super::sample::{Drawn, Report};
use super::status;
use crate::{KernelError, Sampled};

/// Pinned memory that waits for the next steps.
const LANDINGS_MAX: usize = 4;
/// Its least size: 356 draws with 20 likely tokens each.
const LANDING_BYTES_MIN: usize = 64 << 10;

/// A step that was ended.
#[derive(Debug)]
pub struct Ended {
    landing: Landing,
    reports: Vec<Report>,
    /// What went wrong while it was enqueued.
    error: Option<KernelError>,
}

/// The status and what was drawn, one behind the other.
#[derive(Debug)]
enum Landing {
    /// On its way.
    Pinned(Box<dyn Pinned>),
    /// Here: the device has no pinned memory.
    Memory(Vec<u8>),
}

impl Cuda {
    /// Makes what steps land in, as long as they bring no more than that: no memory is pinned while they run. Without pinned
    /// memory they land elsewhere.
    pub(super) fn make_landings(&mut self) {
        let pin = || self.memory.queue.device().pin(LANDING_BYTES_MIN).ok();
        let missing = LANDINGS_MAX.saturating_sub(self.landings.len());
        self.landings.extend(std::iter::from_fn(pin).take(missing));
    }

    pub(super) fn end_step(&mut self) -> Ended {
        let drawn = std::mem::take(&mut self.drawn);
        let landing = if self.broken { Ok(Landing::Memory(Vec::new())) } else { self.bring_back(&drawn) };
        let landing = self.made(landing, |_| Landing::Memory(Vec::new()));
        let error = if self.broken { self.error.clone() } else { self.error.take() };
        Ended { landing, reports: drawn.into_iter().map(Drawn::into_report).collect(), error }
    }

    fn bring_back(&mut self, drawn: &[Drawn]) -> Result<Landing, KernelError> {
        let parts = || [(&self.status, status::BYTES)].into_iter().chain(drawn.iter().map(Drawn::part));
        let bytes = parts().map(|(_, bytes)| bytes).sum();
        let ready = self.landings.iter_mut().position(|landing| landing.bytes().len() >= bytes);
        let pinned = match ready {
            Some(ready) => Ok(self.landings.swap_remove(ready)),
            None => self.memory.queue.device().pin(bytes.next_power_of_two().max(LANDING_BYTES_MIN)),
        };
        let landing = match pinned {
            Ok(mut pinned) => {
                let mut at = 0;
                for (buffer, bytes) in parts() {
                    buffer.fetch(bytes, &mut *pinned, at)?;
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
        let Ended { landing, reports, error } = ended;
        let bytes = match landing {
            Landing::Memory(bytes) => bytes,
            Landing::Pinned(mut pinned) => {
                let waited = pinned.wait();
                let bytes = pinned.bytes().to_vec();
                if waited.is_ok() && self.landings.len() < LANDINGS_MAX {
                    self.landings.push(pinned);
                }
                self.note(waited.clone());
                waited?;
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
}

impl Ended {
    pub(super) fn is_done(&self) -> bool {
        match &self.landing {
            // Whoever waits for it hears what went wrong.
            Landing::Pinned(pinned) => pinned.is_done().unwrap_or(true),
            Landing::Memory(_) => true,
        }
    }
}
