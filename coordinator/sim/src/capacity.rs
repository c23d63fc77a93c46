//! How much a layout carries: the real engine over ranks that take as long as the cost model says.

use std::collections::BTreeMap;

use phalanx_planner::cost::{Cost, StepShape};
use phalanx_planner::{Class, Engine, EngineConfig, Event, Request, Stats, Work};
use phalanx_proto::{Fence, Outputs, Position, Rank, RowsResult, SeqId, Start, StepId, StepPlan, StepResult, TokenId};

use crate::cell::{Cell, Network, Occurrence, Pace, Sent, Worker};
use crate::clock::{MILLISECOND, Nanos};
use crate::random::Random;
use crate::rank::RankError;

/// How long a client that was refused waits before it asks for something else.
const REFUSED_PAUSE: Nanos = 1_000 * MILLISECOND;

/// How long prompts or answers are, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// All alike.
    Fixed(u32),
    /// From the first to the second, each as likely.
    Between(u32, u32),
}

impl Length {
    fn draw(self, random: &mut Random) -> u32 {
        match self {
            Self::Fixed(length) => length,
            Self::Between(low, high) => random.between(low, high),
        }
    }
}

/// When requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// So many a second, each independent of the others.
    Rate(f64),
    /// So many clients, each with one request at a time: whenever it ends, its next one of the same class comes.
    Concurrency(u32),
}

/// What is asked of a cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Decides lengths and times.
    pub seed: u64,
    /// Requests in all.
    pub requests: u64,
    /// When they come.
    pub load: Load,
    /// Tokens of a prompt, those that are shared among them.
    pub prompt: Length,
    /// Tokens of an answer.
    pub answer: Length,
    /// Tokens that prompts begin with alike.
    pub shared: u32,
    /// How many such beginnings there are.
    pub beginnings: u32,
    /// Share of batch requests or, in a closed loop, of clients with batch requests; from 0 to 1.
    pub batch: f64,
}

/// What serves it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The engine's.
    pub engine: EngineConfig,
    /// How long a step takes.
    pub speed: Speed,
    /// Nanoseconds that a plan or a result is under way.
    pub delay: Nanos,
}

/// How long a step takes.
#[derive(Clone, Debug)]
pub enum Speed {
    /// What the cost model says.
    Modelled(Box<Cost>),
    /// Always as long, in nanoseconds.
    Fixed(Nanos),
}

/// Seconds below which half, nine tenths and all but one in a hundred of the values lie, and the largest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// Half.
    pub p50: f64,
    /// Nine tenths.
    pub p90: f64,
    /// All but one in a hundred.
    pub p99: f64,
    /// All.
    pub max: f64,
}

impl Percentiles {
    fn of(mut nanos: Vec<Nanos>) -> Self {
        nanos.sort_unstable();
        let Some(last) = nanos.len().checked_sub(1) else { return Self::default() };
        let at = |share: f64| nanos[(share * last as f64).round() as usize] as f64 / 1e9;
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Answer {
    /// Seconds from the first arrival to the last token.
    pub seconds: f64,
    /// Requests that ended with all their tokens.
    pub finished: u64,
    /// Requests that were refused because too many waited.
    pub refused: u64,
    /// Tokens of prompts in a second, those from the cache among them.
    pub prompt_tokens_per_second: f64,
    /// Tokens of answers in a second.
    pub answer_tokens_per_second: f64,
    /// From arrival to the first token, by class in the order of [`Class`].
    pub time_to_first_token: [Percentiles; 2],
    /// From one token to the next of the same answer.
    pub inter_token: Percentiles,
    /// Steps.
    pub steps: u64,
    /// Rows of a step on all ranks, on average.
    pub rows_per_step: f64,
    /// Rows of the fullest rank over the mean of all, on average over the steps.
    pub imbalance: f64,
    /// Sequences sent back for want of blocks.
    pub preemptions: u64,
    /// Share of the prompts' tokens that were cached.
    pub cached: f64,
    /// Largest share of the blocks that sequences held.
    pub kv_usage_max: f64,
    /// What planning cost, in counted operations.
    pub work: Work,
}

/// A rank that keeps only how far its sequences are.
#[derive(Clone, Debug)]
struct CountingRank {
    rank: Rank,
    reached: BTreeMap<SeqId, u32>,
}

impl CountingRank {
    /// First position of each run of rows.
    fn starts<'a>(&'a self, plan: &'a StepPlan) -> impl Iterator<Item = u32> + 'a {
        plan.rows.iter().map(|rows| match rows.start {
            Start::At(position) => position.0,
            Start::AfterPrevious => self.reached.get(&rows.seq).copied().unwrap_or(0),
        })
    }
}

impl Worker for CountingRank {
    fn run(&mut self, plan: &StepPlan, _: StepId) -> Result<StepResult, RankError> {
        plan.release.iter().for_each(|seq| _ = self.reached.remove(seq));
        let starts: Vec<u32> = self.starts(plan).collect();
        let mut result = StepResult { fence: plan.header.fence, rank: self.rank, ..StepResult::default() };
        for (rows, start) in plan.rows.iter().zip(starts) {
            let end = start + count(rows.tokens.rows());
            self.reached.insert(rows.seq, end);
            if rows.outputs == Outputs::Sample {
                let (tokens, logprobs, logits) = (vec![TokenId(0)], Vec::new(), Vec::new());
                result.rows.push(RowsResult { seq: rows.seq, position: Position(end), tokens, logprobs, logits });
            }
        }
        Ok(result)
    }
}

/// A request on its way, as its client sees it.
#[derive(Clone, Copy, Debug)]
struct Client {
    class: Class,
    arrived: Nanos,
    last_token: Option<Nanos>,
}

/// Serves a workload to its end, in virtual time. The same values give the same answer.
#[must_use]
pub fn capacity(workload: &Workload, setup: &Setup) -> Answer {
    Serving::new(workload, setup).run()
}

struct Serving {
    workload: Workload,
    random: Random,
    cell: Cell<CountingRank, Class>,
    vocab: u32,
    /// Requests that have come.
    came: u64,
    /// Requests of which it is not said yet when they come.
    to_come: u64,
    open: BTreeMap<SeqId, Client>,
    /// By class.
    first_tokens: [Vec<Nanos>; 2],
    between: Vec<Nanos>,
    prompt_tokens: u64,
    imbalance: f64,
    answer: Answer,
}

impl Serving {
    fn new(workload: &Workload, setup: &Setup) -> Self {
        let config = EngineConfig { checked: false, ..setup.engine.clone() };
        let (vocab, window) = (config.vocab, config.window);
        let workers: Vec<_> =
            (0..config.ranks).map(|r| CountingRank { rank: Rank(r), reached: BTreeMap::new() }).collect();
        let pace: Pace<CountingRank> = match setup.speed.clone() {
            Speed::Fixed(nanos) => Box::new(move |_, _| nanos),
            Speed::Modelled(cost) => {
                Box::new(move |ranks, plans| (cost.step_seconds(&shape(ranks, plans, window)) * 1e9) as Nanos)
            }
        };
        let engine = Engine::new(config, Fence::default());
        let cell = Cell::new(engine, workers, Network::steady(setup.delay), pace);
        let mut serving = Self {
            workload: *workload,
            random: Random::new(workload.seed),
            cell,
            vocab,
            came: 0,
            to_come: workload.requests,
            open: BTreeMap::new(),
            first_tokens: [Vec::new(), Vec::new()],
            between: Vec::new(),
            prompt_tokens: 0,
            imbalance: 0.0,
            answer: Answer::default(),
        };
        let at_once = match workload.load {
            Load::Rate(_) => 1,
            Load::Concurrency(requests) => requests,
        };
        for _ in 0..at_once {
            let class = serving.draw_class();
            serving.next_comes(0, class);
        }
        serving
    }

    fn draw_class(&mut self) -> Class {
        if self.random.chance(self.workload.batch) { Class::Batch } else { Class::Interactive }
    }

    /// The next request comes at a time, if there is one.
    fn next_comes(&mut self, at: Nanos, class: Class) {
        if let Some(left) = self.to_come.checked_sub(1) {
            self.to_come = left;
            self.cell.at(at, class);
        }
    }

    fn run(mut self) -> Answer {
        while let Some(occurrence) = self.cell.advance().expect("counting ranks refuse nothing") {
            match occurrence {
                Occurrence::User(class) => self.arrive(class),
                Occurrence::Result(result) => {
                    let events = self.cell.apply(result).expect("every result comes once and in order");
                    events.into_iter().for_each(|event| self.see(&event));
                }
            }
            let (mut imbalance, mut kv_usage) = (0.0, self.answer.kv_usage_max);
            let planned: Result<(), std::convert::Infallible> = self.cell.plan(|engine, _| {
                let stats: Stats = engine.stats();
                imbalance += stats.imbalance;
                kv_usage = stats.kv_usage.max(kv_usage);
                Ok(())
            });
            let Ok(()) = planned;
            self.imbalance += imbalance;
            self.answer.kv_usage_max = kv_usage;
        }
        self.sum_up()
    }

    fn arrive(&mut self, class: Class) {
        let workload = self.workload;
        let random = &mut self.random;
        let seq = SeqId(self.came);
        self.came += 1;
        let shared = u64::from(workload.shared);
        let beginning = random.below(u64::from(workload.beginnings.max(1)));
        let length = workload.prompt.draw(random).max(1);
        // Tokens are only compared: any will do that differ where they should.
        let vocab = u64::from(self.vocab);
        let prompt = (0..u64::from(length)).map(|i| {
            let token = if i < shared { (beginning * 31 + i * 7 + 1) % vocab } else { random.below(vocab) };
            TokenId(u32::try_from(token).expect("below the vocabulary"))
        });
        let prompt: Vec<TokenId> = prompt.collect();
        let answer = workload.answer.draw(random).max(1);
        let now = self.cell.now();
        match self.cell.engine.submit(Request { class, ..Request::greedy(seq, prompt, answer) }) {
            Ok(()) => {
                self.prompt_tokens += u64::from(length);
                self.open.insert(seq, Client { class, arrived: now, last_token: None });
            }
            Err(_) => {
                self.answer.refused += 1;
                self.next_of_loop(class, REFUSED_PAUSE);
            }
        }
        if let Load::Rate(rate) = workload.load {
            let pause = -(1.0 - self.random.unit()).ln() / rate;
            let class = self.draw_class();
            self.next_comes(now + (pause * 1e9) as Nanos, class);
        }
    }

    /// In a closed loop, whoever ends makes room for the next, who comes after a pause.
    fn next_of_loop(&mut self, class: Class, pause: Nanos) {
        if let Load::Concurrency(_) = self.workload.load {
            self.next_comes(self.cell.now() + pause, class);
        }
    }

    fn see(&mut self, event: &Event) {
        let now = self.cell.now();
        match event {
            Event::Token { seq, .. } => {
                let Some(client) = self.open.get_mut(seq) else { return };
                match client.last_token.replace(now) {
                    None => self.first_tokens[client.class as usize].push(now - client.arrived),
                    Some(last) => self.between.push(now - last),
                }
            }
            Event::Finished { seq, .. } => {
                self.answer.finished += 1;
                self.answer.seconds = now as f64 / 1e9;
                if let Some(client) = self.open.remove(seq) {
                    self.next_of_loop(client.class, 0);
                }
            }
            Event::Started { .. } | Event::Logits { .. } => {}
        }
    }

    fn sum_up(self) -> Answer {
        let (stats, work) = (self.cell.engine.stats(), self.cell.engine.work());
        let mut answer = self.answer;
        let per_second = |n: usize| if answer.seconds > 0.0 { n as f64 / answer.seconds } else { 0.0 };
        let share = |part: f64, of: f64| if of > 0.0 { part / of } else { 0.0 };
        answer.prompt_tokens_per_second = per_second(self.prompt_tokens as usize);
        answer.answer_tokens_per_second =
            per_second(self.first_tokens.iter().map(Vec::len).sum::<usize>() + self.between.len());
        answer.time_to_first_token = self.first_tokens.map(Percentiles::of);
        answer.inter_token = Percentiles::of(self.between);
        answer.steps = work.steps;
        answer.rows_per_step = share(work.rows as f64, work.steps as f64);
        answer.imbalance = share(self.imbalance, work.steps as f64);
        answer.preemptions = stats.preemptions;
        answer.cached = share(stats.prefix_hits as f64, stats.prefix_queries as f64);
        answer.work = work;
        answer
    }
}

fn shape(ranks: &[CountingRank], plans: &[std::rc::Rc<Sent>], window: u32) -> StepShape {
    let of_rank = |(rank, sent): (&CountingRank, &std::rc::Rc<Sent>)| {
        let mut shape = phalanx_planner::cost::RankShape::default();
        for (rows, start) in sent.plan.rows.iter().zip(rank.starts(&sent.plan)) {
            let sampled = u32::from(rows.outputs == Outputs::Sample);
            shape.add_run(start, count(rows.tokens.rows()), sampled, window);
        }
        shape
    };
    StepShape(ranks.iter().zip(plans).map(of_rank).collect())
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("rows are bounded by the limits")
}
