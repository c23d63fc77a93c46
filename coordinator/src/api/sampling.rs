//! How tokens are to be chosen: the fields of a request that say so.

use phalanx_planner::Class;
use phalanx_proto::{Admission, Sampling, TokenId};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::ApiConfig;
use super::error::{ApiError, quote};
use super::fields::Fields;

/// Longest `cache_salt`, in bytes.
const SALT_BYTES_MAX: usize = 256;

/// What a request says of how its tokens are chosen and what it shares.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choosing {
    /// All but the number of the choice; its seed counts only if `seeded`.
    pub(super) sampling: Sampling,
    /// Whether the request gave a seed.
    pub(super) seeded: bool,
    /// Ascending.
    pub(super) bias: Vec<(TokenId, f32)>,
    pub(super) class: Class,
    /// What divides its cached prefixes from those of others, beside the tenant.
    pub(super) cache_salt: String,
    /// Whether the model's own end of an answer is passed over.
    pub(super) ignore_eos: bool,
}

impl Choosing {
    pub(super) fn parse(fields: &Fields<'_>, config: &ApiConfig) -> Result<Self, ApiError> {
        let seed = seed(fields)?;
        let penalty = |key| Ok::<_, ApiError>(fields.number(key, -2.0..=2.0)?.unwrap_or(0.0) as f32);
        let repetition = fields.number("repetition_penalty", 0.01..=10.0)?.unwrap_or(1.0) as f32;
        Ok(Self {
            sampling: Sampling {
                temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0) as f32,
                top_k: top_k(fields)?,
                // The sampler wants a share above 0; the least one keeps the likeliest token alone, as 0 means.
                top_p: (fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0) as f32).max(f32::MIN_POSITIVE),
                min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0) as f32,
                presence_penalty: penalty("presence_penalty")?,
                frequency_penalty: penalty("frequency_penalty")?,
                repetition_penalty: repetition,
                seed: seed.unwrap_or(0),
                choice: 0,
                logprobs: logprobs(fields)?,
            },
            seeded: seed.is_some(),
            bias: logit_bias(fields, config.vocab)?,
            class: class(fields)?,
            cache_salt: cache_salt(fields)?,
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        })
    }

    /// What divides the cached prefixes of `tenant`'s request from those of others: the first bytes of a SHA-256 over
    /// both, each with its length before it.
    pub(super) fn salt(&self, tenant: &str) -> u64 {
        let mut hash = Sha256::new();
        for part in [tenant, &self.cache_salt] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.finalize().iter().take(8).fold(0, |salt, byte| salt << 8 | u64::from(*byte))
    }
}

fn seed(fields: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.get("seed") else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| fields.wrong("seed", "a whole number of 64 bits", value))
}

/// -1 and 0 keep all tokens.
fn top_k(fields: &Fields<'_>) -> Result<u32, ApiError> {
    let key = "top_k";
    if fields.get(key).and_then(Value::as_i64) == Some(-1) {
        return Ok(0);
    }
    Ok(fields.integer(key, 0..=u32::MAX)?.unwrap_or(0))
}

/// How many alternatives are reported with each token; none if nothing is to be reported.
fn logprobs(fields: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=Sampling::LOGPROBS_MAX)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

/// Token ids, as the strings that JSON makes of them, and what is added to their logits.
fn logit_bias(fields: &Fields<'_>, vocab: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let key = "logit_bias";
    let Some(biases) = fields.object(key)? else { return Ok(Vec::new()) };
    let refuse = |message: String| Err(ApiError::invalid(key, message));
    if biases.len() > Admission::BIAS_MAX {
        return refuse(format!("at most {} biases are taken", Admission::BIAS_MAX));
    }
    let mut read = Vec::with_capacity(biases.len());
    for (id, value) in biases.entries() {
        // The same id written in two ways would be two biases.
        let token = id.parse::<u32>().ok().filter(|token| token.to_string() == *id && *token < vocab);
        let bias = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        match (token, bias) {
            (Some(token), Some(bias)) => read.push((TokenId(token), bias as f32)),
            (None, _) => return refuse(format!("{} is no token id below {vocab}", quote(id))),
            (_, None) => return refuse(format!("the bias of {} must be a number between -100 and 100", quote(id))),
        }
    }
    read.sort_unstable_by_key(|(token, _)| *token);
    Ok(read)
}

/// A `priority` above 0, or the service tier `flex`, is for those who want only the whole.
fn class(fields: &Fields<'_>) -> Result<Class, ApiError> {
    let key = "priority";
    let later = match fields.get(key) {
        None => false,
        Some(value) => value.as_i64().ok_or_else(|| fields.wrong(key, "a whole number", value))? > 0,
    };
    let flex = fields.text("service_tier")? == Some("flex");
    Ok(if later || flex { Class::Batch } else { Class::Interactive })
}

fn cache_salt(fields: &Fields<'_>) -> Result<String, ApiError> {
    let key = "cache_salt";
    let salt = fields.text(key)?.unwrap_or_default();
    if salt.len() > SALT_BYTES_MAX {
        return Err(ApiError::invalid(key, format!("at most {SALT_BYTES_MAX} bytes are taken")));
    }
    Ok(salt.to_owned())
}
