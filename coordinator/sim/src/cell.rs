//! A cell in virtual time: the real engine, ranks in lockstep, and a stream between the coordinator and each rank.
//!
//! Streams keep their order, as gRPC's do. What is on its way when a stream breaks is lost; on the next stream the
//! coordinator sends again every plan that is not answered, and a rank answers those it has run from the results it keeps.

use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;

use phalanx_planner::{ApplyError, Engine, Event};
use phalanx_proto::{Rank, StepId, StepPlan, StepResult};

use crate::clock::{Clock, Nanos};
use crate::random::Random;
use crate::rank::{RankError, VirtualRank};

/// Whoever runs the plans of a rank.
pub trait Worker {
    /// Runs a plan, or gives the result of one that was run before. `answered` is the last step of this rank whose result
    /// was applied when the plan was made.
    ///
    /// # Errors
    /// The plan is wrong.
    fn run(&mut self, plan: &StepPlan, answered: StepId) -> Result<StepResult, RankError>;
}

impl Worker for VirtualRank {
    fn run(&mut self, plan: &StepPlan, answered: StepId) -> Result<StepResult, RankError> {
        Self::run(self, plan, answered)
    }
}

/// How long messages are under way between the coordinator and a rank.
#[derive(Clone, Debug)]
pub struct Network {
    /// At least.
    pub delay: Nanos,
    /// Up to so much more.
    pub jitter: Nanos,
    /// Decides how much.
    pub random: Random,
}

impl Network {
    /// Every message takes the same time.
    #[must_use]
    pub const fn steady(delay: Nanos) -> Self {
        Self { delay, jitter: 0, random: Random::new(0) }
    }
}

/// A plan on its way.
#[derive(Clone, Debug)]
pub struct Sent {
    /// The plan.
    pub plan: StepPlan,
    /// The last step of the rank whose result was applied when the plan was made.
    pub answered: StepId,
}

impl Sent {
    const fn step(&self) -> StepId {
        self.plan.header.fence.step
    }
}

/// What happens between coordinator and ranks. `U` is what the caller has planned.
#[derive(Clone, Debug)]
enum Happening<U> {
    Plan { rank: usize, stream: u32, sent: Rc<Sent> },
    StepEnds,
    Result { rank: usize, stream: u32, result: StepResult },
    Attach { rank: usize },
    User(U),
}

/// What the caller has to see to.
#[derive(Clone, Debug)]
pub enum Occurrence<U> {
    /// What it had planned for now.
    User(U),
    /// A result has come: [`Cell::apply`] it.
    Result(StepResult),
}

/// The coordinator and one rank.
#[derive(Clone, Debug, Default)]
struct Link {
    /// Which stream this is; what belongs to another one is lost.
    stream: u32,
    broken: bool,
    /// Plans without an applied result, oldest first.
    unanswered: VecDeque<Rc<Sent>>,
    answered: StepId,
    /// At the rank: plans to run.
    inbox: VecDeque<Rc<Sent>>,
    /// The last plan that came.
    received: StepId,
    /// When the last message arrives, each way.
    to_rank: Nanos,
    to_coordinator: Nanos,
}

/// How long a step takes, of all ranks together.
pub type Pace<W> = Box<dyn FnMut(&[W], &[Rc<Sent>]) -> Nanos>;

/// An engine, its ranks, and time.
pub struct Cell<W, U> {
    /// The engine.
    pub engine: Engine,
    clock: Clock<Happening<U>>,
    workers: Vec<W>,
    links: Vec<Link>,
    network: Network,
    pace: Pace<W>,
    /// The last step that is done.
    done: StepId,
    /// Whether the one after it is being done.
    busy: bool,
    /// What has happened, if anybody wants to know.
    log: Option<Vec<String>>,
}

impl<W: Worker, U> Cell<W, U> {
    /// A cell at rest, one worker for each rank.
    #[must_use]
    pub fn new(engine: Engine, workers: Vec<W>, network: Network, pace: Pace<W>) -> Self {
        let done = engine.fence().step;
        let link = Link { answered: done, received: done, ..Link::default() };
        let links = vec![link; workers.len()];
        Self { engine, clock: Clock::default(), workers, links, network, pace, done, busy: false, log: None }
    }

    /// Keeps a log of everything from now on.
    pub fn keep_log(&mut self) {
        self.log = Some(Vec::new());
    }

    /// What has happened so far.
    pub fn take_log(&mut self) -> Vec<String> {
        self.log.take().unwrap_or_default()
    }

    /// Notes something, if there is a log.
    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:>10.3} ms  {}", self.clock.now() as f64 / 1e6, what()));
        }
    }

    /// Now.
    #[must_use]
    pub const fn now(&self) -> Nanos {
        self.clock.now()
    }

    /// Plans something for the caller.
    pub fn at(&mut self, at: Nanos, what: U) {
        self.clock.at(at, Happening::User(what));
    }

    /// What the caller has to see to next; `None` if nothing will ever happen again.
    ///
    /// # Errors
    /// A rank found a mistake in a plan.
    pub fn advance(&mut self) -> Result<Option<Occurrence<U>>, RankError> {
        while let Some(happening) = self.clock.advance() {
            match happening {
                Happening::User(what) => return Ok(Some(Occurrence::User(what))),
                Happening::Result { rank, stream, result } => {
                    if self.links[rank].stream == stream {
                        return Ok(Some(Occurrence::Result(result)));
                    }
                }
                Happening::Plan { rank, stream, sent } => {
                    if self.links[rank].stream == stream {
                        self.receive(rank, sent)?;
                    }
                }
                Happening::Attach { rank } => {
                    self.links[rank].broken = false;
                    self.note(|| format!("rank {rank} is attached again"));
                    self.send_again(rank);
                }
                Happening::StepEnds => self.end_step()?,
            }
        }
        Ok(None)
    }

    /// Plans steps for as long as the engine does, and sends them. Each is shown to `check` first.
    ///
    /// # Errors
    /// The check's.
    pub fn plan<E>(&mut self, mut check: impl FnMut(&Engine, &[StepPlan]) -> Result<(), E>) -> Result<(), E> {
        while let Some(plans) = self.engine.plan() {
            check(&self.engine, &plans)?;
            for (rank, plan) in plans.into_iter().enumerate() {
                self.note(|| format!("plan     {}", Shown(rank, &plan)));
                let link = &mut self.links[rank];
                let sent = Rc::new(Sent { plan, answered: link.answered });
                link.unanswered.push_back(Rc::clone(&sent));
                if !link.broken {
                    self.send(rank, sent);
                }
            }
        }
        Ok(())
    }

    /// Applies a result.
    ///
    /// # Errors
    /// The engine refuses it, as it must if it comes twice.
    pub fn apply(&mut self, result: StepResult) -> Result<Vec<Event>, ApplyError> {
        let (rank, step) = (result.rank, result.fence.step);
        let outcome = self.engine.apply(result);
        self.note(|| match &outcome {
            Ok(events) => format!("apply    rank {rank} step {step:?}: {}", told(events)),
            Err(error) => format!("refused  {error}"),
        });
        let events = outcome?;
        if let Some(link) = self.links.get_mut(rank.index()) {
            link.answered = step;
            link.unanswered.retain(|sent| sent.step() > step);
        }
        Ok(events)
    }

    /// Whether a result answers the first plan that its rank has not answered.
    #[must_use]
    pub fn awaits(&self, result: &StepResult) -> bool {
        let first = self.links.get(result.rank.index()).and_then(|link| link.unanswered.front());
        first.is_some_and(|sent| sent.plan.header.fence == result.fence)
    }

    /// The stream of a rank breaks; there is another one after a while.
    pub fn break_stream(&mut self, rank: Rank, away: Nanos) {
        let now = self.now();
        let Some(link) = self.links.get_mut(rank.index()) else { return };
        link.stream += 1;
        (link.to_rank, link.to_coordinator) = (0, 0);
        if !std::mem::replace(&mut link.broken, true) {
            self.clock.at(now + away, Happening::Attach { rank: rank.index() });
        }
    }

    /// The coordinator grows impatient and sends again what is not answered.
    pub fn repeat(&mut self, rank: Rank) {
        if self.links.get(rank.index()).is_some_and(|link| !link.broken) {
            self.send_again(rank.index());
        }
    }

    /// The first plan that a rank has not answered.
    #[must_use]
    pub fn unanswered(&self, rank: Rank) -> Option<&StepPlan> {
        self.links.get(rank.index()).and_then(|link| link.unanswered.front()).map(|sent| &sent.plan)
    }

    fn send_again(&mut self, rank: usize) {
        for sent in self.links[rank].unanswered.clone() {
            self.send(rank, sent);
        }
    }

    fn delay(&mut self) -> Nanos {
        self.network.delay + self.network.random.below(self.network.jitter + 1)
    }

    fn send(&mut self, rank: usize, sent: Rc<Sent>) {
        let at = self.now() + self.delay();
        let link = &mut self.links[rank];
        link.to_rank = link.to_rank.max(at);
        self.clock.at(link.to_rank, Happening::Plan { rank, stream: link.stream, sent });
    }

    fn answer(&mut self, rank: usize, result: StepResult) {
        let at = self.now() + self.delay();
        let link = &mut self.links[rank];
        if link.broken {
            return;
        }
        link.to_coordinator = link.to_coordinator.max(at);
        self.clock.at(link.to_coordinator, Happening::Result { rank, stream: link.stream, result });
    }

    fn receive(&mut self, rank: usize, sent: Rc<Sent>) -> Result<(), RankError> {
        let step = sent.step();
        if step <= self.done {
            let result = self.workers[rank].run(&sent.plan, sent.answered)?;
            self.note(|| format!("repeated rank {rank} {step:?}"));
            self.answer(rank, result);
        } else if step > self.links[rank].received {
            self.links[rank].received = step;
            self.links[rank].inbox.push_back(sent);
            self.begin_step();
        }
        Ok(())
    }

    /// Begins the next step once every rank has its plan.
    fn begin_step(&mut self) {
        let plans = self.links.iter().map(|link| link.inbox.front().cloned()).collect::<Option<Vec<_>>>();
        if let (false, Some(plans)) = (self.busy, plans) {
            self.busy = true;
            let took = (self.pace)(&self.workers, &plans);
            self.clock.at(self.now() + took, Happening::StepEnds);
        }
    }

    fn end_step(&mut self) -> Result<(), RankError> {
        self.busy = false;
        for rank in 0..self.workers.len() {
            let Some(sent) = self.links[rank].inbox.pop_front() else { continue };
            self.done = sent.step();
            let result = self.workers[rank].run(&sent.plan, sent.answered)?;
            self.answer(rank, result);
        }
        self.note_step();
        self.begin_step();
        Ok(())
    }

    fn note_step(&mut self) {
        let done = self.done;
        self.note(|| format!("done     step {}", done.0));
    }
}

/// A plan on one line.
struct Shown<'a>(usize, &'a StepPlan);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(rank, plan) = self;
        write!(f, "step {} rank {rank} applied {}", plan.header.fence.step.0, plan.header.applied.0)?;
        if !plan.release.is_empty() {
            write!(f, " release {:?}", plan.release.iter().map(|seq| seq.0).collect::<Vec<_>>())?;
        }
        for admission in &plan.admit {
            write!(f, " admit {} cached {}", admission.seq, admission.cached)?;
        }
        for rows in &plan.rows {
            let grants = rows.grants.iter().map(|g| {
                let pool = if g.pool == phalanx_proto::Pool::Full { 'f' } else { 'w' };
                format!("{pool}{}={}", g.index, g.block)
            });
            let grants: Vec<String> = grants.collect();
            let (seq, n) = (rows.seq, rows.tokens.rows());
            write!(f, " | {seq} {:?} {n} rows {:?} [{}]", rows.start, rows.outputs, grants.join(" "))?;
        }
        Ok(())
    }
}

/// Events on one line.
fn told(events: &[Event]) -> String {
    let one = |event: &Event| match event {
        Event::Token { seq, token, .. } => format!("{seq}: token {token}"),
        Event::Logits { seq, logits } => format!("{seq}: {} logits", logits.len()),
        Event::Started { seq, cached } => format!("{seq}: started, {cached} cached"),
        Event::Finished { seq, reason } => format!("{seq}: {reason:?}"),
    };
    events.iter().map(one).collect::<Vec<_>>().join(", ")
}
