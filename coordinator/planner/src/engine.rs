//! The life of every request of one cell.
//!
//! The engine is asked for the next step ([`Engine::plan`]) and told what came of it ([`Engine::apply`]). Several steps
//! may be under way at once: the token that a sequence samples in one is a legal input of the next, before anybody
//! here knows it. Results are applied rank by rank, each rank's in the order of steps. A sequence takes KV blocks as it
//! grows; when a rank has none left, the last in rank gives its own back and is computed again later, with the
//! same tokens.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use phalanx_proto::{
    Admission, ConstraintStart, ConstraintTable, Fence, Limits, ModelConfig, Rank, RowsResult, Sampling, SeqId, StepId,
    StepPlan, StepResult, TokenId, TokenLogprobs,
};

use crate::blocks::{BlockTable, Memory};
use crate::cost::{Calibrated, PhaseSeconds};
use crate::invariants;
use crate::prefix::Match;
use crate::queue::{Key, Queue};
use crate::router::{Affinity, SEQUENCE_TOKENS};
use crate::schedule;
use crate::sequence::{Home, PREEMPTIONS_OF_BATCH, Sequence, State, span};
use crate::work::Work;

/// Blocks of prompts of which it is remembered where they were computed.
const AFFINITY_BLOCKS: usize = 1 << 16;

/// What is wanted of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Tokens after the prompt.
    Tokens,
    /// The logits of every position of the prompt, and no token.
    Logits,
}

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody waits for each token.
    #[default]
    Interactive,
    /// Only the whole matters: it takes what is left, and gives way when room is short.
    Batch,
}

/// A request as the engine sees it: one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its id; never used twice.
    pub seq: SeqId,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Tokens sampled at most.
    pub max_tokens: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Added to the logits of these tokens, ascending.
    pub bias: Vec<(TokenId, f32)>,
    /// What its tokens must obey.
    pub constraint: Option<ConstraintStart>,
    /// Tokens that end the sequence.
    pub stop_tokens: Vec<TokenId>,
    /// What is wanted.
    pub want: Want,
    /// How urgent it is.
    pub class: Class,
    /// Only requests with the same salt share cached prefixes.
    pub salt: u64,
}

impl Request {
    /// An interactive request for `max_tokens` tokens after `prompt`, sampled greedily; the rest is neutral.
    #[must_use]
    pub const fn greedy(seq: SeqId, prompt: Vec<TokenId>, max_tokens: u32) -> Self {
        Self {
            seq,
            prompt,
            max_tokens,
            sampling: Sampling::GREEDY,
            bias: Vec::new(),
            constraint: None,
            stop_tokens: Vec::new(),
            want: Want::Tokens,
            class: Class::Interactive,
            salt: 0,
        }
    }
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many requests, or tokens of their prompts, wait.
    #[error("{waiting} requests with {tokens} tokens wait already; try again later")]
    QueueFull {
        /// How many.
        waiting: usize,
        /// Tokens of their prompts.
        tokens: u64,
    },
    /// Prompt and answer exceed the context.
    #[error("the prompt has {prompt} tokens and asks for {max_tokens} more, the context has {context}")]
    ContextLength {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: u32,
        /// Tokens of the context.
        context: u32,
    },
    /// The prompt is empty or names a token outside the vocabulary.
    #[error("the prompt is empty or names a token outside the vocabulary")]
    Prompt,
    /// A way to choose tokens that no rank would take.
    #[error("{field} {range}")]
    Sampling {
        /// What is wrong.
        field: &'static str,
        /// What it must be.
        range: &'static str,
    },
    /// The id is in use.
    #[error("sequence {0} exists already")]
    Twice(SeqId),
}

/// Why a result cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// No such step is under way on this rank.
    #[error("rank {rank} answers {fence}, which is not under way there")]
    NotUnderWay {
        /// The rank.
        rank: Rank,
        /// The step answered.
        fence: Fence,
    },
    /// The result does not answer the plan.
    #[error("rank {rank} answers {fence} with other sequences than planned")]
    Mismatch {
        /// The rank.
        rank: Rank,
        /// The step answered.
        fence: Fence,
    },
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// It sampled one of its stop tokens.
    Stop(TokenId),
    /// It has as many tokens as asked for.
    Length,
}

/// What happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It sampled a token.
    Token {
        /// The sequence.
        seq: SeqId,
        /// The token.
        token: TokenId,
        /// How likely it was, if asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// Logits of consecutive positions of its prompt, `[n, V]`.
    Logits {
        /// The sequence.
        seq: SeqId,
        /// The numbers.
        logits: Vec<f32>,
    },
    /// It left the queue for the first time.
    Started {
        /// The sequence.
        seq: SeqId,
        /// Tokens of its prompt whose keys and values were in the prefix cache.
        cached: u32,
    },
    /// It ended; its blocks are free.
    Finished {
        /// The sequence.
        seq: SeqId,
        /// Why.
        reason: FinishReason,
    },
}

/// What an engine has done since it was made, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sequences that wait, by class in the order of [`Class`].
    pub waiting: [usize; 2],
    /// Tokens of their prompts.
    pub waiting_tokens: u64,
    /// Sequences that live on a rank.
    pub running: usize,
    /// Share of the blocks for full layers that sequences hold, from 0 to 1.
    pub kv_usage: f64,
    /// Share of them that only the prefix cache holds.
    pub cache_usage: f64,
    /// Sequences sent back to the queue for want of blocks, so far.
    pub preemptions: u64,
    /// Tokens of prompts looked up in the prefix cache, so far.
    pub prefix_queries: u64,
    /// Tokens found there, so far.
    pub prefix_hits: u64,
    /// Tokens to be read before a new request's first, and for each sequence [`SEQUENCE_TOKENS`].
    pub load: u64,
    /// Blocks for full layers, of all ranks.
    pub blocks: u64,
    /// Rows of the fullest rank over the mean of all ranks in the last step; 1 is level.
    pub imbalance: f64,
}

/// What an engine decides with.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// The bounds of each rank.
    pub limits: Limits,
    /// Ranks of the cell.
    pub ranks: u32,
    /// Window of the sliding layers.
    pub window: u32,
    /// Size of the vocabulary.
    pub vocab: u32,
    /// Requests that may wait, beside those that there are seats for.
    pub queue_max: usize,
    /// Tokens of prompts that may wait, beside those that there are seats for.
    pub queue_tokens_max: u64,
    /// Steps that may be under way at once.
    pub depth: u32,
    /// Whether keys and values are kept for prompts that begin alike.
    pub prefix_cache: bool,
    /// Names the arithmetic: keys and values of another are never used.
    pub numerics: u64,
    /// Tables that constraints may name.
    pub tables: Vec<ConstraintTable>,
    /// Rows of one sequence in one step at most.
    pub chunk_max: u32,
    /// Milliseconds that ranks may wait for each other within a step.
    pub deadline_ms: u32,
    /// Whether every decision is followed by a check of [`invariants`]: the default in debug builds.
    pub checked: bool,
}

impl EngineConfig {
    /// The usual configuration for a model.
    #[must_use]
    pub const fn new(model: &ModelConfig, limits: Limits, ranks: u32) -> Self {
        Self::of(model.window, model.vocab, limits, ranks)
    }

    /// The usual configuration for a model of which only window and vocabulary are known.
    #[must_use]
    pub const fn of(window: u32, vocab: u32, limits: Limits, ranks: u32) -> Self {
        Self {
            limits,
            ranks,
            window,
            vocab,
            queue_max: 1024,
            queue_tokens_max: 16 << 20,
            depth: 2,
            prefix_cache: true,
            numerics: 0,
            tables: Vec::new(),
            chunk_max: limits.step_rows_max,
            deadline_ms: 120_000,
            checked: cfg!(debug_assertions),
        }
    }
}

/// What the engine knows of one rank.
#[derive(Clone, Debug)]
pub struct RankState {
    /// Its KV memory.
    pub memory: Memory,
    /// Sequences whose prompts are computed.
    pub decoding: BTreeSet<Key>,
    /// Sequences with tokens still to be read.
    pub prefilling: BTreeSet<Key>,
    /// Those tokens, by class in the order of [`Class`].
    pub prefill_tokens: [u64; 2],
    /// Blocks that prefilling sequences will still take.
    pub claimed: u64,
    /// A sequence that did not fit: it does not before blocks have come back.
    pub(crate) refused: Option<SeqId>,
    /// Sequences the rank is to forget with the next plan.
    pub release: Vec<SeqId>,
    /// Its load when it was weighed last.
    pub(crate) weighed: u64,
    /// Whether it has the constraint tables.
    pub(crate) has_tables: bool,
}

impl RankState {
    /// Sequences that live there.
    #[must_use]
    pub fn running(&self) -> usize {
        self.decoding.len() + self.prefilling.len()
    }

    /// Tokens that are read before those of a new sequence of this class.
    #[must_use]
    pub fn reads_before(&self, class: Class) -> u64 {
        self.prefill_tokens[..=class as usize].iter().sum()
    }

    /// What a new sequence would wait for.
    fn load(&self) -> u64 {
        self.reads_before(Class::Batch) + self.running() as u64 * SEQUENCE_TOKENS
    }
}

/// Rows that a rank was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) seq: SeqId,
    /// Which life of the sequence.
    pub(crate) life: u32,
    /// One past the last position.
    pub(crate) end: u32,
    /// Whether a result is awaited.
    pub(crate) wants: bool,
    /// Whether that is a token.
    pub(crate) samples: bool,
}

/// A step under way: what each rank was asked for; `None` once it has answered.
#[derive(Clone, Debug)]
pub(crate) struct Flight {
    pub(crate) fence: Fence,
    pub(crate) asked: Vec<Option<Vec<Asked>>>,
    /// What each rank is expected to take; empty if nothing is expected.
    pub(crate) expected: Vec<PhaseSeconds>,
}

/// The engine of one cell.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) config: EngineConfig,
    pub(crate) fence: Fence,
    /// The last step that all ranks have answered.
    pub(crate) applied: StepId,
    pub(crate) ranks: Vec<RankState>,
    /// Ranks by load.
    pub(crate) by_load: BTreeSet<(u64, u32)>,
    pub(crate) affinity: Affinity,
    pub(crate) sequences: BTreeMap<SeqId, Sequence>,
    pub(crate) queue: Queue,
    waiting_tokens: u64,
    /// Whether somebody found no room when the last step was planned.
    pub(crate) backed_up: bool,
    /// Whether sequences stop behind their first token.
    pub(crate) answers_held: bool,
    pub(crate) flights: VecDeque<Flight>,
    /// What steps cost, if deadlines follow it.
    pub(crate) pace: Option<Calibrated>,
    /// Events of planning, told with the next result.
    pub(crate) events: Vec<Event>,
    pub(crate) preemptions: u64,
    pub(crate) prefix: (u64, u64),
    pub(crate) imbalance: f64,
    pub(crate) work: Work,
}

impl Engine {
    /// An engine whose first step follows `fence`.
    #[must_use]
    pub fn new(config: EngineConfig, fence: Fence) -> Self {
        let rank = RankState {
            memory: Memory::new(&config.limits),
            decoding: BTreeSet::new(),
            prefilling: BTreeSet::new(),
            prefill_tokens: [0; 2],
            claimed: 0,
            refused: None,
            release: Vec::new(),
            weighed: 0,
            has_tables: false,
        };
        Self {
            ranks: vec![rank; config.ranks as usize],
            by_load: (0..config.ranks).map(|rank| (0, rank)).collect(),
            affinity: Affinity::new(AFFINITY_BLOCKS),
            config,
            fence,
            applied: fence.step,
            sequences: BTreeMap::new(),
            queue: Queue::default(),
            waiting_tokens: 0,
            backed_up: false,
            answers_held: false,
            flights: VecDeque::new(),
            pace: None,
            events: Vec::new(),
            preemptions: 0,
            prefix: (0, 0),
            imbalance: 1.0,
            work: Work::default(),
        }
    }

    /// Deadlines of steps follow what steps take, as `pace` learns it, and no longer the configuration.
    pub fn set_pace(&mut self, pace: Calibrated) {
        self.pace = Some(pace);
    }

    /// Takes a request.
    ///
    /// # Errors
    /// The queue is full, or the request can never be served.
    pub fn submit(&mut self, request: Request) -> Result<(), Refused> {
        let context = self.config.limits.context;
        if request.prompt.is_empty() || request.prompt.iter().any(|t| t.0 >= self.config.vocab) {
            return Err(Refused::Prompt);
        }
        if request.prompt.len() as u64 + u64::from(request.max_tokens) > u64::from(context) {
            let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
            return Err(Refused::ContextLength { prompt, max_tokens, context });
        }
        request.sampling.check().map_err(|(field, range)| Refused::Sampling { field, range })?;
        let biased = request.bias.len() <= Admission::BIAS_MAX
            && request.bias.is_sorted_by(|a, b| a.0 < b.0)
            && request
                .bias
                .iter()
                .all(|(token, bias)| token.0 < self.config.vocab && bias.abs() <= Sampling::PENALTY_MAX);
        if !biased {
            return Err(Refused::Sampling { field: "bias", range: "must name ascending tokens of the vocabulary" });
        }
        let known = |start: ConstraintStart| {
            let table = self.config.tables.iter().find(|table| table.id == start.table);
            table.is_some_and(|table| (start.state as usize) < table.states())
        };
        if request.constraint.is_some_and(|start| !known(start)) {
            return Err(Refused::Sampling { field: "constraint", range: "must name a state of a table" });
        }
        let (waiting, tokens) = (self.queue.len(), self.waiting_tokens);
        // Those that the next step has seats for do not wait, unless others do already.
        let seats = self.config.limits.seqs_max as usize * self.ranks.len();
        let seats = if self.backed_up { 0 } else { seats.saturating_sub(self.running()) };
        let too_long = tokens + request.prompt.len() as u64 > self.config.queue_tokens_max;
        if waiting >= self.config.queue_max.saturating_add(seats) || (too_long && waiting >= seats.max(1)) {
            return Err(Refused::QueueFull { waiting, tokens });
        }
        if self.sequences.contains_key(&request.seq) {
            return Err(Refused::Twice(request.seq));
        }
        let mut sequence = Sequence::new(request, &self.config);
        sequence.seen_by = self.affinity.longest(&sequence.hashes).map(|(rank, _)| rank);
        self.work.touch_all(1 + sequence.hashes.len());
        self.wait(sequence.key(), sequence.len());
        self.sequences.insert(sequence.id(), sequence);
        self.check();
        Ok(())
    }

    fn wait(&mut self, key: Key, len: u32) {
        self.queue.push(key);
        self.waiting_tokens += u64::from(len);
    }

    /// A sequence no longer waits, if it did.
    fn wait_no_more(&mut self, key: Key, len: u32) {
        if self.queue.remove(key) {
            self.waiting_tokens -= u64::from(len);
        }
    }

    /// Bounds the rows of one sequence in one step from the next step on.
    pub fn set_chunk_max(&mut self, rows: u32) {
        self.config.chunk_max = rows.clamp(1, self.config.limits.step_rows_max);
    }

    /// Whether sequences stop behind their first token: a measurement reads all prompts before any answer goes on, so
    /// that no step has rows of both.
    pub const fn hold_answers(&mut self, held: bool) {
        self.answers_held = held;
    }

    /// Forgets a sequence at any moment. No event of it follows.
    pub fn cancel(&mut self, seq: SeqId) {
        self.events.retain(|event| !matches!(event, Event::Started { seq: started, .. } if *started == seq));
        self.remove(seq);
        self.check();
    }

    /// The plans of the next step, one for each rank, or `None` while as many steps are under way as may be, or nothing
    /// is to do before one of them is applied.
    pub fn plan(&mut self) -> Option<Vec<StepPlan>> {
        if self.flights.len() >= self.config.depth.max(1) as usize {
            return None;
        }
        let plans = schedule::step(self);
        self.check();
        plans
    }

    /// Applies one rank's result of the first step that the rank has not answered yet.
    ///
    /// # Errors
    /// The result answers no such step; nothing is changed.
    pub fn apply(&mut self, result: StepResult) -> Result<Vec<Event>, ApplyError> {
        let (rank, fence) = (result.rank, result.fence);
        let not_under_way = || ApplyError::NotUnderWay { rank, fence };
        let first = self.flights.iter_mut().find(|flight| flight.asked.get(rank.index()).is_some_and(Option::is_some));
        let flight = first.filter(|flight| flight.fence == fence).ok_or_else(not_under_way)?;
        let asked = flight.asked.get_mut(rank.index()).and_then(Option::take).ok_or_else(not_under_way)?;
        let answers = asked.iter().filter(|asked| asked.wants).map(|asked| asked.seq);
        if !answers.eq(result.rows.iter().map(|rows| rows.seq)) || !well_formed(&asked, &result.rows) {
            flight.asked[rank.index()] = Some(asked);
            return Err(ApplyError::Mismatch { rank, fence });
        }
        if let (Some(pace), Some(expected)) = (&mut self.pace, flight.expected.get(rank.index())) {
            pace.observe(expected, &result.phases);
        }
        while let Some(flight) = self.flights.front()
            && flight.asked.iter().all(Option::is_none)
        {
            self.applied = flight.fence.step;
            self.flights.pop_front();
        }
        self.ranks[rank.index()].memory.apply(fence.step);
        let mut events = std::mem::take(&mut self.events);
        let mut rows = result.rows.into_iter();
        for asked in asked {
            self.work.touch();
            let result = if asked.wants { rows.next() } else { None };
            self.apply_rows(asked, result, &mut events);
        }
        self.check();
        Ok(events)
    }

    /// Applies what came of a run of rows, unless the sequence is gone or has begun a new life since.
    fn apply_rows(&mut self, asked: Asked, result: Option<RowsResult>, events: &mut Vec<Event>) {
        let Asked { seq, life, end, samples, .. } = asked;
        let Some(sequence) = self.sequences.get_mut(&seq).filter(|sequence| sequence.life == life) else { return };
        let State::Running(home) = &mut sequence.state else { return };
        home.applied = end;
        home.sampling -= u32::from(samples);
        let mut reason = None;
        if let Some(RowsResult { tokens, logprobs, logits, .. }) = result {
            if !logits.is_empty() {
                sequence.told = end;
                events.push(Event::Logits { seq, logits });
            }
            let mut logprobs = logprobs.into_iter();
            for token in tokens {
                sequence.push(token, &self.config);
                events.push(Event::Token { seq, token, logprobs: logprobs.next() });
                if sequence.request.stop_tokens.contains(&token) {
                    reason = Some(FinishReason::Stop(token));
                } else if sequence.generated() >= sequence.request.max_tokens {
                    reason = Some(FinishReason::Length);
                }
            }
        }
        let no_token = sequence.request.want == Want::Logits || sequence.request.max_tokens == 0;
        if no_token && end == sequence.len() {
            reason = Some(FinishReason::Length);
        }
        self.settle(seq);
        if let Some(reason) = reason {
            events.push(Event::Finished { seq, reason });
            self.remove(seq);
        }
    }

    /// Caches the blocks that a sequence has filled, and gives back those out of its window.
    fn settle(&mut self, seq: SeqId) {
        let Some(Sequence { state: State::Running(home), tokens, hashes, .. }) = self.sequences.get_mut(&seq) else {
            return;
        };
        let last = self.fence.step;
        let memory = &mut self.ranks[home.rank.index()].memory;
        let size = self.config.limits.block_size;
        while let Some(next) = memory.publishable(&home.table, home.applied, size)
            && let Some(&hash) = hashes.get(next.0 as usize)
        {
            let start = (next.0 * size) as usize;
            let block = &tokens[start..start + size as usize];
            home.tell.extend(memory.publish(&mut home.table, next, hash, block, last));
        }
        let (applied, mut table) = (home.applied, std::mem::take(&mut home.table));
        let rank = home.rank;
        let is_tail = self.sequences[&seq].is_tail(&self.config, applied);
        self.ranks[rank.index()].memory.retire(&mut table, span(&self.config, applied, applied + 1), is_tail);
        if let Some(Sequence { state: State::Running(home), .. }) = self.sequences.get_mut(&seq) {
            home.table = table;
        }
    }

    fn remove(&mut self, seq: SeqId) {
        self.give_back(seq);
        if let Some(sequence) = self.sequences.remove(&seq) {
            self.wait_no_more(sequence.key(), sequence.len());
        }
    }

    /// Takes back all that a sequence holds on its rank.
    fn give_back(&mut self, seq: SeqId) {
        let last = self.fence.step;
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        let (key, len) = (sequence.key(), sequence.len());
        let State::Running(mut home) = std::mem::replace(&mut sequence.state, State::Waiting) else { return };
        let is_tail = sequence.is_tail(&self.config, home.applied);
        let at = home.rank;
        let rank = &mut self.ranks[at.index()];
        rank.memory.give_back(&mut home.table, last, is_tail);
        rank.decoding.remove(&key);
        if rank.prefilling.remove(&key) {
            rank.prefill_tokens[key.0 as usize] -= u64::from(len - home.planned);
            rank.claimed -= u64::from(home.claim);
            rank.memory.returned = true;
        }
        if home.admitted {
            rank.release.push(seq);
        }
        self.weigh(at, |_| ());
    }

    /// Changes what a rank carries, and its place among the ranks.
    pub(crate) fn weigh(&mut self, rank: Rank, change: impl FnOnce(&mut RankState)) {
        let state = &mut self.ranks[rank.index()];
        change(state);
        let load = state.load();
        let was = std::mem::replace(&mut state.weighed, load);
        if was != load {
            self.by_load.remove(&(was, rank.0));
            self.by_load.insert((load, rank.0));
        }
    }

    /// Gives a waiting sequence a rank, with what is cached of it there. One that has waited its turn counts as
    /// interactive from now on: those it was let in before do not drive it out again.
    pub(crate) fn place(&mut self, seq: SeqId, rank: Rank, found: &Match, its_turn: bool) {
        let size = self.config.limits.block_size;
        let Some(sequence) = self.sequences.get(&seq) else { return };
        let class = sequence.key().0;
        self.wait_no_more(sequence.key(), sequence.len());
        // A batch request that waits until others are read waits for nobody who came here.
        let reads = self.ranks[rank.index()].reads_before(Class::Batch);
        if class == Class::Interactive && reads < u64::from(self.config.limits.step_rows_max) {
            self.queue.pass();
        }
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        let (len, first) = (sequence.len(), sequence.life == 0);
        let mut table = BlockTable::default();
        let tell = self.ranks[rank.index()].memory.adopt(&mut table, found);
        let cached = u32::try_from(found.nodes.len()).expect("sequences are bounded by the context") * size;
        sequence.life += 1;
        sequence.promoted |= its_turn || sequence.life > PREEMPTIONS_OF_BATCH;
        let (key, claim) = (sequence.key(), table.lacks(len + 1, size));
        sequence.seen_by = Some(rank.0);
        self.affinity.remember(&sequence.hashes, rank.0);
        self.work.touch_all(sequence.hashes.len());
        if !sequence.hashes.is_empty() && first {
            self.prefix.0 += u64::from(len);
            self.prefix.1 += u64::from(cached);
        }
        sequence.state = State::Running(Home {
            rank,
            planned: cached,
            applied: cached,
            sampling: 0,
            sampled: false,
            admitted: false,
            cached,
            tell,
            table,
            claim,
            last_step: StepId(0),
        });
        if first {
            self.events.push(Event::Started { seq, cached });
        }
        self.weigh(rank, |state| {
            state.prefilling.insert(key);
            state.prefill_tokens[key.0 as usize] += u64::from(len - cached);
            state.claimed += u64::from(claim);
        });
    }

    /// Sends a sequence back to the queue; it will be computed again from its tokens.
    pub(crate) fn preempt(&mut self, seq: SeqId) {
        self.give_back(seq);
        let Some(sequence) = self.sequences.get(&seq) else { return };
        let (key, len) = (sequence.key(), sequence.len());
        self.wait(key, len);
        self.preemptions += 1;
        self.backed_up = true;
        self.work.touch();
    }

    fn check(&self) {
        if self.config.checked
            && let Err(broken) = invariants::check(self)
        {
            panic!("the engine broke an invariant: {broken}");
        }
    }

    /// Sequences that live on a rank.
    #[must_use]
    pub fn running(&self) -> usize {
        self.ranks.iter().map(RankState::running).sum()
    }

    /// Sequences that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Whether there is nothing to do and no step under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.flights.is_empty()
    }

    /// The last step planned.
    #[must_use]
    pub const fn fence(&self) -> Fence {
        self.fence
    }

    /// What the engine decides with.
    #[must_use]
    pub const fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// What planning has cost so far.
    #[must_use]
    pub fn work(&self) -> Work {
        self.ranks.iter().fold(self.work, |work, rank| work.and(rank.memory.work))
    }

    /// Share of the KV blocks for full layers that sequences hold, from 0 to 1.
    #[must_use]
    pub fn kv_usage(&self) -> f64 {
        self.stats().kv_usage
    }

    /// What the engine has done and holds.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let share = |of: &dyn Fn(&Memory) -> usize| {
            let total: f64 = self.ranks.iter().map(|rank| f64::from(rank.memory.full.total())).sum();
            let part: f64 = self.ranks.iter().map(|rank| of(&rank.memory) as f64).sum();
            if total == 0.0 { 0.0 } else { part / total }
        };
        Stats {
            waiting: self.queue.by_class(),
            waiting_tokens: self.waiting_tokens,
            running: self.running(),
            kv_usage: share(&|m| m.full.total() as usize - m.full.ready() - m.full.cooling() - m.cache.idle()),
            cache_usage: share(&|m| m.cache.idle()),
            preemptions: self.preemptions,
            prefix_queries: self.prefix.0,
            prefix_hits: self.prefix.1,
            load: self.ranks.iter().map(|rank| rank.weighed).sum::<u64>()
                + self.waiting_tokens
                + self.queue.len() as u64 * SEQUENCE_TOKENS,
            blocks: self.ranks.iter().map(|rank| u64::from(rank.memory.full.total())).sum(),
            imbalance: self.imbalance,
        }
    }
}

/// Whether each run that was asked for a token has one, and no other has any.
fn well_formed(asked: &[Asked], rows: &[RowsResult]) -> bool {
    let wants = asked.iter().filter(|asked| asked.wants);
    wants.zip(rows).all(|(asked, rows)| rows.tokens.len() == usize::from(asked.samples))
}
