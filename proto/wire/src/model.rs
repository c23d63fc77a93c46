//! The model's shape, who holds what, and how much there may be.

use phalanx_proto::{
    BackendReport, Bytes, ExpertSlot, LayerKind, Layout, Limits, ModelConfig, Peers, Placement, Rank, Rope, Scratch,
};

use crate::error::{WireError, at_most, counted, known, present};
use crate::v1;

/// Most entries of a placement table, layers times experts.
pub const PLACES_MAX: usize = 1 << 20;

/// Most expert slots of a cell, all layers and ranks together.
const SLOTS_MAX: u64 = 1 << 26;
/// Most bytes that anything may claim to have or use: 1 PiB.
const MEMORY_MAX: u64 = 1 << 50;
/// Most bytes that a backend makes for itself for each row, or for each block of a sequence.
const SCRATCH_MAX: u32 = 1 << 18;
/// Most rows of a step and most sequences of a rank.
const ROWS_MAX: u32 = 1 << 20;
/// Most blocks of a pool, and the longest context.
const BLOCKS_MAX: u32 = 1 << 24;

impl From<LayerKind> for v1::LayerKind {
    fn from(kind: LayerKind) -> Self {
        match kind {
            LayerKind::Sliding => Self::Sliding,
            LayerKind::Full => Self::Full,
        }
    }
}

fn layer_kind(value: i32) -> Result<LayerKind, WireError> {
    match known("layers", value)? {
        v1::LayerKind::Sliding => Ok(LayerKind::Sliding),
        v1::LayerKind::Full => Ok(LayerKind::Full),
        v1::LayerKind::Unspecified => Err(WireError::Unknown { field: "layers", value }),
    }
}

impl From<ModelConfig> for v1::ModelConfig {
    fn from(config: ModelConfig) -> Self {
        let ModelConfig {
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            experts,
            top_k,
            window,
            vocab,
            eps,
            swiglu_limit,
            rope,
            context,
            eos,
        } = config;
        let Rope { theta, factor, beta_fast, beta_slow, original_context, truncate, attention_factor } = rope;
        let rope = v1::Rope { theta, factor, beta_fast, beta_slow, original_context, truncate, attention_factor };
        let layers = layers.into_iter().map(|kind| v1::LayerKind::from(kind).into()).collect();
        Self {
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            experts,
            top_k,
            window,
            vocab,
            eps,
            swiglu_limit,
            rope: Some(rope),
            context,
            eos,
        }
    }
}

impl TryFrom<v1::ModelConfig> for ModelConfig {
    type Error = WireError;

    fn try_from(config: v1::ModelConfig) -> Result<Self, WireError> {
        let rope = present("rope", config.rope)?;
        let config = Self {
            hidden: config.hidden,
            intermediate: config.intermediate,
            layers: config.layers.into_iter().map(layer_kind).collect::<Result<_, _>>()?,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            experts: config.experts,
            top_k: config.top_k,
            window: config.window,
            vocab: config.vocab,
            eps: config.eps,
            swiglu_limit: config.swiglu_limit,
            rope: Rope {
                theta: rope.theta,
                factor: rope.factor,
                beta_fast: rope.beta_fast,
                beta_slow: rope.beta_slow,
                original_context: rope.original_context,
                truncate: rope.truncate,
                attention_factor: rope.attention_factor,
            },
            context: config.context,
            eos: config.eos,
        };
        config.check().map_err(|e| WireError::invalid("config", format!("is no gpt-oss model: {e}")))?;
        at_most("config", config.layers.len() as u64 * u64::from(config.experts), PLACES_MAX as u64)?;
        Ok(config)
    }
}

impl From<BackendReport> for v1::BackendReport {
    fn from(report: BackendReport) -> Self {
        let BackendReport {
            tile_rows,
            dense_block_bytes,
            mxfp4_block_bytes,
            kv_bytes,
            wire_bytes,
            threads,
            process_base,
            embedding_mapped,
            memory,
            operand_block_bytes,
            item_tile,
            scratch: Scratch { fixed, row, stretch },
            peers: Peers { library, slots },
        } = report;
        Self {
            tile_rows,
            dense_block_bytes,
            mxfp4_block_bytes,
            kv_bytes,
            wire_bytes,
            threads,
            process_base: process_base.0,
            embedding_mapped,
            memory: memory.0,
            operand_block_bytes,
            item_tile,
            scratch: Some(v1::Scratch { fixed: fixed.0, row, stretch }),
            peers: Some(v1::Peers { library: library.0, slots: slots.0 }),
        }
    }
}

impl TryFrom<v1::BackendReport> for BackendReport {
    type Error = WireError;

    fn try_from(report: v1::BackendReport) -> Result<Self, WireError> {
        let v1::Scratch { fixed, row, stretch } = present("scratch", report.scratch)?;
        let v1::Peers { library, slots } = present("peers", report.peers)?;
        Ok(Self {
            tile_rows: counted("tile_rows", report.tile_rows, 4096)?,
            dense_block_bytes: counted("dense_block_bytes", report.dense_block_bytes, 256)?,
            mxfp4_block_bytes: counted("mxfp4_block_bytes", report.mxfp4_block_bytes, 256)?,
            kv_bytes: counted("kv_bytes", report.kv_bytes, 8)?,
            wire_bytes: counted("wire_bytes", report.wire_bytes, 8)?,
            threads: counted("threads", report.threads, 4096)?,
            process_base: Bytes(at_most("process_base", report.process_base, MEMORY_MAX)?),
            embedding_mapped: report.embedding_mapped,
            memory: Bytes(at_most("memory", report.memory, MEMORY_MAX)?),
            operand_block_bytes: counted("operand_block_bytes", report.operand_block_bytes, 256)?,
            item_tile: at_most("item_tile", report.item_tile, 256)?,
            scratch: Scratch {
                fixed: Bytes(at_most("scratch.fixed", fixed, MEMORY_MAX)?),
                row: at_most("scratch.row", row, SCRATCH_MAX)?,
                stretch: at_most("scratch.stretch", stretch, SCRATCH_MAX)?,
            },
            peers: Peers {
                library: Bytes(at_most("peers.library", library, MEMORY_MAX)?),
                slots: Bytes(at_most("peers.slots", slots, MEMORY_MAX)?),
            },
        })
    }
}

impl From<Layout> for v1::Layout {
    fn from(layout: Layout) -> Self {
        let Layout { ep, survive } = layout;
        Self { ep, survive }
    }
}

impl TryFrom<v1::Layout> for Layout {
    type Error = WireError;

    fn try_from(layout: v1::Layout) -> Result<Self, WireError> {
        Self::new(layout.ep, layout.survive).map_err(|e| WireError::invalid("layout", format!("is impossible: {e}")))
    }
}

impl From<&Placement> for v1::Placement {
    fn from(placement: &Placement) -> Self {
        let table = placement.table();
        let experts = if table.is_empty() { 0 } else { placement.of_layer(phalanx_proto::LayerIdx(0)).len() };
        let layers = table.len().checked_div(experts).unwrap_or(0);
        let count = |n: usize| u32::try_from(n).expect("both counts of a placement are u32");
        Self {
            layers: count(layers),
            experts: count(experts),
            rank: table.iter().map(|(rank, _)| rank.0).collect(),
            slot: table.iter().map(|(_, slot)| slot.0).collect(),
        }
    }
}

/// A placement makes sense only within its layout.
pub(crate) fn placement(placement: v1::Placement, layout: Layout) -> Result<Placement, WireError> {
    let v1::Placement { layers, experts, rank, slot } = placement;
    at_most("placement", u64::from(layers) * u64::from(experts), PLACES_MAX as u64)?;
    // For each layer the check walks over every slot of every rank.
    let slots = u64::from(layout.ep) * u64::from(layout.slots(experts));
    at_most("placement", u64::from(layers) * slots, SLOTS_MAX)?;
    if rank.len() != slot.len() {
        return Err(WireError::invalid("placement", "has columns of different length"));
    }
    let places = rank.into_iter().map(Rank).zip(slot.into_iter().map(ExpertSlot)).collect();
    Placement::from_table(layers, experts, layout, places)
        .map_err(|e| WireError::invalid("placement", format!("is impossible: {e}")))
}

impl From<Limits> for v1::Limits {
    fn from(limits: Limits) -> Self {
        let Limits { seqs_max, step_rows_max, block_size, full_blocks, window_blocks, context } = limits;
        Self { seqs_max, step_rows_max, block_size, full_blocks, window_blocks, context }
    }
}

impl TryFrom<v1::Limits> for Limits {
    type Error = WireError;

    fn try_from(limits: v1::Limits) -> Result<Self, WireError> {
        if limits.block_size != Self::BLOCK_SIZE {
            let problem = format!("is {}, this build has {}", limits.block_size, Self::BLOCK_SIZE);
            return Err(WireError::invalid("block_size", problem));
        }
        Ok(Self {
            seqs_max: counted("seqs_max", limits.seqs_max, ROWS_MAX)?,
            step_rows_max: counted("step_rows_max", limits.step_rows_max, ROWS_MAX)?,
            block_size: limits.block_size,
            full_blocks: at_most("full_blocks", limits.full_blocks, BLOCKS_MAX)?,
            window_blocks: at_most("window_blocks", limits.window_blocks, BLOCKS_MAX)?,
            context: counted("context", limits.context, BLOCKS_MAX)?,
        })
    }
}
