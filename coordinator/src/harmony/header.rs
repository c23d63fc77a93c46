//! Reading a message's header.
//!
//! A header is a role (for a tool its name), then in any order ` to=RECIPIENT`, `<|channel|>NAME` and a content type.
//! A *closed* header was ended by `<|message|>`: all of it is header, and words of no meaning are set aside. An *open*
//! one ran into its content: it is read as far as it makes sense, and the rest is content, to the letter.

use super::detokenizer::Detokenizer;
use super::message::{Channel, ContentType, FUNCTIONS, Role};
use super::repair::{RepairKind, Repairs};

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Who speaks.
    pub role: Role,
    /// The tool's full name, or which user.
    pub name: Option<String>,
    /// Whom the message is for, where not for everybody.
    pub recipient: Option<String>,
    /// What the message is for.
    pub channel: Option<Channel>,
    /// How its content is written.
    pub content_type: Option<ContentType>,
}

impl Header {
    /// The header of a message of the assistant to everybody.
    pub(super) fn assistant(channel: Option<Channel>) -> Self {
        Self { role: Role::Assistant, name: None, recipient: None, channel, content_type: None }
    }
}

/// A header as it arrives: text and the control tokens that have a meaning within it.
#[derive(Clone, Debug)]
pub(super) struct HeaderTokens {
    /// Who speaks, where the prompt or the place says so already.
    role: Option<Role>,
    pieces: Vec<Piece>,
    /// Holds back a character whose bytes are still to come.
    pub(super) text: Detokenizer,
    /// Tokens so far.
    pub(super) len: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    Channel,
    Constrain,
}

/// A header that was read.
pub(super) struct Reading {
    pub(super) header: Header,
    /// Text of the header that is none: words set aside, or the content of an open header.
    pub(super) rest: String,
    pub(super) repairs: Repairs,
    /// Whether that content could be the beginning of more header.
    pub(super) is_cut: bool,
}

impl HeaderTokens {
    pub(super) fn new(role: Option<Role>) -> Self {
        Self { role, pieces: Vec::new(), text: Detokenizer::default(), len: 0 }
    }

    pub(super) fn push_bytes(&mut self, bytes: &[u8]) {
        self.len += 1;
        let text = self.text.push(bytes);
        self.push_text(text);
    }

    pub(super) fn push_marker(&mut self, marker: Piece) {
        self.len += 1;
        self.flush();
        self.pieces.push(marker);
    }

    /// Takes in what was held back: no more bytes of it will come.
    pub(super) fn flush(&mut self) {
        let text = self.text.finish();
        self.push_text(text);
    }

    fn push_text(&mut self, more: String) {
        match self.pieces.last_mut() {
            Some(Piece::Text(text)) => *text += &more,
            _ if more.is_empty() => {}
            _ => self.pieces.push(Piece::Text(more)),
        }
    }

    pub(super) fn has_channel(&self) -> bool {
        self.pieces.contains(&Piece::Channel)
    }

    /// Whether nothing but a role stands here.
    pub(super) fn is_bare(&self) -> bool {
        match self.pieces.as_slice() {
            [] => true,
            [Piece::Text(text)] if text.trim().is_empty() => true,
            [Piece::Text(text)] => {
                Role::from_word(text.trim()).is_some_and(|word| self.role.is_none_or(|role| role == word))
            }
            _ => false,
        }
    }

    /// Reads what is here as a closed header, or as an open one.
    pub(super) fn read(&self, closed: bool) -> Reading {
        let mut reader = Reader { closed, role: self.role, ..Reader::default() };
        for piece in &self.pieces {
            match piece {
                Piece::Channel => reader.expect(Slot::Channel),
                Piece::Constrain => reader.expect(Slot::Type),
                Piece::Text(text) => reader.text(text),
            }
        }
        reader.finish()
    }
}

/// What the next word is, by what stands before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Slot {
    #[default]
    Any,
    Channel,
    Type,
    Recipient,
}

#[derive(Default)]
struct Reader {
    closed: bool,
    slot: Slot,
    role: Option<Role>,
    /// The word in the role's place that is no role: a tool's name, perhaps.
    speaker: Option<String>,
    name: Option<String>,
    recipient: Option<String>,
    channel: Option<Channel>,
    content_type: Option<ContentType>,
    /// Words set aside.
    extra: Vec<String>,
    /// The content of an open header, from where the header stopped to make sense.
    content: Option<String>,
    /// Whether that content could be the beginning of more header.
    is_cut: bool,
    repairs: Repairs,
}

impl Reader {
    /// The next word is of `slot`; if the one expected so far never came, its marker meant nothing.
    fn expect(&mut self, slot: Slot) {
        if std::mem::replace(&mut self.slot, slot) != Slot::Any {
            self.repairs.note(RepairKind::StrayMarker);
        }
    }

    fn text(&mut self, text: &str) {
        let mut left = text;
        self.is_cut = false;
        while self.content.is_none() {
            let word = left.trim_start();
            if word.is_empty() {
                return;
            }
            match if self.closed { self.closed_word(word) } else { self.open_word(word) } {
                Some(after) => left = after,
                None => self.content = Some(String::new()),
            }
        }
        self.content.get_or_insert_default().push_str(left);
    }

    /// Takes the first word of `text`, which a closed header can always use; returns what follows it.
    fn closed_word<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let (word, after) = text.split_at(text.find(char::is_whitespace).unwrap_or(text.len()));
        if self.slot == Slot::Type && self.role.is_none() && Role::from_word(word).is_some() {
            self.expect(Slot::Any);
        }
        match std::mem::take(&mut self.slot) {
            Slot::Channel => self.set_channel(word),
            Slot::Type => self.set_type(word),
            Slot::Recipient => self.set_recipient(word),
            Slot::Any => {
                if let Some(len) = self.speaker_len(word) {
                    return Some(&text[len..]);
                }
                self.any_word(word);
            }
        }
        Some(after)
    }

    /// Takes the beginning of `text` if it belongs to an open header.
    fn open_word<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        match std::mem::take(&mut self.slot) {
            Slot::Channel => {
                let Some(known) = Channel::KNOWN.into_iter().find(|known| text.starts_with(known.as_str())) else {
                    self.repairs.note(RepairKind::UnknownChannel);
                    self.is_cut = Channel::KNOWN.iter().any(|known| known.as_str().starts_with(text));
                    return None;
                };
                self.set_channel(known.as_str());
                Some(&text[known.as_str().len()..])
            }
            Slot::Type => self.open_type(text, true),
            Slot::Recipient => self.open_recipient(text),
            Slot::Any => {
                let word = &text[..text.find(char::is_whitespace).unwrap_or(text.len())];
                if let Some(len) = self.speaker_len(word) {
                    return (self.speaker.is_none()).then(|| &text[len..]);
                }
                self.is_cut = "to=".starts_with(text);
                match text.strip_prefix("to=") {
                    Some(name) => self.open_recipient(name),
                    None if self.recipient.is_some() => self.open_type(text, false),
                    None => None,
                }
            }
        }
    }

    /// Who speaks, if `word` stands in that place: the length of what says so.
    fn speaker_len(&mut self, word: &str) -> Option<usize> {
        if self.role.is_some() || self.speaker.is_some() || word.starts_with("to=") {
            return None;
        }
        let (role, name) = word.split_once(':').map_or((word, None), |(role, name)| (role, Some(name)));
        if let Some(role) = Role::from_word(role) {
            self.role = Some(role);
            self.name = name.map(str::to_owned);
            return Some(word.len());
        }
        let assistant = Role::Assistant.as_str();
        if word.starts_with(assistant) {
            self.role = Some(Role::Assistant);
            return Some(assistant.len());
        }
        if is_type(word) || is_known_channel(word) {
            return None;
        }
        self.speaker = Some(word.to_owned());
        Some(word.len())
    }

    /// A word of a closed header that no marker announces.
    fn any_word(&mut self, word: &str) {
        if word == "to=" {
            self.expect(Slot::Recipient);
        } else if let Some(name) = word.strip_prefix("to=") {
            self.set_recipient(name);
        } else if self.role.is_some_and(|role| role.as_str() == word) {
            self.repairs.note(RepairKind::RepeatedRole);
        } else if is_type(word) && self.content_type.is_none() {
            self.content_type = Some(ContentType { constrained: false, name: word.to_owned() });
        } else if self.channel.is_none() && is_known_channel(word) {
            self.repairs.note(RepairKind::BareChannel);
            self.set_channel(word);
        } else if self.recipient.is_none() && word.starts_with(FUNCTIONS) {
            self.repairs.note(RepairKind::BareRecipient);
            self.set_recipient(word);
        } else {
            self.extra.push(word.to_owned());
        }
    }

    fn open_recipient<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let len = text.find(|c| !is_name_char(c)).unwrap_or(text.len());
        let plausible = self.channel.is_some() || text[..len].contains('.');
        if len == 0 || !plausible || self.recipient.is_some() {
            return None;
        }
        self.set_recipient(&text[..len]);
        Some(&text[len..])
    }

    fn open_type<'a>(&mut self, text: &'a str, constrained: bool) -> Option<&'a str> {
        let len = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
        if self.content_type.is_some() || !is_type(&text[..len]) {
            return None;
        }
        self.content_type = Some(ContentType { constrained, name: text[..len].to_owned() });
        Some(&text[len..])
    }

    fn set_channel(&mut self, word: &str) {
        let channel = Channel::from_word(word);
        if matches!(channel, Channel::Other(_)) {
            self.repairs.note(RepairKind::UnknownChannel);
        }
        if let Some(earlier) = self.channel.replace(channel) {
            self.repairs.note(RepairKind::RepeatedChannel);
            if let Channel::Other(word) = earlier {
                self.extra.push(word);
            }
        }
    }

    fn set_type(&mut self, word: &str) {
        let earlier = self.content_type.replace(ContentType { constrained: true, name: word.to_owned() });
        self.extra.extend(earlier.map(|earlier| earlier.name).filter(|name| name != word));
    }

    fn set_recipient(&mut self, name: &str) {
        if self.recipient.is_some() {
            self.extra.push(name.to_owned());
        } else {
            self.recipient = Some(name.to_owned());
        }
    }

    fn finish(mut self) -> Reading {
        self.expect(Slot::Any);
        let role = self.settle_role();
        if role == Role::Assistant {
            self.settle_recipient();
        }
        if self.closed && !self.extra.is_empty() {
            self.repairs.note(RepairKind::HeaderText);
        }
        let Self { name, recipient, channel, content_type, repairs, is_cut, .. } = self;
        let rest = self.content.unwrap_or_else(|| self.extra.join(" "));
        Reading { header: Header { role, name, recipient, channel, content_type }, rest, repairs, is_cut }
    }

    fn settle_role(&mut self) -> Role {
        if let Some(role) = self.role {
            return role;
        }
        let speaker = self.speaker.take().filter(|_| self.closed);
        match speaker {
            Some(tool) if self.recipient.is_some() => {
                self.name = Some(tool);
                return Role::Tool;
            }
            Some(tool) if tool.starts_with(FUNCTIONS) => {
                self.repairs.note(RepairKind::BareRecipient);
                self.recipient = Some(tool);
            }
            Some(word) => self.extra.insert(0, word),
            None => {}
        }
        self.repairs.note(RepairKind::MissingRole);
        Role::Assistant
    }

    /// What only the whole header of an assistant's message tells.
    fn settle_recipient(&mut self) {
        if let [word] = self.extra.as_slice()
            && self.closed
            && self.recipient.is_none()
            && self.content_type.is_some()
            && word.chars().all(is_name_char)
        {
            self.repairs.note(RepairKind::BareRecipient);
            self.recipient = self.extra.pop();
        }
        match &self.channel {
            None => self.repairs.note(RepairKind::MissingChannel),
            Some(Channel::Commentary) => {}
            Some(_) if self.recipient.as_ref().is_some_and(|name| name.starts_with(FUNCTIONS)) => {
                self.repairs.note(RepairKind::CallChannel);
            }
            Some(_) => {}
        }
    }
}

fn is_known_channel(word: &str) -> bool {
    Channel::KNOWN.iter().any(|known| known.as_str() == word)
}

fn is_type(word: &str) -> bool {
    matches!(word, "json" | "code")
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}
