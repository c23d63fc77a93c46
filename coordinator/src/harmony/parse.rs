//! Sampled tokens to messages.

use phalanx_proto::TokenId;

use super::detokenizer::Detokenizer;
use super::header::{Header, HeaderTokens, Piece, Reading};
use super::message::{Channel, Role};
use super::repair::{RepairKind, Repairs};
use super::{Tokenizer, special};

/// A header of more tokens than this is none: what it does not explain is content.
pub const HEADER_TOKENS_MAX: usize = 128;

/// Where the tokens begin that a [`Parser`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Before the first `<|start|>`: a whole conversation.
    Conversation,
    /// Behind `<|start|>assistant`: the usual prompt.
    AssistantHeader,
    /// Behind `<|start|>assistant<|channel|>final<|message|>`: the prompt of a model that is not to think.
    FinalContent,
}

/// What ended a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndedBy {
    /// `<|end|>`: another message may follow.
    End,
    /// `<|call|>`: a tool is to answer.
    Call,
    /// `<|return|>` or `<|endoftext|>`: the turn is over.
    Return,
    /// The beginning of the next message.
    Next,
    /// The end of the tokens.
    Eof,
}

/// What a parser reads. Every `Start` is followed by any number of `Delta`s and one `End`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message begins.
    Start(Header),
    /// More of its text; never empty.
    Delta(String),
    /// The message is complete.
    End(EndedBy),
}

/// Reads tokens one by one, whatever they are.
///
/// The parser is total: it accepts every sequence of tokens, mends what strays from the format (counted by
/// [`Parser::repairs`]), and loses no text. Words of a header that belong to no header become content. What it holds
/// back is bounded: a header of [`HEADER_TOKENS_MAX`] tokens and an unfinished character.
#[derive(Clone, Debug)]
pub struct Parser {
    tokenizer: Tokenizer,
    state: State,
    repairs: Repairs,
    /// Events that come before those of the next token.
    pending: Vec<Event>,
}

#[derive(Clone, Debug)]
enum State {
    /// Between messages.
    Outside,
    Header(HeaderTokens),
    Content(Detokenizer),
}

impl Parser {
    /// A parser of tokens that begin at `start`.
    #[must_use]
    pub fn new(tokenizer: Tokenizer, start: Start) -> Self {
        let (state, pending) = match start {
            Start::Conversation => (State::Outside, Vec::new()),
            Start::AssistantHeader => (State::Header(HeaderTokens::new(Some(Role::Assistant))), Vec::new()),
            Start::FinalContent => {
                let header = Header::assistant(Some(Channel::Final));
                (State::Content(Detokenizer::default()), vec![Event::Start(header)])
            }
        };
        Self { tokenizer, state, repairs: Repairs::default(), pending }
    }

    /// Takes the next token and returns what it completes. Stop tokens are to be fed too.
    pub fn push(&mut self, token: TokenId) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.pending);
        match token {
            special::START => self.start(&mut events),
            special::CHANNEL => self.channel(&mut events),
            special::CONSTRAIN => self.constrain(&mut events),
            special::MESSAGE => self.message(&mut events),
            special::END => self.end(EndedBy::End, &mut events),
            special::CALL => self.end(EndedBy::Call, &mut events),
            special::RETURN | special::END_OF_TEXT => self.end(EndedBy::Return, &mut events),
            text if text < special::FIRST_SPECIAL => self.text(text, &mut events),
            _ => self.repairs.note(RepairKind::ReservedToken),
        }
        events
    }

    /// Ends the message that is still open. The tokens are over.
    pub fn finish(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.pending);
        if !matches!(self.state, State::Outside) {
            self.end(EndedBy::Eof, &mut events);
        }
        events
    }

    /// Whether a message's text is being read, not its header.
    #[must_use]
    pub const fn reads_content(&self) -> bool {
        matches!(self.state, State::Content(_))
    }

    /// What had to be mended so far.
    #[must_use]
    pub fn repairs(&self) -> &Repairs {
        &self.repairs
    }

    fn start(&mut self, events: &mut Vec<Event>) {
        self.flush_header();
        match &self.state {
            State::Outside => {}
            State::Header(header) if header.is_bare() => self.repairs.note(RepairKind::RepeatedRole),
            State::Header(_) => self.end(EndedBy::Next, events),
            State::Content(_) => {
                self.repairs.note(RepairKind::MissingEnd);
                self.end(EndedBy::Next, events);
            }
        }
        self.state = State::Header(HeaderTokens::new(None));
    }

    fn channel(&mut self, events: &mut Vec<Event>) {
        self.flush_header();
        match &self.state {
            State::Outside => self.repairs.note(RepairKind::MissingStart),
            // Content, and then the header of the next message.
            State::Header(header) if header.has_channel() && !header.read(false).rest.trim().is_empty() => {
                self.repairs.note(RepairKind::MissingEnd);
                self.end(EndedBy::Next, events);
            }
            State::Header(_) => {}
            State::Content(_) => {
                self.repairs.note(RepairKind::MissingEnd);
                self.end(EndedBy::Next, events);
            }
        }
        self.extend_header(|header| header.push_marker(Piece::Channel), events);
    }

    fn constrain(&mut self, events: &mut Vec<Event>) {
        match &self.state {
            State::Header(_) => self.extend_header(|header| header.push_marker(Piece::Constrain), events),
            State::Outside | State::Content(_) => self.repairs.note(RepairKind::StrayMarker),
        }
    }

    fn message(&mut self, events: &mut Vec<Event>) {
        match std::mem::replace(&mut self.state, State::Content(Detokenizer::default())) {
            State::Outside => {
                self.repairs.note(RepairKind::MissingStart);
                self.repairs.note(RepairKind::MissingChannel);
                events.push(Event::Start(Header::assistant(None)));
            }
            State::Header(mut header) => {
                header.flush();
                self.closed_header(header.read(true), events);
            }
            content @ State::Content(_) => {
                self.repairs.note(RepairKind::StrayMarker);
                self.state = content;
            }
        }
    }

    fn text(&mut self, token: TokenId, events: &mut Vec<Event>) {
        let Ok(bytes) = self.tokenizer.token_bytes(token) else {
            self.repairs.note(RepairKind::ReservedToken);
            return;
        };
        match &mut self.state {
            State::Content(text) => push_delta(text.push(&bytes), events),
            State::Outside => {
                self.repairs.note(RepairKind::MissingStart);
                self.extend_header(|header| header.push_bytes(&bytes), events);
            }
            State::Header(_) => self.extend_header(|header| header.push_bytes(&bytes), events),
        }
    }

    fn end(&mut self, by: EndedBy, events: &mut Vec<Event>) {
        match std::mem::replace(&mut self.state, State::Outside) {
            State::Outside => self.repairs.note(RepairKind::StrayMarker),
            State::Content(mut text) => {
                push_delta(text.finish(), events);
                events.push(Event::End(by));
            }
            State::Header(mut header) => {
                header.flush();
                self.open_header(header.read(false), by, events);
            }
        }
    }

    /// No more bytes of a character come behind a control token.
    fn flush_header(&mut self) {
        if let State::Header(header) = &mut self.state {
            header.flush();
        }
    }

    /// Adds to the header being read, or to a new one of the assistant. If that makes it too long, it is content.
    fn extend_header(&mut self, add: impl FnOnce(&mut HeaderTokens), events: &mut Vec<Event>) {
        let mut header = match std::mem::replace(&mut self.state, State::Outside) {
            State::Header(header) => header,
            State::Outside | State::Content(_) => HeaderTokens::new(Some(Role::Assistant)),
        };
        add(&mut header);
        if header.len < HEADER_TOKENS_MAX {
            self.state = State::Header(header);
            return;
        }
        let reading = header.read(false);
        self.repairs.add(&reading.repairs);
        self.repairs.note(RepairKind::HeaderTooLong);
        events.push(Event::Start(reading.header));
        push_delta(reading.rest, events);
        self.state = State::Content(header.text);
    }

    /// Begins the message of a header that `<|message|>` ended.
    fn closed_header(&mut self, reading: Reading, events: &mut Vec<Event>) {
        let Reading { header, rest, repairs, .. } = reading;
        self.repairs.add(&repairs);
        if rest.is_empty() {
            events.push(Event::Start(header));
        } else if header.recipient.is_none() {
            events.push(Event::Start(header));
            events.push(Event::Delta(rest + " "));
        } else {
            // A call's content is its arguments, so other text is a message of its own.
            events.push(Event::Start(Header::assistant(Some(Channel::Analysis))));
            events.push(Event::Delta(rest));
            events.push(Event::End(EndedBy::Next));
            events.push(Event::Start(header));
        }
    }

    /// The message of a header that ran into its content, now complete.
    fn open_header(&mut self, reading: Reading, by: EndedBy, events: &mut Vec<Event>) {
        let Reading { header, rest, repairs, is_cut } = reading;
        let is_call = header.recipient.is_some() && matches!(by, EndedBy::End | EndedBy::Call | EndedBy::Return);
        if by == EndedBy::Eof && (is_cut || rest.trim().is_empty()) {
            self.repairs.note(RepairKind::CutHeader);
        } else if rest.trim().is_empty() && !is_call {
            self.repairs.note(RepairKind::EmptyHeader);
        } else {
            self.repairs.add(&repairs);
            self.repairs.note(RepairKind::MissingMessage);
            events.push(Event::Start(header));
            push_delta(rest, events);
            events.push(Event::End(by));
        }
    }
}

fn push_delta(text: String, events: &mut Vec<Event>) {
    if !text.is_empty() {
        events.push(Event::Delta(text));
    }
}
