//! A rank's share of a checkpoint, laid out for its backend.

use phalanx_kernels::DenseUse::{self, Projection, Router};
use phalanx_kernels::memory::Source;
use phalanx_kernels::{Backend, ExpertShape, ExpertSource, KvLayer, KvShape, PoolShape, Stack};
use phalanx_proto::{ExpertId, LayerIdx, LayerKind, Limits, ModelConfig, Placement, Pool, Rank};

use crate::checkpoint::{Checkpoint, names};
use crate::error::LoadError;

/// Index of a pool in [`KvShape::pools`].
#[must_use]
pub const fn pool_index(pool: Pool) -> usize {
    match pool {
        Pool::Full => 0,
        Pool::Window => 1,
    }
}

/// The pool of a layer's keys and values.
#[must_use]
pub const fn pool_of(kind: LayerKind) -> Pool {
    match kind {
        LayerKind::Full => Pool::Full,
        LayerKind::Sliding => Pool::Window,
    }
}

/// The KV memory of a rank.
#[must_use]
pub fn kv_shape(config: &ModelConfig, limits: &Limits) -> KvShape {
    let pool =
        |kind| PoolShape { layers: config.layers_of(kind) as usize, blocks: limits.blocks(pool_of(kind)) as usize };
    KvShape {
        pools: vec![pool(LayerKind::Full), pool(LayerKind::Sliding)],
        kv_heads: config.kv_heads as usize,
        head_dim: config.head_dim as usize,
    }
}

/// Widths of the experts.
#[must_use]
pub const fn expert_shape(config: &ModelConfig) -> ExpertShape {
    ExpertShape {
        hidden: config.hidden as usize,
        intermediate: config.intermediate as usize,
        limit: config.swiglu_limit,
    }
}

/// One layer.
pub struct Layer<B: Backend> {
    /// `[H]`
    pub attention_norm: B::Vector,
    /// `[Nq*D + 2*Nkv*D, H]`
    pub qkv: B::Dense,
    /// `[Nq]`
    pub sinks: B::Vector,
    /// `[H, Nq*D]`
    pub out: B::Dense,
    /// `[H]`
    pub mlp_norm: B::Vector,
    /// `[E, H]`
    pub router: B::Dense,
    /// The experts of this rank.
    pub experts: B::Experts,
    /// Where all experts live.
    pub places: B::Places,
    /// Where keys and values live.
    pub kv: KvLayer,
    /// How far back attention looks.
    pub window: Option<u32>,
}

/// A rank's share of the model.
pub struct Weights<B: Backend> {
    /// `[V, H]`
    pub embedding: B::Embedding,
    /// First to last.
    pub layers: Vec<Layer<B>>,
    /// `[H]`
    pub final_norm: B::Vector,
    /// `[V, H]`
    pub unembedding: B::Dense,
}

/// Bytes of the checkpoint read so far, and in all.
pub type OnProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// Reads tensors by name and counts what was read.
struct Reader<'a, 'p> {
    checkpoint: &'a Checkpoint,
    done: u64,
    total: u64,
    on_progress: OnProgress<'p>,
}

impl<'a> Reader<'a, '_> {
    fn tensor(&self, name: &str) -> Result<Source<'a>, LoadError> {
        Ok(self.checkpoint.tensor(name)?)
    }

    /// Builds something from sources and counts them.
    fn take<T, E: Into<LoadError>>(
        &mut self,
        sources: &[Source<'_>],
        build: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, LoadError> {
        let built = build().map_err(Into::into)?;
        self.done += sources.iter().map(|s| s.bytes().len() as u64).sum::<u64>();
        (self.on_progress)(self.done, self.total);
        Ok(built)
    }

    fn vector<B: Backend>(&mut self, backend: &mut B, name: &str) -> Result<B::Vector, LoadError> {
        let source = self.tensor(name)?;
        self.take(&[source], || backend.vector(source))
    }

    /// Matrices stacked into one. `names` have a weight each, and a bias each unless `bias` is false.
    fn dense<B: Backend>(
        &mut self,
        backend: &mut B,
        used: DenseUse,
        cols: u32,
        stems: &[String],
        bias: bool,
    ) -> Result<B::Dense, LoadError> {
        let mut stack = Vec::with_capacity(stems.len());
        let mut sources = Vec::with_capacity(2 * stems.len());
        for stem in stems {
            let weight = self.tensor(&format!("{stem}.weight"))?;
            let bias = if bias { Some(self.tensor(&format!("{stem}.bias"))?) } else { None };
            sources.extend([Some(weight), bias].into_iter().flatten());
            stack.push(Stack { weight, bias });
        }
        self.take(&sources, || backend.dense(used, cols as usize, &stack))
    }
}

/// One expert's part of a tensor `[E, ..]`.
fn of_expert<'a>(tensor: Source<'a>, expert: ExpertId, experts: u32) -> Source<'a> {
    let size = tensor.bytes().len() / experts as usize;
    tensor.slice(expert.index() * size..(expert.index() + 1) * size).expect("an expert's share lies within the tensor")
}

impl<B: Backend> Weights<B> {
    /// Reads the share of `rank`: all that is dense, and only its own experts.
    ///
    /// # Errors
    /// A tensor that is missing or that the backend refuses, by name.
    pub fn load(
        backend: &mut B,
        checkpoint: &Checkpoint,
        placement: &Placement,
        rank: Rank,
        on_progress: OnProgress<'_>,
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config();
        let total = share_bytes(checkpoint, placement, rank);
        let mut reader = Reader { checkpoint, done: 0, total, on_progress };

        let mut layers = Vec::with_capacity(config.layers.len());
        let mut in_pool = [0; 2];
        for (layer, &kind) in (0..).map(LayerIdx).zip(&config.layers) {
            let pool = pool_index(pool_of(kind));
            let kv = KvLayer { pool, layer: in_pool[pool] };
            in_pool[pool] += 1;
            let name = |part: &str| names::layer(layer, part);
            let (hidden, attention) = (config.hidden, config.attention_width());
            let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(name);
            layers.push(Layer {
                attention_norm: reader.vector(backend, &name("input_layernorm.weight"))?,
                qkv: reader.dense(backend, Projection, hidden, &qkv, true)?,
                sinks: reader.vector(backend, &name("self_attn.sinks"))?,
                out: reader.dense(backend, Projection, attention, &[name("self_attn.o_proj")], true)?,
                mlp_norm: reader.vector(backend, &name("post_attention_layernorm.weight"))?,
                router: reader.dense(backend, Router, hidden, &[name("mlp.router")], true)?,
                experts: load_experts(&mut reader, backend, placement, rank, layer)?,
                places: backend.places(&places(placement, layer)),
                kv,
                window: (kind == LayerKind::Sliding).then_some(config.window),
            });
        }
        let final_norm = reader.vector(backend, names::FINAL_NORM)?;
        let unembedding =
            reader.dense(backend, Projection, config.hidden, &[names::UNEMBEDDING_STEM.to_owned()], false)?;
        let embedding = backend.embedding(config.hidden as usize, checkpoint.embedding())?;
        Ok(Self { embedding, layers, final_norm, unembedding })
    }
}

fn load_experts<B: Backend>(
    reader: &mut Reader<'_, '_>,
    backend: &mut B,
    placement: &Placement,
    rank: Rank,
    layer: LayerIdx,
) -> Result<B::Experts, LoadError> {
    let config = reader.checkpoint.config();
    let held: Vec<_> = placement.held_by(layer, rank).collect();
    let slots = held.iter().map(|(_, slot)| slot.index() + 1).max().unwrap_or(0);
    let mut experts = backend.experts(slots, expert_shape(config));
    let part = |part: &str| reader.tensor(&names::layer(layer, &format!("mlp.experts.{part}")));
    let tensors = [
        part("gate_up_proj_blocks")?,
        part("gate_up_proj_scales")?,
        part("gate_up_proj_bias")?,
        part("down_proj_blocks")?,
        part("down_proj_scales")?,
        part("down_proj_bias")?,
    ];
    for (expert, slot) in held {
        let sources = tensors.map(|tensor| of_expert(tensor, expert, config.experts));
        let [gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias] = sources;
        let source = ExpertSource { gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias };
        reader.take(&sources, || {
            backend.load_expert(&mut experts, slot.index(), &source).map_err(|error| LoadError::Expert {
                layer,
                expert,
                error,
            })
        })?;
    }
    Ok(experts)
}

fn places(placement: &Placement, layer: LayerIdx) -> Vec<(u32, u32)> {
    placement.of_layer(layer).iter().map(|(rank, slot)| (rank.0, slot.0)).collect()
}

/// Bytes of the checkpoint that `rank` reads while loading; the embedding is read row by row later.
fn share_bytes(checkpoint: &Checkpoint, placement: &Placement, rank: Rank) -> u64 {
    let config = checkpoint.config();
    let expert = names::EXPERT_PARTS
        .iter()
        .filter_map(|part| checkpoint.tensor(&names::layer(LayerIdx(0), part)).ok())
        .map(|source| source.bytes().len() as u64 / u64::from(config.experts))
        .sum::<u64>();
    let layers = config.layers.len() as u64;
    let all_experts = expert * u64::from(config.experts) * layers;
    let held: u64 =
        (0..).map(LayerIdx).zip(&config.layers).map(|(l, _)| placement.held_by(l, rank).count() as u64).sum();
    let embedding = checkpoint.embedding().table().len() as u64;
    checkpoint.total_bytes().saturating_sub(all_experts + embedding) + expert * held
}
