//! A conversation as harmony sees it.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

/// The namespace of the functions that a request defines.
pub(super) const FUNCTIONS: &str = "functions.";

/// Who wrote a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The server: identity, date, reasoning effort.
    System,
    /// The application: instructions and functions. What chat APIs call the system message.
    Developer,
    /// The person who asks.
    User,
    /// The model.
    Assistant,
    /// A tool, answering a call.
    Tool,
}

impl Role {
    /// Every role, in falling order of authority.
    pub const ALL: [Self; 5] = [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool];

    /// The word that stands in a header.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    /// The role that `word` names.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == word)
    }
}

/// What a message of the assistant is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Thinking, not meant for users.
    Analysis,
    /// Calls of functions, and notes to the user that go before them.
    Commentary,
    /// The answer.
    Final,
    /// A name that harmony does not know, as the model wrote it.
    Other(String),
}

impl Channel {
    /// The channels that harmony knows.
    pub const KNOWN: [Self; 3] = [Self::Analysis, Self::Commentary, Self::Final];

    /// The word that stands in a header.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Analysis => "analysis",
            Self::Commentary => "commentary",
            Self::Final => "final",
            Self::Other(name) => name,
        }
    }

    /// The channel that `word` names.
    #[must_use]
    pub fn from_word(word: &str) -> Self {
        Self::KNOWN.into_iter().find(|known| known.as_str() == word).unwrap_or_else(|| Self::Other(word.to_owned()))
    }
}

/// How the content of a message is written: `json`, or `<|constrain|>json`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContentType {
    /// Whether `<|constrain|>` stands before the name.
    pub constrained: bool,
    /// The type's name.
    pub name: String,
}

impl ContentType {
    /// `<|constrain|>json`, the type of a function's arguments.
    #[must_use]
    pub fn json() -> Self {
        Self { constrained: true, name: "json".to_owned() }
    }
}

impl fmt::Display for ContentType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.constrained { "<|constrain|>" } else { "" }, self.name)
    }
}

/// How long the model may think.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    /// Not at all: the prompt itself opens the final channel. As little as may be where there are functions to call.
    None,
    /// Briefly.
    Low,
    /// The default.
    #[default]
    Medium,
    /// At length.
    High,
}

impl ReasoningEffort {
    /// Every effort, rising.
    pub const ALL: [Self; 4] = [Self::None, Self::Low, Self::Medium, Self::High];

    /// The word that requests use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// A word that names no reasoning effort.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown reasoning effort {0:?}, use none, low, medium or high")]
pub struct UnknownEffort(pub String);

impl FromStr for ReasoningEffort {
    type Err = UnknownEffort;

    fn from_str(word: &str) -> Result<Self, UnknownEffort> {
        Self::ALL.into_iter().find(|effort| effort.as_str() == word).ok_or_else(|| UnknownEffort(word.to_owned()))
    }
}

/// What the server tells the model about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemContent {
    /// Who the model is, one sentence.
    pub model_identity: String,
    /// The month in which the training data ends, as `2024-06`.
    pub knowledge_cutoff: Option<String>,
    /// Today, as `2025-06-28`; absent, the model is told no date.
    pub current_date: Option<String>,
    /// How long the model may think.
    pub reasoning_effort: ReasoningEffort,
}

impl Default for SystemContent {
    fn default() -> Self {
        Self {
            model_identity: "You are ChatGPT, a large language model trained by OpenAI.".to_owned(),
            knowledge_cutoff: Some("2024-06".to_owned()),
            current_date: None,
            reasoning_effort: ReasoningEffort::default(),
        }
    }
}

/// What the application tells the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeveloperContent {
    /// What to do and how.
    pub instructions: Option<String>,
    /// The functions that the model may call.
    pub functions: Vec<ToolDefinition>,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolDefinition {
    /// The name, without a namespace. It stands in headers, so callers admit letters, digits, `_`, `-` and `.` only.
    pub name: String,
    /// What the function does; each line becomes a comment.
    pub description: String,
    /// The JSON schema of its one argument, an object; absent, it takes none.
    pub parameters: Option<Value>,
}

/// A message that the assistant wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssistantMessage {
    /// What the message is for.
    pub channel: Channel,
    /// The tool it is addressed to, as `functions.NAME`; a message with a recipient is a call.
    pub recipient: Option<String>,
    /// How the text is written.
    pub content_type: Option<ContentType>,
    /// The text itself.
    pub text: String,
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// From the server.
    System(SystemContent),
    /// From the application.
    Developer(DeveloperContent),
    /// From the person who asks.
    User {
        /// Which person, where there are several.
        name: Option<String>,
        /// What they wrote.
        text: String,
    },
    /// From the model.
    Assistant(AssistantMessage),
    /// The result of a call.
    Tool {
        /// The tool's full name, as `functions.NAME`.
        name: String,
        /// What it returned.
        text: String,
    },
}

impl Message {
    /// A message of an unnamed user.
    #[must_use]
    pub fn user(text: impl Into<String>) -> Self {
        Self::User { name: None, text: text.into() }
    }

    /// A message of the assistant to everybody.
    #[must_use]
    pub fn assistant(channel: Channel, text: impl Into<String>) -> Self {
        Self::Assistant(AssistantMessage { channel, recipient: None, content_type: None, text: text.into() })
    }

    /// A call of the tool `name` with its arguments in JSON: of a function, unless the name says its namespace.
    #[must_use]
    pub fn call(name: &str, arguments: impl Into<String>) -> Self {
        Self::Assistant(AssistantMessage {
            channel: Channel::Commentary,
            recipient: Some(full_name(name)),
            content_type: Some(ContentType::json()),
            text: arguments.into(),
        })
    }

    /// What the tool `name` returned, a function unless the name says its namespace.
    #[must_use]
    pub fn tool_result(name: &str, text: impl Into<String>) -> Self {
        Self::Tool { name: full_name(name), text: text.into() }
    }
}

/// A tool's name as chat APIs know it: a function's without its namespace, another tool's with its own.
pub(super) fn short_name(recipient: &str) -> &str {
    let function = recipient.strip_prefix(FUNCTIONS).filter(|name| !name.is_empty() && !name.contains('.'));
    function.unwrap_or(recipient)
}

/// The name with its namespace again; one without any is taken for a function's.
fn full_name(name: &str) -> String {
    if name.contains('.') { name.to_owned() } else { format!("{FUNCTIONS}{name}") }
}
