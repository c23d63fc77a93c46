//! `config.json` and `generation_config.json`, in the forms that transformers 4 and 5 write.

use phalanx_proto::{ConfigError, LayerKind, ModelConfig, Rope};
use serde_json::{Map, Value};

/// Most layers that are worth writing down; [`ModelConfig::check`] has the same bound.
const LAYERS_MAX: u32 = 1024;

/// A JSON object whose fields are asked for by name.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Map<String, Value>);

fn fail<T>(field: &'static str, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError { field, problem: problem.into() })
}

/// A value short enough to be shown.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(60).chain("..".chars()).collect() }
}

impl<'a> Fields<'a> {
    /// The field, unless it is absent or null.
    fn get(self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn whole(self, field: &'static str) -> Result<Option<u32>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => fail(field, format!("is {}, but must be a whole number below 2^32", shown(value))),
        }
    }

    fn number(self, field: &'static str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(n) => Ok(Some(n)),
            None => fail(field, format!("is {}, but must be a number", shown(value))),
        }
    }

    fn flag(self, field: &'static str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => fail(field, format!("is {}, but must be true or false", shown(value))),
        }
    }

    fn object(self, field: &'static str) -> Result<Option<Self>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Self(map))),
            None => fail(field, format!("is {}, but must be an object", shown(value))),
        }
    }
}

fn needed<T>(field: &'static str, value: Option<T>) -> Result<T, ConfigError> {
    value.map_or_else(|| fail(field, "is missing"), Ok)
}

/// The model that `config` describes. The list of end tokens in `generation` wins over the one in `config`.
///
/// # Errors
/// The first field that is missing, of the wrong kind, or impossible.
pub fn parse(config: &Value, generation: Option<&Value>) -> Result<ModelConfig, ConfigError> {
    let Some(map) = config.as_object() else { return fail("model_type", "is missing") };
    let fields = Fields(map);
    refuse_other_models(fields)?;
    let whole = |field| fields.whole(field).and_then(|value| needed(field, value));

    let top_k = match fields.whole("num_experts_per_tok")? {
        Some(top_k) => Some(top_k),
        None => fields.whole("experts_per_token")?,
    };
    let vocab = whole("vocab_size")?;
    let context = whole("max_position_embeddings")?;
    let generation_eos = match generation {
        Some(generation) => eos(generation.as_object().and_then(|map| Fields(map).get("eos_token_id")))?,
        None => Vec::new(),
    };
    let model = ModelConfig {
        hidden: whole("hidden_size")?,
        intermediate: whole("intermediate_size")?,
        layers: layers(fields)?,
        heads: whole("num_attention_heads")?,
        kv_heads: whole("num_key_value_heads")?,
        head_dim: whole("head_dim")?,
        experts: whole("num_local_experts")?,
        top_k: needed("num_experts_per_tok", top_k)?,
        window: whole("sliding_window")?,
        vocab,
        eps: fields.number("rms_norm_eps")?.unwrap_or(1e-5) as f32,
        swiglu_limit: fields.number("swiglu_limit")?.unwrap_or(7.0) as f32,
        rope: rope(fields, context)?,
        context,
        eos: if generation_eos.is_empty() { eos(fields.get("eos_token_id"))? } else { generation_eos },
    };
    model.check()?;
    Ok(model)
}

/// What would load, but compute something else.
fn refuse_other_models(fields: Fields<'_>) -> Result<(), ConfigError> {
    match fields.get("model_type") {
        Some(Value::String(name)) if name == "gpt_oss" => {}
        Some(other) => return fail("model_type", format!("is {}, but must be \"gpt_oss\"", shown(other))),
        None => return fail("model_type", "is missing"),
    }
    if fields.flag("attention_bias")? == Some(false) {
        return fail("attention_bias", "is false, but gpt-oss has biases on q, k, v and o");
    }
    if fields.flag("tie_word_embeddings")? == Some(true) {
        return fail("tie_word_embeddings", "is true, but gpt-oss has an unembedding of its own");
    }
    if let Some(other) = fields.get("hidden_act").filter(|&act| act != "silu") {
        return fail("hidden_act", format!("is {}, but must be \"silu\"", shown(other)));
    }
    let alpha = f64::from(phalanx_kernels::SWIGLU_ALPHA);
    if let Some(other) = fields.number("swiglu_alpha")?.filter(|other| (other - alpha).abs() > 1e-6) {
        return fail("swiglu_alpha", format!("is {other}, but must be 1.702"));
    }
    Ok(())
}

fn layers(fields: Fields<'_>) -> Result<Vec<LayerKind>, ConfigError> {
    let count = needed("num_hidden_layers", fields.whole("num_hidden_layers")?)?;
    if count == 0 || count > LAYERS_MAX {
        return fail("num_hidden_layers", format!("is {count}, but must be from 1 to {LAYERS_MAX}"));
    }
    let Some(stated) = fields.get("layer_types") else {
        let kind = |layer: u32| if layer.is_multiple_of(2) { LayerKind::Sliding } else { LayerKind::Full };
        return Ok((0..count).map(kind).collect());
    };
    let Some(stated) = stated.as_array() else {
        return fail("layer_types", format!("is {}, but must be a list", shown(stated)));
    };
    if stated.len() != count as usize {
        return fail("layer_types", format!("has {} entries for {count} layers", stated.len()));
    }
    let kind = |value: &Value| match value.as_str() {
        Some("sliding_attention") => Ok(LayerKind::Sliding),
        Some("full_attention") => Ok(LayerKind::Full),
        _ => fail("layer_types", format!("has {}, which is no attention of gpt-oss", shown(value))),
    };
    stated.iter().map(kind).collect()
}

/// `rope_parameters` holds everything; before it there were `rope_scaling` and, beside it, `rope_theta`.
fn rope(fields: Fields<'_>, context: u32) -> Result<Rope, ConfigError> {
    let parameters = fields.object("rope_parameters")?;
    let scaling = fields.object("rope_scaling")?;
    let theta = match parameters.map(|inner| inner.number("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => needed("rope_theta", fields.number("rope_theta")?)?,
    };
    let plain = Rope {
        theta,
        factor: 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: context,
        truncate: false,
        attention_factor: 1.0,
    };
    let Some(scaling) = parameters.or(scaling) else { return Ok(plain) };
    match scaling.get("rope_type").or_else(|| scaling.get("type")).map_or(Some("default"), Value::as_str) {
        Some("default") => return Ok(plain),
        Some("yarn") => {}
        _ => return fail("rope_scaling.rope_type", "must be \"yarn\" or \"default\""),
    }
    for field in ["mscale", "mscale_all_dim"] {
        if scaling.get(field).is_some() {
            return fail("rope_scaling", format!("has {field}, which gpt-oss does not use"));
        }
    }
    let factor = needed("rope_scaling.factor", scaling.number("factor")?)?;
    let original = match scaling.whole("original_max_position_embeddings")? {
        Some(original) => original,
        None => fields.whole("initial_context_length")?.unwrap_or(context),
    };
    Ok(Rope {
        theta,
        factor,
        beta_fast: scaling.number("beta_fast")?.unwrap_or(32.0),
        beta_slow: scaling.number("beta_slow")?.unwrap_or(1.0),
        original_context: original,
        truncate: scaling.flag("truncate")?.unwrap_or(true),
        //= arXiv:2309.00071 (section 3.4)
        attention_factor: scaling.number("attention_factor")?.unwrap_or_else(|| 0.1 * factor.ln() + 1.0),
    })
}

/// One end token, or a list of them.
fn eos(value: Option<&Value>) -> Result<Vec<u32>, ConfigError> {
    let id = |value: &Value| match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
        Some(id) => Ok(id),
        None => fail("eos_token_id", format!("is {}, but must be a token id or a list of them", shown(value))),
    };
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) if ids.len() <= 64 => ids.iter().map(id).collect(),
        Some(Value::Array(ids)) => fail("eos_token_id", format!("has {} entries, at most 64 are possible", ids.len())),
        Some(one) => Ok(vec![id(one)?]),
    }
}
