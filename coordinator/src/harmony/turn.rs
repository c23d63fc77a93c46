//! What the model wrote in one turn, as an API answers it.

use phalanx_proto::TokenId;

use super::header::Header;
use super::message::{Channel, Role, short_name};
use super::parse::{Event, Parser, Start};
use super::repair::{RepairKind, Repairs};
use super::{Tokenizer, special};

/// Stands between two messages that an API shows as one text.
const SEPARATOR: &str = "\n\n";

/// More of an answer. In total the deltas are what [`TurnReader::finish`] returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TurnDelta {
    /// More thinking.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// A call begins.
    ToolCall {
        /// Which call of the turn, counted from 0.
        index: usize,
        /// The function, without namespace; or another tool, with its own.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call of the turn.
        index: usize,
        /// The next piece of the JSON text, as the model wrote it.
        text: String,
    },
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCall {
    /// The function, without namespace; or another tool, with its own.
    pub name: String,
    /// Its arguments, as the model wrote them: JSON, if all went well.
    pub arguments: String,
}

/// A finished turn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// What the model thought.
    pub reasoning: String,
    /// What it answered: final messages, and notes to the user between calls.
    pub content: String,
    /// What it called, whatever the channel.
    pub tool_calls: Vec<ToolCall>,
    /// What had to be mended.
    pub repairs: Repairs,
}

/// Reads one turn of the assistant.
///
/// A message with a tool as its recipient is a call, if the model may call at all. Of the others, those on the analysis channel are thinking, and all else is
/// the answer: unknown and missing channels too, so that what the model wrote reaches the user. What the model makes
/// others say is thinking. If the model ends its turn with thinking alone, its last thought is the answer as well.
#[derive(Clone, Debug)]
pub struct TurnReader {
    parser: Parser,
    may_call: bool,
    turn: Turn,
    /// What the open message is.
    kind: Kind,
    /// Whether it has no text yet.
    fresh: bool,
    /// Where the last thought begins in the reasoning.
    last_thought: usize,
    /// Whether the last token ended the turn.
    stopped: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Thought,
    Answer,
    Call,
}

impl TurnReader {
    /// A reader of the tokens that follow a prompt, in which calls are possible or mere text.
    #[must_use]
    pub fn new(tokenizer: Tokenizer, start: Start, may_call: bool) -> Self {
        Self {
            parser: Parser::new(tokenizer, start),
            may_call,
            turn: Turn::default(),
            kind: Kind::Answer,
            fresh: true,
            last_thought: 0,
            stopped: false,
        }
    }

    /// Takes the next token, stop tokens included.
    pub fn push(&mut self, token: TokenId) -> Vec<TurnDelta> {
        self.stopped = special::STOP.contains(&token);
        let events = self.parser.push(token);
        self.fold(events)
    }

    /// Ends the turn: the last deltas, and all of it.
    pub fn finish(mut self) -> (Vec<TurnDelta>, Turn) {
        let events = self.parser.finish();
        let mut deltas = self.fold(events);
        self.turn.repairs = *self.parser.repairs();
        let thought = &self.turn.reasoning[self.last_thought..];
        if self.stopped && self.turn.content.is_empty() && self.turn.tool_calls.is_empty() && !thought.is_empty() {
            self.turn.content = thought.to_owned();
            self.turn.repairs.note(RepairKind::AnswerInAnalysis);
            deltas.push(TurnDelta::Content(self.turn.content.clone()));
        }
        (deltas, self.turn)
    }

    /// Whether a token of text that came next would be part of the answer.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.kind == Kind::Answer && self.parser.reads_content()
    }

    /// What had to be mended so far.
    #[must_use]
    pub fn repairs(&self) -> &Repairs {
        self.parser.repairs()
    }

    fn fold(&mut self, events: Vec<Event>) -> Vec<TurnDelta> {
        events.into_iter().filter_map(|event| self.fold_one(event)).collect()
    }

    fn fold_one(&mut self, event: Event) -> Option<TurnDelta> {
        match event {
            Event::Start(header) => self.begin(&header),
            Event::Delta(text) => Some(self.go_on(&text)),
            Event::End(_) => None,
        }
    }

    fn begin(&mut self, header: &Header) -> Option<TurnDelta> {
        self.fresh = true;
        self.kind = kind(header, self.may_call);
        let recipient = header.recipient.as_deref().filter(|_| self.kind == Kind::Call)?;
        let name = short_name(recipient).to_owned();
        let index = self.turn.tool_calls.len();
        self.turn.tool_calls.push(ToolCall { name: name.clone(), arguments: String::new() });
        Some(TurnDelta::ToolCall { index, name })
    }

    fn go_on(&mut self, text: &str) -> TurnDelta {
        let fresh = std::mem::take(&mut self.fresh);
        match self.kind {
            Kind::Thought => {
                let delta = separated(fresh, &self.turn.reasoning, text);
                self.turn.reasoning += &delta;
                if fresh {
                    self.last_thought = self.turn.reasoning.len() - text.len();
                }
                TurnDelta::Reasoning(delta)
            }
            Kind::Answer => {
                let delta = separated(fresh, &self.turn.content, text);
                self.turn.content += &delta;
                TurnDelta::Content(delta)
            }
            Kind::Call => {
                let index = self.turn.tool_calls.len().saturating_sub(1);
                if let Some(call) = self.turn.tool_calls.last_mut() {
                    call.arguments += text;
                }
                TurnDelta::Arguments { index, text: text.to_owned() }
            }
        }
    }
}

fn kind(header: &Header, may_call: bool) -> Kind {
    if header.role != Role::Assistant {
        return Kind::Thought;
    }
    if may_call && header.recipient.as_deref().is_some_and(is_tool) {
        return Kind::Call;
    }
    match &header.channel {
        Some(Channel::Analysis) => Kind::Thought,
        Some(Channel::Other(name)) if name.starts_with(Channel::Analysis.as_str()) => Kind::Thought,
        Some(Channel::Commentary | Channel::Final | Channel::Other(_)) | None => Kind::Answer,
    }
}

/// Whether a message to `recipient` is a call; the people of the conversation are no tools.
fn is_tool(recipient: &str) -> bool {
    !recipient.is_empty() && recipient != "all" && Role::from_word(recipient).is_none()
}

/// `text` as the next piece behind `before`, set apart from it where a new message begins.
fn separated(fresh: bool, before: &str, text: &str) -> String {
    let separator = if fresh && !before.is_empty() { SEPARATOR } else { "" };
    format!("{separator}{text}")
}
