//! The body of a chat completion, parsed into what the rest needs. Inside, invalid values do not exist.

use serde_json::Value;

use super::error::{ApiError, quote};
use super::fields::{Fields, wrong_type};
use super::messages::{read_messages, read_tools};
use super::sampling::Choosing;
use super::{ApiConfig, ApiLimits};
use crate::harmony::{DeveloperContent, Message, ReasoningEffort, SystemContent};

/// Longest identity or date that a request may set, in bytes.
const SYSTEM_TEXT_BYTES_MAX: usize = 1024;
/// Fields of other servers that would change the answer. Null, false and the empty list ask for nothing.
const UNSUPPORTED: [&str; 14] = [
    "guided_json",
    "guided_choice",
    "guided_regex",
    "guided_grammar",
    "structured_outputs",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "include_stop_str_in_output",
    "continue_final_message",
    "echo",
    "prompt_logprobs",
    "web_search_options",
    "use_beam_search",
];

/// A chat completion that was asked for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ChatRequest {
    /// The model asked for.
    pub(super) model: String,
    /// The conversation, the server's own message first.
    pub(super) messages: Vec<Message>,
    /// Choices wanted, at least one.
    pub(super) choices: u32,
    /// Most tokens of a choice, at least one; absent, as many as the context has room for.
    pub(super) max_tokens: Option<u32>,
    /// How its tokens are chosen.
    pub(super) choosing: Choosing,
    /// Strings that end the answer.
    pub(super) stops: Vec<String>,
    pub(super) stream: bool,
    /// Whether the stream ends with the usage.
    pub(super) include_usage: bool,
}

impl ChatRequest {
    /// Reads `body`. Fields that are not known are ignored; known ones that cannot be honoured are refused.
    pub(super) fn parse(body: &Value, config: &ApiConfig) -> Result<Self, ApiError> {
        let fields = Fields::new(body, "")?;
        refuse_unsupported(&fields)?;
        let model = fields.required_text("model")?.to_owned();
        let limits = &config.limits;
        let max_tokens = fields.integer("max_tokens", 1..=u32::MAX)?;
        let max_tokens = fields.integer("max_completion_tokens", 1..=u32::MAX)?.or(max_tokens);
        let stream_options = fields.object("stream_options")?;
        let include_usage = stream_options.map(|options| options.flag("include_usage")).transpose()?.flatten();
        Ok(Self {
            model,
            messages: conversation(&fields, config)?,
            choices: fields.integer("n", 1..=limits.choices_max)?.unwrap_or(1),
            max_tokens,
            choosing: Choosing::parse(&fields, config)?,
            stops: stops(&fields, limits)?,
            stream: fields.flag("stream")?.unwrap_or(false),
            include_usage: include_usage.unwrap_or(false),
        })
    }
}

/// The conversation as harmony sees it: the server's message, the application's, and then the rest in order.
fn conversation(fields: &Fields<'_>, config: &ApiConfig) -> Result<Vec<Message>, ApiError> {
    let functions = read_tools(fields, &config.limits)?;
    let functions = if may_call(fields)? { functions } else { Vec::new() };
    let (instructions, rest) = read_messages(fields, &config.limits)?;
    let mut messages = vec![Message::System(system(fields, config)?)];
    if instructions.is_some() || !functions.is_empty() {
        messages.push(Message::Developer(DeveloperContent { instructions, functions }));
    }
    messages.extend(rest);
    Ok(messages)
}

/// The server's message. `chat_template_kwargs` may override identity and date, where null means harmony's default, and the
/// effort unless the request itself gives one.
fn system(fields: &Fields<'_>, config: &ApiConfig) -> Result<SystemContent, ApiError> {
    let overrides = fields.object("chat_template_kwargs")?;
    let text = |key: &str, configured: &Option<String>| -> Result<Option<String>, ApiError> {
        let Some(overrides) = overrides.as_ref().filter(|overrides| overrides.has(key)) else {
            return Ok(configured.clone());
        };
        let text = overrides.text(key)?;
        if text.is_some_and(|text| text.len() > SYSTEM_TEXT_BYTES_MAX) {
            let message = format!("at most {SYSTEM_TEXT_BYTES_MAX} bytes are taken");
            return Err(ApiError::invalid(overrides.path(key), message));
        }
        Ok(text.map(str::to_owned))
    };
    let default = SystemContent::default();
    let effort_within = overrides.as_ref().map(effort).transpose()?.flatten();
    Ok(SystemContent {
        model_identity: text("model_identity", &config.model_identity)?.unwrap_or(default.model_identity),
        knowledge_cutoff: default.knowledge_cutoff,
        current_date: text("current_date", &config.current_date)?,
        reasoning_effort: effort(fields)?.or(effort_within).unwrap_or(config.reasoning_effort),
    })
}

fn effort(fields: &Fields<'_>) -> Result<Option<ReasoningEffort>, ApiError> {
    let key = "reasoning_effort";
    let Some(word) = fields.text(key)? else { return Ok(None) };
    let effort = match word {
        "minimal" => Ok(ReasoningEffort::Low),
        word => word.parse(),
    };
    effort.map(Some).map_err(|_| {
        let path = fields.path(key);
        let message = format!("{path} must be none, minimal, low, medium or high, not {}", quote(word));
        ApiError::invalid(path, message)
    })
}

/// Whether the model may call functions.
fn may_call(fields: &Fields<'_>) -> Result<bool, ApiError> {
    let key = "tool_choice";
    match fields.get(key) {
        None => Ok(true),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => Ok(true),
            "none" => Ok(false),
            "required" => {
                Err(ApiError::unsupported(key, "tool_choice \"required\" is not supported yet, use \"auto\""))
            }
            other => Err(ApiError::invalid(key, format!("tool_choice must be auto or none, not {}", quote(other)))),
        },
        Some(Value::Object(_)) => {
            Err(ApiError::unsupported(key, "choosing tools by name is not supported yet, use \"auto\""))
        }
        Some(other) => Err(wrong_type(key, "a string or an object", other)),
    }
}

fn stops(fields: &Fields<'_>, limits: &ApiLimits) -> Result<Vec<String>, ApiError> {
    let key = "stop";
    let given = match fields.get(key) {
        None => return Ok(Vec::new()),
        Some(one @ Value::String(_)) => vec![(key.to_owned(), one)],
        Some(_) => fields.array(key, limits.stops_max)?.unwrap_or_default(),
    };
    let stop = |(path, value): (String, &Value)| {
        let stop = value.as_str().ok_or_else(|| wrong_type(&path, "a string", value))?;
        if stop.is_empty() || stop.len() > limits.stop_bytes_max {
            let message = format!("a stop string has between 1 and {} bytes", limits.stop_bytes_max);
            return Err(ApiError::invalid(path, message));
        }
        Ok(stop.to_owned())
    };
    given.into_iter().map(stop).collect()
}

/// Refuses what would change the answer and cannot be done. Values that change nothing pass.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    if fields.integer("min_tokens", 0..=u32::MAX)?.is_some_and(|least| least > 0) {
        return Err(ApiError::unsupported("min_tokens", "min_tokens is not supported yet, leave it out"));
    }
    for key in UNSUPPORTED {
        let value = fields.get(key).filter(|value| **value != Value::Bool(false));
        if value.is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty())) {
            return Err(ApiError::unsupported(key, format!("{key} is not supported, leave it out")));
        }
    }
    fields.integer("best_of", 1..=1)?;
    for key in ["functions", "function_call"] {
        if fields.get(key).is_some() {
            return Err(ApiError::unsupported(key, format!("{key} is not supported, use tools and tool_choice")));
        }
    }
    if let Some(format) = fields.object("response_format")? {
        let kind = format.required_text("type")?;
        if kind != "text" {
            let message = format!("response_format of type {} is not supported yet, use \"text\"", quote(kind));
            return Err(ApiError::unsupported("response_format", message));
        }
    }
    let modalities = fields.array("modalities", 16)?.unwrap_or_default();
    if fields.get("audio").is_some() || modalities.iter().any(|(_, modality)| modality.as_str() != Some("text")) {
        return Err(ApiError::unsupported("modalities", "only text is supported"));
    }
    Ok(())
}
