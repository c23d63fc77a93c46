//! How tokens are to be chosen: what a request says is what the engine is asked for, and what it tells is what the client
//! sees.

use std::collections::BTreeSet;

use phalanx_coordinator::engine_client::{FinishReason, GenerateRequest};
use phalanx_coordinator::harmony::{Tokenizer, special};
use phalanx_planner::Class;
use phalanx_proto::{Sampling, TokenId, TokenLogprobs};
use serde_json::{Value, json};

use crate::support::{Play, Server, config, harmony, start, start_writing};

async fn asked(more: Value) -> GenerateRequest {
    let mut server = start_writing("<|channel|>final<|message|>7<|return|>").await;
    let reply = server.ask(more).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    server.seen.recv().await.unwrap()
}

#[tokio::test]
async fn every_parameter_reaches_the_engine() {
    let request = asked(json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": -1.5,
        "frequency_penalty": 1.25, "repetition_penalty": 1.5, "seed": 9, "logprobs": true, "top_logprobs": 3,
        "logit_bias": {"500": -100, "20": 2.5}
    }))
    .await;
    let sampling = Sampling {
        temperature: 0.5,
        top_k: 7,
        top_p: 0.25,
        min_p: 0.125,
        presence_penalty: -1.5,
        frequency_penalty: 1.25,
        repetition_penalty: 1.5,
        seed: 9,
        choice: 0,
        logprobs: Some(3),
    };
    assert_eq!(request.sampling, sampling);
    assert_eq!(request.bias, [(TokenId(20), 2.5), (TokenId(500), -100.0)]);
    assert_eq!(request.class, Class::Interactive);
}

#[tokio::test]
async fn what_is_not_said_changes_nothing() {
    let request = asked(json!({"seed": 3, "top_k": -1, "logit_bias": {}, "logprobs": false, "priority": 0})).await;
    assert_eq!(request.sampling, Sampling { temperature: 1.0, seed: 3, ..Sampling::GREEDY });
    assert_eq!((request.bias.len(), request.class), (0, Class::Interactive));
    assert_eq!(asked(json!({"logprobs": true})).await.sampling.logprobs, Some(0));
}

#[tokio::test]
async fn who_can_wait_says_so() {
    for more in [json!({"priority": 1}), json!({"service_tier": "flex"})] {
        assert_eq!(asked(more).await.class, Class::Batch);
    }
    for more in [json!({"priority": -1}), json!({"service_tier": "auto"})] {
        assert_eq!(asked(more).await.class, Class::Interactive);
    }
}

#[tokio::test]
async fn the_models_own_end_may_be_passed_over() {
    assert_eq!(asked(json!({"ignore_eos": true})).await.stop_tokens, []);
}

#[tokio::test]
async fn prefixes_are_shared_only_within_key_and_salt() {
    let keys = ["first-key", "second-key"];
    let mut config = config();
    config.api_keys = phalanx_coordinator::api::ApiKeys::new(keys);
    let mut server = start(config, |_| Ok(vec![Play::Finish(FinishReason::Length)])).await;
    let mut salts = Vec::new();
    for key in keys {
        for salt in [json!(null), json!("a"), json!("b")] {
            let reply = server.ask_as(key, json!({"cache_salt": salt})).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            salts.push(server.seen.recv().await.unwrap().salt);
        }
    }
    assert_eq!(salts.iter().collect::<BTreeSet<_>>().len(), salts.len(), "{salts:?}");
    server.ask_as(keys[0], json!({"cache_salt": "a"})).await;
    assert_eq!(server.seen.recv().await.unwrap().salt, salts[1]);
}

/// A server that writes `text`, where token `i` has the logarithm `-i` and one alternative.
async fn likely(text: &str, stop: &'static str) -> (Server, Vec<TokenId>) {
    let tokens = harmony(text);
    let plays: Vec<Play> = (0u16..)
        .zip(&tokens)
        .map(|(i, &token)| {
            let logprobs = TokenLogprobs { logprob: -f32::from(i), top: vec![(TokenId(13), f32::NEG_INFINITY)] };
            Play::Likely(vec![token], vec![logprobs])
        })
        .chain([Play::Finish(FinishReason::Stop(special::RETURN))])
        .collect();
    assert!(stop.is_empty() || text.contains(stop));
    (start(config(), move |_| Ok(plays.clone())).await, tokens)
}

const EMOJI: &str =
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A \u{1f9ab} or two";

#[tokio::test]
async fn logprobs_are_those_of_the_content() {
    let (server, tokens) = likely(EMOJI, "").await;
    let json = server.ask(json!({"logprobs": true, "top_logprobs": 1})).await.json();
    let choice = &json["choices"][0];
    let content = choice["message"]["content"].as_str().unwrap();
    assert_eq!(content, "A \u{1f9ab} or two");
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> =
        entries.iter().flat_map(|e| e["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap() as u8).collect();
    assert_eq!(bytes, content.as_bytes(), "joined, the bytes are the content");
    let first = tokens.len() - entries.len();
    let tokenizer = Tokenizer::shared();
    for (i, entry) in (first..).zip(entries) {
        assert_eq!(entry["logprob"], -(i as f64), "{entry}");
        let text = tokenizer.token_bytes(tokens[i]).unwrap();
        assert_eq!(entry["token"], String::from_utf8_lossy(&text).as_ref());
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["logprob"]), (1, &json!(-9999.0)), "JSON has no infinity");
    }
    assert_eq!(choice["logprobs"]["refusal"], Value::Null);
    let none = server.ask(json!({})).await.json();
    assert_eq!(none["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn streamed_logprobs_come_with_their_content() {
    let (server, _) = likely(EMOJI, "").await;
    let whole = server.ask(json!({"logprobs": true})).await.json();
    let mut entries = Vec::new();
    let (mut shown, mut read) = (String::new(), 0);
    for chunk in server.ask(json!({"logprobs": true, "stream": true})).await.chunks() {
        let choice = &chunk["choices"][0];
        shown += choice["delta"]["content"].as_str().unwrap_or_default();
        for entry in choice["logprobs"]["content"].as_array().into_iter().flatten() {
            assert!(read < shown.len(), "{entry} does not begin in {shown:?}");
            read += entry["bytes"].as_array().unwrap().len();
            entries.push(entry.clone());
        }
    }
    assert_eq!(json!(entries), whole["choices"][0]["logprobs"]["content"]);
}

#[tokio::test]
async fn tokens_behind_a_stop_string_are_not_told() {
    let (server, _) = likely("<|channel|>final<|message|>one two three four", " three").await;
    let json = server.ask(json!({"logprobs": true, "stop": " three"})).await.json();
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["content"], "one two");
    let texts: Vec<&str> =
        choice["logprobs"]["content"].as_array().unwrap().iter().map(|e| e["token"].as_str().unwrap()).collect();
    assert_eq!(texts.concat(), "one two");
}
