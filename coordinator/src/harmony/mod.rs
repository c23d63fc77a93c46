//! Harmony, the chat format of gpt-oss: conversations to tokens, sampled tokens to answers.
//!
//! Three layers, each usable without the next:
//!
//! - [`Tokenizer`] and [`Detokenizer`] turn text into tokens and a stream of tokens into text.
//! - [`prompt`] renders a conversation of [`Message`]s. [`Parser`] reads what the model writes as [`Event`]s;
//!   it is total: every sequence of tokens has a reading, and no text of the model is lost.
//! - [`TurnReader`] folds events into what an API answers with: thinking, content and tool calls.
//!   [`StopScanner`] ends text at a stop string.
//!
//! Text that a user, a developer or a tool supplies never becomes a control token: all of it is encoded as
//! ordinary text, and control tokens are written by the renderer alone.

mod detokenizer;
mod header;
mod message;
mod parse;
mod render;
mod repair;
mod schema;
pub mod special;
mod stop;
mod tokenizer;
mod turn;

pub use detokenizer::Detokenizer;
pub use header::Header;
pub use message::{
    AssistantMessage, Channel, ContentType, DeveloperContent, Message, ReasoningEffort, Role, SystemContent,
    ToolDefinition, UnknownEffort,
};
pub use parse::{EndedBy, Event, HEADER_TOKENS_MAX, Parser, Start};
pub use render::{Bounds, Prompt, prompt, render, without_past_thinking};
pub use repair::{RepairKind, Repairs};
pub use stop::StopScanner;
pub use tokenizer::{Tokenizer, UnknownToken};
pub use turn::{ToolCall, Turn, TurnDelta, TurnReader};
