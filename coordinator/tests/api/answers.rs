//! Answers in one piece.

use phalanx_coordinator::engine_client::FinishReason;
use phalanx_coordinator::harmony::special;
use serde_json::{Value, json};

use crate::support::{Play, config, harmony, start, start_writing};

const THOUGHTFUL: &str = "<|channel|>analysis<|message|>Three and four.<|end|>\
                          <|start|>assistant<|channel|>final<|message|>3 + 4 = 7.<|return|>";

#[tokio::test]
async fn thinking_and_answer_stand_apart() {
    let server = start_writing(THOUGHTFUL).await;
    let reply = server.ask(json!({})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let mut json = reply.json();
    let fields = json.as_object_mut().unwrap();
    assert!(fields.remove("id").unwrap().as_str().unwrap().starts_with("chatcmpl-"));
    assert!(fields.remove("created").unwrap().as_u64().unwrap() > 1_600_000_000);
    let usage = fields.remove("usage").unwrap();
    assert_eq!(
        json,
        json!({
            "object": "chat.completion", "model": "gpt-oss-test", "system_fingerprint": "fp_test-1",
            "choices": [{
                "index": 0,
                "message": {
                    "role": "assistant", "content": "3 + 4 = 7.", "refusal": null,
                    "reasoning": "Three and four.", "reasoning_content": "Three and four."
                },
                "logprobs": null,
                "finish_reason": "stop"
            }]
        })
    );
    assert_eq!(usage["completion_tokens"], harmony(THOUGHTFUL).len());
    let thinking = harmony("<|channel|>analysis<|message|>Three and four.").len();
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], thinking);
    let (prompt, completion) = (usage["prompt_tokens"].as_u64().unwrap(), usage["completion_tokens"].as_u64().unwrap());
    assert_eq!(usage["total_tokens"], prompt + completion);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn the_engine_says_how_much_of_the_prompt_was_cached() {
    let tokens = harmony("<|channel|>final<|message|>7");
    let script = vec![Play::Begin(48), Play::Tokens(tokens), Play::Finish(FinishReason::Stop(special::RETURN))];
    let server = start(config(), move |_| Ok(script.clone())).await;
    for more in [json!({}), json!({"stop": "7"})] {
        let json = server.ask(more).await.json();
        assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 48, "{json}");
    }
}

#[tokio::test]
async fn a_call_is_a_tool_call() {
    let server = start_writing(
        "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary \
         <|constrain|>json<|message|>{\"city\":\"Rome\"}<|call|>",
    )
    .await;
    let tool = json!({"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}});
    let json = server.ask(json!({"tools": [tool]})).await.json();
    let choice = &json["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(call["type"], "function");
    assert_eq!(call["function"], json!({"name": "get_weather", "arguments": "{\"city\":\"Rome\"}"}));
}

#[tokio::test]
async fn a_model_that_may_not_call_answers_with_what_it_wrote() {
    let server = start_writing(
        "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant to=functions.f<|channel|>commentary \
         <|constrain|>json<|message|>{\"a\":1}<|call|>",
    )
    .await;
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for more in [json!({"tools": tools, "tool_choice": "none"}), json!({})] {
        let json = server.ask(more).await.json();
        let choice = &json["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{json}");
        assert_eq!(
            (&choice["message"]["content"], &choice["message"]["reasoning"]),
            (&json!("{\"a\":1}"), &json!("Ask."))
        );
        assert_eq!(choice["message"].get("tool_calls"), None);
    }
}

#[tokio::test]
async fn an_answer_that_runs_out_of_tokens_says_so() {
    let server = start_writing("<|channel|>analysis<|message|>Let me").await;
    let json = server.ask(json!({"max_completion_tokens": 5})).await.json();
    assert_eq!(json["choices"][0]["finish_reason"], "length");
    assert_eq!(json["choices"][0]["message"]["content"], "");
    assert_eq!(json["choices"][0]["message"]["reasoning"], "Let me");
}

#[tokio::test]
async fn a_turn_of_thinking_alone_still_answers() {
    let server = start_writing("<|channel|>analysis<|message|>It is 7.<|return|>").await;
    let json = server.ask(json!({})).await.json();
    assert_eq!(json["choices"][0]["message"]["content"], "It is 7.");
    assert!(server.get("/metrics").await.text().contains("repairs_total{kind=\"answer_in_analysis\"} 1"));
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_the_generation() {
    let mut server = start(config(), |_| {
        let tokens = harmony("<|channel|>final<|message|>one STOP two");
        Ok(tokens.into_iter().map(|token| Play::Tokens(vec![token])).chain([Play::UntilCancelled]).collect())
    })
    .await;
    let json = server.ask(json!({"stop": [" STOP"]})).await.json();
    assert_eq!(json["choices"][0]["message"]["content"], "one");
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
    server.cancelled.recv().await.unwrap();
}

#[tokio::test]
async fn a_stop_string_that_never_comes_whole_is_part_of_the_answer() {
    let server = start_writing("<|channel|>final<|message|>one ST<|return|>").await;
    assert_eq!(server.ask(json!({"stop": "STOP"})).await.json()["choices"][0]["message"]["content"], "one ST");
}

#[tokio::test]
async fn choices_share_seed_and_prompt_but_not_their_number() {
    let mut server = start(config(), |request| {
        let text = format!("<|channel|>final<|message|>choice {}", request.sampling.choice);
        Ok(vec![Play::Tokens(harmony(&text)), Play::Finish(FinishReason::Stop(special::RETURN))])
    })
    .await;
    let json = server.ask(json!({"n": 3, "seed": -1})).await.json();
    let choices = json["choices"].as_array().unwrap();
    for (at, choice) in choices.iter().enumerate() {
        assert_eq!((&choice["index"], &choice["message"]["content"]), (&json!(at), &json!(format!("choice {at}"))));
        let request = server.seen.recv().await.unwrap();
        assert_eq!((request.sampling.seed, request.sampling.choice), (u64::MAX, u32::try_from(at).unwrap()));
        assert_eq!(json["usage"]["prompt_tokens"], request.prompt.len());
    }
    assert_eq!(choices.len(), 3);
    let each = harmony("<|channel|>final<|message|>choice 0").len() + 1;
    assert_eq!(json["usage"]["completion_tokens"], 3 * each);
}

#[tokio::test]
async fn without_a_seed_each_request_draws_one() {
    let mut server = start_writing("<|channel|>final<|message|>7<|return|>").await;
    let mut seeds = Vec::new();
    for _ in 0..2 {
        server.ask(json!({"seed": null})).await;
        seeds.push(server.seen.recv().await.unwrap().sampling.seed);
    }
    assert_ne!(seeds[0], seeds[1]);
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let mut config = config();
    config.served_model_name = "openai/gpt-oss-20b".to_owned();
    let server = start(config, |_| Ok(Vec::new())).await;
    let model = json!({
        "id": "openai/gpt-oss-20b", "object": "model", "created": 1_700_000_000, "owned_by": "phalanx",
        "max_model_len": 4096
    });
    assert_eq!(server.get("/v1/models").await.json(), json!({"object": "list", "data": [model]}));
    assert_eq!(server.get("/v1/models/openai/gpt-oss-20b").await.json(), model);
    assert_eq!(server.get("/v1/models/openai%2Fgpt-oss-20b").await.json(), model);
    for other in ["/v1/models/gpt-4o", "/v1/models/%00", "/v1/models/..%2f..%2fetc"] {
        let reply = server.get(other).await;
        assert_eq!((reply.status, &reply.error()["code"]), (404, &json!("model_not_found")), "{other}");
    }
    assert_eq!(server.get("/v1/models/%ff").await.status, 400);
}
