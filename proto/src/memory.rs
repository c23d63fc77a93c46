//! What a rank will need, known before anything loads.

use std::fmt;

use crate::config::{LayerKind, ModelConfig};
use crate::ids::{Bytes, Rank};
use crate::layout::{Layout, Placement};
use crate::limits::Limits;

/// What a backend says of itself when it joins: the sizes of its formats and what memory it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendReport {
    /// Weight matrices are held in tiles of this many output rows, the last tile padded.
    pub tile_rows: u32,
    /// Bytes of 32 dense weights with their scale; the router's are 64, bf16, always.
    pub dense_block_bytes: u32,
    /// Bytes of 32 MXFP4 weights with their scale.
    pub mxfp4_block_bytes: u32,
    /// Bytes of a key or value.
    pub kv_bytes: u32,
    /// Bytes of a number on the wire.
    pub wire_bytes: u32,
    /// Bytes of 32 numbers of a row as the experts read them.
    pub operand_block_bytes: u32,
    /// The experts read a row for each of its choices, in tiles of this many for each expert, the last of them padded; 0 where
    /// they read each row once.
    pub item_tile: u32,
    /// What it makes for itself.
    pub scratch: Scratch,
    /// What it needs to exchange rows with other ranks, where there are any.
    pub peers: Peers,
    /// Threads that load and compute.
    pub threads: u32,
    /// Memory of a worker process before it holds anything: program, runtimes, connections.
    pub process_base: Bytes,
    /// Whether the embedding stays in the mapped checkpoint, where only the rows looked up are read.
    pub embedding_mapped: bool,
    /// Memory that may be used.
    pub memory: Bytes,
}

/// What a backend makes for itself when a step first needs it, at most: beside weights, keys and values, activations and
/// rows on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    /// Whatever the limits.
    pub fixed: Bytes,
    /// Bytes for each row of a step.
    pub row: u32,
    /// Bytes for each sequence and KV block that it may have.
    pub stretch: u32,
}

impl Scratch {
    /// Bytes by these limits.
    fn of(&self, limits: &Limits) -> u64 {
        let stretches = u64::from(limits.seqs_max) * u64::from(limits.context.div_ceil(limits.block_size));
        self.fixed.0 + u64::from(self.row) * u64::from(limits.step_rows_max) + u64::from(self.stretch) * stretches
    }
}

/// What exchanges with other ranks take beside the rows on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// What a library takes for itself.
    pub library: Bytes,
    /// Slots of one size, which few rows travel in.
    pub slots: Bytes,
}

/// What memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Use {
    /// The process before it holds anything, and what its libraries take.
    Process,
    /// Attention, router, norms, embedding (unless mapped) and unembedding.
    Dense,
    /// The experts of this rank.
    Experts,
    /// Keys and values of full layers.
    KvFull,
    /// Keys and values of sliding layers.
    KvWindow,
    /// Activations and logits, and what the backend makes for itself.
    Workspace,
    /// Rows on their way between ranks, and the experts' intermediate rows.
    Exchange,
    /// Pages of the checkpoint that are read while loading and then given back.
    Loading,
}

impl Use {
    /// The name shown to people and machines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Dense => "dense weights",
            Self::Experts => "expert weights",
            Self::KvFull => "kv full",
            Self::KvWindow => "kv window",
            Self::Workspace => "workspace",
            Self::Exchange => "exchange",
            Self::Loading => "loading",
        }
    }
}

/// The memory of one rank, use by use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The rank.
    pub rank: Rank,
    /// Bytes of each use, in the order of [`Use`].
    pub uses: Vec<(Use, Bytes)>,
}

/// The plan does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRefused {
    /// The plan.
    pub plan: MemoryPlan,
    /// What there is.
    pub memory: Bytes,
}

impl fmt::Display for MemoryRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |b: Bytes| b.0 as f64 / f64::from(1 << 30);
        write!(
            f,
            "rank {} needs {:.2} GiB but has {:.2}: use more workers, fewer --kv-tokens, or a smaller model (",
            self.plan.rank,
            gib(self.plan.total()),
            gib(self.memory)
        )?;
        for (i, (what, bytes)) in self.plan.uses.iter().enumerate() {
            write!(f, "{}{} {:.2}", if i == 0 { "" } else { ", " }, what.name(), gib(*bytes))?;
        }
        f.write_str(" GiB)")
    }
}

impl std::error::Error for MemoryRefused {}

/// Bytes of 32 weights of a router.
const ROUTER_BLOCK_BYTES: u64 = 64;

/// Bytes of 32 numbers of a row rounded to int8, with scale and sums.
pub const INT8_BLOCK_BYTES: u32 = 48;

/// Rows whose logits are held at once; more are worked on in turns.
pub const LOGITS_ROWS_MAX: u32 = 64;

impl MemoryPlan {
    /// The memory of `rank`. Pure: the same numbers give the same plan.
    #[must_use]
    pub fn new(
        config: &ModelConfig,
        layout: Layout,
        placement: &Placement,
        rank: Rank,
        limits: &Limits,
        backend: &BackendReport,
    ) -> Self {
        let n = |v: u32| u64::from(v);
        let (h, i, v) = (n(config.hidden), n(config.intermediate), n(config.vocab));
        let tile = |rows: u64| rows.next_multiple_of(n(backend.tile_rows));
        // A packed matrix: tiles of whole cache lines, with an f32 bias for each row.
        let packed = |rows: u64, cols: u64, block: u64| {
            let weights = cols.div_ceil(32) * block * n(backend.tile_rows);
            tile(rows) / n(backend.tile_rows) * (weights.next_multiple_of(64) + n(backend.tile_rows) * 4)
        };
        let dense = |rows: u64, cols: u64| packed(rows, cols, n(backend.dense_block_bytes));
        let mxfp4 = |rows: u64, cols: u64| packed(rows, cols, n(backend.mxfp4_block_bytes));

        let layers = config.layers.len() as u64;
        let attention = n(config.attention_width());
        let layer = dense(n(config.qkv_width()), h)
            + dense(h, attention)
            + packed(n(config.experts), h, ROUTER_BLOCK_BYTES)
            + 2 * h * 4
            + n(config.heads) * 4;
        let embedding = if backend.embedding_mapped { 0 } else { v * h * 2 };
        let dense_weights = layers * layer + dense(v, h) + h * 4 + embedding;

        let held: u64 = (0u32..)
            .zip(&config.layers)
            .map(|(layer, _)| placement.held_by(crate::ids::LayerIdx(layer), rank).count() as u64)
            .sum();
        let experts = held * (mxfp4(2 * i, h) + mxfp4(h, i));

        let kv_block = |kind| {
            let values = n(config.head_dim).next_multiple_of(n(backend.tile_rows));
            let of_position = n(config.kv_heads) * (n(config.head_dim) + values) * n(backend.kv_bytes);
            n(config.layers_of(kind)) * n(limits.block_size) * of_position
        };
        let kv_full = kv_block(LayerKind::Full) * n(limits.full_blocks);
        let kv_window = kv_block(LayerKind::Sliding) * n(limits.window_blocks);

        let rows = n(limits.step_rows_max);
        // Rows rounded to int8 for a dense product, where weights are.
        let rounded = if n(backend.dense_block_bytes) < ROUTER_BLOCK_BYTES {
            let row = |cols: u64| cols.div_ceil(32) * n(INT8_BLOCK_BYTES);
            (rows * row(h.max(attention))).max(n(LOGITS_ROWS_MAX) * row(h))
        } else {
            0
        };
        let workspace = rounded
            + rows * ((2 * h + n(config.qkv_width()) + attention) * 4 + n(config.top_k) * 8)
            + n(LOGITS_ROWS_MAX) * (h + v) * 4
            + backend.scratch.of(limits);

        let received = rows * n(layout.ep);
        let slots = n(config.top_k).min(n(placement.slots_used(rank)));
        let wire = h * n(backend.wire_bytes);
        // Experts read 32 numbers at a time.
        let operand = |numbers: u64| numbers / 32 * n(backend.operand_block_bytes);
        // A record begins with a slot for each choice; a row's and an item's place in lists.
        let heads = 4 * n(config.top_k);
        let (of_row, of_item) = (heads + 8, 12);
        let items = received * slots;
        let read = match n(backend.item_tile) {
            0 => received * operand(h),
            tile => items * operand(h) + n(placement.slots_used(rank)) * tile * (operand(h) + operand(i)),
        };
        let exchange = if slots == 0 { 0 } else { items * (operand(i) + wire) + read + received * wire }
            + received * (slots * of_item + of_row)
            + rows * n(config.top_k).min(n(layout.ep)) * (wire + heads)
            + rows * n(config.top_k) * wire;

        let peers = if layout.ep > 1 { backend.peers } else { Peers::default() };

        // Each thread packs one piece of the checkpoint at a time.
        let piece = (i * h / 32 * 17 * 2).max(n(LOAD_PIECE_BYTES));
        let loading = (n(backend.threads) * piece).min(dense_weights + experts);

        let uses = vec![
            (Use::Process, Bytes(backend.process_base.0 + peers.library.0)),
            (Use::Dense, Bytes(dense_weights)),
            (Use::Experts, Bytes(experts)),
            (Use::KvFull, Bytes(kv_full)),
            (Use::KvWindow, Bytes(kv_window)),
            (Use::Workspace, Bytes(workspace)),
            (Use::Exchange, Bytes(exchange + peers.slots.0)),
            (Use::Loading, Bytes(loading)),
        ];
        Self { rank, uses }
    }

    /// All uses together.
    #[must_use]
    pub fn total(&self) -> Bytes {
        Bytes(self.uses.iter().map(|(_, b)| b.0).sum())
    }

    /// Bytes of one use.
    #[must_use]
    pub fn of(&self, what: Use) -> Bytes {
        Bytes(self.uses.iter().filter(|(u, _)| *u == what).map(|(_, b)| b.0).sum())
    }

    /// Accepts the plan if it fits.
    ///
    /// # Errors
    /// More is needed than the backend has.
    pub fn fit(self, memory: Bytes) -> Result<Self, MemoryRefused> {
        if self.total() > memory { Err(MemoryRefused { plan: self, memory }) } else { Ok(self) }
    }
}

/// Bytes of the checkpoint that a loading thread has mapped at most, those around what it reads included.
pub const LOAD_PIECE_BYTES: u32 = 4 << 20;
