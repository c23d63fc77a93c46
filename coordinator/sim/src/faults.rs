//! Runs a scenario and holds all that the engine does against what it must do.
//!
//! Safety, after every call: the engine's own invariants; every plan one that a worker takes, within limits and budgets;
//! every event the next one that its request must give; no event after a request's end. Liveness, once nothing more
//! arrives or breaks: everything ends within a bounded number of steps, and nothing is held afterwards.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use phalanx_planner::sequence::PREEMPTIONS_OF_BATCH;
use phalanx_planner::{Class, Engine, Event, Refused};
use phalanx_proto::{Fence, Rank, SeqId, StepPlan, StepResult};

use crate::cell::{Cell, Network, Occurrence};
use crate::clock::{MILLISECOND, Nanos};
use crate::random::Random;
use crate::rank::VirtualRank;
use crate::scenario::{Arrival, Fault, Scenario};
use crate::truth::Truth;

/// What a run has seen, so that a set of runs can be shown to have tried everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Requests that ended as they must.
    pub finished: u64,
    /// Requests that were refused as they must.
    pub refused: u64,
    /// Requests that were cancelled while they lived.
    pub cancelled: u64,
    /// Tokens.
    pub tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Sequences sent back for want of blocks.
    pub preemptions: u64,
    /// Prompts of which something was cached.
    pub cached: u64,
    /// Streams broken.
    pub broken: u64,
    /// Results that came again, or answered nothing.
    pub stray: u64,
}

impl std::ops::AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.finished += other.finished;
        self.refused += other.refused;
        self.cancelled += other.cancelled;
        self.tokens += other.tokens;
        self.steps += other.steps;
        self.preemptions += other.preemptions;
        self.cached += other.cached;
        self.broken += other.broken;
        self.stray += other.stray;
    }
}

/// A scenario that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong.
    pub why: String,
    /// What happened before, if a log was asked for.
    pub log: Vec<String>,
}

/// What the caller of a cell sees to.
#[derive(Clone, Copy, Debug)]
enum Todo {
    Arrive(usize),
    Cancel(usize),
    Fault(Fault),
}

/// Where a request is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    NotYet,
    /// Refused or cancelled: no event may name it.
    Gone,
    Waits,
    Started,
    Finished,
}

/// A request as its client sees it.
#[derive(Clone, Debug)]
struct Client {
    truth: Truth,
    life: Life,
    tokens: usize,
    logits: usize,
}

struct Run<'a> {
    scenario: &'a Scenario,
    clients: Vec<Client>,
    cell: Cell<VirtualRank, Todo>,
    random: Random,
    seen: Seen,
    /// Things that are still to come from outside.
    coming: usize,
    /// How much longer steps take for now.
    slow: Rc<std::cell::Cell<u64>>,
    /// Once nothing is to come: steps when everything must have ended.
    bound: Option<u64>,
}

/// Runs a scenario to its end. A panic of the engine is a failure like any other.
///
/// # Errors
/// What went wrong, with a log if `log`.
pub fn run(scenario: &Scenario, log: bool) -> Result<Seen, Failure> {
    let mut run = Run::new(scenario, log);
    // What a broken run leaves behind is only looked at to be shown.
    let outcome = catch_unwind(AssertUnwindSafe(|| run.drive()));
    let why = match outcome {
        Ok(Ok(())) => return Ok(run.seen),
        Ok(Err(why)) => why,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            format!("panic: {}", text.unwrap_or_default())
        }
    };
    Err(Failure { why, log: run.cell.take_log() })
}

/// A smaller scenario that `fails`, too: requests and faults are left out one by one for as long as it does. A scenario
/// that does not fail comes back as it is.
#[must_use]
pub fn reduce(scenario: &Scenario, fails: impl Fn(&Scenario) -> bool) -> Scenario {
    let mut smallest = scenario.clone();
    if !fails(&smallest) {
        return smallest;
    }
    loop {
        let before = smallest.arrivals.len() + smallest.faults.len();
        for index in (0..smallest.arrivals.len()).rev() {
            let mut without = smallest.clone();
            without.arrivals.remove(index);
            if fails(&without) {
                smallest = without;
            }
        }
        for index in (0..smallest.faults.len()).rev() {
            let mut without = smallest.clone();
            without.faults.remove(index);
            if fails(&without) {
                smallest = without;
            }
        }
        if smallest.arrivals.len() + smallest.faults.len() == before {
            return smallest;
        }
    }
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario, log: bool) -> Self {
        let config = &scenario.config;
        let clients = scenario.arrivals.iter().map(|arrival| Client {
            truth: Truth::of(&arrival.request, &config.tables, config.vocab),
            life: Life::NotYet,
            tokens: 0,
            logits: 0,
        });
        let mut random = Random::new(scenario.seed ^ 0x5eed);
        let rank = |rank| {
            let (window, vocab) = (config.window, config.vocab);
            VirtualRank::new(Rank(rank), config.limits, window, vocab, config.depth, Fence::default())
        };
        let network = Network { delay: scenario.delay, jitter: scenario.jitter, random: Random::new(random.next()) };
        let mut pace = Random::new(random.next());
        let slow = Rc::new(std::cell::Cell::new(1));
        let slow_now = Rc::clone(&slow);
        let engine = Engine::new(config.clone(), Fence::default());
        let workers = (0..config.ranks).map(rank).collect();
        let mut cell = Cell::new(
            engine,
            workers,
            network,
            Box::new(move |_, plans| {
                let rows = plans.iter().map(|sent| sent.plan.row_count()).max().unwrap_or(0) as u64;
                // A slow rank recovers step by step.
                let slow = slow_now.replace((slow_now.get() / 2).max(1));
                (MILLISECOND / 2 + rows * MILLISECOND / 20 + pace.below(MILLISECOND / 2)) * slow
            }),
        );
        if log {
            cell.keep_log();
        }
        let mut todo: Vec<(Nanos, Todo)> = Vec::new();
        for (index, arrival) in scenario.arrivals.iter().enumerate() {
            todo.push((arrival.at, Todo::Arrive(index)));
            todo.extend(arrival.cancelled.map(|at| (at, Todo::Cancel(index))));
        }
        todo.extend(scenario.faults.iter().map(|&(at, fault)| (at, Todo::Fault(fault))));
        let coming = todo.len();
        todo.into_iter().for_each(|(at, what)| cell.at(at, what));
        let clients = clients.collect();
        Self { scenario, clients, cell, random, seen: Seen::default(), coming, slow, bound: None }
    }

    fn drive(&mut self) -> Result<(), String> {
        while let Some(occurrence) = self.cell.advance().map_err(|error| error.to_string())? {
            match occurrence {
                Occurrence::User(what) => {
                    self.coming -= 1;
                    self.see_to(what)?;
                }
                Occurrence::Result(result) => self.apply(result)?,
            }
            self.plan()?;
        }
        self.check_end()
    }

    fn see_to(&mut self, what: Todo) -> Result<(), String> {
        match what {
            Todo::Arrive(index) => self.submit(index),
            Todo::Cancel(index) => {
                let client = &mut self.clients[index];
                let seq = self.scenario.arrivals[index].request.seq;
                if matches!(client.life, Life::Waits | Life::Started) {
                    self.seen.cancelled += 1;
                    client.life = Life::Gone;
                }
                self.cell.note(|| format!("cancel   {seq}"));
                // Also if it has ended or was never taken.
                self.cell.engine.cancel(seq);
                Ok(())
            }
            Todo::Fault(fault) => self.suffer(fault),
        }
    }

    fn submit(&mut self, index: usize) -> Result<(), String> {
        let request = &self.scenario.arrivals[index].request;
        let config = &self.scenario.config;
        let before = self.cell.engine.stats();
        let waiting = before.waiting[0] + before.waiting[1];
        let (prompt, seq) = (request.prompt.len(), request.seq);
        let outcome = self.cell.engine.submit(request.clone());
        self.cell.note(|| {
            let (max, class, want) = (request.max_tokens, request.class, request.want);
            format!("submit   {seq}: {prompt} tokens, {max} more, {class:?} {want:?}: {outcome:?}")
        });
        let too_long = prompt as u64 + u64::from(request.max_tokens) > u64::from(config.limits.context);
        let seats = config.limits.seqs_max as usize * config.ranks as usize - before.running;
        let right = match &outcome {
            Ok(()) => prompt > 0 && !too_long && waiting < config.queue_max + seats,
            Err(Refused::Prompt) => prompt == 0,
            Err(Refused::ContextLength { .. }) => too_long,
            Err(Refused::QueueFull { .. }) => {
                let tokens = before.waiting_tokens + prompt as u64;
                waiting >= config.queue_max || (waiting > 0 && tokens > config.queue_tokens_max)
            }
            // Nothing else is wrong with any of these requests.
            Err(_) => false,
        };
        if !right {
            return Err(format!("submitting {seq} with {waiting} waiting gave {outcome:?}"));
        }
        self.clients[index].life = if outcome.is_ok() { Life::Waits } else { Life::Gone };
        self.seen.refused += u64::from(outcome.is_err());
        Ok(())
    }

    fn suffer(&mut self, fault: Fault) -> Result<(), String> {
        self.cell.note(|| format!("fault    {fault:?}"));
        match fault {
            Fault::Break(rank, away) => {
                self.seen.broken += 1;
                self.cell.break_stream(rank, away);
            }
            Fault::Repeat(rank) => self.cell.repeat(rank),
            Fault::Forged(rank) => return self.forge(rank),
            Fault::Slow(_, times) => self.slow.set(u64::from(times)),
            Fault::ChunkMax(rows) => self.cell.engine.set_chunk_max(rows),
            Fault::Twice => {
                let lives = |client: &Client| matches!(client.life, Life::Waits | Life::Started);
                let Some(index) = self.clients.iter().position(lives) else { return Ok(()) };
                let request = self.scenario.arrivals[index].request.clone();
                let stats = self.cell.engine.stats();
                let outcome = self.cell.engine.submit(request);
                if outcome.is_ok() || self.cell.engine.stats() != stats {
                    return Err(format!("a request that lives is taken twice: {outcome:?}"));
                }
            }
        }
        Ok(())
    }

    /// A result that answers nothing must be refused and change nothing.
    fn forge(&mut self, rank: Rank) -> Result<(), String> {
        let fence = self.cell.engine.fence();
        let other = Rank(self.scenario.config.ranks);
        let wrong_step = StepResult { fence: fence.next(), rank, ..StepResult::default() };
        let wrong_rank = StepResult { fence, rank: other, ..StepResult::default() };
        let wants = |plan: &StepPlan| plan.rows.iter().any(|rows| rows.outputs != phalanx_proto::Outputs::None);
        let empty = self.cell.unanswered(rank).filter(|plan| wants(plan)).map(|plan| plan.header.fence);
        let empty = empty.map(|fence| StepResult { fence, rank, ..StepResult::default() });
        for forged in [Some(wrong_step), Some(wrong_rank), empty].into_iter().flatten() {
            self.refuse(forged)?;
        }
        Ok(())
    }

    /// The engine must refuse a result, and nothing may change.
    fn refuse(&mut self, stray: StepResult) -> Result<(), String> {
        self.seen.stray += 1;
        // Writing the whole engine down is slow: it is done for some.
        let state =
            |engine: &Engine, whole: bool| if whole { format!("{engine:?}") } else { format!("{:?}", engine.stats()) };
        let whole = self.random.chance(0.2);
        let before = state(&self.cell.engine, whole);
        if let Ok(events) = self.cell.apply(stray) {
            return Err(format!("a result that answers nothing gave {events:?}"));
        }
        if state(&self.cell.engine, whole) != before {
            return Err("a result that answers nothing changed the engine".into());
        }
        Ok(())
    }

    fn apply(&mut self, result: StepResult) -> Result<(), String> {
        let awaited = self.cell.awaits(&result);
        if !awaited {
            return self.refuse(result);
        }
        let events = self.cell.apply(result).map_err(|error| error.to_string())?;
        for event in events {
            self.check_event(event)?;
        }
        Ok(())
    }

    fn client(&mut self, seq: SeqId) -> Result<&mut Client, String> {
        let index = self.scenario.arrivals.iter().position(|arrival| arrival.request.seq == seq);
        index.map(|index| &mut self.clients[index]).ok_or_else(|| format!("an event names {seq}, which does not exist"))
    }

    /// What is cached of a prompt must have come with a request of the same salt that was taken.
    fn check_cached(&self, seq: SeqId, cached: u32) -> Result<(), String> {
        let (cached, all) = (cached as usize, || self.scenario.arrivals.iter().zip(&self.clients));
        let Some((Arrival { request, .. }, _)) = all().find(|(arrival, _)| arrival.request.seq == seq) else {
            return Ok(());
        };
        let begins_alike = |(Arrival { request: other, .. }, client): (&Arrival, &Client)| {
            let answer = client.truth.tokens.iter().map(|(token, _)| token);
            let tokens = other.prompt.iter().chain(answer).take(cached);
            let taken = !matches!(client.life, Life::NotYet) && other.seq != seq && other.salt == request.salt;
            taken && tokens.eq(&request.prompt[..cached])
        };
        let whole = cached < request.prompt.len() && (cached == 0 || self.scenario.config.prefix_cache);
        if whole && (cached == 0 || all().any(begins_alike)) {
            return Ok(());
        }
        Err(format!("{cached} of {} tokens of {seq} are said to be cached", request.prompt.len()))
    }

    fn check_event(&mut self, event: Event) -> Result<(), String> {
        let (Event::Token { seq, .. }
        | Event::Logits { seq, .. }
        | Event::Started { seq, .. }
        | Event::Finished { seq, .. }) = event;
        if let Event::Started { cached, .. } = event {
            self.check_cached(seq, cached)?;
            self.seen.cached += u64::from(cached > 0);
        }
        let client = self.client(seq)?;
        let expected = if matches!(event, Event::Started { .. }) { Life::Waits } else { Life::Started };
        if client.life != expected {
            return Err(format!("{seq} is {:?}, but there is {event:?}", client.life));
        }
        match event {
            Event::Started { .. } => client.life = Life::Started,
            Event::Token { token, logprobs, .. } => {
                let (index, found) = (client.tokens, (token, logprobs));
                if client.truth.tokens.get(index) != Some(&found) {
                    let expected = client.truth.tokens.get(index);
                    return Err(format!("token {index} of {seq} is {found:?}, alone it is {expected:?}"));
                }
                client.tokens += 1;
                self.seen.tokens += 1;
            }
            Event::Logits { logits, .. } => {
                let expected = client.truth.logits.get(client.logits..client.logits + logits.len());
                if expected != Some(&logits[..]) {
                    return Err(format!("logits of {seq} from {} on are not its own", client.logits));
                }
                client.logits += logits.len();
            }
            Event::Finished { reason, .. } => {
                client.life = Life::Finished;
                let whole = client.tokens == client.truth.tokens.len() && client.logits == client.truth.logits.len();
                if !whole || reason != client.truth.reason {
                    let expected = (client.truth.tokens.len(), client.truth.logits.len(), client.truth.reason);
                    let found = (client.tokens, client.logits, reason);
                    return Err(format!("{seq} ended with {found:?}, alone it ends with {expected:?}"));
                }
                self.seen.finished += 1;
            }
        }
        Ok(())
    }

    fn plan(&mut self) -> Result<(), String> {
        let ranks = self.scenario.config.ranks as usize;
        let mut steps = 0;
        self.cell.plan(|engine, plans| {
            steps += 1;
            if plans.len() != ranks {
                return Err(format!("{} plans for {ranks} ranks", plans.len()));
            }
            if plans.iter().all(|plan| plan.rows.is_empty()) {
                return Err("a step without rows is planned".to_owned());
            }
            let rows = plans.iter().flat_map(|plan| &plan.rows).map(|rows| rows.tokens.rows()).max().unwrap_or(0);
            if rows > engine.config().chunk_max as usize {
                return Err(format!("{rows} rows of a sequence in a step, {} at most", engine.config().chunk_max));
            }
            Ok(())
        })?;
        self.seen.steps += steps;
        if self.coming == 0 {
            let now = self.seen.steps;
            let bound = *self.bound.get_or_insert_with(|| now + steps_to_end(self.scenario, &self.clients));
            if now > bound {
                return Err(format!("no end after {now} steps, though nothing arrives or breaks any more"));
            }
        }
        Ok(())
    }

    fn check_end(&mut self) -> Result<(), String> {
        let engine = &self.cell.engine;
        let stats = engine.stats();
        let open = self.scenario.arrivals.iter().zip(&self.clients);
        let open = open.filter(|(_, client)| !matches!(client.life, Life::Gone | Life::Finished));
        let open: Vec<u64> = open.map(|(arrival, _)| arrival.request.seq.0).collect();
        if !open.is_empty() || !engine.is_idle() {
            return Err(format!("nothing more happens, but {open:?} have not ended: {stats:?}"));
        }
        if stats.kv_usage != 0.0 || stats.running > 0 || stats.waiting != [0, 0] || stats.waiting_tokens > 0 {
            return Err(format!("all have ended, but something is held: {stats:?}"));
        }
        self.seen.preemptions = stats.preemptions;
        Ok(())
    }
}

/// Steps within which everything must have ended: every sequence in turn may be the only one that gets on, what was under
/// way comes first, and a batch sequence may have to begin again as often as the engine allows.
fn steps_to_end(scenario: &Scenario, clients: &[Client]) -> u64 {
    let depth = u64::from(scenario.config.depth);
    let open = scenario.arrivals.iter().zip(clients).filter(|(_, c)| matches!(c.life, Life::Waits | Life::Started));
    let steps = open.map(|(Arrival { request, .. }, _)| {
        let rows = request.prompt.len() as u64 + u64::from(request.max_tokens) + 1;
        let lives = if request.class == Class::Batch { 1 + u64::from(PREEMPTIONS_OF_BATCH) } else { 1 };
        (rows + depth) * lives
    });
    depth + steps.sum::<u64>()
}
