//! The engine over virtual ranks: whatever arrives, is cancelled or runs out of room, every request ends exactly
//! once and with the tokens it would have had alone. The engine checks its invariants after every call.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::{BTreeMap, VecDeque};

use phalanx_planner::{Class, Engine, EngineConfig, Event, FinishReason, Refused, Request};
use phalanx_proto::{Fence, Rank, SeqId, StepPlan, StepResult, TokenId};
use proptest::prelude::*;
use support::{VOCAB, VirtualRank, alone, config, limits, request};

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
    for seq in 1..=3 {
        engine.submit(request(seq, &[1], 5)).unwrap();
    }
    let refused = |waiting| Refused::QueueFull { waiting, tokens: waiting as u64 };
    assert_eq!(engine.submit(request(4, &[1], 5)).unwrap_err(), refused(3), "two have seats and one waits");
    engine.plan().unwrap();
    engine.cancel(SeqId(1));
    assert_eq!(engine.submit(request(4, &[1], 5)).unwrap_err(), refused(1), "the free seat is for who waits");
}

#[test]
fn prompts_of_a_request_with_many_choices_are_not_too_long_for_an_idle_engine() {
    let few = EngineConfig { queue_tokens_max: 20, ..config(limits(2, 16, 8), 1) };
    let mut engine = Engine::new(few, Fence::default());
    for seq in 1..=2 {
        engine.submit(request(seq, &[1; 15], 5)).unwrap();
    }
    let refused = engine.submit(request(3, &[1; 15], 5)).unwrap_err();
    assert_eq!(refused, Refused::QueueFull { waiting: 2, tokens: 30 }, "there are two seats");
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
