//! The shape of a gpt-oss model: every number that its `config.json` states and the forward pass uses.

use std::fmt;

use crate::ids::LayerIdx;

/// How far back a layer's attention looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// Only the last `window` positions, the own one counted.
    Sliding,
    /// Every position so far.
    Full,
}

/// Rotary position embedding with YaRN's "by parts" interpolation (arXiv:2309.00071).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// How many times longer than the original context the model reads; 1 turns YaRN off.
    pub factor: f64,
    /// Dimensions that turn more often than this over the original context keep their frequency.
    pub beta_fast: f64,
    /// Dimensions that turn less often than this are slowed by `factor`.
    pub beta_slow: f64,
    /// Context length before the extension, in tokens.
    pub original_context: u32,
    /// Whether the bounds of the ramp are rounded outwards to whole dimensions.
    pub truncate: bool,
    /// Multiplies both q and k; the default is `0.1 ln(factor) + 1`.
    pub attention_factor: f64,
}

/// The shape of a gpt-oss checkpoint. Made by parsing, hence always consistent: see [`ModelConfig::check`].
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `H`, width of the residual stream; a multiple of 32.
    pub hidden: u32,
    /// `I`, width of an expert; a multiple of 32.
    pub intermediate: u32,
    /// The kind of each layer, first to last.
    pub layers: Vec<LayerKind>,
    /// `Nq`, query heads.
    pub heads: u32,
    /// `Nkv`, key and value heads; divides `Nq`.
    pub kv_heads: u32,
    /// `D`, width of a head; even.
    pub head_dim: u32,
    /// `E`, experts of a layer.
    pub experts: u32,
    /// `K`, experts chosen for a token.
    pub top_k: u32,
    /// Keys that a sliding layer's query sees, its own counted.
    pub window: u32,
    /// `V`, rows of the embedding and of the unembedding.
    pub vocab: u32,
    /// Added to the mean square in RMSNorm.
    pub eps: f32,
    /// Clamp of the SwiGLU inputs.
    pub swiglu_limit: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Longest context in tokens.
    pub context: u32,
    /// Tokens that end a turn: `generation_config.json`'s list, else `config.json`'s.
    pub eos: Vec<u32>,
}

/// Why a configuration cannot be a gpt-oss model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The field of `config.json`.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "field `{}` {}", self.field, self.problem)
    }
}

impl std::error::Error for ConfigError {}

/// Largest value of any width or count: keeps every product of three of them within 64 bits.
const DIMENSION_MAX: u32 = 1 << 20;
const LAYERS_MAX: usize = 1024;

impl ModelConfig {
    /// The kind of `layer`.
    ///
    /// # Panics
    /// If the model has no such layer.
    #[must_use]
    pub fn kind(&self, layer: LayerIdx) -> LayerKind {
        self.layers[layer.index()]
    }

    /// Layers of one kind.
    #[must_use]
    pub fn layers_of(&self, kind: LayerKind) -> u32 {
        u32::try_from(self.layers.iter().filter(|&&k| k == kind).count()).unwrap_or(u32::MAX)
    }

    /// Width of the joint projection of queries, keys and values: `Nq*D + 2*Nkv*D`.
    #[must_use]
    pub const fn qkv_width(&self) -> u32 {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Width of the concatenated heads: `Nq*D`.
    #[must_use]
    pub const fn attention_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Checks that the numbers fit each other.
    ///
    /// # Errors
    /// The first field that cannot be right.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail = |field, problem: String| Err(ConfigError { field, problem });
        for (field, value) in [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("num_local_experts", self.experts),
            ("num_experts_per_tok", self.top_k),
            ("sliding_window", self.window),
            ("vocab_size", self.vocab),
        ] {
            if value == 0 || value > DIMENSION_MAX {
                return fail(field, format!("is {value}, but must be from 1 to {DIMENSION_MAX}"));
            }
        }
        if self.layers.is_empty() || self.layers.len() > LAYERS_MAX {
            return fail("num_hidden_layers", format!("is {}, but must be from 1 to {LAYERS_MAX}", self.layers.len()));
        }
        for (field, value) in [("hidden_size", self.hidden), ("intermediate_size", self.intermediate)] {
            if !value.is_multiple_of(32) {
                return fail(field, format!("is {value}, but MXFP4 needs a multiple of 32"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail(
                "num_attention_heads",
                format!("is {}, which num_key_value_heads ({}) does not divide", self.heads, self.kv_heads),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail("head_dim", format!("is {}, but rotation needs an even number", self.head_dim));
        }
        if u64::from(self.heads) * u64::from(self.head_dim) > u64::from(DIMENSION_MAX) {
            return fail("head_dim", format!("times num_attention_heads exceeds {DIMENSION_MAX}"));
        }
        if self.top_k > self.experts || self.top_k > 64 {
            return fail(
                "num_experts_per_tok",
                format!("is {}, but must be at most num_local_experts ({}) and 64", self.top_k, self.experts),
            );
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return fail("rms_norm_eps", format!("is {}, but must be a positive number", self.eps));
        }
        if !(self.swiglu_limit.is_finite() && self.swiglu_limit > 0.0) {
            return fail("swiglu_limit", format!("is {}, but must be a positive number", self.swiglu_limit));
        }
        if self.context == 0 || self.context > 1 << 24 {
            return fail("max_position_embeddings", format!("is {}, but must be from 1 to 2^24", self.context));
        }
        let rope = &self.rope;
        if !(rope.theta.is_finite() && rope.theta > 1.0) {
            return fail("rope_theta", format!("is {}, but must be above 1", rope.theta));
        }
        if !(rope.factor.is_finite() && rope.factor >= 1.0) {
            return fail("rope_scaling.factor", format!("is {}, but must be at least 1", rope.factor));
        }
        if !(rope.beta_slow > 0.0 && rope.beta_fast > rope.beta_slow && rope.beta_fast.is_finite()) {
            return fail("rope_scaling.beta_fast", "must be above beta_slow, and both positive".to_owned());
        }
        if rope.original_context == 0 {
            return fail("rope_scaling.original_max_position_embeddings", "is 0".to_owned());
        }
        if !(rope.attention_factor.is_finite() && rope.attention_factor > 0.0) {
            return fail("rope_scaling.attention_factor", "must be a positive number".to_owned());
        }
        if let Some(id) = self.eos.iter().find(|&&id| id >= self.vocab) {
            return fail("eos_token_id", format!("is {id}, outside the vocabulary of {}", self.vocab));
        }
        Ok(())
    }
}
