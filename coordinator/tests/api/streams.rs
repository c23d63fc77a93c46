//! Answers as server-sent events.

use std::sync::Arc;
use std::time::Duration;

use phalanx_coordinator::engine_client::FinishReason;
use phalanx_coordinator::harmony::special;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::support::{Play, config, harmony, joined, post_bytes, question, read_until, start, start_writing};

#[tokio::test]
async fn pieces_come_in_order_and_the_usage_last() {
    let text = "<|channel|>analysis<|message|>Three and four.<|end|>\
                <|start|>assistant<|channel|>final<|message|>3 + 4 = 7.<|return|>";
    let server = start_writing(text).await;
    let reply = server.ask(json!({"stream": true, "stream_options": {"include_usage": true}})).await;
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    let chunks = reply.chunks();
    let (usage, pieces) = chunks.split_last().unwrap();
    assert_eq!(pieces[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(joined(pieces, 0, "reasoning"), "Three and four.");
    assert_eq!(joined(pieces, 0, "reasoning_content"), "Three and four.");
    assert_eq!(joined(pieces, 0, "content"), "3 + 4 = 7.");
    let last = pieces.last().unwrap();
    assert_eq!((&last["choices"][0]["delta"], &last["choices"][0]["finish_reason"]), (&json!({}), &json!("stop")));
    for piece in pieces {
        assert_eq!((&piece["object"], &piece["usage"]), (&json!("chat.completion.chunk"), &Value::Null));
        assert!(piece.as_object().unwrap().contains_key("usage"));
        assert_eq!((&piece["id"], &piece["created"]), (&usage["id"], &usage["created"]));
        assert_eq!(piece["choices"][0]["logprobs"], Value::Null);
    }
    assert!(pieces[..pieces.len() - 1].iter().all(|piece| piece["choices"][0]["finish_reason"].is_null()));
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], harmony(text).len());
}

#[tokio::test]
async fn usage_is_absent_unless_asked_for() {
    let server = start_writing("<|channel|>final<|message|>7<|return|>").await;
    let chunks = server.ask(json!({"stream": true})).await.chunks();
    assert!(chunks.iter().all(|chunk| !chunk.as_object().unwrap().contains_key("usage")));
    assert!(chunks.iter().all(|chunk| chunk["choices"].as_array().unwrap().len() == 1));
}

#[tokio::test]
async fn a_piece_is_sent_before_the_next_token_exists() {
    let gate = Arc::new(Notify::new());
    let wait = Arc::clone(&gate);
    let server = start(config(), move |_| {
        Ok(vec![
            Play::Tokens(harmony("<|channel|>final<|message|>first")),
            Play::Wait(Arc::clone(&wait)),
            Play::Tokens(harmony(" second")),
            Play::Finish(FinishReason::Stop(special::RETURN)),
        ])
    })
    .await;
    let mut stream = server.connect(&post_bytes(question(json!({"stream": true})).to_string().as_bytes())).await;
    let begin = read_until(&mut stream, "first").await;
    assert!(!begin.contains("second"));
    gate.notify_one();
    read_until(&mut stream, "[DONE]").await;
}

#[tokio::test]
async fn a_call_comes_in_pieces() {
    let server =
        start_writing("<|channel|>commentary to=functions.add<|constrain|>json<|message|>{\"a\": 3, \"b\": 4}<|call|>")
            .await;
    let tools = json!([{"type": "function", "function": {"name": "add"}}]);
    let chunks = server.ask(json!({"stream": true, "tools": tools})).await.chunks();
    let calls: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"].get("tool_calls")).collect();
    let first = &calls[0][0];
    assert!(first["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!((&first["index"], &first["type"]), (&json!(0), &json!("function")));
    assert_eq!(first["function"], json!({"name": "add", "arguments": ""}));
    for call in &calls[1..] {
        assert_eq!(call[0].as_object().unwrap().keys().collect::<Vec<_>>(), ["index", "function"]);
    }
    assert!(calls.len() > 2);
    let arguments: String = calls.iter().map(|call| call[0]["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(arguments, "{\"a\": 3, \"b\": 4}");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_stop_string_across_tokens_is_never_shown() {
    let tokens = harmony("<|channel|>final<|message|>one END");
    assert!(tokens.len() > 4, "the stop string must not be one token");
    let mut server = start(config(), |_| {
        let tokens = harmony("<|channel|>final<|message|>alpha beta gamma delta");
        Ok(tokens.into_iter().map(|token| Play::Tokens(vec![token])).chain([Play::UntilCancelled]).collect())
    })
    .await;
    let chunks = server.ask(json!({"stream": true, "stop": ["ta gam"]})).await.chunks();
    assert_eq!(joined(&chunks, 0, "content"), "alpha be");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
    server.cancelled.recv().await.unwrap();
}

#[tokio::test]
async fn a_character_of_several_tokens_comes_whole() {
    let answer = "🦀𓀀é\u{1f469}\u{200d}\u{1f52c}";
    let tokens = harmony(answer);
    assert!(tokens.len() > answer.chars().count(), "some character must have several tokens");
    let server = start_writing(&format!("<|channel|>final<|message|>{answer}<|return|>")).await;
    let chunks = server.ask(json!({"stream": true})).await.chunks();
    assert_eq!(joined(&chunks, 0, "content"), answer);
}

#[tokio::test]
async fn choices_are_told_apart() {
    let server = start(config(), |request| {
        let text = format!("<|channel|>final<|message|>choice {}", request.sampling.choice);
        let tokens = harmony(&text).into_iter().map(|token| Play::Tokens(vec![token]));
        Ok(tokens.chain([Play::Finish(FinishReason::Stop(special::RETURN))]).collect())
    })
    .await;
    let chunks = server.ask(json!({"stream": true, "n": 2, "stream_options": {"include_usage": true}})).await.chunks();
    assert_eq!(joined(&chunks, 0, "content"), "choice 0");
    assert_eq!(joined(&chunks, 1, "content"), "choice 1");
    let finished = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "stop").count();
    assert_eq!(finished, 2);
    let each = harmony("<|channel|>final<|message|>choice 0").len() + 1;
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 2 * each);
}

#[tokio::test]
async fn a_silent_stream_carries_comments() {
    let mut config = config();
    config.limits.keep_alive = Duration::from_millis(5);
    let gate = Arc::new(Notify::new());
    let wait = Arc::clone(&gate);
    let server = start(config, move |_| {
        Ok(vec![Play::Wait(Arc::clone(&wait)), Play::Finish(FinishReason::Stop(special::RETURN))])
    })
    .await;
    let mut stream = server.connect(&post_bytes(question(json!({"stream": true})).to_string().as_bytes())).await;
    read_until(&mut stream, ": keep-alive\n\n").await;
    gate.notify_one();
    read_until(&mut stream, "[DONE]").await;
}
