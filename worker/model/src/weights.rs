//! A rank's share of a checkpoint, laid out for its backend.

use phalanx_kernels::DenseUse::{self, Projection, Router};
use phalanx_kernels::memory::Source;
use phalanx_kernels::{Backend, ExpertShape, ExpertSource, KvLayer, KvShape, PoolShape, ReadAhead, Stack};
use phalanx_proto::{ExpertId, ExpertSlot, LayerIdx, LayerKind, Limits, ModelConfig, Placement, Pool, Rank};

use crate::checkpoint::{Checkpoint, CheckpointError, names};
use crate::error::LoadError;
use crate::packed::{PackedFile, Stored};

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

/// Vectors of a layer.
const ATTENTION_NORM: &str = "input_layernorm.weight";
const SINKS: &str = "self_attn.sinks";
const MLP_NORM: &str = "post_attention_layernorm.weight";

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

/// A dense matrix of the model: tensors of the checkpoint, one under the other.
pub(crate) struct Matrix {
    pub(crate) used: DenseUse,
    pub(crate) cols: u32,
    /// Names of the tensors, without `.weight` and `.bias`; never empty.
    stems: Vec<String>,
    bias: bool,
}

impl Matrix {
    fn qkv(config: &ModelConfig, layer: LayerIdx) -> Self {
        let stems = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(|part| names::layer(layer, part));
        Self { used: Projection, cols: config.hidden, stems: stems.into(), bias: true }
    }

    fn out(config: &ModelConfig, layer: LayerIdx) -> Self {
        let stems = vec![names::layer(layer, "self_attn.o_proj")];
        Self { used: Projection, cols: config.attention_width(), stems, bias: true }
    }

    fn router(config: &ModelConfig, layer: LayerIdx) -> Self {
        Self { used: Router, cols: config.hidden, stems: vec![names::layer(layer, "mlp.router")], bias: true }
    }

    fn unembedding(config: &ModelConfig) -> Self {
        let stems = vec![names::UNEMBEDDING_STEM.to_owned()];
        Self { used: Projection, cols: config.hidden, stems, bias: false }
    }

    /// Every dense matrix, first layer to last, then the unembedding.
    pub(crate) fn all(config: &ModelConfig) -> Vec<Self> {
        let layers = (0..config.layers.len() as u32).map(LayerIdx);
        let of_layer = |layer| [Self::qkv(config, layer), Self::out(config, layer), Self::router(config, layer)];
        layers.flat_map(of_layer).chain([Self::unembedding(config)]).collect()
    }

    /// What it is called where a name is needed: its first tensor's stem.
    pub(crate) fn name(&self) -> &str {
        &self.stems[0]
    }

    /// Its tensors.
    pub(crate) fn stack<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Vec<Stack<'a>>, CheckpointError> {
        let of_stem = |stem: &String| {
            let weight = checkpoint.tensor(&format!("{stem}.weight"))?;
            let bias = self.bias.then(|| checkpoint.tensor(&format!("{stem}.bias"))).transpose()?;
            Ok(Stack { weight, bias })
        };
        self.stems.iter().map(of_stem).collect()
    }

    /// The bytes of its tensors.
    pub(crate) fn sources<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Vec<Source<'a>>, CheckpointError> {
        Ok(self.stack(checkpoint)?.iter().flat_map(|matrix| [Some(matrix.weight), matrix.bias]).flatten().collect())
    }

    /// Its rows.
    pub(crate) fn rows(&self, checkpoint: &Checkpoint) -> Result<usize, LoadError> {
        let rows =
            self.stack(checkpoint)?.iter().map(|matrix| matrix.rows(self.cols as usize)).sum::<Result<_, _>>()?;
        Ok(rows)
    }
}

/// The tensors of an expert.
pub(crate) fn expert_source(
    checkpoint: &Checkpoint,
    layer: LayerIdx,
    expert: ExpertId,
) -> Result<ExpertSource<'_>, CheckpointError> {
    let part = |part: &str| {
        let tensor = checkpoint.tensor(&names::layer(layer, &format!("mlp.experts.{part}")))?;
        Ok(of_expert(tensor, expert, checkpoint.config().experts))
    };
    Ok(ExpertSource {
        gate_up_blocks: part("gate_up_proj_blocks")?,
        gate_up_scales: part("gate_up_proj_scales")?,
        gate_up_bias: part("gate_up_proj_bias")?,
        down_blocks: part("down_proj_blocks")?,
        down_scales: part("down_proj_scales")?,
        down_bias: part("down_proj_bias")?,
    })
}

/// One expert's part of a tensor `[E, ..]`.
fn of_expert(tensor: Source<'_>, expert: ExpertId, experts: u32) -> Source<'_> {
    let size = tensor.bytes().len() / experts as usize;
    tensor.slice(expert.index() * size..(expert.index() + 1) * size).expect("an expert's share lies within the tensor")
}

/// Takes weights from a checkpoint, or from the file that has them packed, and counts what was taken.
struct Reader<'a, 'p> {
    checkpoint: &'a Checkpoint,
    packed: Option<&'a PackedFile>,
    /// Hears what is used of the checkpoint.
    ahead: &'a ReadAhead<'a>,
    done: u64,
    total: u64,
    on_progress: OnProgress<'p>,
}

impl Reader<'_, '_> {
    /// Takes what the next sources of the share are for.
    fn take<T>(&mut self, sources: &[Source<'_>], take: impl FnOnce() -> Result<T, LoadError>) -> Result<T, LoadError> {
        self.ahead.using(sources);
        let taken = take()?;
        self.done += bytes_of(sources) as u64;
        (self.on_progress)(self.done, self.total);
        Ok(taken)
    }

    fn vector<B: Backend>(&mut self, backend: &mut B, name: &str) -> Result<B::Vector, LoadError> {
        let source = self.checkpoint.tensor(name)?;
        self.take(&[source], || Ok(backend.vector(source)?))
    }

    fn dense<B: Backend>(&mut self, backend: &mut B, matrix: &Matrix) -> Result<B::Dense, LoadError> {
        let (stack, cols) = (matrix.stack(self.checkpoint)?, matrix.cols as usize);
        let (packed, rows) = (self.packed.map(|file| file.dense(matrix.name())), matrix.rows(self.checkpoint)?);
        self.take(&matrix.sources(self.checkpoint)?, || {
            Ok(match packed {
                Some(packed) => backend.hold_dense(matrix.used, rows, cols, packed)?,
                None => backend.dense(matrix.used, cols, &stack)?,
            })
        })
    }

    fn expert<B: Backend>(
        &mut self,
        backend: &mut B,
        experts: &mut B::Experts,
        (layer, expert, slot): (LayerIdx, ExpertId, ExpertSlot),
    ) -> Result<(), LoadError> {
        let source = expert_source(self.checkpoint, layer, expert)?;
        let packed = self.packed.map(|file| file.expert(layer, expert));
        self.take(&source.parts(), || {
            let held = match packed {
                Some(packed) => backend.hold_expert(experts, slot.index(), packed),
                None => backend.load_expert(experts, slot.index(), &source),
            };
            held.map_err(|error| LoadError::Expert { layer, expert, error })
        })
    }
}

/// Bytes of them all.
fn bytes_of(sources: &[Source<'_>]) -> usize {
    sources.iter().map(|source| source.bytes().len()).sum()
}

impl<B: Backend> Weights<B> {
    /// Reads the share of `rank`: all that is dense, and only its own experts. Matrices come from the packed file
    /// if there is one.
    ///
    /// # Errors
    /// A tensor that is missing or that the backend refuses, by name.
    pub fn load(
        backend: &mut B,
        Stored { checkpoint, packed }: Stored<'_>,
        placement: &Placement,
        rank: Rank,
        on_progress: OnProgress<'_>,
    ) -> Result<Self, LoadError> {
        let share = share(checkpoint, placement, rank)?;
        let total = bytes_of(&share) as u64;
        // Pages of a packed file that are asked for ahead would be small ones.
        let to_read = if packed.is_none() { &share[..] } else { &[] };
        on_progress(0, total);
        ReadAhead::during(to_read, |ahead| {
            let mut reader = Reader { checkpoint, packed, ahead, done: 0, total, on_progress };
            Self::take(backend, &mut reader, placement, rank)
        })
    }

    /// Takes what [`share`] lists, in its order. What is large comes first, so that little is left to do when the last of it
    /// has been read.
    fn take(
        backend: &mut B,
        reader: &mut Reader<'_, '_>,
        placement: &Placement,
        rank: Rank,
    ) -> Result<Self, LoadError> {
        let checkpoint = reader.checkpoint;
        let config = checkpoint.config();
        let embedding = backend.embedding(config.hidden as usize, checkpoint.embedding())?;
        let unembedding = reader.dense(backend, &Matrix::unembedding(config))?;
        let final_norm = reader.vector(backend, names::FINAL_NORM)?;
        let mut layers = Vec::with_capacity(config.layers.len());
        let mut in_pool = [0; 2];
        for (layer, &kind) in (0..).map(LayerIdx).zip(&config.layers) {
            let pool = pool_index(pool_of(kind));
            let kv = KvLayer { pool, layer: in_pool[pool] };
            in_pool[pool] += 1;
            let name = |part: &str| names::layer(layer, part);
            layers.push(Layer {
                attention_norm: reader.vector(backend, &name(ATTENTION_NORM))?,
                qkv: reader.dense(backend, &Matrix::qkv(config, layer))?,
                sinks: reader.vector(backend, &name(SINKS))?,
                out: reader.dense(backend, &Matrix::out(config, layer))?,
                mlp_norm: reader.vector(backend, &name(MLP_NORM))?,
                router: reader.dense(backend, &Matrix::router(config, layer))?,
                experts: load_experts(reader, backend, placement, rank, layer)?,
                places: backend.places(&places(placement, layer)),
                kv,
                window: (kind == LayerKind::Sliding).then_some(config.window),
            });
        }
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
    for (expert, slot) in held {
        reader.expert(backend, &mut experts, (layer, expert, slot))?;
    }
    Ok(experts)
}

fn places(placement: &Placement, layer: LayerIdx) -> Vec<(u32, u32)> {
    placement.of_layer(layer).iter().map(|(rank, slot)| (rank.0, slot.0)).collect()
}

/// What `rank` reads of the checkpoint while loading, in that order; the embedding is read as the backend likes.
fn share<'a>(
    checkpoint: &'a Checkpoint,
    placement: &Placement,
    rank: Rank,
) -> Result<Vec<Source<'a>>, CheckpointError> {
    let config = checkpoint.config();
    let mut share = Matrix::unembedding(config).sources(checkpoint)?;
    share.push(checkpoint.tensor(names::FINAL_NORM)?);
    for layer in (0..config.layers.len() as u32).map(LayerIdx) {
        let vector = |part: &str| checkpoint.tensor(&names::layer(layer, part));
        share.push(vector(ATTENTION_NORM)?);
        share.extend(Matrix::qkv(config, layer).sources(checkpoint)?);
        share.push(vector(SINKS)?);
        share.extend(Matrix::out(config, layer).sources(checkpoint)?);
        share.push(vector(MLP_NORM)?);
        share.extend(Matrix::router(config, layer).sources(checkpoint)?);
        for (expert, _) in placement.held_by(layer, rank) {
            share.extend(expert_source(checkpoint, layer, expert)?.parts());
        }
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use phalanx_kernels::{DenseFormat, Precision, Reference};
    use phalanx_proto::Layout;

    use super::*;
    use crate::nano;

    /// What is asked for ahead is what is used, in that order, and progress ends with all of it.
    #[test]
    fn a_share_lists_what_is_taken_in_its_order() {
        let checkpoint = nano::checkpoint().unwrap();
        let config = checkpoint.config();
        for ranks in [1, 2] {
            let layout = Layout::new(ranks, 0).unwrap();
            let placement = Placement::contiguous(config.layers.len() as u32, config.experts, layout);
            for rank in (0..ranks).map(Rank) {
                let share = share(&checkpoint, &placement, rank).unwrap();
                let total = bytes_of(&share) as u64;
                let mut left = share.iter().map(|source| source.bytes().len() as u64);
                let (mut listed, mut heard) = (0, 0);
                let on_progress = &mut |done, all| {
                    while listed < done {
                        listed += left.next().unwrap();
                    }
                    assert_eq!((listed, all), (done, total), "whole sources are taken");
                    heard = done;
                };
                let mut backend = Reference::new(Precision::Exact, DenseFormat::Bf16);
                let stored = Stored { checkpoint: &checkpoint, packed: None };
                Weights::load(&mut backend, stored, &placement, rank, on_progress).unwrap();
                assert_eq!(heard, total);
                let held: usize =
                    (0..).map(LayerIdx).zip(&config.layers).map(|(l, _)| placement.held_by(l, rank).count()).sum();
                let of_expert = bytes_of(&expert_source(&checkpoint, LayerIdx(0), ExpertId(0)).unwrap().parts());
                let others = config.layers.len() * config.experts as usize - held;
                let embedding = checkpoint.embedding().table().len();
                let rest = checkpoint.total_bytes() - (others * of_expert + embedding) as u64;
                assert_eq!(total, rest, "no other rank's experts are read");
            }
        }
    }
}
