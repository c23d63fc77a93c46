//! What is encoded is decoded to the same; anything else is refused, and nothing makes the decoder panic.

#![allow(clippy::unwrap_used, reason = "tests")]

use phalanx_proto::{
    Admission, BackendReport, BlockAddress, BlockGrant, BlockId, Bytes, CellId, ConstraintStart, ConstraintTable,
    Epoch, ExchangeCounters, Fence, History, KvOp, LayerIdx, LayerKind, Layout, Limits, ModelConfig, NumericsId,
    Outputs, Peers, PhaseTimes, Placement, Pool, Position, Rank, Rope, Rows, RowsResult, Sampling, Scratch, SeqId,
    Start, StepHeader, StepId, StepPlan, StepResult, TableId, Term, Tier, TokenId, TokenLogprobs, Tokens,
};
use phalanx_wire::{
    Description, Health, Join, Prepare, PrepareEvent, Progress, StepFailure, StepProgress, StepReply, WireError,
    WorkerState, v1,
};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

fn fence() -> impl Strategy<Value = Fence> {
    let counter = 0..=u64::MAX >> 1;
    (counter.clone(), counter.clone(), counter).prop_map(|(term, epoch, step)| Fence {
        term: Term(term),
        epoch: Epoch(epoch),
        step: StepId(step),
    })
}

fn pool() -> impl Strategy<Value = Pool> {
    prop_oneof![Just(Pool::Full), Just(Pool::Window)]
}

fn kv_op() -> impl Strategy<Value = KvOp> {
    let tier = || prop_oneof![Just(Tier::Device), Just(Tier::Host)];
    let address = move || {
        let parts = (pool(), tier(), any::<u32>());
        parts.prop_map(|(pool, tier, block)| BlockAddress { pool, tier, block: BlockId(block) })
    };
    (address(), address()).prop_map(|(from, to)| KvOp::Copy { from, to })
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let kept = (0f32..4.0, any::<u32>(), 0.001f32..=1.0, 0f32..=1.0);
    let penalties = (-2f32..2.0, -2f32..2.0, 0.1f32..3.0);
    (kept, penalties, any::<u64>(), any::<u32>(), proptest::option::of(0u32..=20)).prop_map(
        |((temperature, top_k, top_p, min_p), penalties, seed, choice, logprobs)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            presence_penalty: penalties.0,
            frequency_penalty: penalties.1,
            repetition_penalty: penalties.2,
            seed,
            choice,
            logprobs,
        },
    )
}

fn admission() -> impl Strategy<Value = Admission> {
    let bias = vec((any::<u32>().prop_map(TokenId), -100f32..100.0), 0..4);
    let constraint = proptest::option::of((any::<u32>(), any::<u32>()));
    let constraint =
        constraint.prop_map(|start| start.map(|(table, state)| ConstraintStart { table: TableId(table), state }));
    let history = (tokens(), tokens()).prop_map(|(prompt, generated)| History { prompt, generated });
    (any::<u64>(), sampling(), bias, constraint, any::<u32>(), history).prop_map(
        |(seq, sampling, bias, constraint, cached, history)| Admission {
            seq: SeqId(seq),
            sampling,
            bias,
            constraint,
            cached,
            history,
        },
    )
}

fn table() -> impl Strategy<Value = ConstraintTable> {
    let runs = vec((any::<u32>().prop_map(TokenId), any::<u32>()), 0..4);
    (any::<u32>(), runs, any::<u32>(), vec(any::<u32>(), 0..4)).prop_map(|(id, runs, classes, next)| ConstraintTable {
        id: TableId(id),
        runs,
        classes,
        next,
    })
}

fn tokens() -> impl Strategy<Value = Vec<TokenId>> {
    vec(any::<u32>().prop_map(TokenId), 0..8)
}

fn rows() -> impl Strategy<Value = Rows> {
    let start = prop_oneof![any::<u32>().prop_map(|p| Start::At(Position(p))), Just(Start::AfterPrevious)];
    let read = prop_oneof![tokens().prop_map(Tokens::Given), Just(Tokens::Previous), tokens().prop_map(Tokens::Draft)];
    let outputs =
        prop_oneof![Just(Outputs::None), Just(Outputs::Sample), Just(Outputs::AllLogits), Just(Outputs::Verify)];
    let grant = (pool(), any::<u32>(), any::<u32>());
    let grant = grant.prop_map(|(pool, index, block)| BlockGrant { pool, index, block: BlockId(block) });
    (any::<u64>(), start, read, outputs, vec(grant, 0..3)).prop_map(|(seq, start, tokens, outputs, grants)| Rows {
        seq: SeqId(seq),
        start,
        tokens,
        outputs,
        grants,
    })
}

fn plan() -> impl Strategy<Value = StepPlan> {
    let header = (fence(), any::<u32>(), any::<u64>(), vec(any::<u32>(), 0..5));
    let header = header.prop_map(|(fence, deadline_ms, applied, rows_of_rank)| StepHeader {
        fence,
        deadline_ms,
        applied: StepId(applied),
        rows_of_rank,
    });
    let release = vec(any::<u64>().prop_map(SeqId), 0..4);
    (header, vec(table(), 0..3), release, vec(admission(), 0..4), vec(kv_op(), 0..4), vec(rows(), 0..4)).prop_map(
        |(header, tables, release, admit, kv_ops, rows)| StepPlan { header, tables, release, admit, kv_ops, rows },
    )
}

fn rank() -> impl Strategy<Value = Rank> {
    (0..Layout::RANKS_MAX).prop_map(Rank)
}

fn reply() -> impl Strategy<Value = StepReply> {
    let top = vec((any::<u32>().prop_map(TokenId), -1e30f32..0.0), 0..4);
    let logprobs = vec((-1e30f32..0.0, top).prop_map(|(logprob, top)| TokenLogprobs { logprob, top }), 0..3);
    let rows = (any::<u64>(), any::<u32>(), tokens(), logprobs, vec(-1e30f32..1e30, 0..5));
    let rows = rows.prop_map(|(seq, position, tokens, logprobs, logits)| RowsResult {
        seq: SeqId(seq),
        position: Position(position),
        tokens,
        logprobs,
        logits,
    });
    let exchange = any::<[u64; 4]>().prop_map(|[dispatch_rows, combine_rows, bytes_sent, bytes_received]| {
        ExchangeCounters { dispatch_rows, combine_rows, bytes_sent, bytes_received }
    });
    let result = (fence(), rank(), vec(rows, 0..4), any::<[u64; 8]>().prop_map(PhaseTimes), exchange)
        .prop_map(|(fence, rank, rows, phases, exchange)| StepResult { fence, rank, rows, phases, exchange });
    let failure = (fence(), ".{0,40}", vec(rank(), 0..4)).prop_map(|(fence, message, blamed)| StepFailure {
        fence,
        message,
        blamed,
    });
    prop_oneof![result.prop_map(Ok), failure.prop_map(Err)]
}

fn config() -> ModelConfig {
    ModelConfig {
        hidden: 64,
        intermediate: 96,
        layers: vec![LayerKind::Sliding, LayerKind::Full],
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        experts: 8,
        top_k: 2,
        window: 5,
        vocab: 300,
        eps: 1e-5,
        swiglu_limit: 7.0,
        rope: Rope {
            theta: 150_000.0,
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 4096,
            truncate: false,
            attention_factor: 1.346_573,
        },
        context: 4096,
        eos: vec![3, 7],
    }
}

fn description() -> Description {
    Description {
        version: "0.1.0".to_owned(),
        numerics: NumericsId("cpu-1/exact".to_owned()),
        config: config(),
        model: "tiny".to_owned(),
        backend: BackendReport {
            tile_rows: 16,
            dense_block_bytes: 64,
            mxfp4_block_bytes: 17,
            kv_bytes: 4,
            wire_bytes: 4,
            threads: 2,
            process_base: Bytes(1 << 24),
            operand_block_bytes: 128,
            item_tile: 8,
            scratch: Scratch { fixed: Bytes(1 << 20), row: 700, stretch: 20 },
            peers: Peers { library: Bytes(1 << 30), slots: Bytes(1 << 25) },
            embedding_mapped: true,
            memory: Bytes(1 << 34),
        },
        data_address: "127.0.0.1:7001".parse().unwrap(),
        memory_pool: "here".to_owned(),
    }
}

fn prepare() -> Prepare {
    let layout = Layout::new(3, 1).unwrap();
    Prepare {
        fence: Fence { term: Term(4), epoch: Epoch(2), step: StepId(0) },
        cell: CellId(5),
        rank: Rank(2),
        layout,
        placement: Placement::contiguous(2, 8, layout),
        limits: Limits {
            seqs_max: 8,
            step_rows_max: 64,
            block_size: Limits::BLOCK_SIZE,
            full_blocks: 100,
            window_blocks: 50,
            context: 4096,
        },
        peers: (1..=3).map(|port| ([127, 0, 0, 1], port).into()).collect(),
    }
}

/// Through the bytes, as on the wire.
fn across<M: Message + Default>(message: M) -> M {
    M::decode(&message.encode_to_vec()[..]).unwrap()
}

proptest! {
    #[test]
    fn plans_survive(plan in plan()) {
        let envelope = across(v1::Envelope::from(plan.clone()));
        prop_assert_eq!(StepPlan::try_from(envelope).unwrap(), plan);
    }

    #[test]
    fn replies_survive(reply in reply()) {
        let envelope = across(v1::Envelope::from(reply.clone()));
        prop_assert_eq!(StepReply::try_from(envelope).unwrap(), reply);
    }

    #[test]
    fn every_flipped_bit_of_a_plan_is_noticed(plan in plan()) {
        let sealed = v1::Envelope::from(plan).encode_to_vec();
        for bit in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let opened = v1::Envelope::decode(&damaged[..]).map_err(WireError::from).and_then(StepPlan::try_from);
            prop_assert!(opened.is_err(), "bit {bit} of {sealed:02x?}");
        }
    }

    /// Random bytes with a right checksum, too: behind it everything is still checked.
    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in vec(any::<u8>(), 0..200)) {
        fn read<W: Message + Default, T: TryFrom<W>>(bytes: &[u8]) {
            if let Ok(message) = W::decode(bytes) {
                drop(T::try_from(message));
            }
        }
        read::<v1::Envelope, StepPlan>(&bytes);
        read::<v1::Envelope, StepReply>(&bytes);
        read::<v1::StepPlan, StepPlan>(&bytes);
        read::<v1::StepReply, StepReply>(&bytes);
        read::<v1::JoinRequest, Join>(&bytes);
        read::<v1::JoinReply, Description>(&bytes);
        read::<v1::PrepareRequest, Prepare>(&bytes);
        read::<v1::PrepareEvent, PrepareEvent>(&bytes);
        read::<v1::HealthReply, Health>(&bytes);
    }

    /// Near misses reach further than random bytes: one byte of a legitimate message is another.
    #[test]
    fn no_near_miss_makes_the_decoder_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        fn read<W: Message + Default + From<T>, T: TryFrom<W>>(value: T, at: prop::sample::Index, byte: u8) {
            let mut bytes = W::from(value).encode_to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(message) = W::decode(&bytes[..]) {
                drop(T::try_from(message));
            }
        }
        read::<v1::JoinReply, Description>(description(), at, byte);
        read::<v1::PrepareRequest, Prepare>(prepare(), at, byte);
    }
}

#[test]
fn control_words_survive() {
    fn check<W: Message + Default + From<T>, T: TryFrom<W, Error = WireError> + Clone + PartialEq + std::fmt::Debug>(
        value: T,
    ) {
        assert_eq!(T::try_from(across(W::from(value.clone()))), Ok(value));
    }
    check::<v1::JoinRequest, _>(Join {
        cell: CellId(1),
        term: Term(2),
        instance: u64::MAX,
        version: "0.1.0".to_owned(),
    });
    check::<v1::JoinReply, _>(description());
    check::<v1::PrepareRequest, _>(prepare());
    let progress = Progress { stage: "experts".to_owned(), done_bytes: 3, total_bytes: 5 };
    check::<v1::PrepareEvent, _>(PrepareEvent::Progress(progress));
    check::<v1::PrepareEvent, _>(PrepareEvent::Ready { allocated_bytes: 7 });
    for state in
        [WorkerState::Idle, WorkerState::Loading, WorkerState::Ready, WorkerState::Stepping, WorkerState::Failed]
    {
        check::<v1::HealthReply, _>(Health {
            state,
            fence: Fence::default().next(),
            progress: StepProgress {
                step: StepId(1),
                layer: LayerIdx(2),
                op: "dispatch".to_owned(),
                waiting_for: vec![Rank(3)],
            },
            last_error: Some("rank 3 is lost".to_owned()),
        });
    }
    check::<v1::HealthReply, _>(Health::default());
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    fn refused<W, T: TryFrom<W, Error = WireError> + std::fmt::Debug>(message: W) -> String {
        T::try_from(message).unwrap_err().to_string()
    }
    let join = |change: fn(&mut v1::JoinReply)| {
        let mut message = v1::JoinReply::from(description());
        change(&mut message);
        refused::<_, Description>(message)
    };
    assert!(join(|m| m.config = None).contains("`config` is missing"));
    assert!(join(|m| m.config.as_mut().unwrap().layers[1] = 9).contains("`layers` has the unknown value 9"));
    assert!(join(|m| m.config.as_mut().unwrap().layers[1] = 0).contains("`layers` has the unknown value 0"));
    assert!(join(|m| m.config.as_mut().unwrap().heads = 0).contains("num_attention_heads"));
    assert!(join(|m| m.config.as_mut().unwrap().eps = f32::NAN).contains("rms_norm_eps"));
    assert!(join(|m| m.backend.as_mut().unwrap().tile_rows = 0).contains("`tile_rows` is 0"));
    assert!(join(|m| m.backend.as_mut().unwrap().memory = u64::MAX).contains("`memory`"));
    assert!(join(|m| m.numerics = "x".repeat(257)).contains("`numerics` is 257, at most 256"));
    assert!(join(|m| m.data_address = "localhost".to_owned()).contains("`data_address`"));

    let prepare = |change: fn(&mut v1::PrepareRequest)| {
        let mut message = v1::PrepareRequest::from(prepare());
        change(&mut message);
        refused::<_, Prepare>(message)
    };
    assert!(prepare(|m| m.fence.as_mut().unwrap().step = 1).contains("before the first step"));
    assert!(prepare(|m| m.fence.as_mut().unwrap().term = u64::MAX).contains("`fence`"));
    assert!(prepare(|m| m.rank = 3).contains("`rank` is 3 in a layout of 3 ranks"));
    assert!(prepare(|m| m.layout.as_mut().unwrap().survive = 3).contains("`layout`"));
    assert!(prepare(|m| m.placement.as_mut().unwrap().slot[0] = 4).contains("expert 0 is placed on no slot"));
    assert!(prepare(|m| m.placement.as_mut().unwrap().layers = u32::MAX).contains("`placement`"));
    assert!(prepare(|m| m.placement.as_mut().unwrap().slot.truncate(15)).contains("columns"));
    assert!(prepare(|m| m.limits.as_mut().unwrap().block_size = 32).contains("`block_size` is 32"));
    assert!(prepare(|m| m.limits.as_mut().unwrap().full_blocks = u32::MAX).contains("`full_blocks`"));
    assert!(prepare(|m| drop(m.peers.pop())).contains("`peers` has 2 entries for 3 ranks"));

    let sampling = |temperature, top_p| v1::Sampling { temperature, top_p, ..Sampling::GREEDY.into() };
    for (temperature, top_p) in [(f32::NAN, 1.0), (-1.0, 1.0), (f32::INFINITY, 1.0), (1.0, 0.0), (1.0, f32::NAN)] {
        refused::<_, Sampling>(sampling(temperature, top_p));
    }
    let odd = v1::Sampling { repetition_penalty: 0.0, ..Sampling::GREEDY.into() };
    assert!(refused::<_, Sampling>(odd).contains("`repetition_penalty`"));
    let odd = v1::RowsResult { logits: vec![0; 7], ..v1::RowsResult::default() };
    assert!(refused::<_, RowsResult>(odd).contains("`logits` has 7 bytes"));
    let odd = v1::ConstraintTable { first: vec![0], ..v1::ConstraintTable::default() };
    assert!(refused::<_, ConstraintTable>(odd).contains("`runs` has columns of 1 and 0 rows"));
    let mut odd = v1::Admission::from(Admission::new(SeqId(1), Sampling::GREEDY));
    odd.bias_tokens = vec![1; 1025];
    assert!(refused::<_, Admission>(odd).contains("`bias`"));
}

#[test]
fn logits_keep_their_bits() {
    let logits = vec![f32::NAN, -0.0, f32::NEG_INFINITY, f32::MIN_POSITIVE / 2.0];
    let bits: Vec<u32> = logits.iter().map(|logit| logit.to_bits()).collect();
    let rows = RowsResult { seq: SeqId(1), position: Position(2), tokens: Vec::new(), logprobs: Vec::new(), logits };
    let back = RowsResult::try_from(across(v1::RowsResult::from(rows))).unwrap();
    assert_eq!(back.logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>(), bits);
}

#[test]
fn a_long_failure_is_cut_and_still_read() {
    let failure = StepFailure { fence: Fence::default(), message: "é".repeat(5000), blamed: Vec::new() };
    let reply = StepReply::try_from(v1::Envelope::from(StepReply::Err(failure))).unwrap();
    assert_eq!(reply.unwrap_err().message, "é".repeat(2048));
}

#[test]
fn a_slot_beyond_the_layout_is_refused_without_a_table_for_it() {
    let layout = Layout::new(Layout::RANKS_MAX, Layout::RANKS_MAX - 1).unwrap();
    let mut message = v1::PrepareRequest::from(prepare());
    message.layout = Some(layout.into());
    message.peers = vec!["127.0.0.1:1".to_owned(); Layout::RANKS_MAX as usize];
    let places = 1 << 20;
    message.placement = Some(v1::Placement { layers: 1, experts: places, rank: Vec::new(), slot: Vec::new() });
    let refused = Prepare::try_from(message).unwrap_err();
    assert!(matches!(refused, WireError::TooLarge { field: "placement", .. }), "{refused}");
}
