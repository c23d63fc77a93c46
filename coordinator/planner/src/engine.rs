//! The life of every request of one cell.
//!
//! The engine is asked for the next step ([`Engine::plan`]) and told what came of it ([`Engine::apply`]). One step
//! is under way at a time. First come, first served; a sequence takes KV blocks as it grows, and when a rank has
//! none left its youngest sequence gives its own back and is computed again later, with the same tokens.

use std::collections::{BTreeMap, VecDeque};

use phalanx_proto::{
    ConstraintStart, ConstraintTable, Fence, Limits, ModelConfig, Rank, Sampling, SeqId, StepPlan, StepResult, TokenId,
    TokenLogprobs,
};

use crate::blocks::FreeBlocks;
use crate::invariants;
use crate::schedule;
use crate::sequence::{Sequence, State};

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
    /// Requests that may wait.
    pub queue_max: usize,
    /// Tokens of prompts that may wait.
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
}

impl EngineConfig {
    /// The usual configuration for a model.
    #[must_use]
    pub fn new(model: &ModelConfig, limits: Limits, ranks: u32) -> Self {
        Self {
            limits,
            ranks,
            window: model.window,
            vocab: model.vocab,
            queue_max: 1024,
            queue_tokens_max: 16 << 20,
            depth: 2,
            prefix_cache: true,
            numerics: 0,
            tables: Vec::new(),
            chunk_max: limits.step_rows_max,
            deadline_ms: 120_000,
        }
    }
}

/// What the engine knows of one rank.
#[derive(Clone, Debug)]
pub struct RankState {
    /// Blocks for full layers.
    pub full: FreeBlocks,
    /// Blocks for sliding layers.
    pub window: FreeBlocks,
    /// Sequences that live there, oldest first.
    pub running: Vec<SeqId>,
    /// Sequences the rank is to forget with the next plan.
    pub release: Vec<SeqId>,
}

/// The step under way: what each rank that has not answered was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Flight {
    pub(crate) fence: Fence,
    /// For each rank: sequences whose result is awaited, in the plan's order; `None` once answered.
    pub(crate) asked: Vec<Option<Vec<SeqId>>>,
}

/// The engine of one cell.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) config: EngineConfig,
    pub(crate) fence: Fence,
    pub(crate) ranks: Vec<RankState>,
    pub(crate) sequences: BTreeMap<SeqId, Sequence>,
    pub(crate) waiting: VecDeque<SeqId>,
    pub(crate) flight: Option<Flight>,
    pub(crate) preemptions: u64,
}

impl Engine {
    /// An engine whose first step follows `fence`.
    #[must_use]
    pub fn new(config: EngineConfig, fence: Fence) -> Self {
        let rank = RankState {
            full: FreeBlocks::new(config.limits.full_blocks),
            window: FreeBlocks::new(config.limits.window_blocks),
            running: Vec::new(),
            release: Vec::new(),
        };
        Self {
            ranks: vec![rank; config.ranks as usize],
            config,
            fence,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            flight: None,
            preemptions: 0,
        }
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
        if self.waiting.len() >= self.config.queue_max {
            return Err(Refused::QueueFull { waiting: self.waiting.len(), tokens: 0 });
        }
        if self.sequences.contains_key(&request.seq) {
            return Err(Refused::Twice(request.seq));
        }
        self.waiting.push_back(request.seq);
        self.sequences.insert(request.seq, Sequence::new(request));
        Ok(())
    }

    /// Bounds the rows of one sequence in one step from the next step on.
    pub fn set_chunk_max(&mut self, rows: u32) {
        self.config.chunk_max = rows.clamp(1, self.config.limits.step_rows_max);
    }

    /// Forgets a sequence at any moment. No event of it follows.
    pub fn cancel(&mut self, seq: SeqId) {
        self.remove(seq);
        self.check();
    }

    /// The plans of the next step, one for each rank, or `None` while a step is under way or nothing is to do.
    pub fn plan(&mut self) -> Option<Vec<StepPlan>> {
        if self.flight.is_some() {
            return None;
        }
        let plans = schedule::step(self);
        self.check();
        plans
    }

    /// Applies one rank's result. The step is done when all ranks have answered.
    ///
    /// # Errors
    /// The result answers no plan under way; nothing is changed.
    pub fn apply(&mut self, result: StepResult) -> Result<Vec<Event>, ApplyError> {
        let (rank, fence) = (result.rank, result.fence);
        let asked = match &mut self.flight {
            Some(flight) if flight.fence == fence => flight.asked.get_mut(rank.index()).and_then(Option::take),
            _ => None,
        };
        let Some(asked) = asked else {
            return Err(ApplyError::NotUnderWay { rank, fence });
        };
        if !asked.iter().eq(result.rows.iter().map(|rows| &rows.seq)) {
            return Err(ApplyError::Mismatch { rank, fence });
        }
        let mut events = Vec::new();
        for rows in result.rows {
            if !rows.logits.is_empty() {
                events.push(Event::Logits { seq: rows.seq, logits: rows.logits });
            }
            let mut logprobs = rows.logprobs.into_iter();
            for token in rows.tokens {
                self.append(rows.seq, token, logprobs.next(), &mut events);
            }
        }
        if let Some(flight) = &self.flight
            && flight.asked.iter().all(Option::is_none)
        {
            self.flight = None;
            self.end_prompts(&mut events);
        }
        self.check();
        Ok(events)
    }

    /// Appends a sampled token, and ends the sequence where its request says so.
    fn append(&mut self, seq: SeqId, token: TokenId, logprobs: Option<TokenLogprobs>, events: &mut Vec<Event>) {
        // A sequence cancelled during the step is gone.
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        sequence.tokens.push(token);
        events.push(Event::Token { seq, token, logprobs });
        let reason = if sequence.request.stop_tokens.contains(&token) {
            FinishReason::Stop(token)
        } else if sequence.generated() >= sequence.request.max_tokens {
            FinishReason::Length
        } else {
            return;
        };
        events.push(Event::Finished { seq, reason });
        self.remove(seq);
    }

    /// Ends sequences that wanted no token and whose prompt is computed.
    fn end_prompts(&mut self, events: &mut Vec<Event>) {
        let done = |s: &&Sequence| {
            let computed = matches!(&s.state, State::Running(home) if home.computed == s.len());
            computed && (s.request.want == Want::Logits || s.request.max_tokens == 0)
        };
        let ended: Vec<SeqId> = self.sequences.values().filter(done).map(Sequence::id).collect();
        for seq in ended {
            events.push(Event::Finished { seq, reason: FinishReason::Length });
            self.remove(seq);
        }
    }

    fn remove(&mut self, seq: SeqId) {
        self.give_back(seq);
        self.sequences.remove(&seq);
        self.waiting.retain(|&waiting| waiting != seq);
    }

    /// Takes back all that a sequence holds on its rank.
    fn give_back(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        if let State::Running(mut home) = std::mem::replace(&mut sequence.state, State::Waiting) {
            let rank = &mut self.ranks[home.rank.index()];
            home.full.give_back(&mut rank.full);
            home.window.give_back(&mut rank.window);
            rank.running.retain(|&running| running != seq);
            if home.admitted {
                rank.release.push(seq);
            }
        }
    }

    /// Sends a sequence back to the head of the queue; it will be computed again from its tokens.
    pub(crate) fn preempt(&mut self, seq: SeqId) {
        self.give_back(seq);
        self.waiting.push_front(seq);
        self.preemptions += 1;
    }

    /// What the engine has done and holds.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats { preemptions: self.preemptions, ..Stats::default() }
    }

    fn check(&self) {
        if cfg!(debug_assertions)
            && let Err(broken) = invariants::check(self)
        {
            panic!("the engine broke an invariant: {broken}");
        }
    }

    /// Sequences that live on a rank.
    #[must_use]
    pub fn running(&self) -> usize {
        self.ranks.iter().map(|rank| rank.running.len()).sum()
    }

    /// Sequences that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether there is nothing to do and no step under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.flight.is_none()
    }

    /// The last step planned.
    #[must_use]
    pub const fn fence(&self) -> Fence {
        self.fence
    }

    /// Share of the KV blocks for full layers that belong to somebody, from 0 to 1.
    #[must_use]
    pub fn kv_usage(&self) -> f64 {
        let total: f64 = self.ranks.iter().map(|r| f64::from(r.full.total())).sum();
        let free: f64 = self.ranks.iter().map(|r| r.full.len() as f64).sum();
        if total == 0.0 { 0.0 } else { 1.0 - free / total }
    }

    /// How often a sequence had to give its blocks back.
    #[must_use]
    pub const fn preemptions(&self) -> u64 {
        self.preemptions
    }
}
