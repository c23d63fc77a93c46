//! Who is served when, and what a cached prefix saves.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use phalanx_planner::cost::{Calibrated, Cost, DeadlineRule, Formats, Hardware, RankShape, StepShape};
use phalanx_planner::{Class, EngineConfig, Event, FinishReason, Refused, Request, Want};
use phalanx_proto::{ConstraintStart, ConstraintTable, Layout, Outputs, Phase, SeqId, TableId, TokenId, Tokens};
use support::{Cell, VOCAB, WINDOW, alone, config, gpt_oss, limits, request};

/// A prompt of `len` tokens that no other `salt` shares.
fn prompt(salt: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * 31 + salt * 7 + i * i % 13) % VOCAB).collect()
}

/// A request that stops only at its most tokens.
fn endless(seq: u64, prompt: &[u32], max_tokens: u32) -> Request {
    Request { stop_tokens: Vec::new(), ..request(seq, prompt, max_tokens) }
}

fn rows_of(cell: &Cell) -> Vec<Vec<(u64, usize)>> {
    let of_rank = |plan: &phalanx_proto::StepPlan| plan.rows.iter().map(|r| (r.seq.0, r.tokens.rows())).collect();
    cell.plans.iter().map(of_rank).collect()
}

#[test]
fn a_prompt_seen_before_is_computed_from_its_last_whole_block_on() {
    let mut cell = Cell::new(config(limits(4, 64, 64), 1));
    let same = prompt(1, 100);
    cell.engine.submit(endless(1, &same, 4)).unwrap();
    cell.run();
    cell.engine.submit(endless(2, &same, 4)).unwrap();
    cell.plan();
    assert_eq!(rows_of(&cell), [[(2, 4)]], "96 of 100 tokens are there");
    assert_eq!(cell.plans[0].admit[0].cached, 96);
    cell.run();
    assert_eq!((cell.cached(1), cell.cached(2)), (Some(0), Some(96)));
    assert_eq!(cell.tokens(1), cell.tokens(2));
    let stats = cell.engine.stats();
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (200, 96));
}

#[test]
fn one_token_is_always_computed() {
    let mut cell = Cell::new(config(limits(4, 64, 64), 1));
    let same = prompt(1, 96);
    for seq in 1..=2 {
        cell.engine.submit(endless(seq, &same, 2)).unwrap();
        cell.run();
    }
    assert_eq!(cell.cached(2), Some(80), "the block that ends the prompt holds the row to sample from");
}

#[test]
fn the_next_turn_finds_prompt_and_answer() {
    let mut cell = Cell::new(config(limits(4, 64, 64), 1));
    let first = endless(1, &prompt(1, 50), 30);
    let mut second = first.prompt.clone();
    second.extend(alone(&first).0);
    cell.engine.submit(first).unwrap();
    cell.run();
    let second: Vec<u32> = second.iter().map(|t| t.0).chain(prompt(9, 5)).collect();
    cell.engine.submit(endless(2, &second, 4)).unwrap();
    cell.run();
    assert_eq!(cell.cached(2), Some(64), "79 tokens were computed, 64 of them in whole blocks");
}

#[test]
fn salts_divide_what_is_shared() {
    let mut cell = Cell::new(config(limits(4, 64, 64), 1));
    let same = prompt(1, 60);
    for (seq, salt) in [(1, 0), (2, 1), (3, 1)] {
        cell.engine.submit(Request { salt, ..endless(seq, &same, 2) }).unwrap();
        cell.run();
    }
    assert_eq!([1, 2, 3].map(|seq| cell.cached(seq).unwrap()), [0, 0, 48]);
}

#[test]
fn other_numerics_share_nothing() {
    let of = |numerics| EngineConfig { numerics, ..config(limits(4, 64, 64), 1) };
    let chains = [1, 2].map(|numerics| {
        let root = phalanx_planner::prefix::BlockHash::root(0, of(numerics).numerics);
        phalanx_planner::prefix::chain(&request(1, &prompt(1, 64), 1).prompt, 16, root)
    });
    assert!(chains[0].iter().zip(&chains[1]).all(|(a, b)| a != b));
}

#[test]
fn without_the_cache_nothing_is_kept() {
    let mut cell = Cell::new(EngineConfig { prefix_cache: false, ..config(limits(4, 64, 64), 1) });
    for seq in 1..=2 {
        cell.engine.submit(endless(seq, &prompt(1, 60), 2)).unwrap();
        cell.run();
    }
    assert_eq!(cell.cached(2), Some(0));
    assert_eq!(cell.engine.stats().cache_usage, 0.0);
}

#[test]
fn a_branch_in_the_middle_of_a_prompt_needs_its_window() {
    // The window pool keeps what it has room for: a prefix of a long prompt is found as long as that is there.
    let mut cell = Cell::new(config(limits(2, 64, 64), 1));
    let shared = prompt(1, 160);
    let ask = |end: u32| -> Vec<u32> { shared.iter().copied().chain(prompt(end, 20)).collect() };
    for seq in 1..=2 {
        cell.engine.submit(endless(seq, &ask(u32::try_from(seq).unwrap() + 50), 2)).unwrap();
        cell.run();
    }
    assert_eq!(cell.cached(2), Some(160));
}

#[test]
fn what_is_cached_gives_way_to_what_runs_and_the_newest_stays() {
    let limits = limits(2, 64, 16);
    let mut cell = Cell::new(config(limits, 1));
    for seq in 0..5u32 {
        cell.engine.submit(endless(u64::from(seq), &prompt(seq, 70), 2)).unwrap();
        cell.run();
    }
    assert!(cell.engine.stats().cache_usage > 0.5, "the cache fills what is free");
    cell.engine.submit(endless(10, &prompt(4, 70), 2)).unwrap();
    cell.engine.submit(endless(11, &prompt(0, 70), 2)).unwrap();
    cell.run();
    assert_eq!((cell.cached(10), cell.cached(11)), (Some(64), Some(0)), "the oldest went first");
}

#[test]
fn sequences_that_compute_the_same_at_once_end_up_with_one_copy() {
    let mut cell = Cell::new(config(limits(4, 200, 64), 1));
    for seq in 1..=3 {
        cell.engine.submit(endless(seq, &prompt(1, 64), 40)).unwrap();
    }
    while cell.tokens(3).is_empty() {
        cell.step();
    }
    cell.step();
    // Four blocks of the prompt once, and for each sequence those it writes to.
    let held = cell.engine.stats().kv_usage * 64.0;
    assert!(held <= 4.0 + 3.0 * 2.0, "{held} blocks are held");
    cell.run();
    assert_eq!(cell.tokens(1), cell.tokens(2));
    assert_eq!(cell.tokens(1), cell.tokens(3));
}

#[test]
fn steps_go_out_before_results_are_back() {
    let mut cell = Cell::new(EngineConfig { depth: 3, ..config(limits(4, 64, 64), 1) });
    cell.engine.submit(endless(1, &prompt(1, 5), 9)).unwrap();
    assert!(cell.plan() && cell.plan() && cell.plan());
    assert_eq!(cell.plans[0].rows[0].tokens, Tokens::Previous, "the token that nobody here knows yet");
    assert!(!cell.plan(), "three are under way");
    cell.answer();
    assert!(cell.plan());
    assert_eq!(cell.plans[0].header.applied.0, 1);
    cell.run();
    assert_eq!(cell.tokens(1).len(), 9);
    assert_eq!(cell.engine.fence().step.0, 9, "no step for tokens beyond the last");
}

#[test]
fn what_is_sampled_after_a_stop_token_is_nobodys() {
    let lone = endless(1, &prompt(1, 5), 9);
    let stop = alone(&lone).0[3];
    let first = alone(&lone).0.iter().position(|&token| token == stop).unwrap();
    let mut cell = Cell::new(EngineConfig { depth: 4, ..config(limits(4, 64, 64), 1) });
    cell.engine.submit(Request { stop_tokens: vec![stop], ..lone.clone() }).unwrap();
    cell.run();
    assert_eq!(cell.tokens(1), alone(&lone).0[..=first]);
    assert_eq!(cell.events.last(), Some(&Event::Finished { seq: SeqId(1), reason: FinishReason::Stop(stop) }));
}

#[test]
fn interactive_requests_go_before_batch() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(1, 64, 64), 1) });
    for seq in 1..=4 {
        let class = if seq <= 2 { Class::Batch } else { Class::Interactive };
        cell.engine.submit(Request { class, ..endless(seq, &prompt(1, 5), 3) }).unwrap();
    }
    cell.run();
    assert_eq!(cell.started(), [3, 4, 1, 2]);
}

#[test]
fn a_batch_request_gives_its_place_to_an_interactive_one_and_still_ends() {
    let mut cell = Cell::new(config(limits(1, 64, 64), 1));
    let batch = Request { class: Class::Batch, ..endless(1, &prompt(1, 40), 30) };
    let expected = alone(&batch).0;
    cell.engine.submit(batch).unwrap();
    for seq in 2..40 {
        cell.step();
        cell.engine.submit(endless(seq, &prompt(2, 5), 5)).unwrap();
    }
    cell.run();
    assert_eq!(cell.tokens(1), expected);
    let preemptions = cell.engine.stats().preemptions;
    assert!((1..=4).contains(&preemptions), "{preemptions} preemptions: more would never let it end");
}

#[test]
fn a_steady_stream_of_interactive_requests_does_not_starve_batch() {
    let mut cell = Cell::new(config(limits(2, 64, 64), 1));
    cell.engine.submit(Request { class: Class::Batch, ..endless(1, &prompt(1, 900), 20) }).unwrap();
    let mut seq = 2;
    while !cell.events.iter().any(|e| matches!(e, Event::Finished { seq: SeqId(1), .. })) {
        while cell.engine.waiting() < 4 {
            cell.engine.submit(endless(seq, &prompt(2, 5), 5)).unwrap();
            seq += 1;
        }
        cell.step();
        assert!(seq < 2000, "it is passed for ever");
    }
}

#[test]
fn when_blocks_run_out_the_last_to_come_gives_way() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(2, 64, 8), 1) });
    let requests = [endless(1, &prompt(1, 40), 60), endless(2, &prompt(2, 40), 60)];
    for request in &requests {
        cell.engine.submit(request.clone()).unwrap();
    }
    cell.run();
    assert!(cell.engine.stats().preemptions > 0);
    let finished = |seq| cell.events.iter().position(|e| matches!(e, Event::Finished { seq: s, .. } if s.0 == seq));
    assert!(finished(1) < finished(2));
    for request in &requests {
        assert_eq!(cell.tokens(request.seq.0), alone(request).0);
    }
}

#[test]
fn a_rank_is_not_promised_blocks_that_others_will_take() {
    // Two prompts of 13 blocks do not fit 20, though only one chunk of the first is computed yet.
    let mut cell = Cell::new(EngineConfig { chunk_max: 16, depth: 1, ..config(limits(4, 512, 20), 1) });
    for seq in 1..=2 {
        cell.engine.submit(endless(seq, &prompt(u32::try_from(seq).unwrap(), 200), 2)).unwrap();
    }
    cell.step();
    assert_eq!((cell.engine.running(), cell.engine.waiting()), (1, 1));
    cell.run();
    assert_eq!(cell.engine.stats().preemptions, 0, "nobody is let in to be sent back");
    // A third fits beside the first, to the block.
    let mut cell = Cell::new(EngineConfig { chunk_max: 16, depth: 1, ..config(limits(4, 512, 20), 1) });
    cell.engine.submit(endless(1, &prompt(1, 200), 2)).unwrap();
    cell.engine.submit(endless(2, &prompt(2, 111), 2)).unwrap();
    cell.step();
    assert_eq!((cell.engine.running(), cell.engine.waiting()), (2, 0), "13 blocks and 7");
    let mut cell = Cell::new(EngineConfig { chunk_max: 16, depth: 1, ..config(limits(4, 512, 20), 1) });
    cell.engine.submit(endless(1, &prompt(1, 200), 2)).unwrap();
    cell.engine.submit(endless(2, &prompt(2, 112), 2)).unwrap();
    cell.step();
    assert_eq!((cell.engine.running(), cell.engine.waiting()), (1, 1), "13 blocks and 8");
}

#[test]
fn what_is_promised_shrinks_as_it_is_taken() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, 512, 20), 1) });
    cell.engine.submit(endless(1, &prompt(1, 150), 60)).unwrap();
    cell.step();
    cell.engine.submit(endless(2, &prompt(2, 150), 2)).unwrap();
    cell.step();
    assert_eq!(cell.engine.running(), 2, "10 blocks are held, 10 are free, and nothing more is promised");
}

#[test]
fn a_rank_takes_no_new_prompt_while_it_has_a_step_of_others_to_read() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, 16, 64), 1) });
    cell.engine.submit(endless(1, &prompt(1, 32), 2)).unwrap();
    cell.engine.submit(endless(2, &prompt(2, 8), 2)).unwrap();
    cell.step();
    assert_eq!(cell.engine.running(), 1, "16 more tokens are a whole step");
    cell.step();
    cell.step();
    assert_eq!(cell.started(), [1, 2]);
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, 16, 64), 1) });
    cell.engine.submit(endless(1, &prompt(1, 15), 2)).unwrap();
    cell.engine.submit(endless(2, &prompt(2, 8), 2)).unwrap();
    cell.plan();
    assert_eq!(rows_of(&cell), [[(1, 15), (2, 1)]], "15 leave room for one");
}

#[test]
fn a_prefix_outweighs_load_to_the_token() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(64, 1024, 256), 3) });
    // Ranks 0 and 1 are busy when the prompt comes first, so it lives on rank 2.
    let long = prompt(1, 640);
    for (seq, own) in [(1, prompt(5, 600)), (2, prompt(6, 600)), (3, long.clone())] {
        cell.engine.submit(endless(seq, &own, 2)).unwrap();
    }
    cell.run();
    // 624 tokens are saved there, and each sequence counts 32.
    let mut homes = Vec::new();
    for seq in 10..32 {
        cell.engine.submit(endless(seq, &long, 500)).unwrap();
        cell.plan();
        homes.push((0..3).find(|&rank| cell.plans[rank].admit.iter().any(|a| a.seq == SeqId(seq))).unwrap());
        cell.answer();
    }
    assert!(homes[..20].iter().all(|&home| home == 2), "{homes:?}");
    assert_ne!(homes[20], 2, "{homes:?}");
}

#[test]
fn constraint_tables_go_out_once_and_a_sequence_names_its_own() {
    let table = ConstraintTable { id: TableId(3), runs: vec![(TokenId(0), 0)], classes: 1, next: vec![0] };
    let tables = vec![table.clone()];
    let mut cell = Cell::new(EngineConfig { tables, depth: 1, ..config(limits(4, 64, 64), 2) });
    let constraint = Some(ConstraintStart { table: TableId(3), state: 0 });
    let bias = vec![(TokenId(4), 1.5), (TokenId(9), -2.0)];
    let asked = Request { constraint, bias: bias.clone(), ..endless(1, &prompt(1, 20), 3) };
    cell.engine.submit(asked).unwrap();
    cell.step();
    assert!(cell.plans.iter().all(|plan| plan.tables == [table.clone()]), "every rank gets them");
    let admit = &cell.plans[0].admit[0];
    assert_eq!((admit.constraint, &admit.bias), (constraint, &bias));
    cell.step();
    assert!(cell.plans.iter().all(|plan| plan.tables.is_empty()));
    cell.run();
    let unknown = Some(ConstraintStart { table: TableId(4), state: 0 });
    let beyond = Some(ConstraintStart { table: TableId(3), state: 1 });
    for constraint in [unknown, beyond] {
        let refused = cell.engine.submit(Request { constraint, ..endless(2, &[1], 3) });
        assert!(matches!(refused, Err(Refused::Sampling { field: "constraint", .. })), "{refused:?}");
    }
    let bias = vec![(TokenId(VOCAB), 1.0)];
    let refused = cell.engine.submit(Request { bias, ..endless(2, &[1], 3) });
    assert!(matches!(refused, Err(Refused::Sampling { field: "bias", .. })), "{refused:?}");
}

#[test]
fn what_a_preempted_sequence_had_said_goes_with_it() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(2, 64, 8), 1) });
    let mut second = endless(2, &prompt(2, 40), 60);
    second.sampling.frequency_penalty = 0.5;
    cell.engine.submit(endless(1, &prompt(1, 40), 60)).unwrap();
    cell.engine.submit(second).unwrap();
    let mut again = None;
    for _ in 0..400 {
        cell.step();
        let admitted = cell.plans[0].admit.iter().find(|a| a.seq == SeqId(2) && cell.engine.stats().preemptions > 0);
        if let Some(admission) = admitted {
            again = Some((admission.history.clone(), cell.tokens(2)));
            break;
        }
    }
    let (history, tokens) = again.expect("it was sent back and came again");
    assert!(history.prompt.is_empty() && !history.generated.is_empty());
    assert_eq!(history.generated, tokens[..history.generated.len()]);
}

#[test]
fn logits_of_a_prompt_are_told_once_also_if_it_is_sent_back() {
    let mut cell = Cell::new(EngineConfig { chunk_max: 2, depth: 1, ..config(limits(2, 64, 16), 1) });
    cell.engine.submit(endless(1, &prompt(1, 16), 150)).unwrap();
    cell.engine.submit(Request { want: Want::Logits, ..endless(2, &prompt(2, 200), 0) }).unwrap();
    let mut asked = 0;
    while cell.step() {
        let rows = cell.plans[0].rows.iter().filter(|rows| rows.outputs == Outputs::AllLogits);
        asked += rows.map(|rows| rows.tokens.rows()).sum::<usize>();
    }
    assert!(cell.engine.is_idle());
    assert_eq!(asked, 200);
    assert!(cell.engine.stats().preemptions > 0, "it was never sent back");
}

#[test]
fn prompts_are_spread_over_the_ranks_and_read_level() {
    let limits = limits(8, 1024, 1024);
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits, 4) });
    cell.engine.submit(endless(1, &prompt(1, 2000), 2)).unwrap();
    cell.plan();
    let counts: Vec<usize> = rows_of(&cell).iter().map(|rows| rows.iter().map(|r| r.1).sum()).collect();
    assert_eq!(counts, [500, 0, 0, 0], "a quarter of what there is to read, not all that the budget allows");
    assert_eq!(cell.engine.stats().imbalance, 4.0);
    cell.answer();
    for seq in 2..=4 {
        cell.engine.submit(endless(seq, &prompt(u32::try_from(seq).unwrap(), 1500), 2)).unwrap();
    }
    cell.plan();
    assert_eq!(rows_of(&cell), [[(1, 1024)], [(2, 1024)], [(3, 1024)], [(4, 1024)]]);
    assert_eq!(cell.engine.stats().imbalance, 1.0);
    cell.run();
}

#[test]
fn a_sequence_lives_where_its_prefix_is() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(8, 256, 256), 3) });
    let long = prompt(1, 640);
    for seq in 1..=4 {
        let own: Vec<u32> = if seq == 2 { prompt(2, 640) } else { long.clone() };
        cell.engine.submit(endless(seq, &own, 2)).unwrap();
        cell.run();
    }
    assert_eq!([1, 2, 3, 4].map(|seq| cell.cached(seq).unwrap()), [0, 0, 624, 624]);
}

#[test]
fn cancelling_gives_everything_back_at_once() {
    let mut cell = Cell::new(EngineConfig { depth: 3, ..config(limits(8, 64, 64), 2) });
    for seq in 1..=8 {
        cell.engine.submit(endless(seq, &prompt(u32::try_from(seq).unwrap(), 20), 30)).unwrap();
    }
    let lone = alone(&endless(3, &prompt(3, 20), 30)).0;
    for _ in 0..6 {
        cell.step();
    }
    for seq in (1..=8).filter(|seq| *seq != 3) {
        cell.engine.cancel(SeqId(seq));
    }
    assert_eq!((cell.engine.running(), cell.engine.waiting()), (1, 0));
    cell.run();
    assert_eq!(cell.tokens(3), lone);
    let stats = cell.engine.stats();
    assert_eq!((stats.kv_usage, stats.running, stats.waiting_tokens), (0.0, 0, 0));
}

#[test]
fn the_rank_is_told_of_the_past_only_where_it_matters() {
    let greedy = endless(1, &prompt(1, 20), 3);
    let mut penal = endless(2, &prompt(2, 20), 3);
    penal.sampling.presence_penalty = 0.5;
    let mut repeating = endless(3, &prompt(3, 20), 3);
    repeating.sampling.repetition_penalty = 1.3;
    let mut cell = Cell::new(config(limits(4, 200, 64), 1));
    for request in [greedy, penal, repeating] {
        cell.engine.submit(request).unwrap();
    }
    cell.plan();
    let admit = &cell.plans[0].admit;
    let lens: Vec<(usize, usize)> = admit.iter().map(|a| (a.history.prompt.len(), a.history.generated.len())).collect();
    assert_eq!(lens, [(0, 0), (0, 0), (20, 0)]);
    cell.run();
}

#[test]
fn planning_costs_in_rows_and_blocks_whatever_waits() {
    // Twice the ranks, the same rows and blocks a rank: twice the work; more in the queue: the same.
    let work = |ranks: u32, waiting: u64| {
        let limits = limits(8, 64, 64);
        let mut cell = Cell::new(EngineConfig { queue_max: 100_000, checked: false, ..config(limits, ranks) });
        for seq in 0..u64::from(ranks) * 8 + waiting {
            let seed = u32::try_from(seq).unwrap();
            cell.engine.submit(endless(seq, &prompt(seed, 30), 60)).unwrap();
        }
        for _ in 0..8 {
            cell.step();
        }
        let before = cell.engine.work();
        for _ in 0..20 {
            cell.step();
        }
        let after = cell.engine.work();
        (after.ops - before.ops) as f64 / (after.rows - before.rows) as f64
    };
    let base = work(2, 0);
    assert!(base < 8.0, "{base} operations a row");
    for (ranks, waiting) in [(2, 5_000), (16, 0), (16, 5_000)] {
        let ops = work(ranks, waiting);
        assert!(ops < base * 1.5, "{ops} operations a row with {ranks} ranks and {waiting} waiting, {base} before");
    }
}

#[test]
fn a_long_prompt_that_does_not_fit_yet_is_not_looked_up_each_step() {
    let limits = limits(4, 64, 100);
    let mut cell = Cell::new(EngineConfig { checked: false, depth: 1, ..config(limits, 1) });
    cell.engine.submit(endless(1, &prompt(1, 600), 500)).unwrap();
    while cell.tokens(1).is_empty() {
        cell.step();
    }
    let begins_alike: Vec<u32> = prompt(1, 320).into_iter().chain(prompt(2, 1_200)).collect();
    cell.engine.submit(endless(2, &begins_alike, 2)).unwrap();
    cell.step();
    let before = cell.engine.work().ops;
    for _ in 0..50 {
        cell.step();
    }
    let ops = cell.engine.work().ops - before;
    assert_eq!(cell.engine.waiting(), 1);
    assert!(ops < 50 * 8, "{ops} operations in 50 steps of one row, of 20 blocks that would be found");
}

#[test]
fn interactive_requests_wait_for_a_busy_rank_rather_than_drive_batch_out() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(3, 16, 64), 1) });
    cell.engine.submit(Request { class: Class::Batch, ..endless(1, &prompt(1, 5), 60) }).unwrap();
    cell.step();
    cell.engine.submit(endless(2, &prompt(2, 64), 2)).unwrap();
    cell.step();
    cell.engine.submit(endless(3, &prompt(3, 5), 2)).unwrap();
    cell.step();
    assert_eq!((cell.engine.waiting(), cell.engine.stats().preemptions), (1, 0), "it reads enough for now");
    cell.run();
    assert_eq!(cell.engine.stats().preemptions, 0);
}

#[test]
fn nobody_is_driven_out_for_one_that_does_not_fit_even_then() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(3, 512, 24), 1) });
    cell.engine.submit(endless(1, &prompt(1, 200), 100)).unwrap();
    cell.engine.submit(Request { class: Class::Batch, ..endless(2, &prompt(2, 60), 20) }).unwrap();
    while cell.tokens(2).is_empty() {
        cell.step();
    }
    // 13 and 4 of 24 blocks are held: neither the 7 that are free nor these and 4 more are 12.
    cell.engine.submit(endless(3, &prompt(3, 180), 2)).unwrap();
    while cell.tokens(2).len() < 20 {
        cell.step();
        assert_eq!((cell.engine.waiting(), cell.engine.stats().preemptions), (1, 0));
    }
    cell.run();
    assert_eq!(cell.started(), [1, 2, 3]);
    // The same with no seat left.
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(2, 512, 24), 1) });
    cell.engine.submit(endless(1, &prompt(1, 200), 100)).unwrap();
    cell.engine.submit(Request { class: Class::Batch, ..endless(2, &prompt(2, 60), 20) }).unwrap();
    cell.step();
    cell.engine.submit(endless(3, &prompt(3, 180), 2)).unwrap();
    cell.run();
    assert_eq!((cell.started(), cell.engine.stats().preemptions), (vec![1, 2, 3], 0));
}

#[test]
fn what_batch_sequences_share_comes_back_when_the_last_of_them_goes() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, 512, 24), 1) });
    cell.engine.submit(endless(1, &prompt(1, 60), 100)).unwrap();
    for seq in 2..=3 {
        cell.engine.submit(Request { class: Class::Batch, ..endless(seq, &prompt(2, 240), 40) }).unwrap();
        cell.step();
    }
    // 15 of 24 blocks are held for both, and the one sequence that stays has 5.
    let ask = |cell: &mut Cell, seq, len| cell.engine.submit(endless(seq, &prompt(9, len), 2)).unwrap();
    ask(&mut cell, 4, 320);
    cell.step();
    assert_eq!((cell.engine.waiting(), cell.engine.stats().preemptions), (1, 0), "21 blocks there are not");
    cell.engine.cancel(SeqId(4));
    ask(&mut cell, 5, 200);
    cell.step();
    assert_eq!((cell.engine.running(), cell.engine.stats().preemptions), (2, 2), "13 there are without both");
    cell.run();
}

#[test]
fn an_interactive_request_does_not_wait_until_a_batch_prompt_is_read() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, 64, 64), 1) });
    cell.engine.submit(Request { class: Class::Batch, ..endless(1, &prompt(1, 900), 2) }).unwrap();
    cell.step();
    cell.engine.submit(endless(2, &prompt(2, 20), 2)).unwrap();
    cell.plan();
    assert_eq!(rows_of(&cell), [[(2, 20), (1, 44)]], "the batch prompt has the rows that are left");
    cell.run();
    assert_eq!(cell.engine.stats().preemptions, 0);
    // A second batch prompt waits, as there is a step of the first to read.
    for seq in 3..=4 {
        let own = prompt(u32::try_from(seq).unwrap(), 400);
        cell.engine.submit(Request { class: Class::Batch, ..endless(seq, &own, 2) }).unwrap();
    }
    cell.step();
    assert_eq!((cell.engine.running(), cell.engine.waiting()), (1, 1));
}

#[test]
fn who_comes_while_a_batch_prompt_is_read_passes_no_other_that_waits_for_it() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(8, 64, 128), 1) });
    for (seq, len) in [(1, 900), (2, 400)] {
        let own = prompt(u32::try_from(seq).unwrap(), len);
        cell.engine.submit(Request { class: Class::Batch, ..endless(seq, &own, 2) }).unwrap();
    }
    let mut seq = 3;
    for _ in 0..20 {
        for _ in 0..6 {
            cell.engine.submit(endless(seq, &prompt(3, 5), 1)).unwrap();
            seq += 1;
        }
        cell.step();
        assert_eq!(cell.engine.waiting(), 1, "the other batch prompt, after {seq} have come");
    }
    assert!(cell.tokens(1).is_empty(), "it is still read");
    cell.run();
}

#[test]
fn interactive_prompts_without_end_do_not_keep_a_batch_prompt_that_is_read() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(8, 64, 64), 1) });
    cell.engine.submit(Request { class: Class::Batch, ..endless(1, &prompt(1, 400), 2) }).unwrap();
    cell.step();
    let mut seq = 2;
    while !cell.events.iter().any(|e| matches!(e, Event::Finished { seq: SeqId(1), .. })) {
        while cell.engine.waiting() < 4 {
            cell.engine.submit(endless(seq, &prompt(u32::try_from(seq).unwrap(), 60), 1)).unwrap();
            seq += 1;
        }
        cell.step();
        assert!(seq < 200, "it is never read");
    }
}

#[test]
fn no_more_batch_sequences_are_driven_out_than_needed() {
    let mut cell = Cell::new(EngineConfig { depth: 3, ..config(limits(8, 256, 24), 1) });
    for seq in 1..=3 {
        let own = prompt(u32::try_from(seq).unwrap(), 100);
        cell.engine.submit(Request { class: Class::Batch, ..endless(seq, &own, 20) }).unwrap();
    }
    while cell.tokens(3).is_empty() {
        cell.step();
    }
    // 21 of 24 blocks are held; what one of the three gives back cools while steps are under way, and is enough.
    cell.plan();
    cell.engine.submit(endless(9, &prompt(9, 80), 2)).unwrap();
    while cell.tokens(9).is_empty() {
        cell.step();
    }
    assert_eq!(cell.engine.stats().preemptions, 1);
    cell.run();
}

#[test]
fn what_is_cached_is_not_asked_room_for_twice() {
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, 512, 20), 1) });
    cell.engine.submit(endless(1, &prompt(1, 200), 2)).unwrap();
    cell.run();
    cell.engine.submit(endless(2, &prompt(2, 70), 50)).unwrap();
    cell.step();
    // 12 blocks are cached, 5 are held, 3 are free: the prompt of 13 fits with the 12.
    cell.engine.submit(endless(3, &prompt(1, 200), 2)).unwrap();
    cell.step();
    assert_eq!((cell.engine.running(), cell.cached(3)), (2, Some(192)));
    cell.run();
}

#[test]
fn deadlines_are_those_of_the_rows_planned() {
    let rule = DeadlineRule { factor: 1e3, min_ms: 1, max_ms: u32::MAX };
    let cost = Cost::new(&gpt_oss(), Layout::new(1, 0).unwrap(), Formats::BF16, Hardware::H100);
    let pace = Calibrated::new(cost, rule);
    let mut cell = Cell::new(EngineConfig { depth: 4, chunk_max: 24, ..config(limits(4, 64, 64), 1) });
    cell.engine.set_pace(pace.clone());
    cell.engine.submit(endless(1, &prompt(1, 60), 3)).unwrap();
    for (start, rows, sampled) in [(0, 24, 0), (24, 24, 0), (48, 12, 1), (60, 1, 1)] {
        cell.plan();
        let mut shape = RankShape::default();
        shape.add_run(start, rows, sampled, WINDOW);
        assert_eq!(cell.plans[0].header.deadline_ms, pace.deadline(&StepShape(vec![shape])));
    }
    cell.run();
}

#[test]
fn deadlines_follow_what_steps_take() {
    let rule = DeadlineRule { factor: 10.0, min_ms: 1, max_ms: 60_000 };
    let cost = Cost::new(&gpt_oss(), Layout::new(1, 0).unwrap(), Formats::BF16, Hardware::H100);
    let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, 64, 64), 1) });
    cell.engine.set_pace(Calibrated::new(cost, rule));
    cell.engine.submit(endless(1, &prompt(1, 8), 400)).unwrap();
    cell.plan();
    let first = cell.plans[0].header.deadline_ms;
    let slow = |cell: &mut Cell| {
        let mut result = cell.results().remove(0);
        Phase::ALL.iter().for_each(|&phase| result.phases.add(phase, 100_000));
        cell.engine.apply(result).unwrap();
    };
    for _ in 0..100 {
        slow(&mut cell);
        cell.plan();
    }
    let later = cell.plans[0].header.deadline_ms;
    assert!(first < 1000, "{first} ms for a step of an H100");
    assert!((2_000..=9_000).contains(&later), "{later} ms where steps take 800");
    assert!(cell.plans[0].header.deadline_ms <= 60_000);
}

#[test]
fn chunks_of_prompts_are_as_long_as_the_deadline_has_time_for() {
    let rule = DeadlineRule { factor: 20.0, min_ms: 1, max_ms: 120_000 };
    // The rows of each step of a rank that takes so many microseconds for each, and the longest deadline.
    let read_on = |hardware, rows, tokens, micros: u64| {
        let cost = Cost::new(&gpt_oss(), Layout::new(1, 0).unwrap(), Formats::BF16, hardware);
        let mut cell = Cell::new(EngineConfig { depth: 1, ..config(limits(4, rows, rows / 2), 1) });
        cell.engine.set_pace(Calibrated::new(cost, rule));
        cell.engine.submit(endless(1, &prompt(1, tokens), 2)).unwrap();
        let (mut rows, mut longest) = (Vec::new(), 0);
        while cell.plan() {
            rows.push(rows_of(&cell)[0][0].1);
            longest = longest.max(cell.plans[0].header.deadline_ms);
            let mut result = cell.results().remove(0);
            result.phases.add(Phase::Attention, micros * rows.last().copied().unwrap_or(0) as u64);
            cell.engine.apply(result).unwrap();
        }
        assert!(cell.engine.is_idle());
        (rows, longest)
    };
    let read = |micros| read_on(Hardware::CPU_2_CORES, 512, 3000, micros);
    let (rows, _) = read(100);
    assert_eq!(rows[..3], [16, 512, 512], "at first nobody knows how fast it is");
    // What a GPU takes is in none of the phases in which prompts are read.
    let (rows, _) = read_on(Hardware::H100, 8192, 10_000, 0);
    assert_eq!(rows[1], 8192, "{rows:?}");
    let (rows, longest) = read(100_000);
    assert!(rows[..20].iter().all(|&rows| (16..128).contains(&rows)), "512 would take 51 seconds: {rows:?}");
    assert!(longest < 120_000, "{longest} ms");
}
