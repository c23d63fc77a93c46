//! What came of the last steps, for plans that are sent again.
//!
//! A coordinator that lost its stream does not know which of its plans arrived, or which replies were lost on the way.
//! It sends all that were not answered once more, and what has been done is told again, not done again. This
//! is the one place that says which plan is next, which is repeated, and which is of another moment.

use std::collections::VecDeque;

use phalanx_proto::{Fence, StepHeader, StepResult};

/// Plans that a coordinator may have under way at once: sent, and not answered.
pub const STEPS_IN_FLIGHT: usize = 8;

/// A plan is of another moment; nothing was touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the plan is of {theirs}, the last step here is of {ours}")]
pub struct OutOfStep {
    /// The plan's moment.
    pub theirs: Fence,
    /// The last step that ran.
    pub ours: Fence,
}

/// What came of the last steps of an epoch: as many as may be asked for again.
#[derive(Debug)]
pub struct Outcomes<E> {
    /// The last step that ran.
    fence: Fence,
    /// Results of the steps up to that one, without gaps; at most [`STEPS_IN_FLIGHT`] and one.
    results: VecDeque<StepResult>,
    /// Why that one gave no result. It ended the epoch.
    failure: Option<E>,
}

impl<E: Clone> Outcomes<E> {
    /// Nothing has come yet; the next step is the one after `fence`.
    #[must_use]
    pub const fn new(fence: Fence) -> Self {
        Self { fence, results: VecDeque::new(), failure: None }
    }

    /// What came of the step, if it ran already; none if it is the next to run. Once a step has failed, every later
    /// one fails as it did.
    ///
    /// # Errors
    /// It is neither.
    pub fn of(&self, fence: Fence) -> Result<Option<Result<StepResult, E>>, OutOfStep> {
        let here = fence.same_epoch(self.fence);
        if let Some(failure) = &self.failure
            && here
            && fence >= self.fence
        {
            return Ok(Some(Err(failure.clone())));
        }
        if let Some(result) = self.results.iter().find(|result| result.fence == fence) {
            return Ok(Some(Ok(result.clone())));
        }
        if fence == self.fence.next() { Ok(None) } else { Err(OutOfStep { theirs: fence, ours: self.fence }) }
    }

    /// What came of a step that ran.
    ///
    /// # Errors
    /// It did not.
    pub fn told(&self, fence: Fence) -> Result<Result<StepResult, E>, OutOfStep> {
        self.of(fence)?.ok_or(OutOfStep { theirs: fence, ours: self.fence })
    }

    /// Keeps what came of the next step, and forgets what `header` says has arrived.
    pub fn keep(&mut self, header: &StepHeader, outcome: &Result<StepResult, E>) {
        self.fence = header.fence;
        self.results.retain(|result| result.fence.step > header.applied);
        match outcome {
            Ok(result) => self.results.push_back(result.clone()),
            Err(error) => self.failure = Some(error.clone()),
        }
        if self.results.len() > STEPS_IN_FLIGHT + 1 {
            self.results.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{Epoch, Rank, StepId, Term};

    use super::*;

    fn fence(step: u64) -> Fence {
        Fence { term: Term(2), epoch: Epoch(3), step: StepId(step) }
    }

    fn header(step: u64, applied: u64) -> StepHeader {
        StepHeader { fence: fence(step), applied: StepId(applied), ..StepHeader::default() }
    }

    fn result(step: u64) -> StepResult {
        StepResult { fence: fence(step), rank: Rank(u32::try_from(step).unwrap()), ..StepResult::default() }
    }

    fn after(steps: u64, applied: impl Fn(u64) -> u64) -> Outcomes<&'static str> {
        let mut outcomes = Outcomes::new(fence(0));
        for step in 1..=steps {
            assert_eq!(outcomes.of(fence(step)), Ok(None));
            outcomes.keep(&header(step, applied(step)), &Ok(result(step)));
        }
        outcomes
    }

    #[test]
    fn what_has_run_is_told_again_and_the_next_one_runs() {
        let outcomes = after(20, |_| 0);
        let oldest = 20 - STEPS_IN_FLIGHT as u64;
        for step in oldest..=20 {
            assert_eq!(outcomes.of(fence(step)), Ok(Some(Ok(result(step)))));
        }
        assert_eq!(outcomes.of(fence(21)), Ok(None));
        let elsewhere = [
            fence(oldest - 1),
            fence(22),
            fence(0),
            Fence { term: Term(3), ..fence(20) },
            Fence { epoch: Epoch(4), ..fence(21) },
        ];
        for theirs in elsewhere {
            assert_eq!(outcomes.of(theirs), Err(OutOfStep { theirs, ours: fence(20) }));
        }
    }

    #[test]
    fn what_has_arrived_is_forgotten() {
        let outcomes = after(6, |step| step.saturating_sub(2));
        assert_eq!(outcomes.of(fence(4)), Err(OutOfStep { theirs: fence(4), ours: fence(6) }));
        assert_eq!(outcomes.of(fence(5)), Ok(Some(Ok(result(5)))));
        // A claim to have what has not been made yet is no harm.
        let outcomes = after(6, |_| u64::MAX);
        assert_eq!(outcomes.of(fence(6)), Ok(Some(Ok(result(6)))));
        assert_eq!(outcomes.of(fence(7)), Ok(None));
    }

    #[test]
    fn a_failure_is_told_for_its_step_and_all_after() {
        let mut outcomes = after(3, |_| 0);
        outcomes.keep(&header(4, 0), &Err("rank 2 is lost"));
        assert_eq!(outcomes.of(fence(3)), Ok(Some(Ok(result(3)))));
        assert_eq!(outcomes.of(fence(4)), Ok(Some(Err("rank 2 is lost"))));
        assert_eq!(outcomes.of(fence(5)), Ok(Some(Err("rank 2 is lost"))));
        assert!(outcomes.of(Fence { epoch: Epoch(4), ..fence(1) }).is_err());
    }
}
