//! The parser and the turn reader: what the model ought to write, and what it writes.

#![allow(clippy::unwrap_used, reason = "tests")]

use phalanx_coordinator::harmony::{
    EndedBy, Event, HEADER_TOKENS_MAX, Header, Parser, RepairKind, Repairs, Start, Tokenizer, ToolCall, Turn,
    TurnDelta, TurnReader, special,
};
use phalanx_proto::TokenId;
use proptest::prelude::*;

/// The tokens of `text`, control markers included.
fn tokens(text: &str) -> Vec<TokenId> {
    let bpe = tiktoken_rs::o200k_harmony_singleton();
    bpe.encode_with_special_tokens(text).into_iter().map(TokenId).collect()
}

fn parse(start: Start, tokens: &[TokenId]) -> (Vec<Event>, Repairs) {
    let mut parser = Parser::new(Tokenizer::shared(), start);
    let mut events: Vec<Event> = tokens.iter().flat_map(|&token| parser.push(token)).collect();
    events.extend(parser.finish());
    assert_eq!(parser.finish(), [], "a finished parser has nothing more to say");
    (events, *parser.repairs())
}

/// Events as lines `SPEAKER to=RECIPIENT #CHANNEL TYPE | TEXT | END`, then the repairs.
fn show(events: &[Event], repairs: &Repairs) -> String {
    let mut out = String::new();
    for event in events {
        match event {
            Event::Start(Header { role, name, recipient, channel, content_type }) => {
                out += role.as_str();
                out += &name.as_ref().map(|name| format!(":{name}")).unwrap_or_default();
                out += &recipient.as_ref().map(|to| format!(" to={to}")).unwrap_or_default();
                out += &channel.as_ref().map(|channel| format!(" #{}", channel.as_str())).unwrap_or_default();
                out += &content_type.as_ref().map(|kind| format!(" {kind}")).unwrap_or_default();
                out += " | ";
            }
            Event::Delta(text) => {
                assert!(!text.is_empty());
                out += text;
            }
            Event::End(by) => {
                let by = match by {
                    EndedBy::End => "end",
                    EndedBy::Call => "call",
                    EndedBy::Return => "return",
                    EndedBy::Next => "next",
                    EndedBy::Eof => "eof",
                };
                out += &format!(" | {by}\n");
            }
        }
    }
    let repairs: Vec<String> = repairs.iter().map(|(kind, count)| format!("{} {count}", kind.label())).collect();
    out + &repairs.join(", ")
}

#[track_caller]
fn check(start: Start, text: &str, expected: &str) {
    let (events, repairs) = parse(start, &tokens(text));
    assert_eq!(show(&events, &repairs), expected, "{text}");
}

/// What the model writes behind `<|start|>assistant`.
#[track_caller]
fn sampled(text: &str, expected: &str) {
    check(Start::AssistantHeader, text, expected);
}

#[test]
fn well_formed_turns_need_no_repair() {
    sampled(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4 🦀<|return|>",
        "assistant #analysis | Hm. | end\nassistant #final | 4 🦀 | return\n",
    );
    check(Start::FinalContent, "4<|return|>", "assistant #final | 4 | return\n");
    check(
        Start::Conversation,
        "<|start|>user:bob<|message|>a\nb<|end|><|start|>functions.f to=assistant<|channel|>commentary<|message|>{}<|end|>",
        "user:bob | a\nb | end\ntool:functions.f to=assistant #commentary | {} | end\n",
    );
}

#[test]
fn a_call_may_name_its_recipient_before_or_behind_the_channel() {
    for text in [
        " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to= functions.f <|constrain|> json<|message|>{}<|call|>",
    ] {
        sampled(text, "assistant to=functions.f #commentary <|constrain|>json | {} | call\n");
    }
    for kind in ["json", "code"] {
        let text = format!("<|channel|>commentary to=functions.f {kind}<|message|>{{}}<|call|>");
        sampled(&text, &format!("assistant to=functions.f #commentary {kind} | {{}} | call\n"));
    }
    sampled(
        "<|channel|>commentary to=functions.web-browsing<|message|>{}<|call|>",
        "assistant to=functions.web-browsing #commentary | {} | call\n",
    );
}

#[test]
fn a_content_type_is_no_recipient() {
    sampled(
        "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
        "assistant #final <|constrain|>json | {} | return\n",
    );
    sampled("<|channel|>final json<|message|>{}<|return|>", "assistant #final json | {} | return\n");
}

#[test]
fn a_call_on_another_channel_is_a_call() {
    sampled(
        "<|channel|>analysis to=functions.f code<|message|>{}<|call|>",
        "assistant to=functions.f #analysis code | {} | call\ncall_channel 1",
    );
}

#[test]
fn a_recipient_may_lack_its_mark() {
    let expected = "assistant to=functions.f #commentary json | {} | call\nbare_recipient 1";
    sampled("<|channel|>commentary functions.f json<|message|>{}<|call|>", expected);
    sampled(
        "<|channel|>commentary get_time json<|message|>{}<|call|>",
        "assistant to=get_time #commentary json | {} | call\nbare_recipient 1",
    );
    check(
        Start::Conversation,
        "<|start|>functions.f<|channel|>commentary json<|message|>{}<|call|>",
        "assistant to=functions.f #commentary json | {} | call\nmissing_role 1, bare_recipient 1",
    );
}

#[test]
fn content_may_follow_the_header_without_its_mark() {
    sampled(
        "<|channel|>final The sum is 4.<|return|>",
        "assistant #final |  The sum is 4. | return\nmissing_message 1",
    );
    sampled("<|channel|>finalx y<|end|>", "assistant #final | x y | end\nmissing_message 1");
    sampled(
        "<|channel|>commentary to=functions.f <|constrain|>json{\"a\": 1}<|call|>",
        "assistant to=functions.f #commentary <|constrain|>json | {\"a\": 1} | call\nmissing_message 1",
    );
    sampled(
        "<|channel|>commentary to=functions.f json {}<|call|>",
        "assistant to=functions.f #commentary json |  {} | call\nmissing_message 1",
    );
    sampled(
        "<|channel|>commentary to=functions.now<|call|>",
        "assistant to=functions.now #commentary |  | call\nmissing_message 1",
    );
    sampled(
        "<|channel|>analysis 2 and 2<|channel|>final<|message|>4<|return|>",
        "assistant #analysis |  2 and 2 | next\nassistant #final | 4 | return\nmissing_end 1, missing_message 1",
    );
}

#[test]
fn text_without_any_header_is_a_message() {
    let expected = "assistant | The sum is 4. | return\nmissing_message 1, missing_channel 1";
    sampled("The sum is 4.<|return|>", expected);
    sampled("final words", "assistant | final words | eof\nmissing_message 1, missing_channel 1");
    sampled("<|message|>4<|return|>", "assistant | 4 | return\nmissing_channel 1");
    check(
        Start::Conversation,
        "4<|end|>",
        "assistant | 4 | end\nmissing_start 1, missing_message 1, missing_channel 1",
    );
    check(Start::Conversation, "<|message|>4", "assistant | 4 | eof\nmissing_start 1, missing_channel 1");
    check(
        Start::Conversation,
        "<|start|>Hi there<|end|>",
        "assistant | Hi there | end\nmissing_message 1, missing_role 1, missing_channel 1",
    );
}

#[test]
fn channels_may_be_unknown_missing_bare_or_double() {
    sampled("<|channel|>finalx<|message|>4<|return|>", "assistant #finalx | 4 | return\nunknown_channel 1");
    sampled("<|channel|><|message|>4<|return|>", "assistant | 4 | return\nmissing_channel 1, stray_marker 1");
    sampled("final<|message|>4<|return|>", "assistant #final | 4 | return\nbare_channel 1");
    sampled(
        "<|channel|>analysis<|channel|>final<|message|>4<|return|>",
        "assistant #final | 4 | return\nrepeated_channel 1",
    );
    check(
        Start::Conversation,
        "<|start|>assistantfinal<|message|>4<|return|>",
        "assistant #final | 4 | return\nbare_channel 1",
    );
}

#[test]
fn roles_may_stand_twice_or_nowhere() {
    let expected = "assistant #final | 4 | return\nrepeated_role 1";
    sampled("assistant<|channel|>final<|message|>4<|return|>", expected);
    sampled("<|start|>assistant<|channel|>final<|message|>4<|return|>", expected);
    check(Start::Conversation, "<|start|>assistant<|start|>assistant<|channel|>final<|message|>4<|return|>", expected);
    check(
        Start::Conversation,
        "<|start|><|channel|>final<|message|>4<|return|>",
        "assistant #final | 4 | return\nmissing_role 1",
    );
    check(
        Start::Conversation,
        "<|start|>to=functions.f<|channel|>commentary<|message|>{}<|call|>",
        "assistant to=functions.f #commentary | {} | call\nmissing_role 1",
    );
}

#[test]
fn messages_may_run_into_each_other() {
    sampled(
        "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>4<|return|>",
        "assistant #analysis | Hm. | next\nassistant #final | 4 | return\nmissing_end 1",
    );
    sampled(
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>4<|return|>",
        "assistant #analysis | Hm. | next\nassistant #final | 4 | return\nmissing_end 1",
    );
    sampled(
        "<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>4<|return|>",
        "assistant #analysis | Hm. | end\nassistant #final | 4 | return\nmissing_start 1",
    );
    sampled(
        "<|channel|>final<|start|>assistant<|channel|>final<|message|>4<|return|>",
        "assistant #final | 4 | return\nempty_header 1",
    );
}

#[test]
fn control_tokens_out_of_place_are_dropped() {
    sampled("<|channel|>final<|message|>a<|end|><|end|><|return|>", "assistant #final | a | end\nstray_marker 2");
    sampled(
        "<|channel|>final<|message|><|message|>a<|constrain|>b<|return|>",
        "assistant #final | ab | return\nstray_marker 2",
    );
    sampled(
        "<|channel|><|reserved_200013|>final<|message|>a<|reserved_201087|><|startoftext|>b<|return|>",
        "assistant #final | ab | return\nreserved_token 3",
    );
    let mut ids = tokens("<|channel|>final<|message|>a");
    ids.extend([TokenId(special::VOCAB_SIZE), TokenId(u32::MAX)]);
    let (events, repairs) = parse(Start::AssistantHeader, &ids);
    assert_eq!(show(&events, &repairs), "assistant #final | a | eof\nreserved_token 2");
}

#[test]
fn generation_may_end_anywhere() {
    sampled("", "cut_header 1");
    for cut in ["<|channel|>", "<|channel|>comm", "<|channel|>final", " to", " to=", " to=functions.f"] {
        sampled(cut, "cut_header 1");
    }
    sampled("<|channel|>commentary to=functions.f <|constrain|>json", "cut_header 1");
    sampled("<|channel|>final<|message|>", "assistant #final |  | eof\n");
    check(Start::FinalContent, "", "assistant #final |  | eof\n");
    sampled("<|channel|>analysis<|message|>Hm", "assistant #analysis | Hm | eof\n");
    sampled("<|channel|>analysis Hm", "assistant #analysis |  Hm | eof\nmissing_message 1");
    check(Start::Conversation, "<|start|>", "cut_header 1");
}

#[test]
fn words_of_no_meaning_in_a_header_are_content() {
    sampled(
        "<|channel|>final The sum<|message|>is 4.<|return|>",
        "assistant #final | The sum is 4. | return\nheader_text 1",
    );
    sampled(
        "<|channel|>commentary to=functions.f please json<|message|>{}<|call|>",
        "assistant #analysis | please | next\nassistant to=functions.f #commentary json | {} | call\nheader_text 1",
    );
    sampled(
        "<|channel|>commentary to=functions.f to=functions.g<|message|>{}<|call|>",
        "assistant #analysis | functions.g | next\nassistant to=functions.f #commentary | {} | call\nheader_text 1",
    );
}

#[test]
fn a_header_without_end_becomes_content() {
    let words = " word".repeat(HEADER_TOKENS_MAX * 2);
    let text = format!("<|channel|>final{words}<|return|>");
    let ids = tokens(&text);
    let mut parser = Parser::new(Tokenizer::shared(), Start::AssistantHeader);
    let held: Vec<Event> = ids[..HEADER_TOKENS_MAX - 1].iter().flat_map(|&token| parser.push(token)).collect();
    assert_eq!(held, []);
    assert_eq!(parser.push(ids[HEADER_TOKENS_MAX - 1]).len(), 2, "the header and the text so far");
    sampled(&text, &format!("assistant #final | {words} | return\nheader_too_long 1"));
    let markers = "<|channel|>".repeat(HEADER_TOKENS_MAX) + "x";
    sampled(&markers, "assistant | x | eof\nmissing_channel 1, header_too_long 1, stray_marker 128");
}

#[test]
fn a_character_in_pieces_comes_whole() {
    let ids = tokens("<|channel|>final<|message|>🦀");
    let crab = &ids[3..];
    assert!(crab.len() > 1, "the character has several tokens");
    let mut parser = Parser::new(Tokenizer::shared(), Start::AssistantHeader);
    let events: Vec<Event> = ids[..ids.len() - 1].iter().flat_map(|&token| parser.push(token)).collect();
    assert_eq!(events.len(), 1, "only the message's start: {events:?}");
    assert_eq!(parser.push(ids[ids.len() - 1]), [Event::Delta("🦀".to_owned())]);
    let (events, _) = parse(Start::AssistantHeader, &[&ids[..ids.len() - 1], &[special::RETURN]].concat());
    assert_eq!(events[1], Event::Delta("\u{fffd}".to_owned()));
}

fn turn(start: Start, ids: &[TokenId]) -> (Vec<TurnDelta>, Turn) {
    let mut reader = TurnReader::new(Tokenizer::shared(), start, true);
    let mut deltas: Vec<TurnDelta> = ids.iter().flat_map(|&token| reader.push(token)).collect();
    let (last, turn) = reader.finish();
    deltas.extend(last);
    assert_eq!(sum(&deltas), Turn { repairs: Repairs::default(), ..turn.clone() }, "the deltas are the turn");
    (deltas, turn)
}

/// The turn that a client puts together from the deltas.
fn sum(deltas: &[TurnDelta]) -> Turn {
    let mut turn = Turn::default();
    for delta in deltas {
        match delta {
            TurnDelta::Reasoning(text) => turn.reasoning += text,
            TurnDelta::Content(text) => turn.content += text,
            TurnDelta::ToolCall { index, name } => {
                assert_eq!(*index, turn.tool_calls.len());
                turn.tool_calls.push(ToolCall { name: name.clone(), arguments: String::new() });
            }
            TurnDelta::Arguments { index, text } => turn.tool_calls[*index].arguments += text,
        }
    }
    turn
}

#[track_caller]
fn check_turn(text: &str, reasoning: &str, content: &str, calls: &[(&str, &str)]) -> Repairs {
    let (_, turn) = turn(Start::AssistantHeader, &tokens(text));
    let got: Vec<(&str, &str)> = turn.tool_calls.iter().map(|c| (c.name.as_str(), c.arguments.as_str())).collect();
    assert_eq!((turn.reasoning.as_str(), turn.content.as_str(), got.as_slice()), (reasoning, content, calls), "{text}");
    turn.repairs
}

#[test]
fn a_turn_has_thinking_answer_and_calls() {
    let repairs = check_turn(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>\
         <|start|>assistant to=functions.f<|channel|>commentary json<|message|>{\"a\":1}<|end|>\
         <|start|>assistant<|channel|>analysis to=functions.g<|message|>{}<|call|>",
        "Hm.",
        "I look.",
        &[("f", "{\"a\":1}"), ("g", "{}")],
    );
    assert_eq!(repairs.iter().collect::<Vec<_>>(), [(RepairKind::CallChannel, 1)]);
    check_turn(
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>\
         <|start|>assistant<|channel|>commentary<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>",
        "a\n\nb",
        "c\n\nd",
        &[],
    );
}

#[test]
fn what_the_model_writes_reaches_the_user_whatever_the_header() {
    for text in [
        "<|channel|>finalx<|message|>4<|return|>",
        "<|channel|>final 4<|return|>",
        "<|channel|>commentary to=user<|message|>4<|return|>",
        "<|channel|>final to=all<|message|>4<|return|>",
        "<|message|>4<|return|>",
        "4",
    ] {
        let (_, turn) = turn(Start::AssistantHeader, &tokens(text));
        assert_eq!((turn.content.trim(), turn.reasoning.as_str()), ("4", ""), "{text}");
        assert_eq!(turn.tool_calls, [], "{text}");
    }
    check_turn("<|channel|>analysisx<|message|>a<|end|><|start|>user<|message|>b", "a\n\nb", "", &[]);
    check_turn("<|channel|>commentary to=python code<|message|>1+1<|call|>", "", "", &[("python", "1+1")]);
    check_turn("<|channel|>commentary to=functions.<|message|>1<|call|>", "", "", &[("functions.", "1")]);
}

#[test]
fn where_nothing_may_be_called_a_call_is_text() {
    for (header, reasoning, content) in [
        (" to=functions.f<|channel|>commentary <|constrain|>json", "", "{}"),
        ("<|channel|>commentary to=python code", "", "{}"),
        ("<|channel|>final to=functions.f", "", "{}"),
        ("<|channel|>analysis to=functions.f", "{}", "{}"),
    ] {
        let mut reader = TurnReader::new(Tokenizer::shared(), Start::AssistantHeader, false);
        for token in tokens(&format!("{header}<|message|>{{}}<|call|>")) {
            reader.push(token);
        }
        let turn = reader.finish().1;
        assert_eq!((turn.reasoning.as_str(), turn.content.as_str()), (reasoning, content), "{header}");
        assert_eq!(turn.tool_calls, [], "{header}");
    }
}

#[test]
fn a_turn_of_thinking_alone_answers_with_its_last_thought() {
    let text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>analysis<|message|>It is 4.";
    let repairs = check_turn(&format!("{text}<|return|>"), "Hm.\n\nIt is 4.", "It is 4.", &[]);
    assert_eq!(repairs.count(RepairKind::AnswerInAnalysis), 1);
    let repairs = check_turn(&format!("{text}<|end|><|return|>"), "Hm.\n\nIt is 4.", "It is 4.", &[]);
    assert_eq!(repairs.count(RepairKind::AnswerInAnalysis), 1);
    let repairs = check_turn(text, "Hm.\n\nIt is 4.", "", &[]);
    assert!(repairs.is_empty(), "a turn that was cut off has no answer yet");
}

/// Any token, control tokens as often as text; words are distinct, so that a lost one is missed.
fn soup() -> impl Strategy<Value = Vec<TokenId>> {
    let control = prop::sample::select(vec![
        special::START,
        special::CHANNEL,
        special::CONSTRAIN,
        special::MESSAGE,
        special::END,
        special::CALL,
        special::RETURN,
        special::END_OF_TEXT,
    ]);
    let header = prop::sample::select(vec![
        "assistant",
        "user",
        "analysis",
        "commentary",
        "final",
        "finalx",
        " to=",
        " to=functions.f",
        " json",
        "code",
        " ",
        "\n",
        "functions.g",
        "{",
        ":",
    ]);
    let part = prop_oneof![
        4 => control.prop_map(|token| vec![token]),
        3 => header.prop_map(tokens),
        3 => (0u32..1000).prop_map(|n| tokens(&format!(" w{n}w "))),
        2 => (0..special::VOCAB_SIZE + 10).prop_map(|id| vec![TokenId(id)]),
        1 => Just(tokens(" w7w ").repeat(HEADER_TOKENS_MAX)),
    ];
    prop::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
}

/// The words that [`soup`] mixes in.
fn words(text: &str) -> Vec<&str> {
    let mut words: Vec<&str> = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| is_word(w)).collect();
    words.sort_unstable();
    words
}

fn is_word(word: &str) -> bool {
    word.len() > 2
        && word.starts_with('w')
        && word.ends_with('w')
        && word[1..word.len() - 1].bytes().all(|b| b.is_ascii_digit())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_token_soup_has_a_reading_that_loses_no_word(ids in soup(), start in 0..3usize) {
        let start = [Start::Conversation, Start::AssistantHeader, Start::FinalContent][start];
        let (events, repairs) = parse(start, &ids);

        let mut open = false;
        for event in &events {
            prop_assert_eq!(open, !matches!(event, Event::Start(_)), "messages begin and end in turn");
            open = !matches!(event, Event::End(_));
        }
        prop_assert!(!open);

        let text: Vec<TokenId> = ids.iter().copied().filter(|&id| id < special::FIRST_SPECIAL).collect();
        let sent = String::from_utf8_lossy(&Tokenizer::shared().decode_bytes(&text).unwrap()).into_owned();
        let read = show(&events, &repairs);
        prop_assert_eq!(words(&read), words(&sent), "{}", read);

        turn(start, &ids);
    }
}
