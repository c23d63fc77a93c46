//! Conversations to tokens.
//!
//! A message is `<|start|>HEADER<|message|>CONTENT` and `<|end|>`, or `<|call|>` after a call. Every piece between
//! control tokens is encoded on its own, as ordinary text.

use phalanx_proto::TokenId;

use super::message::{
    AssistantMessage, Channel, ContentType, DeveloperContent, Message, ReasoningEffort, Role, SystemContent,
    ToolDefinition,
};
use super::parse::Start;
use super::schema::{Page, write_type};
use super::{Tokenizer, special};

/// A rendered conversation that waits for the assistant's turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// What the model reads.
    pub tokens: Vec<TokenId>,
    /// Where the prompt leaves off, for the [`Parser`](super::Parser) of what the model writes.
    pub start: Start,
    /// Whether it declares functions, which the model may call.
    pub may_call: bool,
}

/// How far rendering goes before it gives up.
#[derive(Clone, Copy)]
pub struct Bounds<'a> {
    /// Most tokens.
    pub tokens: usize,
    /// Whether somebody still waits for them; asked again and again.
    pub wanted: &'a dyn Fn() -> bool,
}

impl Bounds<'_> {
    /// Goes to the end whatever it takes.
    pub const NONE: Self = Self { tokens: usize::MAX, wanted: &|| true };
}

/// Renders `messages` without [past thinking](without_past_thinking) and opens the assistant's turn; none if that
/// exceeds `bounds`, which shows early however long the rest is.
///
/// With [`ReasoningEffort::None`] the prompt also opens the final channel, so the answer begins at once. It does not where
/// functions are declared: their calls go to another channel, and the model must choose.
#[must_use]
pub fn prompt(tokenizer: Tokenizer, messages: &[Message], bounds: Bounds<'_>) -> Option<Prompt> {
    let mut writer = Writer { tokenizer, bounds, tokens: Vec::new() };
    writer.messages(&without_past_thinking(messages));
    let may_call = declare_functions(messages);
    writer.control(special::START);
    writer.text(Role::Assistant.as_str());
    let silent = messages
        .iter()
        .any(|message| matches!(message, Message::System(system) if system.reasoning_effort == ReasoningEffort::None));
    let start = if silent && !may_call {
        writer.channel(&Channel::Final);
        writer.control(special::MESSAGE);
        Start::FinalContent
    } else {
        Start::AssistantHeader
    };
    writer.is_within().then_some(Prompt { tokens: writer.tokens, start, may_call })
}

/// The messages that the model is to read again: thinking is dropped once its turn ended in a final message.
///
/// Thinking that led to calls whose turn has not ended yet is kept, for the model goes on from it. Calls are kept
/// whatever their channel.
#[must_use]
pub fn without_past_thinking(messages: &[Message]) -> Vec<&Message> {
    let is = |message: &Message, wanted: Channel| matches!(message, Message::Assistant(m) if m.channel == wanted && m.recipient.is_none());
    let past = messages.iter().rposition(|message| is(message, Channel::Final)).unwrap_or(0);
    let kept = messages.iter().enumerate().filter(|&(at, message)| at >= past || !is(message, Channel::Analysis));
    kept.map(|(_, message)| message).collect()
}

/// Renders all of `messages` and nothing else.
#[must_use]
pub fn render(tokenizer: Tokenizer, messages: &[&Message]) -> Vec<TokenId> {
    let mut writer = Writer { tokenizer, bounds: Bounds::NONE, tokens: Vec::new() };
    writer.messages(messages);
    writer.tokens
}

fn declare_functions<'a>(messages: impl IntoIterator<Item = &'a Message>) -> bool {
    let declares = |message: &Message| matches!(message, Message::Developer(m) if !m.functions.is_empty());
    messages.into_iter().any(declares)
}

struct Writer<'a> {
    tokenizer: Tokenizer,
    bounds: Bounds<'a>,
    tokens: Vec<TokenId>,
}

impl Writer<'_> {
    fn is_within(&self) -> bool {
        self.tokens.len() <= self.bounds.tokens && (self.bounds.wanted)()
    }

    fn messages(&mut self, messages: &[&Message]) {
        let has_functions = declare_functions(messages.iter().copied());
        for message in messages {
            self.message(message, has_functions);
        }
    }

    fn control(&mut self, token: TokenId) {
        self.tokens.push(token);
    }

    fn text(&mut self, text: &str) {
        let mut parts = self.tokenizer.encode_parts(text);
        while self.is_within()
            && let Some(part) = parts.next()
        {
            self.tokens.extend(part);
        }
    }

    fn channel(&mut self, channel: &Channel) {
        self.control(special::CHANNEL);
        self.text(channel.as_str());
    }

    fn recipient(&mut self, recipient: &str) {
        self.text(&format!(" to={recipient}"));
    }

    fn content_type(&mut self, content_type: &ContentType) {
        if content_type.constrained {
            self.text(" ");
            self.control(special::CONSTRAIN);
            self.text(&content_type.name);
        } else {
            self.text(&format!(" {}", content_type.name));
        }
    }

    fn content(&mut self, text: &str, end: TokenId) {
        self.control(special::MESSAGE);
        self.text(text);
        self.control(end);
    }

    fn message(&mut self, message: &Message, has_functions: bool) {
        self.control(special::START);
        match message {
            Message::System(system) => {
                self.text(Role::System.as_str());
                self.content(&system_text(system, has_functions), special::END);
            }
            Message::Developer(developer) => {
                self.text(Role::Developer.as_str());
                // A text that was cut has more tokens than there may be.
                let bytes_max = self.bounds.tokens.saturating_mul(special::TOKEN_BYTES_MAX);
                self.content(&developer_text(developer, bytes_max), special::END);
            }
            Message::User { name, text } => {
                self.text(Role::User.as_str());
                if let Some(name) = name {
                    self.text(&format!(":{name}"));
                }
                self.content(text, special::END);
            }
            Message::Assistant(message) => self.assistant(message),
            Message::Tool { name, text } => {
                self.text(name);
                self.recipient(Role::Assistant.as_str());
                self.channel(&Channel::Commentary);
                self.content(text, special::END);
            }
        }
    }

    fn assistant(&mut self, message: &AssistantMessage) {
        self.text(Role::Assistant.as_str());
        if let Some(recipient) = &message.recipient {
            self.recipient(recipient);
        }
        self.channel(&message.channel);
        if let Some(content_type) = &message.content_type {
            self.content_type(content_type);
        }
        self.content(&message.text, if message.recipient.is_some() { special::CALL } else { special::END });
    }
}

/// The system message; `has_functions` adds the line that says where their calls go.
fn system_text(system: &SystemContent, has_functions: bool) -> String {
    let mut about = system.model_identity.clone();
    if let Some(cutoff) = &system.knowledge_cutoff {
        about += &format!("\nKnowledge cutoff: {cutoff}");
    }
    if let Some(date) = &system.current_date {
        about += &format!("\nCurrent date: {date}");
    }
    let effort = match system.reasoning_effort {
        // The model was trained with three efforts. "none" is the least of them, with the thinking left out.
        ReasoningEffort::None => ReasoningEffort::Low,
        effort => effort,
    };
    let mut channels =
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.".to_owned();
    if has_functions {
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'.";
    }
    format!("{about}\n\nReasoning: {}\n\n{channels}", effort.as_str())
}

/// The developer message, which may end early once it is longer than so many bytes.
fn developer_text(developer: &DeveloperContent, bytes_max: usize) -> String {
    let mut out = Page::new(bytes_max);
    if let Some(instructions) = &developer.instructions {
        out.add(["# Instructions\n\n", instructions]);
    }
    if !developer.functions.is_empty() {
        out.add([if developer.instructions.is_some() { "\n\n" } else { "" }]);
        write_functions(&mut out, &developer.functions);
    }
    out.into_text()
}

fn write_functions(out: &mut Page, functions: &[ToolDefinition]) {
    out.add(["# Tools\n\n## functions\n\nnamespace functions {\n\n"]);
    for function in functions {
        for line in function.description.lines() {
            out.add(["// ", line, "\n"]);
        }
        out.add(["type ", &function.name, " = ("]);
        if let Some(schema) = &function.parameters {
            out.add(["_: "]);
            write_type(out, schema);
        }
        out.add([") => any;\n\n"]);
    }
    out.add(["} // namespace functions"]);
}
