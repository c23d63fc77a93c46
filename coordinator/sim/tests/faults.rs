//! Small worlds in which everything goes wrong that may.

#![allow(clippy::unwrap_used, reason = "tests")]

use phalanx_sim::campaign::campaign;
use phalanx_sim::faults::{Failure, Seen, reduce, run};
use phalanx_sim::scenario::{Fault, Scenario};

fn all_well(seeds: std::ops::Range<u64>) -> Seen {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let outcome = campaign(seeds, threads, |seed| run(&Scenario::of(seed), false), |_| ());
    outcome.unwrap_or_else(|(seed, Failure { why, .. })| {
        panic!("seed {seed}: {why}\nReproduce: cargo xtask sim --seed {seed} --trace --reduce")
    })
}

#[test]
fn every_request_ends_once_with_its_own_tokens_whatever_happens() {
    let seen = all_well(0..1500);
    // The worlds are such that all of this happens, again and again.
    let counts = [seen.refused, seen.cancelled, seen.preemptions, seen.cached, seen.broken, seen.stray];
    assert!(counts.into_iter().all(|count| count > 100), "{seen:?}");
    assert!(seen.finished > 2000 && seen.tokens > 10_000, "{seen:?}");
}

#[test]
#[ignore = "full tier: ten thousand worlds"]
fn ten_thousand_seeds_are_well() {
    all_well(0..10_000);
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 0..20 {
        let scenario = Scenario::of(seed);
        assert_eq!(run(&scenario, false), run(&scenario, true), "seed {seed}");
    }
}

#[test]
fn a_failing_scenario_is_reduced_to_what_it_needs() {
    let scenario = (0..).map(Scenario::of).find(|s| s.arrivals.len() > 10 && s.faults.len() > 5).unwrap();
    let (wanted, fault) = (scenario.arrivals[7].clone(), scenario.faults[3]);
    let needs = |s: &Scenario| s.arrivals.contains(&wanted) && s.faults.contains(&fault);
    let reduced = reduce(&scenario, needs);
    assert_eq!((reduced.arrivals.len(), reduced.faults.len()), (1, 1));
    assert!(needs(&reduced));
    let unneeded = reduce(&scenario, |_| false);
    assert_eq!(unneeded.arrivals, scenario.arrivals, "what does not fail is left alone");
}

#[test]
fn worlds_differ_and_have_every_kind_of_fault() {
    let scenarios: Vec<Scenario> = (0..200).map(Scenario::of).collect();
    let faults = || scenarios.iter().flat_map(|s| &s.faults).map(|(_, fault)| fault);
    let kinds: [fn(&Fault) -> bool; 6] = [
        |f| matches!(f, Fault::Break(..)),
        |f| matches!(f, Fault::Repeat(_)),
        |f| matches!(f, Fault::Forged(_)),
        |f| matches!(f, Fault::Slow(..)),
        |f| matches!(f, Fault::ChunkMax(_)),
        |f| matches!(f, Fault::Twice),
    ];
    assert!(kinds.into_iter().all(|kind| faults().any(kind)));
    for depth in 1..=4 {
        for ranks in 1..=4 {
            assert!(scenarios.iter().any(|s| s.config.depth == depth && s.config.ranks == ranks));
        }
    }
}
