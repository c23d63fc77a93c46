//! The engine over a virtual worker: whatever arrives, is cancelled or runs out of room, every request ends exactly
//! once and with the tokens it would have had alone. The engine checks its invariants after every call.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use phalanx_planner::{Engine, EngineConfig, Event, FinishReason, Refused, Request, Want};
use phalanx_proto::{
    Fence, Limits, Outputs, Pool, Position, Rank, RowsResult, Sampling, SeqId, Start, StepPlan, StepResult, TokenId,
    Tokens,
};
use proptest::prelude::*;

const VOCAB: u32 = 97;
const WINDOW: u32 = 24;

/// The token after `tokens`: a function of all of them.
fn next_token(tokens: &[TokenId]) -> TokenId {
    TokenId(tokens.iter().fold(7u32, |h, t| h.wrapping_mul(31).wrapping_add(t.0 + 1)) % VOCAB)
}

/// A rank that keeps what its KV memory would hold, block by block, and reads it back from there.
struct VirtualRank {
    rank: Rank,
    limits: Limits,
    /// (pool, block, offset) -> the token prefix's length and the token written there.
    memory: BTreeMap<(Pool, u32, u32), (SeqId, u32, TokenId)>,
    sequences: BTreeMap<SeqId, VirtualSequence>,
}

#[derive(Default)]
struct VirtualSequence {
    tables: BTreeMap<(Pool, u32), u32>,
    tokens: Vec<TokenId>,
    last: Option<TokenId>,
}

impl VirtualRank {
    fn run(&mut self, plan: &StepPlan) -> StepResult {
        plan.check(&self.limits, VOCAB).unwrap();
        for seq in &plan.release {
            assert!(self.sequences.remove(seq).is_some(), "released {seq} does not live on {}", self.rank);
        }
        for admission in &plan.admit {
            assert!(self.sequences.insert(admission.seq, VirtualSequence::default()).is_none());
        }
        assert!(self.sequences.len() <= self.limits.seqs_max as usize);
        let mut rows = Vec::new();
        for run in &plan.rows {
            let sequence = self.sequences.get_mut(&run.seq).unwrap();
            for grant in &run.grants {
                sequence.tables.insert((grant.pool, grant.index), grant.block.0);
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
            let size = self.limits.block_size;
            for (position, &token) in (0u32..).zip(&sequence.tokens).skip(start) {
                for pool in [Pool::Full, Pool::Window] {
                    let block = sequence.tables[&(pool, position / size)];
                    self.memory.insert((pool, block, position % size), (run.seq, position, token));
                }
                // Every position this row sees must still hold what the sequence wrote there.
                for (pool, from) in [(Pool::Full, 0), (Pool::Window, (position + 1).saturating_sub(WINDOW))] {
                    for seen in from..=position {
                        let block = sequence.tables[&(pool, seen / size)];
                        let expected = (run.seq, seen, sequence.tokens[seen as usize]);
                        assert_eq!(self.memory.get(&(pool, block, seen % size)), Some(&expected));
                    }
                }
            }
            if run.outputs == Outputs::Sample {
                let token = next_token(&sequence.tokens);
                sequence.last = Some(token);
                let position = Position(u32::try_from(sequence.tokens.len()).unwrap());
                rows.push(RowsResult { seq: run.seq, position, tokens: vec![token], logits: Vec::new() });
            }
        }
        StepResult { fence: plan.header.fence, rank: self.rank, rows, ..StepResult::default() }
    }
}

fn limits(seqs_max: u32, rows: u32, blocks: u32) -> Limits {
    let window_blocks = seqs_max * (WINDOW.div_ceil(16) + 2) + rows.div_ceil(16);
    Limits { seqs_max, step_rows_max: rows, block_size: 16, full_blocks: blocks, window_blocks, context: blocks * 16 }
}

fn config(limits: Limits, ranks: u32) -> EngineConfig {
    EngineConfig {
        limits,
        ranks,
        window: WINDOW,
        vocab: VOCAB,
        queue_max: 1000,
        chunk_max: limits.step_rows_max,
        deadline_ms: 1000,
    }
}

fn request(seq: u64, prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        seq: SeqId(seq),
        prompt: prompt.iter().map(|&t| TokenId(t)).collect(),
        max_tokens,
        sampling: Sampling::GREEDY,
        stop_tokens: vec![TokenId(3)],
        want: Want::Tokens,
    }
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_request_ends_once_with_its_own_tokens(
        ranks in 1u32..5,
        seqs_max in 1u32..6,
        rows in 1u32..40,
        chunk_max in 1u32..40,
        blocks in 6u32..14,
        requests in prop::collection::vec(
            (prop::collection::vec(0u32..VOCAB, 1..60), 0u32..36, 0usize..40, prop::option::weighted(0.2, 0usize..60)),
            1..24,
        ),
    ) {
        let limits = limits(seqs_max, rows.max(seqs_max), blocks);
        let config = EngineConfig { chunk_max, ..config(limits, ranks) };
        let mut engine = Engine::new(config, Fence::default());
        let mut workers: Vec<VirtualRank> = (0..ranks)
            .map(|r| VirtualRank { rank: Rank(r), limits, memory: BTreeMap::new(), sequences: BTreeMap::new() })
            .collect();
        let requests: Vec<(Request, usize, Option<usize>)> = (0u64..)
            .zip(requests)
            .map(|(seq, (prompt, max, arrives, cancelled))| (request(seq, &prompt, max), arrives, cancelled))
            .collect();
        let mut got: BTreeMap<SeqId, Vec<TokenId>> = BTreeMap::new();
        let mut ended: BTreeMap<SeqId, FinishReason> = BTreeMap::new();
        let mut cancelled = Vec::new();
        for step in 0.. {
            prop_assert!(step < 100_000, "no end in sight");
            for (request, arrives, _) in &requests {
                if *arrives == step {
                    engine.submit(request.clone()).unwrap();
                }
            }
            let plans = engine.plan();
            for (request, _, cancel) in &requests {
                // Also while the step is under way.
                if *cancel == Some(step) && !ended.contains_key(&request.seq) {
                    engine.cancel(request.seq);
                    cancelled.push(request.seq);
                }
            }
            let last_arrival = requests.iter().map(|r| r.1).max().unwrap();
            let Some(plans) = plans else {
                if step > last_arrival && engine.is_idle() { break }
                continue;
            };
            prop_assert_eq!(plans.len(), workers.len());
            for (worker, plan) in workers.iter_mut().zip(&plans).rev() {
                for event in engine.apply(worker.run(plan)).unwrap() {
                    match event {
                        Event::Token { seq, token } => {
                            prop_assert!(!ended.contains_key(&seq));
                            got.entry(seq).or_default().push(token);
                        }
                        Event::Finished { seq, reason } => {
                            prop_assert!(ended.insert(seq, reason).is_none(), "{} ended twice", seq);
                        }
                        Event::Logits { .. } => prop_assert!(false, "nobody asked for logits"),
                    }
                }
            }
        }
        for (request, arrives, cancel) in &requests {
            let never_came = cancel.is_some_and(|c| c < *arrives);
            if cancelled.contains(&request.seq) && !never_came {
                prop_assert!(!ended.contains_key(&request.seq));
                continue;
            }
            let (tokens, reason) = alone(request);
            prop_assert_eq!(got.get(&request.seq).cloned().unwrap_or_default(), tokens);
            prop_assert_eq!(ended.get(&request.seq), Some(&reason));
        }
        prop_assert_eq!(engine.kv_usage(), 0.0);
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
    assert_eq!(engine.submit(request(2, &[1], 5)).unwrap_err(), Refused::QueueFull { waiting: 1 });
}

#[test]
fn requests_share_a_step_and_decode_rows_come_first() {
    let limits = limits(4, 20, 40);
    let mut engine = Engine::new(config(limits, 1), Fence::default());
    let mut worker = VirtualRank { rank: Rank(0), limits, memory: BTreeMap::new(), sequences: BTreeMap::new() };
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
    let mut worker = VirtualRank { rank: Rank(0), limits, memory: BTreeMap::new(), sequences: BTreeMap::new() };
    let result = worker.run(&plan);
    let other = StepResult { rows: Vec::new(), ..result.clone() };
    assert!(engine.apply(other).is_err());
}
