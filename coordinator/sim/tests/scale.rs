//! Thousands of GPUs: what planning costs does not grow with what is not planned.

use phalanx_planner::EngineConfig;
use phalanx_proto::Limits;
use phalanx_sim::capacity::{Answer, Length, Load, Setup, Speed, Workload, capacity};
use phalanx_sim::clock::MILLISECOND;

const BLOCK: u32 = Limits::BLOCK_SIZE;

/// Serves `requests` requests on a cell of `ranks` ranks, `waiting` at once for each of their places.
fn serve(ranks: u32, requests: u64, waiting: u32, seed: u64) -> Answer {
    let limits = Limits {
        seqs_max: 8,
        step_rows_max: 256,
        block_size: BLOCK,
        full_blocks: 96,
        window_blocks: 160,
        context: 96 * BLOCK,
    };
    let config = EngineConfig { depth: 2, queue_max: 1 << 20, ..EngineConfig::of(128, 10_000, limits, ranks) };
    let workload = Workload {
        seed,
        requests,
        load: Load::Concurrency(ranks * limits.seqs_max * waiting),
        prompt: Length::Between(32, 160),
        answer: Length::Between(1, 24),
        shared: 48,
        beginnings: 64,
        batch: 0.2,
    };
    capacity(&workload, &Setup { engine: config, speed: Speed::Fixed(20 * MILLISECOND), delay: MILLISECOND })
}

/// Operations over what they may be for: rows, ranks of each step, and blocks of each request.
fn cost(answer: &Answer, ranks: u32) -> f64 {
    // A request has about this many blocks, in two pools.
    let blocks = answer.finished as f64 * 2.0 * (108.0 / f64::from(BLOCK)).ceil();
    let work = answer.work;
    let per_step = work.rows as f64 + work.steps as f64 * f64::from(ranks);
    work.ops as f64 / (per_step + blocks)
}

#[test]
fn planning_costs_as_much_for_many_ranks_and_a_long_queue_as_for_few() {
    let few = cost(&serve(2, 800, 1, 1), 2);
    for (ranks, waiting) in [(8, 2), (32, 2), (8, 20)] {
        let found = serve(ranks, 400 * u64::from(ranks), waiting, 1);
        assert_eq!(found.finished, 400 * u64::from(ranks));
        let many = cost(&found, ranks);
        assert!(many < 1.25 * few, "{many} operations on {ranks} ranks with {waiting} for each place, {few} before");
    }
}

#[test]
fn thousands_of_ranks_are_planned_in_rows_and_blocks() {
    let few = cost(&serve(2, 800, 1, 1), 2);
    let mut finished = 0;
    for cell in 0..512 {
        let answer = serve(8, 175, 2, cell);
        let cost = cost(&answer, 8);
        assert!(cost < 1.25 * few, "cell {cell}: {cost} operations, {few} on a small one");
        finished += answer.finished;
    }
    let answer = serve(128, 100_000 - finished, 4, 0);
    let cost = cost(&answer, 128);
    assert!(cost < 1.25 * few, "{cost} operations on 128 ranks, {few} on a small cell");
    assert_eq!(finished + answer.finished, 100_000);
}
