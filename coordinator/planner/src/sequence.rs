//! One choice of one request, from submission to its last token.

use phalanx_proto::{BlockGrant, Rank, SeqId, StepId, TokenId};

use crate::blocks::{BlockTable, Span};
use crate::engine::{Class, EngineConfig, Request, Want};
use crate::prefix::{BlockHash, chain};
use crate::queue::Key;

/// A batch sequence that was sent back this often counts as interactive.
pub const PREEMPTIONS_OF_BATCH: u32 = 4;
/// Windows are kept at every multiple of this many tokens.
const TAIL_EVERY: u32 = 2048;

/// Where a sequence is in its life.
#[derive(Clone, Debug)]
pub enum State {
    /// It holds nothing and waits for room.
    Waiting,
    /// It lives on a rank.
    Running(Home),
}

/// What a sequence is and holds on its rank.
#[derive(Clone, Debug)]
pub struct Home {
    /// The rank.
    pub rank: Rank,
    /// Positions whose rows are planned, from 0.
    pub planned: u32,
    /// Positions whose rows are applied.
    pub applied: u32,
    /// Tokens sampled in steps under way, which are not known yet.
    pub sampling: u32,
    /// Whether the rank sampled the last token itself, and so need not be told which it is.
    pub sampled: bool,
    /// Whether the rank has been told of the sequence.
    pub admitted: bool,
    /// Positions found in the cache when it came.
    pub cached: u32,
    /// Blocks of the cache, of which the rank is to be told with the next rows.
    pub tell: Vec<BlockGrant>,
    /// Its blocks.
    pub table: BlockTable,
    /// Blocks it will still take until its tokens are read.
    pub claim: u32,
    /// The last step with rows of it.
    pub last_step: StepId,
}

/// A sequence.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// What was asked.
    pub request: Request,
    /// Prompt and the tokens sampled so far.
    pub tokens: Vec<TokenId>,
    /// Hash of each whole block of the tokens; empty where nothing is to be cached.
    pub hashes: Vec<BlockHash>,
    /// Where it is.
    pub state: State,
    /// How often it was given a rank: results of an earlier life are not its own.
    pub life: u32,
    /// Whether it counts as interactive, whatever its class.
    pub promoted: bool,
    /// Positions of the prompt whose logits have been told.
    pub told: u32,
    /// The rank that has seen most of its prompt.
    pub seen_by: Option<u32>,
}

/// What a sequence could compute next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// Nothing before results come back.
    Nothing,
    /// The row after its last token.
    Decode,
    /// So many tokens of its prompt or, after a preemption, of its answer.
    Prefill(u32),
}

impl Sequence {
    pub(crate) fn new(request: Request, config: &EngineConfig) -> Self {
        let tokens = request.prompt.clone();
        let keeps = config.prefix_cache && request.want == Want::Tokens;
        let root = BlockHash::root(request.salt, config.numerics);
        let hashes = if keeps { chain(&tokens, config.limits.block_size, root) } else { Vec::new() };
        Self { tokens, hashes, request, state: State::Waiting, life: 0, promoted: false, told: 0, seen_by: None }
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> SeqId {
        self.request.seq
    }

    /// Its place among others.
    #[must_use]
    pub const fn key(&self) -> Key {
        let class = if self.promoted { Class::Interactive } else { self.request.class };
        (class, self.id())
    }

    /// Tokens sampled so far.
    #[must_use]
    pub fn generated(&self) -> u32 {
        count(self.tokens.len() - self.request.prompt.len())
    }

    /// Tokens so far, prompt included.
    #[must_use]
    pub fn len(&self) -> u32 {
        count(self.tokens.len())
    }

    /// Never: a prompt has at least one token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Whether no more rows are needed once those planned are applied.
    #[must_use]
    fn suffices(&self, sampling: u32) -> bool {
        self.request.want == Want::Tokens && self.generated() + sampling >= self.request.max_tokens.max(1)
    }

    /// What it could compute next.
    #[must_use]
    pub fn pending(&self) -> Pending {
        let State::Running(home) = &self.state else { return Pending::Nothing };
        let len = self.len();
        if home.sampling > 0 {
            if self.suffices(home.sampling) { Pending::Nothing } else { Pending::Decode }
        } else if home.planned >= len {
            Pending::Nothing
        } else if home.planned + 1 == len && self.generated() > 0 {
            Pending::Decode
        } else {
            Pending::Prefill(len - home.planned)
        }
    }

    /// Appends a sampled token.
    pub fn push(&mut self, token: TokenId, config: &EngineConfig) {
        self.tokens.push(token);
        let size = config.limits.block_size as usize;
        let block = self.tokens.len() / size;
        if self.tokens.len().is_multiple_of(size)
            && config.prefix_cache
            && self.request.want == Want::Tokens
            && self.hashes.len() + 1 == block
        {
            let root = BlockHash::root(self.request.salt, config.numerics);
            let before = self.hashes.last().copied().unwrap_or(root);
            self.hashes.push(before.then(&self.tokens[(block - 1) * size..]));
        }
    }

    /// Whether a window block of this sequence is one of those kept before others: before the end of its prompt, before
    /// the end of `applied` positions, or before a multiple of 2048 tokens.
    pub fn is_tail(&self, config: &EngineConfig, applied: u32) -> impl Fn(u32) -> bool + use<> {
        let size = config.limits.block_size;
        let width = (config.window + size).saturating_sub(2) / size;
        let ends = [count(self.request.prompt.len().saturating_sub(1)) / size, applied / size];
        let every = (TAIL_EVERY / size).max(1);
        move |stretch| {
            let before = |end: u32| stretch < end && end - stretch <= width;
            ends.into_iter().any(before) || before((stretch / every + 1) * every)
        }
    }
}

/// The span of positions `start..end` under a configuration.
#[must_use]
pub const fn span(config: &EngineConfig, start: u32, end: u32) -> Span {
    Span { start, end, block_size: config.limits.block_size, window: config.window }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("sequences are bounded by the context")
}
