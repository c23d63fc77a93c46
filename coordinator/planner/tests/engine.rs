//! The engine over a virtual worker: whatever arrives, is cancelled or runs out of room, every request ends exactly
//! once and with the tokens it would have had alone. The engine checks its invariants after every call.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, VecDeque};

use phalanx_planner::{Class, Engine, EngineConfig, Event, FinishReason, Refused, Request};
use phalanx_proto::{
    Fence, Limits, Outputs, Pool, Position, Rank, RowsResult, SeqId, Start, StepPlan, StepResult, TokenId, Tokens,
};
use proptest::prelude::*;

const VOCAB: u32 = 97;
const WINDOW: u32 = 24;

/// The token after `tokens`: a function of all of them.
fn next_token(tokens: &[TokenId]) -> TokenId {
    TokenId(tokens.iter().fold(7u32, |h, t| h.wrapping_mul(31).wrapping_add(t.0 + 1)) % VOCAB)
}

/// A hash of a prefix: what the keys and values of its last position depend on.
fn prefix_hash(tokens: &[TokenId]) -> u64 {
    tokens.iter().fold(11u64, |h, t| (h ^ u64::from(t.0 + 1)).wrapping_mul(0x100_0000_01b3))
}

/// A rank that keeps what its KV memory would hold, block by block, and reads it back from there.
struct VirtualRank {
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
    cached: usize,
    last: Option<TokenId>,
}

impl VirtualRank {
    fn new(rank: u32, limits: Limits) -> Self {
        Self { rank: Rank(rank), limits, memory: BTreeMap::new(), sequences: BTreeMap::new() }
    }

    fn run(&mut self, plan: &StepPlan) -> StepResult {
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
                sequence.tokens.push(self.memory[&(Pool::Full, block, position % size)].1);
            }
            let start = match run.start {
                Start::At(position) => position.index(),
                Start::AfterPrevious => sequence.tokens.len(),
            };
            assert!(start <= sequence.tokens.len());
            sequence.tokens.truncate(start);
            match &run.tokens {
                Tokens::Given(tokens) => sequence.tokens.extend(tokens),
                Tokens::Previous => sequence.tokens.push(sequence.last.unwrap()),
                Tokens::Draft(_) => unreachable!(),
            }
            for end in start + 1..=sequence.tokens.len() {
                let (position, token) = (u32::try_from(end - 1).unwrap(), sequence.tokens[end - 1]);
                for pool in [Pool::Full, Pool::Window] {
                    let block = sequence.tables[&(pool, position / size)];
                    self.memory.insert((pool, block, position % size), (prefix_hash(&sequence.tokens[..end]), token));
                }
                // Every position this row sees must still hold what belongs there.
                for (pool, from) in [(Pool::Full, 0), (Pool::Window, (position + 1).saturating_sub(WINDOW))] {
                    for seen in from..=position {
                        let block = sequence.tables[&(pool, seen / size)];
                        let tokens = &sequence.tokens[..=seen as usize];
                        let expected = (prefix_hash(tokens), tokens[seen as usize]);
                        let found = self.memory.get(&(pool, block, seen % size));
                        assert_eq!(found, Some(&expected), "{pool:?} {} at {seen} of {}", run.seq, position);
                    }
                }
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

fn limits(seqs_max: u32, rows: u32, blocks: u32) -> Limits {
    let window_blocks = seqs_max * (WINDOW.div_ceil(16) + 2) + rows.div_ceil(16) + blocks / 4;
    Limits { seqs_max, step_rows_max: rows, block_size: 16, full_blocks: blocks, window_blocks, context: blocks * 16 }
}

fn config(limits: Limits, ranks: u32) -> EngineConfig {
    let config = EngineConfig::of(WINDOW, VOCAB, limits, ranks);
    EngineConfig { queue_max: 1000, deadline_ms: 1000, checked: true, ..config }
}

fn request(seq: u64, prompt: &[u32], max_tokens: u32) -> Request {
    let prompt = prompt.iter().map(|&t| TokenId(t)).collect();
    Request { stop_tokens: vec![TokenId(3)], ..Request::greedy(SeqId(seq), prompt, max_tokens) }
}

/// What the request gives alone.
fn alone(request: &Request) -> (Vec<TokenId>, FinishReason) {
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

/// One request of a random workload.
#[derive(Clone, Debug)]
struct Arrival {
    request: Request,
    at: usize,
    cancelled: Option<usize>,
}

fn arrival() -> impl Strategy<Value = (Vec<u32>, u32, usize, Option<usize>, bool, u64)> {
    // Prompts that begin alike, and some that do not.
    let shared = (0usize..45, prop::collection::vec(0u32..VOCAB, 1..15))
        .prop_map(|(len, end)| (0..len as u32).map(|i| i * 7 % VOCAB).chain(end).collect::<Vec<u32>>());
    let own = prop::collection::vec(0u32..VOCAB, 1..60);
    let cancelled = prop::option::weighted(0.2, 0usize..120);
    (prop_oneof![shared, own], 0u32..36, 0usize..80, cancelled, prop::bool::weighted(0.3), 0u64..2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_request_ends_once_with_its_own_tokens(
        ranks in 1u32..5,
        depth in 1u32..5,
        seqs_max in 1u32..6,
        rows in 1u32..40,
        chunk_max in 1u32..40,
        blocks in 6u32..14,
        prefix_cache in prop::bool::weighted(0.7),
        arrivals in prop::collection::vec(arrival(), 1..24),
        // Which rank answers next, or that a step is planned first.
        order in prop::collection::vec(0u32..8, 64),
    ) {
        let limits = limits(seqs_max, rows.max(seqs_max), blocks);
        let config = EngineConfig { chunk_max, depth, prefix_cache, ..config(limits, ranks) };
        let mut engine = Engine::new(config, Fence::default());
        let mut workers: Vec<VirtualRank> = (0..ranks).map(|r| VirtualRank::new(r, limits)).collect();
        let mut inbox: Vec<VecDeque<StepPlan>> = vec![VecDeque::new(); ranks as usize];
        let arrivals: Vec<Arrival> = (0u64..)
            .zip(arrivals)
            .map(|(seq, (prompt, max, at, cancelled, batch, salt))| {
                let class = if batch { Class::Batch } else { Class::Interactive };
                Arrival { request: Request { class, salt, ..request(seq, &prompt, max) }, at, cancelled }
            })
            .collect();
        let mut got: BTreeMap<SeqId, Vec<TokenId>> = BTreeMap::new();
        let mut ended: BTreeMap<SeqId, FinishReason> = BTreeMap::new();
        let mut cancelled = Vec::new();
        for step in 0.. {
            prop_assert!(step < 100_000, "no end in sight");
            for arrival in arrivals.iter().filter(|arrival| arrival.at == step) {
                engine.submit(arrival.request.clone()).unwrap();
            }
            for Arrival { request, cancelled: at, .. } in &arrivals {
                if *at == Some(step) && !ended.contains_key(&request.seq) {
                    engine.cancel(request.seq);
                    cancelled.push(request.seq);
                }
            }
            let choice = order[step % order.len()];
            let busy: Vec<usize> = (0..ranks as usize).filter(|&rank| !inbox[rank].is_empty()).collect();
            if choice < 3 || busy.is_empty() {
                match engine.plan() {
                    Some(plans) => {
                        prop_assert_eq!(plans.len(), workers.len());
                        inbox.iter_mut().zip(plans).for_each(|(inbox, plan)| inbox.push_back(plan));
                    }
                    None if busy.is_empty() && arrivals.iter().all(|arrival| arrival.at < step) => break,
                    None => {}
                }
                continue;
            }
            let rank = busy[choice as usize % busy.len()];
            let plan = inbox[rank].pop_front().unwrap();
            for event in engine.apply(workers[rank].run(&plan)).unwrap() {
                match event {
                    Event::Token { seq, token, .. } => {
                        prop_assert!(!ended.contains_key(&seq));
                        got.entry(seq).or_default().push(token);
                    }
                    Event::Finished { seq, reason } => {
                        prop_assert!(ended.insert(seq, reason).is_none(), "{} ended twice", seq);
                    }
                    Event::Started { .. } => {}
                    Event::Logits { .. } => prop_assert!(false, "nobody asked for logits"),
                }
            }
        }
        prop_assert!(engine.is_idle(), "nothing can be planned, but not all have ended");
        for Arrival { request, at, cancelled: cancel } in &arrivals {
            let never_came = cancel.is_some_and(|c| c < *at);
            if cancelled.contains(&request.seq) && !never_came {
                prop_assert!(!ended.contains_key(&request.seq));
                continue;
            }
            let (tokens, reason) = alone(request);
            prop_assert_eq!(got.get(&request.seq).cloned().unwrap_or_default(), tokens);
            prop_assert_eq!(ended.get(&request.seq), Some(&reason));
        }
        prop_assert_eq!(engine.stats().kv_usage, 0.0);
    }
}

#[test]
fn what_can_never_be_served_is_refused_before_it_waits() {
    let mut engine = Engine::new(config(limits(2, 16, 4), 1), Fence::default());
    let too_long = engine.submit(request(1, &[1; 60], 5)).unwrap_err();
    assert_eq!(too_long, Refused::ContextLength { prompt: 60, max_tokens: 5, context: 64 });
    assert_eq!(engine.submit(request(1, &[], 5)).unwrap_err(), Refused::Prompt);
    assert_eq!(engine.submit(request(1, &[VOCAB], 5)).unwrap_err(), Refused::Prompt);
    assert!(engine.is_idle());
}

#[test]
fn a_full_queue_refuses() {
    let mut engine = Engine::new(EngineConfig { queue_max: 1, ..config(limits(2, 16, 4), 1) }, Fence::default());
    engine.submit(request(1, &[1], 5)).unwrap();
    assert_eq!(engine.submit(request(2, &[1], 5)).unwrap_err(), Refused::QueueFull { waiting: 1, tokens: 1 });
}

#[test]
fn requests_share_a_step_and_decode_rows_come_first() {
    let limits = limits(4, 20, 40);
    let mut engine = Engine::new(EngineConfig { depth: 1, ..config(limits, 1) }, Fence::default());
    let mut worker = VirtualRank::new(0, limits);
    engine.submit(request(1, &[1; 5], 9)).unwrap();
    let plans = engine.plan().unwrap();
    assert!(engine.plan().is_none(), "one step at a time");
    engine.apply(worker.run(&plans[0])).unwrap();
    engine.submit(request(2, &[2; 30], 9)).unwrap();
    let plan = &engine.plan().unwrap()[0];
    let shape: Vec<(u64, usize)> = plan.rows.iter().map(|rows| (rows.seq.0, rows.tokens.rows())).collect();
    assert_eq!(shape, [(1, 1), (2, 19)]);
    assert_eq!(plan.header.rows_of_rank, [20]);
}

#[test]
fn a_result_of_another_step_is_refused() {
    let limits = limits(4, 20, 40);
    let mut engine = Engine::new(config(limits, 1), Fence::default());
    engine.submit(request(1, &[1; 5], 9)).unwrap();
    let plan = engine.plan().unwrap().remove(0);
    let stale = StepResult { rank: Rank(0), ..StepResult::default() };
    assert!(engine.apply(stale).is_err());
    let mut worker = VirtualRank::new(0, limits);
    let result = worker.run(&plan);
    let other = StepResult { rows: Vec::new(), ..result.clone() };
    assert!(engine.apply(other).is_err());
}
