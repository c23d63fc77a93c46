//! One choice of one request, from submission to its last token.

use phalanx_proto::{Rank, SeqId, TokenId};

use crate::blocks::BlockTable;
use crate::engine::Request;

/// Where a sequence is in its life.
#[derive(Clone, Debug)]
pub enum State {
    /// It holds nothing and waits for room.
    Waiting,
    /// It lives on a rank.
    Running(Home),
}

/// What a sequence holds on its rank.
#[derive(Clone, Debug)]
pub struct Home {
    /// The rank.
    pub rank: Rank,
    /// Tokens whose keys and values are written once the steps planned so far are applied.
    pub computed: u32,
    /// Whether the rank has been told of the sequence.
    pub admitted: bool,
    /// Whether the rank sampled the last token itself, and so need not be told which it is.
    pub sampled: bool,
    /// Blocks for full layers.
    pub full: BlockTable,
    /// Blocks for sliding layers.
    pub window: BlockTable,
}

/// A sequence.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// What was asked.
    pub request: Request,
    /// Prompt and the tokens sampled so far.
    pub tokens: Vec<TokenId>,
    /// Where it is.
    pub state: State,
}

impl Sequence {
    pub(crate) fn new(request: Request) -> Self {
        Self { tokens: request.prompt.clone(), request, state: State::Waiting }
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> SeqId {
        self.request.seq
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
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("sequences are bounded by the context")
}
