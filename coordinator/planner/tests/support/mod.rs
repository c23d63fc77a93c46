//! Ranks that compute nothing and remember everything, and a cell of them.

#![allow(clippy::unwrap_used, dead_code, reason = "tests; not every test file uses all of it")]

use std::collections::{BTreeMap, VecDeque};

use phalanx_planner::{Engine, EngineConfig, Event, FinishReason, Request};
use phalanx_proto::{
    Fence, LayerKind, Limits, ModelConfig, Outputs, Pool, Position, Rank, Rope, RowsResult, SeqId, Start, StepPlan,
    StepResult, TokenId, Tokens,
};

pub(crate) const VOCAB: u32 = 97;
pub(crate) const WINDOW: u32 = 24;

/// The token after `tokens`: a function of all of them.
pub(crate) fn next_token(tokens: &[TokenId]) -> TokenId {
    TokenId(tokens.iter().fold(7u32, |h, t| h.wrapping_mul(31).wrapping_add(t.0 + 1)) % VOCAB)
}

/// The hash of a prefix and one more token: what the keys and values of that position depend on.
fn then(hash: u64, token: TokenId) -> u64 {
    (hash ^ u64::from(token.0 + 1)).wrapping_mul(0x100_0000_01b3)
}

/// A rank that keeps what its KV memory would hold, block by block, and reads it back from there.
pub(crate) struct VirtualRank {
    rank: Rank,
    limits: Limits,
    /// (pool, block, offset) -> the hash of the prefix written there and its last token.
    memory: BTreeMap<(Pool, u32, u32), (u64, TokenId)>,
    sequences: BTreeMap<SeqId, VirtualSequence>,
}

#[derive(Default)]
struct VirtualSequence {
    tables: BTreeMap<(Pool, u32), u32>,
    tokens: Vec<TokenId>,
    /// Of each prefix of the tokens.
    hashes: Vec<u64>,
    cached: usize,
    last: Option<TokenId>,
}

impl VirtualSequence {
    fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        self.hashes.push(then(self.hashes.last().copied().unwrap_or(11), token));
    }
}

impl VirtualRank {
    pub(crate) fn new(rank: u32, limits: Limits) -> Self {
        Self { rank: Rank(rank), limits, memory: BTreeMap::new(), sequences: BTreeMap::new() }
    }

    pub(crate) fn run(&mut self, plan: &StepPlan) -> StepResult {
        plan.check(&self.limits, VOCAB).unwrap();
        for seq in &plan.release {
            assert!(self.sequences.remove(seq).is_some(), "released {seq} does not live on {}", self.rank);
        }
        for admission in &plan.admit {
            let sequence = VirtualSequence { cached: admission.cached as usize, ..VirtualSequence::default() };
            assert!(self.sequences.insert(admission.seq, sequence).is_none());
        }
        assert!(self.sequences.len() <= self.limits.seqs_max as usize);
        let size = self.limits.block_size;
        let mut rows = Vec::new();
        for run in &plan.rows {
            let sequence = self.sequences.get_mut(&run.seq).unwrap();
            for grant in &run.grants {
                sequence.tables.insert((grant.pool, grant.index), grant.block.0);
            }
            // What is said to be cached is read from the blocks.
            for position in sequence.tokens.len()..std::mem::take(&mut sequence.cached) {
                let position = u32::try_from(position).unwrap();
                let block = sequence.tables[&(Pool::Full, position / size)];
                sequence.push(self.memory[&(Pool::Full, block, position % size)].1);
            }
            let start = match run.start {
                Start::At(position) => position.index(),
                Start::AfterPrevious => sequence.tokens.len(),
            };
            assert!(start <= sequence.tokens.len());
            sequence.tokens.truncate(start);
            sequence.hashes.truncate(start);
            match &run.tokens {
                Tokens::Given(tokens) => tokens.iter().for_each(|&token| sequence.push(token)),
                Tokens::Previous => sequence.push(sequence.last.unwrap()),
                Tokens::Draft(_) => unreachable!(),
            }
            for end in start + 1..=sequence.tokens.len() {
                let (position, token) = (u32::try_from(end - 1).unwrap(), sequence.tokens[end - 1]);
                for pool in [Pool::Full, Pool::Window] {
                    let block = sequence.tables[&(pool, position / size)];
                    self.memory.insert((pool, block, position % size), (sequence.hashes[end - 1], token));
                }
                // Every position this row sees must still hold what belongs there.
                for (pool, from) in [(Pool::Full, 0), (Pool::Window, (position + 1).saturating_sub(WINDOW))] {
                    for seen in from..=position {
                        let block = sequence.tables[&(pool, seen / size)];
                        let expected = (sequence.hashes[seen as usize], sequence.tokens[seen as usize]);
                        let found = self.memory.get(&(pool, block, seen % size));
                        assert_eq!(found, Some(&expected), "{pool:?} {} at {seen} of {}", run.seq, position);
                    }
                }
            }
            if run.outputs == Outputs::AllLogits {
                let (position, logits) = (Position(0), vec![0.0; run.tokens.rows()]);
                rows.push(RowsResult { seq: run.seq, position, tokens: Vec::new(), logprobs: Vec::new(), logits });
            }
            if run.outputs == Outputs::Sample {
                let token = next_token(&sequence.tokens);
                sequence.last = Some(token);
                let position = Position(u32::try_from(sequence.tokens.len()).unwrap());
                let tokens = vec![token];
                rows.push(RowsResult { seq: run.seq, position, tokens, logprobs: Vec::new(), logits: Vec::new() });
            }
        }
        StepResult { fence: plan.header.fence, rank: self.rank, rows, ..StepResult::default() }
    }
}

pub(crate) fn limits(seqs_max: u32, rows: u32, blocks: u32) -> Limits {
    let window_blocks = seqs_max * (WINDOW.div_ceil(16) + 2) + rows.div_ceil(16) + blocks / 4;
    Limits { seqs_max, step_rows_max: rows, block_size: 16, full_blocks: blocks, window_blocks, context: blocks * 16 }
}

pub(crate) fn config(limits: Limits, ranks: u32) -> EngineConfig {
    let config = EngineConfig::of(WINDOW, VOCAB, limits, ranks);
    EngineConfig { queue_max: 1000, deadline_ms: 1000, checked: true, ..config }
}

pub(crate) fn request(seq: u64, prompt: &[u32], max_tokens: u32) -> Request {
    let prompt = prompt.iter().map(|&t| TokenId(t)).collect();
    Request { stop_tokens: vec![TokenId(3)], ..Request::greedy(SeqId(seq), prompt, max_tokens) }
}

/// What the request gives alone.
pub(crate) fn alone(request: &Request) -> (Vec<TokenId>, FinishReason) {
    let mut tokens = request.prompt.clone();
    for _ in 0..request.max_tokens {
        let token = next_token(&tokens);
        tokens.push(token);
        if request.stop_tokens.contains(&token) {
            return (tokens[request.prompt.len()..].to_vec(), FinishReason::Stop(token));
        }
    }
    (tokens[request.prompt.len()..].to_vec(), FinishReason::Length)
}

/// An engine and its ranks.
pub(crate) struct Cell {
    pub(crate) engine: Engine,
    workers: Vec<VirtualRank>,
    inbox: Vec<VecDeque<StepPlan>>,
    /// The plans of the last step.
    pub(crate) plans: Vec<StepPlan>,
    /// Everything that was told, in order.
    pub(crate) events: Vec<Event>,
}

impl Cell {
    pub(crate) fn new(config: EngineConfig) -> Self {
        let workers = (0..config.ranks).map(|rank| VirtualRank::new(rank, config.limits)).collect();
        let inbox = vec![VecDeque::new(); config.ranks as usize];
        let engine = Engine::new(config, Fence::default());
        Self { engine, workers, inbox, plans: Vec::new(), events: Vec::new() }
    }

    /// Plans a step, if one can be planned.
    pub(crate) fn plan(&mut self) -> bool {
        let Some(plans) = self.engine.plan() else { return false };
        self.inbox.iter_mut().zip(&plans).for_each(|(inbox, plan)| inbox.push_back(plan.clone()));
        self.plans = plans;
        true
    }

    /// What every rank answers to its first step that waits for an answer, without telling the engine.
    pub(crate) fn results(&mut self) -> Vec<StepResult> {
        let ranks = self.workers.iter_mut().zip(&mut self.inbox);
        ranks.filter_map(|(worker, inbox)| inbox.pop_front().map(|plan| worker.run(&plan))).collect()
    }

    /// Every rank answers its first step that waits for an answer.
    pub(crate) fn answer(&mut self) -> bool {
        let mut any = false;
        for (worker, inbox) in self.workers.iter_mut().zip(&mut self.inbox) {
            let Some(plan) = inbox.pop_front() else { continue };
            any = true;
            self.events.extend(self.engine.apply(worker.run(&plan)).unwrap());
        }
        any
    }

    /// As many steps as may be under way are planned, then the first is answered.
    pub(crate) fn step(&mut self) -> bool {
        while self.plan() {}
        self.answer()
    }

    pub(crate) fn run(&mut self) {
        for _ in 0..1_000_000 {
            if !self.step() {
                assert!(self.engine.is_idle(), "nothing can be planned, but not all have ended");
                return;
            }
        }
        panic!("no end in sight");
    }

    /// The tokens of a sequence.
    pub(crate) fn tokens(&self, seq: u64) -> Vec<TokenId> {
        let of = |event: &Event| match event {
            Event::Token { seq: of, token, .. } if of.0 == seq => Some(*token),
            _ => None,
        };
        self.events.iter().filter_map(of).collect()
    }

    /// The tokens of a sequence's prompt that were found in the cache, once it has started.
    pub(crate) fn cached(&self, seq: u64) -> Option<u32> {
        self.events.iter().find_map(|event| match event {
            Event::Started { seq: of, cached } if of.0 == seq => Some(*cached),
            _ => None,
        })
    }

    /// In which order sequences started.
    pub(crate) fn started(&self) -> Vec<u64> {
        let of = |event: &Event| if let Event::Started { seq, .. } = event { Some(seq.0) } else { None };
        self.events.iter().filter_map(of).collect()
    }
}

/// gpt-oss-20b.
pub(crate) fn gpt_oss() -> ModelConfig {
    let rope = Rope {
        theta: 150_000.0,
        factor: 32.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: 4096,
        truncate: false,
        attention_factor: 1.35,
    };
    let kind = |layer| if layer % 2 == 0 { LayerKind::Sliding } else { LayerKind::Full };
    ModelConfig {
        hidden: 2880,
        intermediate: 2880,
        layers: (0..24).map(kind).collect(),
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        experts: 32,
        top_k: 4,
        window: 128,
        vocab: 201_088,
        eps: 1e-5,
        swiglu_limit: 7.0,
        rope,
        context: 131_072,
        eos: vec![200_002],
    }
}
