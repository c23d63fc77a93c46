//! The thread on which constraints are evaluated while the model computes.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use phalanx_proto::TokenId;

use super::{Constraint, ConstraintFailure, Mask};
use crate::panics::catch;

/// Longest wait for masks after the forward pass is done. They are there before, unless a constraint never ends.
const LATE: Duration = Duration::from_secs(10);

/// A constraint that a step needs masks of.
pub(crate) struct Job {
    /// Whose it is, in the hands of whoever asks.
    pub(crate) index: usize,
    pub(crate) constraint: Box<dyn Constraint>,
    /// Tokens that have come since it was asked last.
    pub(crate) news: Vec<TokenId>,
    /// Tokens guessed to come next.
    pub(crate) guesses: Vec<TokenId>,
    /// The answer: see [`Constraint::masks`].
    pub(crate) masks: Vec<Mask>,
}

impl Job {
    fn evaluate(&mut self) -> Result<(), ConstraintFailure> {
        for token in self.news.drain(..) {
            self.constraint.advance(token)?;
        }
        self.masks = self.constraint.masks(&self.guesses);
        Ok(())
    }
}

type Evaluated = Result<Vec<Job>, ConstraintFailure>;

/// Evaluates the constraints of one step at a time. Its thread starts with the first, sleeps between steps, and
/// ends when this is dropped.
#[derive(Default)]
pub(crate) struct Beside {
    thread: Option<(SyncSender<Vec<Job>>, Receiver<Evaluated>)>,
}

impl Beside {
    /// Evaluates the step's constraints while `meanwhile` runs, and returns what that gave with them.
    ///
    /// # Errors
    /// A constraint failed, or `meanwhile` did.
    pub(crate) fn evaluate<T, E: From<ConstraintFailure>>(
        &mut self,
        jobs: Vec<Job>,
        meanwhile: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, Vec<Job>), E> {
        if jobs.is_empty() {
            return Ok((meanwhile()?, jobs));
        }
        let (to, from) = match &self.thread {
            Some(thread) => thread,
            None => self.thread.insert(start()?),
        };
        // A thread that has ended is noticed below.
        drop(to.send(jobs));
        let given = meanwhile()?;
        let jobs = from.recv_timeout(LATE).map_err(|error| match error {
            RecvTimeoutError::Timeout => ConstraintFailure::Late(LATE.as_secs()),
            RecvTimeoutError::Disconnected => ConstraintFailure::Panicked("its thread has ended".to_owned()),
        })??;
        Ok((given, jobs))
    }
}

fn start() -> Result<(SyncSender<Vec<Job>>, Receiver<Evaluated>), ConstraintFailure> {
    let (to, jobs) = sync_channel::<Vec<Job>>(1);
    let (done, from) = sync_channel(1);
    let body = move || {
        // Started by a thread of the model, it would share that one's core.
        phalanx_kernels::cpu::unbind();
        for mut step in jobs {
            let evaluated = catch(|| step.iter_mut().try_for_each(Job::evaluate).map(|()| step));
            let evaluated = evaluated.unwrap_or_else(|panic| Err(ConstraintFailure::Panicked(panic)));
            if done.send(evaluated).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("constraints".to_owned()).spawn(body);
    thread.map_err(|error| ConstraintFailure::Start(error.to_string()))?;
    Ok((to, from))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::super::Refused;
    use super::*;

    /// Allows every token but 13, says what it is told, and panics at 99.
    struct Tells(Sender<u32>);

    impl Constraint for Tells {
        fn masks(&mut self, guesses: &[TokenId]) -> Vec<Mask> {
            vec![[u64::MAX].into(); guesses.len() + 1]
        }

        fn advance(&mut self, token: TokenId) -> Result<(), Refused> {
            assert_ne!(token.0, 99, "told to");
            self.0.send(token.0).unwrap();
            if token.0 == 13 { Err(Refused(token)) } else { Ok(()) }
        }
    }

    fn job(index: usize, tell: &Sender<u32>, news: &[u32]) -> Job {
        let tokens = |ids: &[u32]| ids.iter().map(|&id| TokenId(id)).collect();
        let constraint = Box::new(Tells(tell.clone()));
        Job { index, constraint, news: tokens(news), guesses: tokens(&[5]), masks: Vec::new() }
    }

    #[test]
    fn constraints_are_evaluated_while_something_else_goes_on() {
        let (tell, told) = channel();
        let mut beside = Beside::default();
        for step in 0..3 {
            // It waits for the constraints from within: were they evaluated before or after, this would not end.
            let meanwhile = || Ok::<_, ConstraintFailure>((told.recv().unwrap(), told.recv().unwrap()));
            let jobs = vec![job(7, &tell, &[step]), job(9, &tell, &[step + 100])];
            let (given, jobs) = beside.evaluate(jobs, meanwhile).unwrap();
            assert_eq!(given, (step, step + 100));
            assert_eq!(jobs.iter().map(|job| job.index).collect::<Vec<_>>(), [7, 9]);
            assert!(jobs.iter().all(|job| job.news.is_empty() && job.masks.len() == 2));
        }
        let nothing = beside.evaluate(Vec::new(), || Ok::<_, ConstraintFailure>(5)).unwrap();
        assert_eq!((nothing.0, nothing.1.len()), (5, 0));
    }

    #[test]
    fn what_fails_on_the_thread_is_told() {
        let (tell, _told) = channel();
        let mut beside = Beside::default();
        let fails = |beside: &mut Beside, news| {
            beside.evaluate(vec![job(0, &tell, news)], || Ok::<_, ConstraintFailure>(())).err().unwrap()
        };
        assert_eq!(fails(&mut beside, &[1, 13, 2]), ConstraintFailure::Refused(Refused(TokenId(13))));
        let ConstraintFailure::Panicked(why) = fails(&mut beside, &[99]) else { panic!("no panic") };
        assert!(why.contains("told to"), "{why}");
    }
}
