//! The evaluation prompts of gpt-oss-nano, rendered from the fields of a request, and the model's answers, read back.
//!
//! The model was trained on prompts of the format's reference renderer, so their token counts must agree.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../tests/support/paths.rs"]
mod paths;

use phalanx_coordinator::harmony::{
    Bounds, Channel, DeveloperContent, Message, Start, SystemContent, Tokenizer, ToolCall, ToolDefinition, Turn,
    TurnReader, prompt, special,
};
use phalanx_proto::TokenId;
use serde_json::Value;

fn rows() -> Vec<Value> {
    let path = paths::root().join("models/gpt-oss-nano/eval_prompts.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 206);
    rows
}

fn conversation(row: &Value) -> Vec<Message> {
    let owned = |key: &str| row[key].as_str().map(str::to_owned);
    let default = SystemContent::default();
    let mut messages = vec![Message::System(SystemContent {
        model_identity: owned("model_identity").unwrap_or_else(|| default.model_identity.clone()),
        current_date: owned("current_date"),
        reasoning_effort: row["reasoning_effort"].as_str().unwrap().parse().unwrap(),
        ..default
    })];
    let functions: Vec<ToolDefinition> =
        row["tools"].as_array().unwrap().iter().map(|tool| tool_definition(&tool["function"])).collect();
    let instructions = owned("instructions");
    if instructions.is_some() || !functions.is_empty() {
        messages.push(Message::Developer(DeveloperContent { instructions, functions }));
    }
    for message in row["messages"].as_array().unwrap() {
        let text = message["content"].as_str().unwrap();
        messages.push(match message["role"].as_str().unwrap() {
            "user" => Message::user(text),
            "assistant" => Message::assistant(Channel::Final, text),
            role => panic!("no row has a message of {role}"),
        });
    }
    messages
}

fn tool_definition(function: &Value) -> ToolDefinition {
    ToolDefinition {
        name: function["name"].as_str().unwrap().to_owned(),
        description: function["description"].as_str().unwrap().to_owned(),
        parameters: Some(function["parameters"].clone()),
    }
}

fn tokens(text: &str) -> Vec<TokenId> {
    let bpe = tiktoken_rs::o200k_harmony_singleton();
    bpe.encode_with_special_tokens(text).into_iter().map(TokenId).collect()
}

fn read(completion: &str) -> Turn {
    let mut reader = TurnReader::new(Tokenizer::shared(), Start::AssistantHeader, true);
    for token in tokens(completion) {
        reader.push(token);
    }
    reader.finish().1
}

#[test]
fn prompts_have_the_token_counts_of_the_reference() {
    for row in rows() {
        let prompt = prompt(Tokenizer::shared(), &conversation(&row), Bounds::NONE).unwrap();
        assert_eq!(row["prompt_tokens"], prompt.tokens.len(), "{}", row["id"]);
        assert_eq!(prompt.start, Start::AssistantHeader);
    }
}

#[test]
fn the_answers_of_the_model_are_read_back() {
    let mut calls = 0;
    for row in rows().iter().filter(|row| row["nano_passes"] == true) {
        let greedy = row["nano_greedy"].as_array().unwrap();
        let last = read(greedy.last().unwrap().as_str().unwrap());
        assert!(last.repairs.is_empty(), "{}: {:?}", row["id"], last.repairs);
        if row["match"] == "exact" {
            assert_eq!(row["expect"]["final"], last.content, "{}", row["id"]);
        }
        if let Some(expected) = row["expect"].get("tool_call") {
            let turn = read(greedy[0].as_str().unwrap());
            let [ToolCall { name, arguments }] = turn.tool_calls.as_slice() else { panic!("{}: {turn:?}", row["id"]) };
            assert_eq!(expected["name"], *name);
            assert_eq!(expected["arguments"], serde_json::from_str::<Value>(arguments).unwrap());
            assert!(!turn.reasoning.is_empty() || row["reasoning_effort"] == "low");
            assert!(turn.repairs.is_empty(), "{}: {:?}", row["id"], turn.repairs);
            calls += 1;
        }
    }
    assert!(calls >= 20, "{calls} rows with calls");
}

/// The second round of a tool case: what the model wrote, read into messages and rendered again, is what it wrote.
#[test]
fn the_second_round_goes_on_from_what_the_model_wrote() {
    for row in rows().iter().filter(|row| row["nano_greedy"].as_array().unwrap().len() == 2) {
        let mut messages = conversation(row);
        let mut expected = prompt(Tokenizer::shared(), &messages, Bounds::NONE).unwrap().tokens;
        let written = row["nano_greedy"][0].as_str().unwrap();
        let turn = read(written);
        let call = &turn.tool_calls[0];
        let result = row["expect"]["tool_result"].as_str().unwrap();

        expected.extend(tokens(written));
        expected
            .extend(tokens(&format!("<|start|>functions.{} to=assistant<|channel|>commentary<|message|>", call.name)));
        expected.extend(Tokenizer::shared().encode_ordinary(result));
        expected.extend(tokens("<|end|><|start|>assistant"));

        if !turn.reasoning.is_empty() {
            messages.push(Message::assistant(Channel::Analysis, turn.reasoning.as_str()));
        }
        messages.push(Message::call(&call.name, call.arguments.as_str()));
        messages.push(Message::tool_result(&call.name, result));
        assert_eq!(prompt(Tokenizer::shared(), &messages, Bounds::NONE).unwrap().tokens, expected, "{}", row["id"]);
    }
}

#[test]
fn without_reasoning_the_prompt_opens_the_answer() {
    let mut row = rows().swap_remove(0);
    row["reasoning_effort"] = "low".into();
    let low = prompt(Tokenizer::shared(), &conversation(&row), Bounds::NONE).unwrap();
    row["reasoning_effort"] = "none".into();
    let none = prompt(Tokenizer::shared(), &conversation(&row), Bounds::NONE).unwrap();
    assert_eq!(none.start, Start::FinalContent);
    let (shared, opening) = none.tokens.split_at(low.tokens.len());
    assert_eq!(shared, low.tokens);
    assert_eq!(opening, tokens("<|channel|>final<|message|>"));
    assert_eq!(none.tokens.last(), Some(&special::MESSAGE));
    assert!(!none.may_call);
}
