//! Many streams at once: each is given the text that it is given alone, byte for byte, whatever shares its steps.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/server.rs"]
#[allow(dead_code, reason = "other test binaries use the rest")]
mod server;

use std::sync::OnceLock;

use serde_json::{Value, json};
use server::{Serve, until};

const STREAMS: usize = 64;

/// Requests of many kinds: questions and stories, greedy and seeded, some with penalties.
fn body(index: usize) -> Value {
    let text = match index % 4 {
        0 => format!("What is {} + {}?", index + 3, 2 * index + 1),
        1 => format!("Tell me a story about {} cats.", index + 2),
        2 => format!("What is {} times {}? Think first.", index % 9 + 2, index % 7 + 3),
        _ => format!("Say hello in {} ways, please.", index % 5 + 1),
    };
    let mut body = json!({
        "model": "gpt-oss-nano", "messages": [{"role": "user", "content": text}], "max_tokens": 48,
        "stream": true, "stream_options": {"include_usage": true},
    });
    if index.is_multiple_of(2) {
        body["temperature"] = json!(0);
    } else {
        body["temperature"] = json!(1.0);
        body["seed"] = json!(1000 + index);
    }
    if index % 8 == 3 {
        body["presence_penalty"] = json!(0.7);
        body["frequency_penalty"] = json!(0.3);
    }
    body
}

/// What a stream gave: its text, why it ended, and its tokens.
#[derive(Clone, Debug, PartialEq)]
struct Given {
    text: String,
    finish: String,
    tokens: u64,
}

/// Also gives the prompt tokens that were found in the cache.
fn ask(serve: &Serve, body: &Value) -> (Given, u64) {
    let mut given = Given { text: String::new(), finish: String::new(), tokens: 0 };
    let (mut cached, mut done) = (0, false);
    for data in serve.stream(body) {
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(&data).unwrap();
        assert!(chunk.get("error").is_none(), "{chunk}");
        for choice in chunk["choices"].as_array().unwrap() {
            for part in ["reasoning", "content"] {
                if let Some(text) = choice["delta"][part].as_str() {
                    given.text += text;
                }
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                assert!(given.finish.is_empty(), "it ended twice: {body}");
                given.finish = reason.to_owned();
            }
        }
        if let Some(usage) = chunk["usage"].as_object() {
            given.tokens = usage["completion_tokens"].as_u64().unwrap();
            cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        }
    }
    assert!(done, "the stream broke off: {body}");
    (given, cached)
}

/// All streams at once.
fn together(serve: &Serve) -> Vec<(Given, u64)> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..STREAMS).map(|index| scope.spawn(move || ask(serve, &body(index)))).collect();
        asked.into_iter().map(|given| given.join().unwrap()).collect()
    })
}

/// What each stream is given alone: one request at a time, one worker, nothing cached.
fn alone() -> &'static [Given] {
    static ALONE: OnceLock<Vec<Given>> = OnceLock::new();
    ALONE.get_or_init(|| {
        let serve = Serve::start(&["--workers", "1", "--no-prefix-cache"]);
        (0..STREAMS).map(|index| ask(&serve, &body(index)).0).collect()
    })
}

/// The sum of a metric over its label sets.
fn metric(serve: &Serve, name: &str) -> f64 {
    let (status, text) = serve.get("/metrics");
    assert_eq!(status, 200);
    let of = |line: &str| {
        let rest = line.strip_prefix(name)?;
        if !rest.starts_with(['{', ' ']) {
            return None;
        }
        rest.rsplit(' ').next()?.parse::<f64>().ok()
    };
    let values: Vec<f64> = text.lines().filter_map(of).collect();
    assert!(!values.is_empty(), "{name} is not among the metrics");
    values.iter().sum()
}

fn same_as_alone(given: &[(Given, u64)]) {
    for (index, ((given, _), alone)) in given.iter().zip(alone()).enumerate() {
        assert_eq!(given, alone, "stream {index}: {}", body(index));
    }
}

/// Nothing runs, waits or holds memory.
fn idle(serve: &Serve) {
    until("the gauges return to zero", || {
        ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
            .iter()
            .all(|name| metric(serve, name) == 0.0)
    });
}

fn streams(args: &[&str]) -> Serve {
    let serve = Serve::start(args);
    same_as_alone(&together(&serve));
    idle(&serve);
    serve
}

#[test]
fn streams_are_the_same_together_on_one_two_and_three_workers() {
    for workers in ["1", "2", "3"] {
        let serve = streams(&["--workers", workers]);
        let steps = metric(&serve, "vllm:iteration_tokens_total_count");
        let rows = metric(&serve, "vllm:iteration_tokens_total_sum") / steps;
        assert!(rows >= 16.0, "{rows} rows a step with {workers} workers");
        assert_eq!(metric(&serve, "vllm:num_preemptions_total"), 0.0);
    }
}

#[test]
fn streams_are_the_same_where_memory_is_short() {
    let serve = streams(&["--workers", "2", "--kv-tokens", "512"]);
    assert!(metric(&serve, "vllm:num_preemptions_total") > 0.0, "there was room for all");
}

#[test]
fn streams_are_the_same_in_chunks_without_the_cache_and_step_by_step() {
    drop(streams(&["--workers", "2", "--chunk", "16", "--no-prefix-cache", "--depth", "1"]));
    drop(streams(&["--workers", "1", "--chunk", "16", "--depth", "4"]));
}

#[test]
fn streams_are_the_same_from_the_cache() {
    let serve = streams(&["--workers", "2"]);
    let again = together(&serve);
    same_as_alone(&again);
    let cached = again.iter().filter(|(_, cached)| *cached > 0).count();
    assert!(cached > STREAMS / 2, "{cached} of {STREAMS} prompts were found");
    assert!(metric(&serve, "vllm:prefix_cache_hits_total") > 0.0);
}

/// The engine is told to stop, and the sequence counts as any that came to its end.
#[test]
fn an_answer_that_a_stop_string_ends_is_measured_like_any_other() {
    let serve = Serve::start(&["--workers", "1"]);
    let mut body = body(0);
    let (given, _) = ask(&serve, &body);
    body["stop"] = json!(given.text.chars().last().unwrap().to_string());
    let (stopped, cached) = ask(&serve, &body);
    assert!(stopped.finish == "stop" && stopped.text != given.text, "{stopped:?}");
    assert!(cached > 0, "the prompt was read before");
    for name in
        ["queue_time_seconds", "prefill_time_seconds", "decode_time_seconds", "prompt_tokens", "generation_tokens"]
    {
        until(name, || metric(&serve, &format!("vllm:request_{name}_count")) == 2.0);
    }
}

#[test]
fn clients_that_leave_free_their_memory_and_disturb_nobody() {
    let serve = Serve::start(&["--workers", "2"]);
    let given: Vec<Option<Given>> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..400)
            .map(|index| {
                let serve = &serve;
                scope.spawn(move || {
                    let body = body(index % STREAMS);
                    if index % 2 == 1 {
                        // Reads a little and leaves.
                        drop(serve.stream(&body).take(1 + index % 7).collect::<Vec<String>>());
                        return None;
                    }
                    Some(ask(serve, &body).0)
                })
            })
            .collect();
        asked.into_iter().map(|given| given.join().unwrap()).collect()
    });
    for (index, given) in given.iter().enumerate() {
        if let Some(given) = given {
            assert_eq!(given, &alone()[index % STREAMS], "stream {index}");
        }
    }
    idle(&serve);
}
