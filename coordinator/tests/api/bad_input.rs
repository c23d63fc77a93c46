//! Requests that must be refused: the exact status, in the envelope, without reaching the engine.

use std::net::TcpListener;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{CONTEXT, MODEL, Server, config, question, start};

async fn server() -> Server {
    start(config(), |request| panic!("{request:?} reached the engine")).await
}

/// Sends `question(more)` and expects 400 because of `param`.
async fn refused(server: &Server, more: Value, param: &str) {
    let reply = server.ask(more.clone()).await;
    assert_eq!(reply.status, 400, "{more}: {}", reply.text());
    let error = reply.error();
    assert_eq!((&error["type"], &error["param"]), (&json!("invalid_request_error"), &json!(param)), "{more}: {error}");
}

#[tokio::test]
async fn numbers_out_of_range() {
    let server = server().await;
    for n in [json!(0), json!(9), json!(1_000_000_000), json!(-1), json!("ten"), json!(1.5), json!([1])] {
        refused(&server, json!({"n": n}), "n").await;
    }
    for best_of in [json!(1_000_000), json!(0)] {
        refused(&server, json!({"best_of": best_of}), "best_of").await;
    }
    for key in ["max_tokens", "max_completion_tokens"] {
        for value in [json!(0), json!(-5), json!("ten"), json!(7.0), json!(u64::MAX), json!(true)] {
            refused(&server, json!({key: value}), key).await;
        }
    }
    let error = server.ask(json!({"max_tokens": 7.0})).await.error();
    assert_eq!(error["message"], "max_tokens must be a whole number, not 7.0");
    for temperature in [json!(-0.1), json!(2.1), json!(1e300), json!("hot"), json!({})] {
        refused(&server, json!({"temperature": temperature}), "temperature").await;
    }
    for top_p in [json!(-0.1), json!(1.1), json!(true)] {
        refused(&server, json!({"top_p": top_p}), "top_p").await;
    }
    for top_k in [json!(-2), json!(1.5), json!("all")] {
        refused(&server, json!({"top_k": top_k}), "top_k").await;
    }
    for min_p in [json!(-0.1), json!(1.1), json!("x")] {
        refused(&server, json!({"min_p": min_p}), "min_p").await;
    }
    for penalty in [json!(0), json!(-1), json!(11), json!("x")] {
        refused(&server, json!({"repetition_penalty": penalty}), "repetition_penalty").await;
    }
    refused(&server, json!({"priority": "high"}), "priority").await;
    refused(&server, json!({"service_tier": 1}), "service_tier").await;
    refused(&server, json!({"cache_salt": 1}), "cache_salt").await;
    refused(&server, json!({"cache_salt": "x".repeat(257)}), "cache_salt").await;
    refused(&server, json!({"min_tokens": 3}), "min_tokens").await;
    refused(&server, json!({"ignore_eos": "yes"}), "ignore_eos").await;
    for seed in [json!(1.5), json!("x"), json!(1e40)] {
        refused(&server, json!({"seed": seed}), "seed").await;
    }
    for penalty in [json!(2.5), json!(-2.5), json!("much")] {
        refused(&server, json!({"frequency_penalty": penalty}), "frequency_penalty").await;
        refused(&server, json!({"presence_penalty": penalty}), "presence_penalty").await;
    }
}

#[tokio::test]
async fn what_is_not_supported_is_refused_rather_than_ignored() {
    let server = server().await;
    let many: serde_json::Map<String, Value> = (0..100_000).map(|id| (id.to_string(), json!(1))).collect();
    let odd = ["201088", "-1", "05", "+5", "x", "", "4294967296", "1e3"];
    let odd = odd.into_iter().map(|id| json!({id: 1}));
    let large = [json!({"5": -101}), json!({"5": 1e300}), json!({"5": "1"}), json!({"5": null})];
    for bias in odd.chain(large).chain([Value::Object(many), json!([1])]) {
        refused(&server, json!({"logit_bias": bias}), "logit_bias").await;
    }
    for top in [json!(21), json!(-1), json!("x")] {
        refused(&server, json!({"logprobs": true, "top_logprobs": top}), "top_logprobs").await;
    }
    refused(&server, json!({"logprobs": 1_000_000}), "logprobs").await;
    for top in [json!(21), json!(5), json!(1_000_000), json!(-1)] {
        refused(&server, json!({"top_logprobs": top}), "top_logprobs").await;
    }
    for format in [json!({"type": "json_object"}), json!({"type": "json_schema", "json_schema": {}})] {
        refused(&server, json!({"response_format": format}), "response_format").await;
    }
    refused(&server, json!({"response_format": {}}), "response_format.type").await;
    refused(&server, json!({"response_format": "text"}), "response_format").await;
    refused(&server, json!({"modalities": ["text", "audio"]}), "modalities").await;
    refused(&server, json!({"functions": [{"name": "f"}]}), "functions").await;
    for (key, value) in [
        ("guided_json", json!({"type": "object"})),
        ("guided_choice", json!(["a", "b"])),
        ("guided_regex", json!("a+")),
        ("guided_grammar", json!("root ::= \"a\"")),
        ("structured_outputs", json!({"regex": "a+"})),
        ("stop_token_ids", json!([5])),
        ("bad_words", json!(["x"])),
        ("allowed_token_ids", json!([5])),
        ("include_stop_str_in_output", json!(true)),
        ("continue_final_message", json!(true)),
        ("echo", json!(true)),
        ("prompt_logprobs", json!(0)),
        ("web_search_options", json!({})),
        ("use_beam_search", json!(true)),
    ] {
        refused(&server, json!({key: value}), key).await;
    }
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for choice in [json!("required"), json!("maybe"), json!({"type": "function", "function": {"name": "f"}}), json!(1)]
    {
        refused(&server, json!({"tools": tools, "tool_choice": choice}), "tool_choice").await;
    }
    for effort in [json!("extreme"), json!(3), json!("")] {
        refused(&server, json!({"reasoning_effort": effort}), "reasoning_effort").await;
        let within = json!({"chat_template_kwargs": {"reasoning_effort": effort}});
        refused(&server, within, "chat_template_kwargs.reasoning_effort").await;
    }
}

#[tokio::test]
async fn tools_that_are_none() {
    let server = server().await;
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    for name in ["", "<|end|>", "a b", "a.b", "ü", "a\u{0}", "a\nb", &"x".repeat(65), &"x".repeat(5000)] {
        refused(&server, json!({"tools": [named(name)]}), "tools[0].function.name").await;
    }
    refused(&server, json!({"tools": [{"type": "banana", "function": {"name": "f"}}]}), "tools[0].type").await;
    refused(&server, json!({"tools": [{"function": {"name": "f"}}]}), "tools[0].type").await;
    refused(&server, json!({"tools": [{"type": "function"}]}), "tools[0].function").await;
    refused(&server, json!({"tools": [named("f"), 7]}), "tools[1]").await;
    refused(&server, json!({"tools": {"type": "function"}}), "tools").await;
    refused(&server, json!({"tools": [named("f"), named("f")]}), "tools").await;
    refused(&server, json!({"tools": vec![named("f"); 129]}), "tools").await;
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": "all"}});
    refused(&server, json!({"tools": [tool]}), "tools[0].function.parameters").await;
    let tool = json!({"type": "function", "function": {"name": "f", "description": 5}});
    refused(&server, json!({"tools": [tool]}), "tools[0].function.description").await;
}

#[tokio::test]
async fn messages_that_are_none() {
    let server = server().await;
    let call = |function: Value| {
        let calls = json!([{"id": "1", "type": "function", "function": function}]);
        json!([{"role": "assistant", "content": null, "tool_calls": calls}])
    };
    for (messages, param) in [
        (json!([]), "messages"),
        (json!("hi"), "messages"),
        (json!({"role": "user", "content": "hi"}), "messages"),
        (json!(["hi"]), "messages[0]"),
        (json!([{"content": "hi"}]), "messages[0].role"),
        (json!([{"role": "wizard", "content": "hi"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "user", "content": null}]), "messages[0].content"),
        (json!([{"role": "user", "content": 5}]), "messages[0].content"),
        (json!([{"role": "user", "content": ["hi"]}]), "messages[0].content[0]"),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (json!([{"role": "user", "content": [{"text": "hi"}]}]), "messages[0].content[0].type"),
        (json!([{"role": "user", "content": "hi", "name": "<|end|>"}]), "messages[0].name"),
        (json!([{"role": "user", "content": "hi", "name": ""}]), "messages[0].name"),
        (json!([{"role": "tool", "content": "hi"}]), "messages[0].tool_call_id"),
        (json!([{"role": "tool", "content": "hi", "tool_call_id": "unknown"}]), "messages"),
        (call(json!({"name": "<|end|>", "arguments": "{}"})), "messages[0].tool_calls[0].function.name"),
        (call(json!({"name": "a b", "arguments": "{}"})), "messages[0].tool_calls[0].function.name"),
        (call(json!({"name": "", "arguments": "{}"})), "messages[0].tool_calls[0].function.name"),
        (call(json!({"name": "f", "arguments": {}})), "messages[0].tool_calls[0].function.arguments"),
        (json!(vec![json!({"role": "user", "content": "hi"}); 4097]), "messages"),
    ] {
        refused(&server, json!({"messages": messages}), param).await;
    }
    let reply = server.chat(&json!({"model": MODEL})).await;
    assert_eq!((reply.status, &reply.error()["param"]), (400, &json!("messages")));
}

#[tokio::test]
async fn stop_strings_and_options() {
    let server = server().await;
    refused(&server, json!({"stop": ["a", "b", "c", "d", "e"]}), "stop").await;
    refused(&server, json!({"stop": ["a", 5]}), "stop[1]").await;
    refused(&server, json!({"stop": ""}), "stop").await;
    refused(&server, json!({"stop": "x".repeat(1025)}), "stop").await;
    refused(&server, json!({"stop": {"a": 1}}), "stop").await;
    refused(&server, json!({"stream": "yes"}), "stream").await;
    refused(&server, json!({"stream": true, "stream_options": true}), "stream_options").await;
    refused(&server, json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage").await;
    let identity = json!({"model_identity": "x".repeat(1025)});
    refused(&server, json!({"chat_template_kwargs": identity}), "chat_template_kwargs.model_identity").await;
    refused(&server, json!({"chat_template_kwargs": {"current_date": 5}}), "chat_template_kwargs.current_date").await;
}

#[tokio::test]
async fn media_is_refused_and_never_fetched() {
    let server = server().await;
    let trap = TcpListener::bind("127.0.0.1:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let url = format!("http://{}/image.png", trap.local_addr().unwrap());
    for part in [
        json!({"type": "image_url", "image_url": {"url": url}}),
        json!({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        json!({"type": "file", "file": {"file_url": url}}),
        json!({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
    ] {
        let messages = json!([{"role": "user", "content": [{"type": "text", "text": "see"}, part]}]);
        refused(&server, json!({"messages": messages}), "messages[0].content[1].type").await;
    }
    assert_eq!(trap.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "the server connected to the URL");
}

#[tokio::test]
async fn what_does_not_fit_the_context() {
    let server = server().await;
    for more in [
        json!({"max_tokens": 1_000_000}),
        json!({"max_tokens": CONTEXT}),
        json!({"messages": [{"role": "user", "content": "word ".repeat(CONTEXT as usize)}]}),
        json!({"messages": [{"role": "user", "content": "word ".repeat(CONTEXT as usize)}], "max_tokens": 1}),
    ] {
        let reply = server.ask(more).await;
        let error = reply.error();
        assert_eq!((reply.status, &error["code"]), (400, &json!("context_length_exceeded")), "{error}");
        assert_eq!(error["param"], "messages");
    }
}

#[tokio::test]
async fn tools_that_print_many_times_as_long_as_they_are() {
    let server = server().await;
    let mut schema = json!({"type": "string", "examples": vec![""; 1_300_000]});
    for _ in 0..57 {
        schema = json!({"type": "object", "properties": {"a": schema}});
    }
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": schema}}]);
    let error = server.ask(json!({"tools": tools})).await.error();
    assert_eq!(error["code"], "context_length_exceeded", "{error}");
    assert!(error["message"].as_str().unwrap().contains("messages and tools take more"), "{error}");
}

#[tokio::test]
async fn a_request_waits_only_so_long_for_its_turn_to_be_read() {
    let mut config = config();
    config.limits.encoders = 0;
    config.limits.encoder_wait = Duration::from_millis(20);
    let server = start(config, |request| panic!("{request:?} reached the engine")).await;
    let reply = server.ask(json!({})).await;
    assert_eq!((reply.status, &reply.error()["code"]), (429, &json!("rate_limit_exceeded")));
    assert_eq!(reply.header("retry-after-ms"), Some("20"));
}

#[tokio::test]
async fn the_model_must_be_the_one_served() {
    let server = server().await;
    let reply = server.ask(json!({"model": "gpt-4o\n<script>"})).await;
    assert_eq!((reply.status, &reply.error()["code"]), (404, &json!("model_not_found")));
    refused(&server, json!({"model": 5}), "model").await;
    refused(&server, json!({"model": null}), "model").await;
}

#[tokio::test]
async fn bodies_that_are_not_json() {
    let server = server().await;
    let body = question(json!({"x": "HERE"})).to_string();
    let with = |raw: &str| body.replace("\"HERE\"", raw).into_bytes();
    let deep = |open: &str, close: &str| open.repeat(20_000) + &close.repeat(20_000);
    let digits = "9".repeat(5000);
    let invalid_utf8 = [&with("\"")[..body.len() - 7], b"\xff\xfe\"}"].concat();
    for bytes in [
        Vec::new(),
        b"{".to_vec(),
        b"null".to_vec(),
        b"[]".to_vec(),
        b"\"text\"".to_vec(),
        b"{} trailing".to_vec(),
        with("NaN"),
        with("1e999"),
        with(&digits),
        with("\"\\ud800\""),
        with("\"\n\""),
        invalid_utf8,
        with(&deep("[", "]")),
        with(&deep("{\"a\":", "}")),
        deep("[", "").into_bytes(),
    ] {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
        let reply = server.post(&bytes).await;
        assert_eq!(reply.status, 400, "{shown}");
        assert_eq!(reply.error()["code"], "invalid_json", "{shown}");
    }
}

#[tokio::test]
async fn a_schema_may_not_nest_without_end() {
    let server = server().await;
    let schema = "{\"type\":\"object\",\"properties\":{\"a\":".repeat(3000) + "{}" + &"}}".repeat(3000);
    let body = question(json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": "HERE"}}]}));
    let reply = server.post(body.to_string().replace("\"HERE\"", &schema).as_bytes()).await;
    assert_eq!(reply.status, 400);
    reply.error();
}
