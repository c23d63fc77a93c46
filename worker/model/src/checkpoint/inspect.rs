//! What a checkpoint is made of, for people and machines.

use std::collections::BTreeSet;
use std::path::Path;

use phalanx_proto::{LayerKind, ModelConfig};
use serde::Serialize;

use super::contents::Contents;
use super::names::{self, Expected};
use super::{Checkpoint, Dtype, FileSize};

/// A checkpoint at a glance.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The name it is served under.
    pub name: String,
    /// Its shape, unless `config.json` is at fault.
    pub model: Option<ModelSummary>,
    /// Files of weights.
    pub files: Vec<FileSize>,
    /// Tensors that the index and the files agree on, by name.
    pub tensors: Vec<TensorSummary>,
    /// Tensors that are not part of the model; they are never read.
    pub unused: Vec<String>,
    /// All that is wrong, each with file, tensor and what to do.
    pub defects: Vec<String>,
}

/// The shape of a model and what follows from it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelSummary {
    /// Layers.
    pub layers: u32,
    /// Layers whose attention is a window.
    pub sliding_layers: u32,
    /// Keys that a query of such a layer sees.
    pub window: u32,
    /// `H`
    pub hidden: u32,
    /// `I`
    pub intermediate: u32,
    /// `Nq`
    pub heads: u32,
    /// `Nkv`
    pub kv_heads: u32,
    /// `D`
    pub head_dim: u32,
    /// `E`
    pub experts: u32,
    /// `K`
    pub experts_per_token: u32,
    /// `V`
    pub vocab: u32,
    /// Longest context in tokens.
    pub context: u32,
    /// Tokens that end a turn.
    pub eos: Vec<u32>,
    /// Weights; a packed one counts as one, scales do not count.
    pub parameters: u64,
    /// Weights that take part in one token: `K` experts of each layer, and no embedding.
    pub active_parameters: u64,
    /// Bytes of each kind of weight.
    pub bytes: KindBytes,
}

/// Bytes in the checkpoint by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KindBytes {
    /// Projections and sinks.
    pub attention: u64,
    /// Routers.
    pub router: u64,
    /// Experts.
    pub experts: u64,
    /// Norms.
    pub norms: u64,
    /// The embedding.
    pub embedding: u64,
    /// The unembedding.
    pub unembedding: u64,
    /// All together.
    pub total: u64,
}

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorSummary {
    /// Its name.
    pub name: String,
    /// Type of its numbers.
    pub dtype: String,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: u64,
}

impl Inspection {
    /// Reads what there is in `dir`, however damaged; with the model's shape if that is known.
    #[must_use]
    pub fn of_directory(dir: &Path) -> (Self, Option<ModelConfig>) {
        let contents = Contents::of_directory(dir);
        (Self::of_contents(&contents), contents.config)
    }

    /// A checkpoint without a defect.
    #[must_use]
    pub fn of(checkpoint: &Checkpoint) -> Self {
        Self::of_contents(&checkpoint.contents)
    }

    fn of_contents(contents: &Contents) -> Self {
        let config = contents.config.as_ref();
        let expected: BTreeSet<String> =
            config.iter().flat_map(|config| names::expected(config)).map(|tensor| tensor.name).collect();
        let unused = |name: &&String| config.is_some() && !expected.contains(*name);
        let tensor = |(name, located): (&String, &super::Located)| {
            let view = located.view();
            TensorSummary {
                name: name.clone(),
                dtype: view.dtype.to_string(),
                shape: view.shape.to_vec(),
                bytes: view.source.bytes().len() as u64,
            }
        };
        Self {
            name: contents.name.clone(),
            model: config.map(ModelSummary::new),
            files: contents.files(),
            tensors: contents.tensors.iter().map(tensor).collect(),
            unused: contents.tensors.keys().filter(unused).cloned().collect(),
            defects: contents.defects.iter().map(ToString::to_string).collect(),
        }
    }
}

impl ModelSummary {
    /// What follows from the shape alone.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        let (mut parameters, mut of_experts, mut of_embedding) = (0, 0, 0);
        let mut bytes = KindBytes::default();
        for tensor in names::expected(config) {
            let weights = weights(&tensor);
            parameters += weights;
            let kind = match tensor.name.as_str() {
                names::EMBEDDING => {
                    of_embedding += weights;
                    &mut bytes.embedding
                }
                names::UNEMBEDDING => &mut bytes.unembedding,
                name if name.contains(".mlp.experts.") => {
                    of_experts += weights;
                    &mut bytes.experts
                }
                name if name.contains(".mlp.router.") => &mut bytes.router,
                name if name.contains(".self_attn.") => &mut bytes.attention,
                _ => &mut bytes.norms,
            };
            *kind += tensor.bytes();
            bytes.total += tensor.bytes();
        }
        let idle_experts = of_experts / u64::from(config.experts) * u64::from(config.experts - config.top_k);
        Self {
            layers: config.layers.len() as u32,
            sliding_layers: config.layers_of(LayerKind::Sliding),
            window: config.window,
            hidden: config.hidden,
            intermediate: config.intermediate,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            experts: config.experts,
            experts_per_token: config.top_k,
            vocab: config.vocab,
            context: config.context,
            eos: config.eos.clone(),
            parameters,
            active_parameters: parameters - idle_experts - of_embedding,
            bytes,
        }
    }
}

/// Weights that a tensor holds: two in a byte of blocks, none in scales.
fn weights(tensor: &Expected) -> u64 {
    match tensor.dtype {
        Dtype::U8 if tensor.name.ends_with("_scales") => 0,
        Dtype::U8 => 2 * tensor.elements(),
        _ => tensor.elements(),
    }
}
