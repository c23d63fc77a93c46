//! How far the host is ahead of the stream: marks behind exchanges that nobody has waited for, at which it looks.
//!
//! There are marks within a step, so that the host never is too far ahead, and one behind its last exchange, which tells what
//! was wrong with its slots. Those of two steps may be there at once.

use std::collections::VecDeque;
use std::time::Instant;

use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::Look;
use phalanx_model::Exchange;
use phalanx_proto::Fence;

/// Exchanges on the stream before the host waits for some of them: a stream takes about a thousand launches, and one more
/// would wait without a deadline while a rank is gone. A layer has two exchanges and some 25 launches.
pub(super) const IN_FLIGHT_MAX: u32 = 48;
/// Exchanges from one mark to the next, at most: so many the device still has to do when the host goes on.
const APART_MAX: u32 = 12;
/// Steps that are not settled when another begins, at most.
const UNSETTLED_MAX: usize = 1;
/// Marks at once, at most: what is in flight, and the ends of steps.
pub(super) const MARKS_MAX: usize = (IN_FLIGHT_MAX / APART_MAX) as usize + UNSETTLED_MAX + 1;

/// A point of the stream behind exchanges of a step.
pub(super) struct Mark {
    pub(super) look: Look,
    /// Of the step.
    pub(super) fence: Fence,
    pub(super) deadline: Instant,
    /// The last exchange before it.
    pub(super) exchange: Exchange,
    /// Exchanges since the mark before it.
    exchanges: u32,
    /// Whether it ends the step.
    pub(super) ends: bool,
}

/// The marks that the stream has not come to as far as the host knows, the oldest first.
#[derive(Default)]
pub(super) struct Marks {
    marks: VecDeque<Mark>,
    /// The last exchange of the step that has begun, until it has ended.
    last: Option<Exchange>,
    /// Exchanges since the last mark.
    since: u32,
}

impl Marks {
    /// An exchange of the step that has begun is on the stream.
    pub(super) const fn count(&mut self, exchange: Exchange) {
        self.last = Some(exchange);
        self.since += 1;
    }

    /// Whether a mark is due.
    pub(super) const fn is_due(&self) -> bool {
        self.since >= APART_MAX
    }

    /// Whether the host is so far ahead that it is to wait for the oldest mark.
    pub(super) fn are_too_many(&self) -> bool {
        self.since + self.marks.iter().map(|mark| mark.exchanges).sum::<u32>() >= IN_FLIGHT_MAX
    }

    /// Whether another step may begin: the one that has begun has ended, and few are not settled.
    pub(super) fn leave_room(&self) -> bool {
        self.last.is_none() && self.marks.iter().filter(|mark| mark.ends).count() <= UNSETTLED_MAX
    }

    /// Puts a mark behind the exchanges that were counted, if the step has one on the stream.
    ///
    /// # Errors
    /// Those of `look`.
    pub(super) fn mark(
        &mut self,
        (fence, deadline): (Fence, Instant),
        ends: bool,
        look: impl FnOnce() -> Result<Look, KernelError>,
    ) -> Result<(), KernelError> {
        let Some(exchange) = self.last.take_if(|_| ends).or(self.last) else { return Ok(()) };
        let exchanges = std::mem::take(&mut self.since);
        self.marks.push_back(Mark { look: look()?, fence, deadline, exchange, exchanges, ends });
        Ok(())
    }

    /// The oldest mark, if it is of a step up to this one.
    pub(super) fn oldest(&self, until: Fence) -> Option<&Mark> {
        self.marks.front().filter(|mark| mark.fence <= until)
    }

    /// The newest one.
    pub(super) fn newest(&self) -> Option<&Mark> {
        self.marks.back()
    }

    /// The stream has come to the oldest mark.
    pub(super) fn pass(&mut self) -> Option<Mark> {
        self.marks.pop_front()
    }

    /// The time of the marks that are left ends then.
    pub(super) fn extend(&mut self, deadline: Instant) {
        self.marks.iter_mut().for_each(|mark| mark.deadline = deadline);
    }
}
