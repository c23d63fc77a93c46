//! The tokenizer against the golden fixture, and on text made to hurt it.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../tests/support/paths.rs"]
mod paths;

use phalanx_coordinator::harmony::{Detokenizer, Tokenizer, UnknownToken, special};
use phalanx_proto::TokenId;
use proptest::prelude::*;
use serde_json::Value;

fn golden() -> Value {
    let path = paths::fixture("tokenizer_golden.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap().iter().map(|id| TokenId(id.as_u64().unwrap().try_into().unwrap())).collect()
}

#[test]
fn text_becomes_the_tokens_of_the_golden_file_and_back() {
    let tokenizer = Tokenizer::shared();
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 40);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode_ordinary(text), ids(&case["ordinary"]), "{text:?}");
        assert_eq!(tokenizer.decode_bytes(&ids(&case["ordinary"])).unwrap(), text.as_bytes());
    }
}

#[test]
fn special_tokens_have_the_ids_of_the_golden_file() {
    let tokenizer = Tokenizer::shared();
    let golden = golden();
    assert_eq!(golden["n_vocab"], special::VOCAB_SIZE);
    let specials = golden["specials"].as_object().unwrap();
    for (marker, id) in specials {
        let id = TokenId(id.as_u64().unwrap().try_into().unwrap());
        assert!(id >= special::FIRST_SPECIAL);
        assert_eq!(tokenizer.token_bytes(id).unwrap(), marker.as_bytes());
        assert!(tokenizer.encode_ordinary(marker).iter().all(|&token| token < special::FIRST_SPECIAL));
    }
    for (marker, id) in [
        ("<|endoftext|>", special::END_OF_TEXT),
        ("<|return|>", special::RETURN),
        ("<|constrain|>", special::CONSTRAIN),
        ("<|channel|>", special::CHANNEL),
        ("<|start|>", special::START),
        ("<|end|>", special::END),
        ("<|message|>", special::MESSAGE),
        ("<|call|>", special::CALL),
    ] {
        assert_eq!(specials[marker], id.0, "{marker}");
    }
}

#[test]
fn ids_outside_the_vocabulary_are_errors() {
    let tokenizer = Tokenizer::shared();
    assert!(tokenizer.token_bytes(TokenId(special::VOCAB_SIZE - 1)).is_ok());
    for id in [special::VOCAB_SIZE, u32::MAX] {
        assert_eq!(tokenizer.decode_bytes(&[TokenId(1), TokenId(id)]), Err(UnknownToken(TokenId(id))));
    }
}

#[test]
fn no_token_is_longer_than_is_said() {
    let tokenizer = Tokenizer::shared();
    let len = |id| tokenizer.token_bytes(TokenId(id)).unwrap().len();
    assert_eq!((0..special::FIRST_SPECIAL.0).map(len).max(), Some(special::TOKEN_BYTES_MAX));
}

#[test]
fn long_text_that_is_encoded_in_parts_has_the_tokens_of_the_whole() {
    let bpe = tiktoken_rs::o200k_harmony_singleton();
    for unit in [
        "word word ",
        "// - \"\"\n        ",
        "it's  \u{a0} 12345 \r\n /// a\t b\n\n  ",
        "\u{301} !\u{301} 中文。 é🦀 ",
        " ' s 're",
        "  x",
    ] {
        // Of every length, so that the cuts fall everywhere.
        for shift in 0..unit.chars().count() {
            let text = "x".repeat(shift) + &unit.repeat(200_000 / unit.len());
            let whole: Vec<TokenId> = bpe.encode_ordinary(&text).into_iter().map(TokenId).collect();
            assert!(Tokenizer::shared().encode_ordinary(&text) == whole, "{unit:?} {shift}");
        }
    }
}

#[test]
fn long_runs_of_one_kind_survive() {
    let tokenizer = Tokenizer::shared();
    for unit in [" ", "\n", "\t\u{a0}", "a", "!", "\u{301}"] {
        let text = unit.repeat(1_100_000 / unit.chars().count()) + "x";
        let tokens = tokenizer.encode_ordinary(&text);
        assert!(tokenizer.decode_bytes(&tokens).unwrap() == text.as_bytes(), "{unit:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn text_survives_the_way_through_tokens(text in "\\PC{0,60}|[ \\t\\r\\n]{0,20}|(?s).{0,30}") {
        let tokenizer = Tokenizer::shared();
        let tokens = tokenizer.encode_ordinary(&text);
        let mut detokenizer = Detokenizer::default();
        let mut out = String::new();
        for &token in &tokens {
            out += &detokenizer.push(&tokenizer.token_bytes(token).unwrap());
        }
        prop_assert_eq!(out + &detokenizer.finish(), text);
    }
}
