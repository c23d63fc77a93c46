//! The demo model behind a real server: its evaluation prompts, sent as chat requests, are answered as the model's card
//! says, token for token, in both precisions and with any number of workers.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/server.rs"]
#[allow(dead_code, reason = "other test binaries use the rest")]
mod server;

use std::sync::Mutex;

use phalanx_coordinator::harmony::{Start, Tokenizer, Turn, TurnReader};
use phalanx_proto::TokenId;
use serde_json::{Value, json};
use server::Serve;

/// Below this, the two best tokens are too close to call between types of numbers.
const GAP_MIN: f64 = 0.25;
/// Requests at a time.
const CLIENTS: usize = 8;

fn cases() -> Vec<Value> {
    let path = server::paths::root().join("models/gpt-oss-nano/eval_prompts.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let cases: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sure: Vec<Value> = cases.into_iter().filter(|case| case["nano_gap"].as_f64().unwrap() > GAP_MIN).collect();
    assert!(sure.len() > 180, "{} cases", sure.len());
    sure
}

/// A case as a chat request.
fn body(case: &Value) -> Value {
    let mut messages = case["messages"].as_array().unwrap().clone();
    if let Some(instructions) = case["instructions"].as_str() {
        messages.insert(0, json!({"role": "developer", "content": instructions}));
    }
    let mut body = json!({
        "model": "gpt-oss-nano", "messages": messages, "temperature": 0,
        "reasoning_effort": case["reasoning_effort"],
        "chat_template_kwargs": {"model_identity": case["model_identity"], "current_date": case["current_date"]},
    });
    if !case["tools"].as_array().unwrap().is_empty() {
        body["tools"] = case["tools"].clone();
    }
    body
}

fn tokens(text: &str) -> Vec<TokenId> {
    let bpe = tiktoken_rs::o200k_harmony_singleton();
    bpe.encode_with_special_tokens(text).into_iter().map(TokenId).collect()
}

fn read(tokens: &[TokenId]) -> Turn {
    let mut reader = TurnReader::new(Tokenizer::shared(), Start::AssistantHeader, true);
    for &token in tokens {
        reader.push(token);
    }
    reader.finish().1
}

/// Asks every round of a case and compares the answer with the model's own completion.
fn ask(serve: &Serve, case: &Value) {
    let id = &case["id"];
    let mut body = body(case);
    for (round, expected) in case["nano_greedy"].as_array().unwrap().iter().enumerate() {
        let expected = tokens(expected.as_str().unwrap());
        let turn = read(&expected);
        let (status, answer) = serve.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{id}: {answer}");
        let message = &answer["choices"][0]["message"];
        assert_eq!(answer["usage"]["completion_tokens"], expected.len(), "{id} round {round}: {answer}");
        if round == 0 {
            assert_eq!(answer["usage"]["prompt_tokens"], case["prompt_tokens"], "{id}: {answer}");
        }
        assert_eq!(message["content"].as_str().unwrap_or_default(), turn.content, "{id} round {round}: {answer}");
        assert_eq!(message["reasoning"].as_str().unwrap_or_default(), turn.reasoning, "{id} round {round}: {answer}");
        let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
        assert_eq!(calls.len(), turn.tool_calls.len(), "{id} round {round}: {answer}");
        let messages = body["messages"].as_array_mut().unwrap();
        messages.push(message.clone());
        for (call, expected) in calls.iter().zip(&turn.tool_calls) {
            assert_eq!(call["function"]["name"], expected.name, "{id}: {answer}");
            assert_eq!(call["function"]["arguments"], expected.arguments, "{id}: {answer}");
            let result = &case["expect"]["tool_result"];
            messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": result}));
        }
    }
}

fn every_case_is_answered_as_the_card_says(args: &[&str]) {
    let serve = Serve::start(args);
    let cases = Mutex::new(cases());
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let Some(case) = cases.lock().unwrap().pop() else { return };
                    ask(&serve, &case);
                }
            });
        }
    });
}

#[test]
fn one_worker_exact() {
    every_case_is_answered_as_the_card_says(&["--workers", "1", "--precision", "exact"]);
}

#[test]
fn one_worker_fast() {
    every_case_is_answered_as_the_card_says(&["--workers", "1"]);
}

#[test]
fn three_workers_fast() {
    every_case_is_answered_as_the_card_says(&["--workers", "3"]);
}

#[test]
fn four_workers_exact() {
    every_case_is_answered_as_the_card_says(&["--workers", "4", "--precision", "exact"]);
}

/// Identity and date are the server's where the request says nothing.
#[test]
fn identity_and_date_come_from_the_servers_configuration() {
    let identity = "You are gpt-oss-nano, a tiny demo model.";
    let serve = Serve::start(&["--model-identity", identity, "--current-date", "2030-03-14"]);
    let cases = cases();
    let named = cases.iter().find(|case| case["model_identity"] == identity && case["current_date"] == "2030-03-14");
    let mut asked = body(named.unwrap());
    asked.as_object_mut().unwrap().remove("chat_template_kwargs");
    let (_, answer) = serve.post("/v1/chat/completions", &asked);
    assert_eq!(answer["usage"]["prompt_tokens"], named.unwrap()["prompt_tokens"], "{answer}");
}
