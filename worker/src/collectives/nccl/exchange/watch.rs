//! Waits: each looks at the stream, at the communicator and at the other ranks, and ends by its deadline.

use std::time::{Duration, Instant};

use phalanx_kernels::KernelError;
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::Rank;

use super::Nccl;
use crate::collectives::nccl::communicator::NcclError;
use crate::collectives::nccl::table::Code;

/// Looks at the stream without a pause before the thread sleeps between them.
const SPINS: u32 = 200;
/// Sleep between two looks.
const POLL: Duration = Duration::from_micros(20);

/// What a wait waits for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Goal {
    /// What was enqueued is on the stream: what is enqueued now comes after it.
    Enqueued,
    /// The stream is through with it.
    Done,
    /// The stream has come to the oldest mark.
    Passed,
}

impl Nccl {
    /// What comes of a call: where another rank failed, it is waited for the one to blame.
    pub(super) fn enqueued(
        &mut self,
        exchange: Exchange,
        outcome: Result<(), NcclError>,
    ) -> Result<(), CollectiveError> {
        match outcome {
            Ok(()) => Ok(()),
            Err(error) if is_remote(&error) => self.wait(exchange, Some(error), Goal::Done),
            Err(error) => Err(self.lost(exchange, &error)),
        }
    }

    /// Waits for the goal, and looks at the communicator and at the other ranks meanwhile; or waits until one of them
    /// says what has failed there.
    pub(super) fn wait(
        &mut self,
        exchange: Exchange,
        failed: Option<NcclError>,
        goal: Goal,
    ) -> Result<(), CollectiveError> {
        if let Some(error) = failed {
            let until = Instant::now() + self.grace;
            self.trouble.get_or_insert((until, error));
        }
        for look in 0_u32.. {
            // Work comes onto the stream in less time than the other ranks are heard.
            if self.look(exchange, goal, goal != Goal::Enqueued || look >= SPINS)? {
                return Ok(());
            }
            pause(look);
        }
        Err(CollectiveError::Broken)
    }

    /// Looks once whether the goal is reached, and why it may never be.
    pub(super) fn look(&mut self, exchange: Exchange, goal: Goal, listens: bool) -> Result<bool, CollectiveError> {
        if self.trouble.is_none() {
            match self.communicator.poll() {
                Ok(settled) => {
                    if settled && self.is_reached(goal).map_err(|error| self.device(error))? {
                        return Ok(true);
                    }
                }
                Err(error) if is_remote(&error) => self.trouble = Some((Instant::now() + self.grace, error)),
                Err(error) => return Err(self.lost(exchange, &error)),
            }
        }
        let now = Instant::now();
        if self.gone.is_none() && (listens || self.trouble.is_some()) {
            self.gone = self.control.listen(exchange).err().map(|named| (now + self.grace, named));
        }
        if let Some((_, named)) = self.gone.take_if(|(until, _)| self.trouble.is_some() || *until <= now) {
            return Err(named);
        }
        let deadline = match goal {
            Goal::Passed => self.marks.oldest(self.step.fence).map_or(self.step.deadline, |mark| mark.deadline),
            Goal::Enqueued | Goal::Done => self.step.deadline,
        };
        match &self.trouble {
            Some((until, error)) if *until <= now => Err(self.lost(exchange, error)),
            None if deadline <= now => Err(self.late(exchange)),
            _ => Ok(false),
        }
    }

    /// The deadline has passed: all others are waited for.
    pub(super) fn late(&self, exchange: Exchange) -> CollectiveError {
        let (Exchange { layer, kind, .. }, me) = (exchange, self.control.rank());
        let others = (0..self.control.size()).map(Rank).filter(|rank| *rank != me);
        CollectiveError::Deadline { layer, kind, waiting_for: others.collect() }
    }

    fn is_reached(&self, goal: Goal) -> Result<bool, KernelError> {
        match goal {
            Goal::Enqueued => Ok(true),
            Goal::Done => self.port.is_idle(),
            Goal::Passed => self.marks.oldest(self.step.fence).map_or(Ok(true), |mark| mark.look.is_done()),
        }
    }
}

/// Between two looks.
pub(super) fn pause(look: u32) {
    if look < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::sleep(POLL);
    }
}

/// Whether another rank has failed, or the way to it.
const fn is_remote(error: &NcclError) -> bool {
    matches!(error, NcclError::Failed { code: Code::REMOTE_ERROR })
}
