//! The kernels, and their argument structs as `csrc/` declares them.
//!
//! Pointers are `u64` and come first wherever padding would otherwise arise; the test at the end and the emulation
//! compare every size with the compiler's.

use std::ffi::c_void;
use std::marker::PhantomData;

/// A kernel of `csrc/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its entry point.
    pub name: &'static str,
    /// The file that has it.
    pub file: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of its argument struct.
    pub args_bytes: usize,
    /// In a graph it starts while the kernel before it still runs, for whose end it waits itself: where it has something to do
    /// until then, or lets the next one start.
    pub starts_ahead: bool,
}

/// A kernel that takes `A`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op<A> {
    pub(super) kernel: Kernel,
    args: PhantomData<fn(A)>,
}

impl<A: Copy> Op<A> {
    const fn new(name: &'static str, file: &'static str, threads: u32) -> Self {
        const { assert!(size_of::<A>().is_multiple_of(8), "arguments are kept as words") };
        let kernel = Kernel { name, file, threads, args_bytes: size_of::<A>(), starts_ahead: false };
        Self { kernel, args: PhantomData }
    }

    const fn ahead(mut self) -> Self {
        self.kernel.starts_ahead = true;
        self
    }
}

/// A struct as a kernel takes it.
pub(super) const fn pointer<A>(args: &A) -> *const c_void {
    std::ptr::from_ref(args).cast()
}

macro_rules! args {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $($(#[$doc])* #[derive(Clone, Copy, Debug)] #[repr(C)] pub(super) struct $name { $(pub(super) $field: $type),* })*
    };
}

args! {
    /// embed.cu
    EmbedArgs { table: u64, tokens: u64, sampled: u64, slots: u64, out: u64, status: u64, cols: u32, vocab: u32 }
    /// embed.cu
    GatherArgs { x: u64, rows: u64, out: u64, cols: u32, unused: u32 }
    /// rms_norm.cu
    RmsNormArgs { x: u64, weight: u64, out: u64, hidden: u32, eps: f32 }
    /// rope.cu
    RopeArgs {
        qkv: u64, cos: u64, sin: u64, kv: u64, tables: u64, positions: u64, sequences: u64,
        cols: u32, heads: u32, kv_heads: u32, dim: u32, stride: u32, unused: u32,
    }
    /// attention.cu
    AttentionArgs {
        qkv: u64, kv: u64, tables: u64, positions: u64, sequences: u64, tiles: u64, sinks: u64, out: u64, partials: u64,
        cols: u32, heads: u32, kv_heads: u32, dim: u32, stride: u32, window: u32, segments: u32, scale: f32, share: u32,
        unused: u32,
    }
    /// dense.cu
    DenseArgs { x: u64, weights: u64, bias: u64, out: u64, n: u32, rows: u32, cols: u32, add: u32 }
    /// dense_wgmma.cu
    DenseWgmmaArgs {
        x: u64, weights: u64, bias: u64, out: u64, halves: u64, n: u32, rows: u32, cols: u32, add: u32, parts: u32,
        unused: u32,
    }
    /// dense_wgmma.cu
    PiecesArgs { x: u64, pieces: u64, n: u32, cols: u32, group: u32, unused: u32 }
    /// router.cu
    TopKArgs { logits: u64, experts: u64, weights: u64, experts_count: u32, top_k: u32 }
    /// router.cu
    RouteArgs {
        x: u64, matrix: u64, bias: u64, logits: u64, tickets: u64, experts: u64, weights: u64,
        n: u32, cols: u32, experts_count: u32, top_k: u32,
    }
    /// exchange.cu
    EntriesArgs {
        experts: u64, places: u64, parts: u64, at: u64, counts: u64, bytes: u64, entries: u32, top_k: u32,
    }
    /// exchange.cu
    DispatchArgs {
        x: u64, experts: u64, places: u64, out: u64, parts: u64, at: u64, rows: u32, hidden: u32, top_k: u32,
        gathered: u32,
    }
    /// exchange.cu
    CombineArgs {
        results: u64, parts: u64, at: u64, counts: u64, weights: u64, residual: u64, status: u64,
        rows: u32, hidden: u32, top_k: u32, ranks: u32,
    }
    /// receive.cu
    ReceiveArgs {
        received: u64, parts: u64, filled: u64, row_source: u64, item_row: u64, order: u64, starts: u64, counts: u64,
        results: u64, tiles: u64, status: u64, record_bytes: u64, result_bytes: u64,
        ranks: u32, top_k: u32, slots: u32, rows_max: u32, items_max: u32, me: u32, stretches: u32, moves: u32,
        hidden: u32, unused: u32,
    }
    /// receive.cu
    RowsArgs { received: u64, row_source: u64, counts: u64, rows: u64, row_bytes: u32, unused: u32 }
    /// receive.cu
    TilesArgs {
        received: u64, row_source: u64, item_row: u64, order: u64, starts: u64, tiles: u64, hidden: u32, slots: u32,
    }
    /// slots.cu
    PackArgs {
        bytes: u64, parts: u64, moment: u64, slots: u64, status: u64, slot_bytes: u64, exchange: u32, from: u32,
    }
    /// slots.cu
    UnpackArgs {
        slots: u64, moment: u64, parts: u64, status: u64, slot_bytes: u64, row_bytes: u64, exchange: u32, ranks: u32,
    }
    /// experts.cu
    ExpertArgs {
        slots: u64, starts: u64, order: u64, item_row: u64, rows: u64, activations: u64, results: u64, progress: u64,
        hidden: u32, intermediate: u32, limit: f32, slots_count: u32,
    }
    /// sample.cu
    SampleArgs {
        logits: u64, weights: u64, states: u64, done: u64, draws: u64, edits: u64, allowed: u64, drawn: u64, top: u64,
        slots: u64, vocab: u32, stride: u32, state_bytes: u32, unused: u32,
    }
}

pub(super) const EMBED: Op<EmbedArgs> = Op::new("embed", "embed.cu", 128);
pub(super) const GATHER: Op<GatherArgs> = Op::new("gather", "embed.cu", 128);
pub(super) const RMS_NORM: Op<RmsNormArgs> = Op::new("rms_norm", "rms_norm.cu", 128).ahead();
pub(super) const ROPE_F32: Op<RopeArgs> = Op::new("rope_f32", "rope.cu", 128);
pub(super) const ROPE_BF16: Op<RopeArgs> = Op::new("rope_bf16", "rope.cu", 128);
pub(super) const ATTENTION_F32: Op<AttentionArgs> = Op::new("attention_f32", "attention.cu", 128);
pub(super) const ATTENTION_SEGMENTS_F32: Op<AttentionArgs> = Op::new("attention_segments_f32", "attention.cu", 128);
pub(super) const ATTENTION_MERGE: Op<AttentionArgs> = Op::new("attention_merge", "attention.cu", 128);
/// For heads of up to 64 dimensions and for wider ones.
pub(super) const ATTENTION_MANY: [Op<AttentionArgs>; 2] =
    [Op::new("attention_many_64", "attention.cu", 128), Op::new("attention_many_128", "attention.cu", 128)];
pub(super) const ATTENTION_FEW: [Op<AttentionArgs>; 2] =
    [Op::new("attention_few_64", "attention.cu", 32), Op::new("attention_few_128", "attention.cu", 32)];
pub(super) const ATTENTION_JOIN: Op<AttentionArgs> = Op::new("attention_join", "attention.cu", 128);
pub(super) const DENSE_F32: Op<DenseArgs> = Op::new("dense_f32", "dense.cu", 256);
pub(super) const DENSE_MMA_8: Op<DenseArgs> = Op::new("dense_mma_8", "dense.cu", 256);
pub(super) const DENSE_MMA_64: Op<DenseArgs> = Op::new("dense_mma_64", "dense.cu", 256);
pub(super) const TOP_K: Op<TopKArgs> = Op::new("top_k", "router.cu", 32);
pub(super) const ROUTE_FEW: Op<RouteArgs> = Op::new("route_few", "router.cu", 256).ahead();
pub(super) const ROUTE_MANY: Op<RouteArgs> = Op::new("route_many", "router.cu", 512);
pub(super) const PLACE_ENTRIES: Op<EntriesArgs> = Op::new("place_entries", "exchange.cu", 512);
pub(super) const DISPATCH_F32: Op<DispatchArgs> = Op::new("dispatch_f32", "exchange.cu", 256);
pub(super) const DISPATCH_BF16: Op<DispatchArgs> = Op::new("dispatch_bf16", "exchange.cu", 256);
pub(super) const COMBINE_F32: Op<CombineArgs> = Op::new("combine_f32", "exchange.cu", 256).ahead();
pub(super) const COMBINE_BF16: Op<CombineArgs> = Op::new("combine_bf16", "exchange.cu", 256).ahead();
pub(super) const RECEIVE: Op<ReceiveArgs> = Op::new("receive", "receive.cu", 1024);
pub(super) const RECEIVE_FEW: Op<ReceiveArgs> = Op::new("receive_few", "receive.cu", 512);
pub(super) const RECEIVE_WARP: Op<ReceiveArgs> = Op::new("receive_warp", "receive.cu", 128);
pub(super) const RECEIVE_ROWS: Op<RowsArgs> = Op::new("receive_rows", "receive.cu", 256);
pub(super) const RECEIVE_TILES: Op<TilesArgs> = Op::new("receive_tiles", "receive.cu", 256);
pub(super) const GATE_UP_F32: Op<ExpertArgs> = Op::new("gate_up_f32", "experts.cu", 128);
pub(super) const GATE_UP_BF16: Op<ExpertArgs> = Op::new("gate_up_bf16", "experts.cu", 128);
pub(super) const DOWN_F32: Op<ExpertArgs> = Op::new("down_f32", "experts.cu", 128);
pub(super) const DOWN_BF16: Op<ExpertArgs> = Op::new("down_bf16", "experts.cu", 128);
pub(super) const DENSE_PIECES: Op<PiecesArgs> = Op::new("dense_pieces", "dense_wgmma.cu", 128);
/// For 8, 32, 64, 128 and 256 tokens at once.
pub(super) const DENSE_WGMMA: [Op<DenseWgmmaArgs>; 5] = [
    Op::new("dense_wgmma_8", "dense_wgmma.cu", 160).ahead(),
    Op::new("dense_wgmma_32", "dense_wgmma.cu", 160),
    Op::new("dense_wgmma_64", "dense_wgmma.cu", 160),
    Op::new("dense_wgmma_128", "dense_wgmma.cu", 288),
    Op::new("dense_wgmma_256", "dense_wgmma.cu", 384),
];
/// Both matrices of the experts, for 8, 16, 32 and 48 items at once.
pub(super) const EXPERTS_WGMMA: [Op<ExpertArgs>; 4] = [
    Op::new("experts_wgmma_8", "experts_wgmma.cu", 160),
    Op::new("experts_wgmma_16", "experts_wgmma.cu", 160),
    Op::new("experts_wgmma_32", "experts_wgmma.cu", 288),
    Op::new("experts_wgmma_48", "experts_wgmma.cu", 288),
];
/// For 8 and 176 items at once.
pub(super) const GATE_UP_WGMMA: [Op<ExpertArgs>; 2] =
    [Op::new("gate_up_wgmma_8", "experts_wgmma.cu", 160), Op::new("gate_up_wgmma_176", "experts_wgmma.cu", 512)];
pub(super) const DOWN_WGMMA: [Op<ExpertArgs>; 2] =
    [Op::new("down_wgmma_8", "experts_wgmma.cu", 160), Op::new("down_wgmma_176", "experts_wgmma.cu", 512)];
pub(super) const PACK: Op<PackArgs> = Op::new("pack", "slots.cu", 256);
pub(super) const UNPACK: Op<UnpackArgs> = Op::new("unpack", "slots.cu", 256);
pub(super) const SAMPLE_CHANGE: Op<SampleArgs> = Op::new("sample_change", "sample.cu", 512);
pub(super) const SAMPLE_LARGEST: Op<SampleArgs> = Op::new("sample_largest", "sample.cu", 512);
pub(super) const SAMPLE_WEIGH: Op<SampleArgs> = Op::new("sample_weigh", "sample.cu", 512);
pub(super) const SAMPLE_CUT: Op<SampleArgs> = Op::new("sample_cut", "sample.cu", 512);
pub(super) const SAMPLE_DRAW: Op<SampleArgs> = Op::new("sample_draw", "sample.cu", 512);
pub(super) const SAMPLE_REPORT: Op<SampleArgs> = Op::new("sample_report", "sample.cu", 512);

/// Every kernel.
pub const KERNELS: [Kernel; 55] = [
    EMBED.kernel,
    GATHER.kernel,
    RMS_NORM.kernel,
    ROPE_F32.kernel,
    ROPE_BF16.kernel,
    ATTENTION_F32.kernel,
    ATTENTION_SEGMENTS_F32.kernel,
    ATTENTION_MERGE.kernel,
    ATTENTION_MANY[0].kernel,
    ATTENTION_MANY[1].kernel,
    ATTENTION_FEW[0].kernel,
    ATTENTION_FEW[1].kernel,
    ATTENTION_JOIN.kernel,
    DENSE_F32.kernel,
    DENSE_MMA_8.kernel,
    DENSE_MMA_64.kernel,
    TOP_K.kernel,
    ROUTE_FEW.kernel,
    ROUTE_MANY.kernel,
    PLACE_ENTRIES.kernel,
    DISPATCH_F32.kernel,
    DISPATCH_BF16.kernel,
    COMBINE_F32.kernel,
    COMBINE_BF16.kernel,
    RECEIVE.kernel,
    RECEIVE_FEW.kernel,
    RECEIVE_WARP.kernel,
    RECEIVE_ROWS.kernel,
    RECEIVE_TILES.kernel,
    GATE_UP_F32.kernel,
    GATE_UP_BF16.kernel,
    DOWN_F32.kernel,
    DOWN_BF16.kernel,
    DENSE_PIECES.kernel,
    DENSE_WGMMA[0].kernel,
    DENSE_WGMMA[1].kernel,
    DENSE_WGMMA[2].kernel,
    DENSE_WGMMA[3].kernel,
    DENSE_WGMMA[4].kernel,
    EXPERTS_WGMMA[0].kernel,
    EXPERTS_WGMMA[1].kernel,
    EXPERTS_WGMMA[2].kernel,
    EXPERTS_WGMMA[3].kernel,
    GATE_UP_WGMMA[0].kernel,
    GATE_UP_WGMMA[1].kernel,
    DOWN_WGMMA[0].kernel,
    DOWN_WGMMA[1].kernel,
    PACK.kernel,
    UNPACK.kernel,
    SAMPLE_CHANGE.kernel,
    SAMPLE_LARGEST.kernel,
    SAMPLE_WEIGH.kernel,
    SAMPLE_CUT.kernel,
    SAMPLE_DRAW.kernel,
    SAMPLE_REPORT.kernel,
];
