//! Messages and tools of a request, as harmony sees them.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::ApiLimits;
use super::error::{ApiError, quote};
use super::fields::{Fields, wrong_type};
use crate::harmony::{Channel, DeveloperContent, Message, ToolDefinition};

/// Longest name of a function or of a person, in bytes.
const NAME_BYTES_MAX: usize = 64;
/// Parts of one message's content.
const PARTS_MAX: usize = 1024;
/// Calls of one message.
const CALLS_MAX: usize = 128;
/// Stands between texts that become one.
const SEPARATOR: &str = "\n\n";

/// The functions of `tools`, each name once.
pub(super) fn read_tools(fields: &Fields<'_>, limits: &ApiLimits) -> Result<Vec<ToolDefinition>, ApiError> {
    let tools = fields.array("tools", limits.tools_max)?.unwrap_or_default();
    let tools: Vec<ToolDefinition> =
        tools.into_iter().map(|(path, tool)| read_tool(&Fields::new(tool, path)?)).collect::<Result<_, _>>()?;
    let mut names = HashSet::new();
    match tools.iter().find(|tool| !names.insert(&tool.name)) {
        Some(twice) => Err(ApiError::invalid("tools", format!("the function {:?} is defined twice", twice.name))),
        None => Ok(tools),
    }
}

fn read_tool(tool: &Fields<'_>) -> Result<ToolDefinition, ApiError> {
    expect_function(tool)?;
    let function = tool.object("function")?.ok_or_else(|| ApiError::missing(tool.path("function")))?;
    function.object("parameters")?;
    Ok(ToolDefinition {
        name: function_name(&function)?,
        description: function.text("description")?.unwrap_or_default().to_owned(),
        parameters: function.get("parameters").cloned(),
    })
}

fn expect_function(tool: &Fields<'_>) -> Result<(), ApiError> {
    match tool.required_text("type")? {
        "function" => Ok(()),
        other => {
            let message = format!("only tools of type \"function\" are taken, not {}", quote(other));
            Err(ApiError::invalid(tool.path("type"), message))
        }
    }
}

/// The name of a function that the model may call.
fn function_name(function: &Fields<'_>) -> Result<String, ApiError> {
    let name = function.required_text("name")?;
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !is_word {
        let message = format!(
            "a function's name has between 1 and {NAME_BYTES_MAX} letters, digits, _ and -, unlike {}",
            quote(name)
        );
        return Err(ApiError::invalid(function.path("name"), message));
    }
    Ok(name.to_owned())
}

/// The name of a tool that the model called: whatever a header can hold, for it chose the name.
fn called_name(function: &Fields<'_>) -> Result<String, ApiError> {
    let name = function.required_text("name")?;
    if name.is_empty() || name.contains(char::is_whitespace) || name.contains("<|") {
        let message = format!("a called tool's name has no white space and no <|, unlike {}", quote(name));
        return Err(ApiError::invalid(function.path("name"), message));
    }
    Ok(name.to_owned())
}

/// The application's instructions, which are the system and developer messages that come first, and all other messages.
pub(super) fn read_messages(
    fields: &Fields<'_>,
    limits: &ApiLimits,
) -> Result<(Option<String>, Vec<Message>), ApiError> {
    let given = fields.array("messages", limits.messages_max)?.ok_or_else(|| ApiError::missing("messages"))?;
    if given.is_empty() {
        return Err(ApiError::invalid("messages", "messages must not be empty"));
    }
    let mut instructions: Option<String> = None;
    let mut messages = Vec::new();
    let mut calls = HashMap::new();
    for (path, value) in given {
        let message = Fields::new(value, path)?;
        match message.required_text("role")? {
            "system" | "developer" => {
                let text = required_content(&message)?;
                if messages.is_empty() {
                    let before = instructions.take().map(|before| before + SEPARATOR);
                    instructions = Some(before.unwrap_or_default() + &text);
                } else {
                    let instructions = Some(text);
                    messages.push(Message::Developer(DeveloperContent { instructions, functions: Vec::new() }));
                }
            }
            "user" => {
                let name = person(&message)?;
                messages.push(Message::User { name, text: required_content(&message)? });
            }
            "assistant" => messages.extend(assistant(&message, &mut calls)?),
            "tool" => {
                let id = message.required_text("tool_call_id")?;
                let name = calls.get(id).ok_or_else(|| {
                    let message = format!("no message before this one called a tool with the id {}", quote(id));
                    ApiError::invalid("messages", message)
                })?;
                messages.push(Message::tool_result(name, required_content(&message)?));
            }
            other => {
                let roles = "system, developer, user, assistant or tool";
                let problem = format!("a role is {roles}, not {}", quote(other));
                return Err(ApiError::invalid(message.path("role"), problem));
            }
        }
    }
    Ok((instructions, messages))
}

/// What an assistant's message stands for: its thinking, its text, its calls. `calls` learns the names by their ids.
fn assistant(message: &Fields<'_>, calls: &mut HashMap<String, String>) -> Result<Vec<Message>, ApiError> {
    let mut read = Vec::new();
    let reasoning = message.text("reasoning_content")?;
    if let Some(reasoning) = message.text("reasoning")?.or(reasoning).filter(|text| !text.is_empty()) {
        read.push(Message::assistant(Channel::Analysis, reasoning));
    }
    let given = message.array("tool_calls", CALLS_MAX)?.unwrap_or_default();
    if let Some(text) = content(message)?.filter(|text| !text.is_empty()) {
        // Text beside calls is a note on the way to the answer, not the answer.
        let channel = if given.is_empty() { Channel::Final } else { Channel::Commentary };
        read.push(Message::assistant(channel, text));
    }
    for (path, call) in given {
        let call = Fields::new(call, path)?;
        expect_function(&call)?;
        let id = call.required_text("id")?;
        let function = call.object("function")?.ok_or_else(|| ApiError::missing(call.path("function")))?;
        let name = called_name(&function)?;
        read.push(Message::call(&name, function.required_text("arguments")?));
        calls.insert(id.to_owned(), name);
    }
    Ok(read)
}

fn person(message: &Fields<'_>) -> Result<Option<String>, ApiError> {
    let Some(name) = message.text("name")? else { return Ok(None) };
    let strange = |c: char| c.is_whitespace() || c.is_control() || "<|\\/>".contains(c);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(strange) {
        let problem = format!("a name has between 1 and {NAME_BYTES_MAX} bytes, without spaces and <|\\/>");
        return Err(ApiError::invalid(message.path("name"), problem));
    }
    Ok(Some(name.to_owned()))
}

fn required_content(message: &Fields<'_>) -> Result<String, ApiError> {
    content(message)?.ok_or_else(|| ApiError::missing(message.path("content")))
}

/// The text of a message's content: a string, or parts that are texts.
fn content(message: &Fields<'_>) -> Result<Option<String>, ApiError> {
    match message.get("content") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(_)) => {
            let parts = message.array("content", PARTS_MAX)?.unwrap_or_default();
            parts
                .into_iter()
                .map(|(path, part)| part_text(&Fields::new(part, path)?))
                .collect::<Result<_, _>>()
                .map(Some)
        }
        Some(other) => Err(wrong_type(&message.path("content"), "a string or an array of parts", other)),
    }
}

fn part_text<'a>(part: &Fields<'a>) -> Result<&'a str, ApiError> {
    match part.required_text("type")? {
        "text" => part.required_text("text"),
        "refusal" => part.required_text("refusal"),
        other => {
            let message = format!("this model reads text only, parts of type {} cannot be given", quote(other));
            Err(ApiError::invalid(part.path("type"), message))
        }
    }
}
