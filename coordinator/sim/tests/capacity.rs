//! What a layout carries, and how long its clients wait.

#![allow(clippy::unwrap_used, reason = "tests")]

use phalanx_planner::EngineConfig;
use phalanx_planner::cost::{Cost, Formats, Hardware};
use phalanx_proto::{LayerKind, Layout, Limits, ModelConfig, Rope};
use phalanx_sim::capacity::{Answer, Length, Load, Setup, Speed, Workload, capacity};
use phalanx_sim::clock::MILLISECOND;

fn gpt_oss_120b() -> ModelConfig {
    let rope = Rope {
        theta: 150_000.0,
        factor: 32.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: 4096,
        truncate: false,
        attention_factor: 1.0,
    };
    ModelConfig {
        hidden: 2880,
        intermediate: 2880,
        layers: [LayerKind::Sliding, LayerKind::Full].repeat(18),
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        experts: 128,
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

/// `ranks` H100 with room for `seqs` sequences and `kv_tokens` tokens each.
fn h100(ranks: u32, seqs: u32, kv_tokens: u32) -> Setup {
    let model = gpt_oss_120b();
    let limits = Limits::new(&model, seqs, 2048, kv_tokens);
    let cost = Cost::new(&model, Layout::new(ranks, 0).unwrap(), Formats::BF16, Hardware::H100);
    let engine = EngineConfig { depth: 2, ..EngineConfig::new(&model, limits, ranks) };
    Setup { engine, speed: Speed::Modelled(Box::new(cost)), delay: MILLISECOND / 5 }
}

fn workload(requests: u64, load: Load) -> Workload {
    let (prompt, answer) = (Length::Fixed(896), Length::Fixed(256));
    Workload { seed: 1, requests, load, prompt, answer, shared: 0, beginnings: 1, batch: 0.0 }
}

/// A small cell whose steps all take 5 ms.
fn steady(depth: u32, delay: u64) -> Setup {
    let limits = Limits::new(&gpt_oss_120b(), 16, 256, 1 << 14);
    let engine = EngineConfig { depth, ..EngineConfig::of(128, 1000, limits, 2) };
    Setup { engine, speed: Speed::Fixed(5 * MILLISECOND), delay }
}

fn tokens_per_second(setup: &Setup) -> f64 {
    let (prompt, answer) = (Length::Between(10, 100), Length::Between(50, 150));
    let answer = capacity(&Workload { prompt, answer, ..workload(200, Load::Concurrency(24)) }, setup);
    assert_eq!(answer.finished, 200);
    answer.answer_tokens_per_second
}

#[test]
fn steps_ahead_of_results_hide_the_way_to_the_ranks() {
    let without_delay = tokens_per_second(&steady(3, 0));
    let hidden = tokens_per_second(&steady(3, 5 * MILLISECOND));
    let bare = tokens_per_second(&steady(1, 5 * MILLISECOND));
    assert!(hidden > 0.9 * without_delay, "{hidden} tokens a second, {without_delay} without a delay");
    // A step of 5 ms and 10 ms there and back.
    assert!(bare < 0.4 * without_delay, "{bare} tokens a second one step at a time, {without_delay} without a delay");
}

#[test]
fn decoding_comes_near_the_roofline() {
    // 64 sequences of about 1k: 3265 tokens a second from bytes alone; prompts take their part.
    let answer = capacity(&workload(256, Load::Concurrency(64)), &h100(1, 64, 64 * 1200));
    assert_eq!((answer.finished, answer.refused, answer.preemptions), (256, 0, 0));
    let per_second = answer.answer_tokens_per_second;
    assert!((2000.0..3265.0).contains(&per_second), "{per_second}");
    // A token takes a step: of 64 rows, or of those and a chunk of a prompt.
    assert!((0.019..0.022).contains(&answer.inter_token.p50), "{:?}", answer.inter_token);
    assert!(answer.inter_token.max < 0.1, "{:?}", answer.inter_token);
    assert!((0.9..=1.0).contains(&answer.kv_usage_max), "{}", answer.kv_usage_max);
}

#[test]
fn the_same_values_give_the_same_answer() {
    let ask = || capacity(&workload(40, Load::Rate(20.0)), &h100(2, 16, 16 * 1200));
    assert_eq!(ask(), ask());
}

#[test]
fn beyond_what_is_carried_clients_wait() {
    let at = |rate: f64| capacity(&workload(200, Load::Rate(rate)), &h100(1, 32, 32 * 1200));
    let (idle, crowded) = (at(0.5), at(50.0));
    let first = |answer: &Answer| answer.time_to_first_token[0];
    // Alone: 896 tokens of a prompt, which visit all experts, in one step.
    assert!((0.015..0.045).contains(&first(&idle).p50), "{:?}", first(&idle));
    assert!(first(&crowded).p50 > 20.0 * first(&idle).p50, "{:?}", first(&crowded));
    assert!(crowded.answer_tokens_per_second > 5.0 * idle.answer_tokens_per_second);
    assert_eq!((idle.finished, crowded.finished), (200, 200));
}

#[test]
fn shared_beginnings_are_computed_once() {
    let own = Workload { answer: Length::Fixed(16), ..workload(512, Load::Concurrency(64)) };
    let shared = Workload { shared: 768, beginnings: 4, ..own };
    let setup = h100(1, 64, 64 * 1200);
    let (with, without) = (capacity(&shared, &setup), capacity(&own, &setup));
    // Most find the beginning there; those that came at once computed it at once.
    assert!((0.7..768.0 / 896.0).contains(&with.cached), "{}", with.cached);
    assert_eq!(without.cached, 0.0);
    let saved = without.work.rows - with.work.rows;
    assert_eq!(saved as f64, with.cached * 512.0 * 896.0);
    assert!(with.answer_tokens_per_second > 1.5 * without.answer_tokens_per_second, "{with:?} {without:?}");
}

#[test]
fn too_little_memory_costs_throughput_but_no_request() {
    let ask = |kv_tokens| capacity(&workload(128, Load::Concurrency(64)), &h100(1, 64, kv_tokens));
    let (enough, little) = (ask(64 * 1200), ask(16 * 1200));
    assert!(little.preemptions > 0 && enough.preemptions == 0);
    assert_eq!(little.finished, 128);
    assert!(little.answer_tokens_per_second < 0.8 * enough.answer_tokens_per_second);
}

#[test]
fn who_is_refused_comes_again_later_and_carries_nothing() {
    let setup = steady(2, 0);
    let setup = Setup { engine: EngineConfig { queue_max: 4, ..setup.engine }, ..setup };
    let asked =
        Workload { prompt: Length::Fixed(50), answer: Length::Fixed(50), ..workload(400, Load::Concurrency(64)) };
    let answer = capacity(&asked, &setup);
    assert!(answer.refused > 28 && answer.finished > 100, "{answer:?}");
    assert_eq!(answer.finished + answer.refused, 400);
    let prompts = answer.prompt_tokens_per_second * answer.seconds;
    assert!((prompts / 50.0 - answer.finished as f64).abs() < 0.01, "{prompts} tokens of {} prompts", answer.finished);
}

#[test]
fn more_ranks_carry_more_and_stay_level() {
    let ask = |ranks: u32| {
        capacity(&workload(256 * u64::from(ranks), Load::Concurrency(64 * ranks)), &h100(ranks, 64, 64 * 1200))
    };
    let (two, eight) = (ask(2), ask(8));
    // Experts are shared: twice the ranks carry more than twice as much.
    assert!(eight.answer_tokens_per_second > 4.0 * two.answer_tokens_per_second, "{eight:?} {two:?}");
    assert!(eight.imbalance < 2.0, "{}", eight.imbalance);
}

#[test]
fn nobody_waits_longer_because_more_are_to_come() {
    // Many wait at any time, few find room, and blocks run out.
    let limits = Limits { full_blocks: 24, ..Limits::new(&gpt_oss_120b(), 4, 32, 400) };
    let engine = EngineConfig { depth: 2, ..EngineConfig::of(24, 1000, Limits { context: 192, ..limits }, 2) };
    let setup = Setup { engine, speed: Speed::Fixed(MILLISECOND), delay: 0 };
    let ask = |requests, batch| {
        let load = Load::Concurrency(40);
        let (prompt, answer) = (Length::Between(1, 100), Length::Between(1, 60));
        capacity(&Workload { prompt, answer, batch, ..workload(requests, load) }, &setup)
    };
    for batch in [0.0, 0.3, 0.9] {
        let (short, long) = (ask(500, batch), ask(4000, batch));
        assert!(long.preemptions > 0 && long.finished == 4000);
        for class in 0..2 {
            let waits = [&short, &long].map(|answer| answer.time_to_first_token[class].max);
            assert!(waits[1] <= 2.0 * waits[0], "class {class} of {batch} batch: {waits:?} s in {} s", long.seconds);
            assert!(waits[1] < long.seconds / 4.0, "class {class} of {batch} batch: {waits:?} s in {} s", long.seconds);
        }
    }
}
