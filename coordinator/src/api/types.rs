//! The objects of OpenAI's API that answers are made of.

use serde::Serialize;

/// A model that is served.
#[derive(Debug, Serialize)]
pub(super) struct Model {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) owned_by: &'static str,
    /// Longest context in tokens, under the name that vLLM gave it.
    pub(super) max_model_len: u32,
}

/// What all parts of an answer begin with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    /// Answers that bear the same one come from the same numerics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) system_fingerprint: Option<String>,
}

/// An answer in one piece.
#[derive(Debug, Serialize)]
pub(super) struct Completion {
    #[serde(flatten)]
    pub(super) head: Head,
    pub(super) choices: Vec<CompletionChoice>,
    pub(super) usage: Usage,
}

#[derive(Debug, Serialize)]
pub(super) struct CompletionChoice {
    pub(super) index: u32,
    pub(super) message: Message,
    /// Null unless asked for.
    pub(super) logprobs: Option<Logprobs>,
    pub(super) finish_reason: FinishReason,
}

/// How likely the tokens of the content were.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Logprobs {
    pub(super) content: Vec<TokenLogprob>,
    pub(super) refusal: (),
}

impl Logprobs {
    pub(super) const fn new(content: Vec<TokenLogprob>) -> Self {
        Self { content, refusal: () }
    }
}

/// How likely a token was, and what else was likely there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct TokenLogprob {
    #[serde(flatten)]
    pub(super) token: LikelyToken,
    pub(super) top_logprobs: Vec<LikelyToken>,
}

/// A token's text, as far as it is text, its bytes, and the logarithm of its probability.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct LikelyToken {
    pub(super) token: String,
    pub(super) logprob: f32,
    pub(super) bytes: Vec<u8>,
}

/// What the model answered.
#[derive(Debug, Serialize)]
pub(super) struct Message {
    pub(super) role: &'static str,
    /// Null only if the model called tools and wrote nothing beside.
    pub(super) content: Option<String>,
    pub(super) refusal: (),
    /// What the model thought; some clients read this name,
    pub(super) reasoning: Option<String>,
    /// and others this one.
    pub(super) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<ToolCall>,
}

#[derive(Debug, Serialize)]
pub(super) struct ToolCall {
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) function: FunctionCall,
}

#[derive(Debug, Serialize)]
pub(super) struct FunctionCall {
    pub(super) name: String,
    pub(super) arguments: String,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinishReason {
    Stop,
    Length,
    ToolCalls,
}

/// Tokens read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
    pub(super) total_tokens: u32,
    pub(super) prompt_tokens_details: PromptDetails,
    pub(super) completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct PromptDetails {
    pub(super) cached_tokens: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct CompletionDetails {
    pub(super) reasoning_tokens: u32,
}

/// A piece of a streamed answer.
#[derive(Debug, Serialize)]
pub(super) struct Chunk<'a> {
    #[serde(flatten)]
    pub(super) head: &'a Head,
    pub(super) choices: Vec<ChunkChoice>,
    /// Absent unless asked for; then null in every chunk but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChunkChoice {
    pub(super) index: u32,
    pub(super) delta: Delta,
    /// Null unless asked for and there is content.
    pub(super) logprobs: Option<Logprobs>,
    pub(super) finish_reason: Option<FinishReason>,
}

/// What a piece adds.
#[derive(Debug, Default, Serialize)]
pub(super) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tool_calls: Option<[ToolCallDelta; 1]>,
}

#[derive(Debug, Serialize)]
pub(super) struct ToolCallDelta {
    pub(super) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<&'static str>,
    pub(super) function: FunctionDelta,
}

#[derive(Debug, Serialize)]
pub(super) struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    pub(super) arguments: String,
}
