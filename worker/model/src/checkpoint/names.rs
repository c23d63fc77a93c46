//! What the tensors of a gpt-oss checkpoint are called, and the type and shape each must have.

use phalanx_proto::{LayerIdx, ModelConfig};

use super::header::Dtype;

/// `[V, H]`, the rows that tokens begin as.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// `[H]`, the norm after the last layer.
pub const FINAL_NORM: &str = "model.norm.weight";
/// `[V, H]`, the rows that make logits.
pub const UNEMBEDDING: &str = "lm_head.weight";
/// [`UNEMBEDDING`] without `.weight`.
pub const UNEMBEDDING_STEM: &str = "lm_head";
/// The parts of a layer whose first dimension is the expert.
pub const EXPERT_PARTS: [&str; 6] = [
    "mlp.experts.gate_up_proj_bias",
    "mlp.experts.gate_up_proj_blocks",
    "mlp.experts.gate_up_proj_scales",
    "mlp.experts.down_proj_bias",
    "mlp.experts.down_proj_blocks",
    "mlp.experts.down_proj_scales",
];

/// The name of a layer's part: `layer(LayerIdx(3), "self_attn.sinks")`.
#[must_use]
pub fn layer(layer: LayerIdx, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// The name that a layer's tensor has in the first layer.
pub(crate) fn in_first_layer(name: &str) -> Option<String> {
    let (_, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some(layer(LayerIdx(0), part))
}

/// A tensor that a checkpoint must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its name.
    pub name: String,
    /// Type of its numbers.
    pub dtype: Dtype,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
}

impl Expected {
    /// Numbers of the tensor.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Name, type and shape, as a header states them.
    pub(crate) fn stated(&self) -> (&str, Dtype, &[usize]) {
        (&self.name, self.dtype, &self.shape)
    }

    /// Bytes of the tensor.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.elements() * u64::from(self.dtype.bits()) / 8
    }
}

/// The 19 parts of a layer, in the order of the published index.
fn parts(config: &ModelConfig) -> [(&'static str, Dtype, Vec<usize>); 19] {
    let n = |value: u32| value as usize;
    let (h, i, e) = (n(config.hidden), n(config.intermediate), n(config.experts));
    let (q, kv) = (n(config.attention_width()), n(config.kv_heads * config.head_dim));
    let bf16 = |name, shape: &[usize]| (name, Dtype::BF16, shape.to_vec());
    let packed = |name, shape: &[usize]| (name, Dtype::U8, shape.to_vec());
    [
        bf16("input_layernorm.weight", &[h]),
        bf16("self_attn.o_proj.bias", &[h]),
        bf16("self_attn.o_proj.weight", &[h, q]),
        bf16("self_attn.q_proj.bias", &[q]),
        bf16("self_attn.k_proj.bias", &[kv]),
        bf16("self_attn.v_proj.bias", &[kv]),
        bf16("self_attn.q_proj.weight", &[q, h]),
        bf16("self_attn.k_proj.weight", &[kv, h]),
        bf16("self_attn.v_proj.weight", &[kv, h]),
        bf16("self_attn.sinks", &[n(config.heads)]),
        bf16("mlp.router.bias", &[e]),
        bf16("mlp.router.weight", &[e, h]),
        bf16("mlp.experts.gate_up_proj_bias", &[e, 2 * i]),
        packed("mlp.experts.gate_up_proj_blocks", &[e, 2 * i, h / 32, 16]),
        packed("mlp.experts.gate_up_proj_scales", &[e, 2 * i, h / 32]),
        bf16("mlp.experts.down_proj_bias", &[e, h]),
        packed("mlp.experts.down_proj_blocks", &[e, h, i / 32, 16]),
        packed("mlp.experts.down_proj_scales", &[e, h, i / 32]),
        bf16("post_attention_layernorm.weight", &[h]),
    ]
}

/// Every tensor of a checkpoint, in the order of the published index: layers in text order (0, 1, 10, 11, ..),
/// then what there is once.
#[must_use]
pub fn expected(config: &ModelConfig) -> Vec<Expected> {
    let mut layers: Vec<(String, LayerIdx)> =
        (0..).map(LayerIdx).zip(&config.layers).map(|(layer, _)| (layer.to_string(), layer)).collect();
    layers.sort();
    let parts = parts(config);
    let (h, v) = (config.hidden as usize, config.vocab as usize);
    let once = [(FINAL_NORM, vec![h]), (EMBEDDING, vec![v, h]), (UNEMBEDDING, vec![v, h])];
    let of_layers = layers.iter().flat_map(|&(_, index)| {
        parts.iter().map(move |(part, dtype, shape)| Expected {
            name: layer(index, part),
            dtype: *dtype,
            shape: shape.clone(),
        })
    });
    of_layers.chain(once.map(|(name, shape)| Expected { name: name.to_owned(), dtype: Dtype::BF16, shape })).collect()
}
