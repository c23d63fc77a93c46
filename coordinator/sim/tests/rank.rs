//! A rank finds each mistake that a plan can make.

#![allow(clippy::unwrap_used, reason = "tests")]

use phalanx_planner::Request;
use phalanx_proto::{
    Admission, BlockGrant, BlockId, Fence, Limits, Outputs, Pool, Position, Rank, Rows, Sampling, SeqId, Start,
    StepHeader, StepId, StepPlan, TokenId, Tokens,
};
use phalanx_sim::rank::{RankError, VirtualRank};
use phalanx_sim::truth::Truth;

const SIZE: u32 = 4;
const WINDOW: u32 = 6;
const VOCAB: u32 = 50;
const DEPTH: u32 = 2;

fn rank() -> VirtualRank {
    let limits =
        Limits { seqs_max: 2, step_rows_max: 16, block_size: SIZE, full_blocks: 6, window_blocks: 6, context: 24 };
    VirtualRank::new(Rank(0), limits, WINDOW, VOCAB, DEPTH, Fence::default())
}

fn tokens(tokens: impl IntoIterator<Item = u32>) -> Vec<TokenId> {
    tokens.into_iter().map(TokenId).collect()
}

/// The same blocks in both pools, for the stretches from `first` on.
fn grants(first: u32, blocks: &[u32]) -> Vec<BlockGrant> {
    let of_pool =
        |pool| (first..).zip(blocks).map(move |(index, &block)| BlockGrant { pool, index, block: BlockId(block) });
    of_pool(Pool::Full).chain(of_pool(Pool::Window)).collect()
}

fn given(seq: u64, start: u32, read: &[TokenId], outputs: Outputs, grants: Vec<BlockGrant>) -> Rows {
    let (start, tokens) = (Start::At(Position(start)), Tokens::Given(read.to_vec()));
    Rows { seq: SeqId(seq), start, tokens, outputs, grants }
}

fn previous(seq: u64, grants: Vec<BlockGrant>) -> Rows {
    Rows { seq: SeqId(seq), start: Start::AfterPrevious, tokens: Tokens::Previous, outputs: Outputs::Sample, grants }
}

fn step(step: u64, admit: &[u64], rows: Vec<Rows>) -> StepPlan {
    let fence = Fence { step: StepId(step), ..Fence::default() };
    let rows_of_rank = vec![rows.iter().map(|rows| rows.tokens.rows() as u32).sum()];
    // As early as may be: results are kept for the steps that can be under way.
    let applied = StepId(step.saturating_sub(u64::from(DEPTH)));
    let admit = admit.iter().map(|&seq| Admission::new(SeqId(seq), Sampling::GREEDY)).collect();
    StepPlan { header: StepHeader { fence, deadline_ms: 1, applied, rows_of_rank }, admit, rows, ..StepPlan::default() }
}

/// Runs a plan whose predecessors are all applied.
fn run(rank: &mut VirtualRank, plan: &StepPlan) -> Result<Vec<TokenId>, RankError> {
    let answered = StepId(plan.header.fence.step.0 - 1);
    Ok(rank.run(plan, answered)?.rows.into_iter().flat_map(|rows| rows.tokens).collect())
}

#[track_caller]
fn finds(outcome: Result<Vec<TokenId>, RankError>, words: &str) {
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains(words), "{error}");
}

/// A rank on which sequence 1 has read `0..8` into blocks 0 and 1 and sampled a token.
fn begun() -> (VirtualRank, TokenId) {
    let mut rank = rank();
    let plan = step(1, &[1], vec![given(1, 0, &tokens(0..8), Outputs::Sample, grants(0, &[0, 1]))]);
    let token = run(&mut rank, &plan).unwrap()[0];
    (rank, token)
}

#[test]
fn tokens_are_those_of_the_request_alone_however_it_is_cut() {
    let truth = Truth::of(&Request::greedy(SeqId(1), tokens(0..8), 2), &[], VOCAB);
    let expected: Vec<TokenId> = truth.tokens.iter().map(|(token, _)| *token).collect();

    let (mut whole, first) = begun();
    let second = run(&mut whole, &step(2, &[], vec![previous(1, grants(2, &[2]))])).unwrap()[0];
    assert_eq!([first, second], expected[..]);

    let mut cut = rank();
    let chunk = step(1, &[1], vec![given(1, 0, &tokens(0..3), Outputs::None, grants(0, &[5]))]);
    assert_eq!(run(&mut cut, &chunk).unwrap(), []);
    let chunk = step(2, &[], vec![given(1, 3, &tokens(3..8), Outputs::Sample, grants(1, &[3]))]);
    assert_eq!(run(&mut cut, &chunk).unwrap(), expected[..1]);
    let again = step(3, &[], vec![given(1, 8, &expected[..1], Outputs::Sample, grants(2, &[0]))]);
    assert_eq!(run(&mut cut, &again).unwrap(), expected[1..]);
}

#[test]
fn a_plan_that_comes_again_gives_the_same_result_until_it_is_acknowledged() {
    let (mut rank, _) = begun();
    let first = step(1, &[1], vec![given(1, 0, &tokens(0..8), Outputs::Sample, grants(0, &[0, 1]))]);
    let result = rank.run(&first, StepId(0)).unwrap();
    for n in 2..=3 {
        run(&mut rank, &step(n, &[], vec![previous(1, grants(2, &[2]))])).unwrap();
        assert_eq!(rank.run(&first, StepId(0)).is_ok_and(|again| again == result), n < 3, "after step {n}");
    }
    finds(run(&mut rank, &step(5, &[], vec![previous(1, Vec::new())])), "this rank has run term 0 epoch 0 step 3");
}

#[test]
fn a_cached_prefix_is_read_from_its_blocks() {
    let (mut rank, first) = begun();
    let mut plan = step(
        2,
        &[2],
        vec![given(2, 4, &tokens(4..8), Outputs::Sample, {
            let mut grants = grants(0, &[0]);
            grants.extend(self::grants(1, &[3]));
            grants
        })],
    );
    plan.admit[0].cached = 4;
    assert_eq!(run(&mut rank.clone(), &plan).unwrap(), [first]);

    let blocks_of = |blocks: &[u32]| {
        let mut plan = plan.clone();
        plan.rows[0].grants = grants(0, blocks);
        plan
    };
    finds(run(&mut rank.clone(), &blocks_of(&[1, 3])), "holds no continuation of the positions before");
    finds(run(&mut rank.clone(), &blocks_of(&[4, 3])), "holds nothing");
    plan.rows[0].grants.remove(0);
    finds(run(&mut rank, &plan), "no block for a position that is said to be cached");
}

#[test]
fn rows_that_see_what_others_wrote_are_found() {
    let (mut rank, _) = begun();
    // Block 1 goes to sequence 2, though sequence 1 still sees it.
    let both = vec![given(2, 0, &tokens(20..24), Outputs::Sample, grants(0, &[1])), previous(1, grants(2, &[2]))];
    finds(
        run(&mut rank.clone(), &step(2, &[2], both)),
        "sees position 4 in Full block 1, which holds the keys and values of another prefix",
    );
    // Within a window, only the window matters: position 10 sees 5 to 10.
    let more = given(1, 8, &tokens(8..10), Outputs::None, grants(2, &[2]));
    run(&mut rank, &step(2, &[], vec![more])).unwrap();
    let window = |block| BlockGrant { pool: Pool::Window, index: 0, block: BlockId(block) };
    let full = BlockGrant { pool: Pool::Full, index: 0, block: BlockId(5) };
    let taker = |block| given(2, 0, &tokens(20..24), Outputs::None, vec![window(block), full]);
    let more = given(1, 10, &tokens(10..11), Outputs::None, Vec::new());
    finds(run(&mut rank.clone(), &step(3, &[2], vec![taker(1), more.clone()])), "sees position 5 in Window block 1");
    run(&mut rank, &step(3, &[2], vec![taker(0), more])).unwrap();
}

#[test]
fn a_block_is_not_written_while_a_step_under_way_uses_it() {
    let (mut rank, _) = begun();
    let mut plan = step(2, &[2], vec![given(2, 0, &tokens(20..24), Outputs::None, grants(0, &[1]))]);
    plan.release.push(SeqId(1));
    let error = rank.clone().run(&plan, StepId(0)).unwrap_err();
    let (seq, user, pool) = (SeqId(2), SeqId(1), Pool::Full);
    let (step, used, answered) = (StepId(2), StepId(1), StepId(0));
    assert_eq!(error, RankError::Reused { step, seq, pool, block: 1, user, used, answered });
    rank.run(&plan, StepId(1)).unwrap();
}

#[test]
fn a_prefix_is_not_used_before_the_step_that_wrote_it_is_applied() {
    let (mut rank, _) = begun();
    let rows = given(2, 4, &tokens(4..8), Outputs::None, [grants(0, &[0]), grants(1, &[3])].concat());
    let mut plan = step(2, &[2], vec![rows]);
    plan.admit[0].cached = 4;
    let error = rank.clone().run(&plan, StepId(0)).unwrap_err();
    assert!(matches!(error, RankError::Unapplied { block: 0, writer: SeqId(1), .. }), "{error}");
    rank.run(&plan, StepId(1)).unwrap();
}

#[test]
fn plans_that_a_worker_refuses_are_refused() {
    let (rank, _) = begun();
    let refused = |plan: &StepPlan, words| finds(run(&mut rank.clone(), plan), words);
    let rows = |seq, start, grants| given(seq, start, &tokens(0..4), Outputs::None, grants);
    refused(&step(2, &[], vec![rows(1, 9, grants(2, &[2, 3]))]), "begin beyond the positions computed");
    refused(&step(2, &[], vec![rows(1, 8, Vec::new())]), "no block for a position it writes");
    refused(&step(2, &[], vec![rows(7, 0, grants(0, &[2]))]), "it does not live here");
    refused(&step(2, &[1], vec![rows(1, 0, Vec::new())]), "admitted twice");
    refused(&step(2, &[2, 3], vec![rows(2, 0, grants(0, &[2]))]), "more sequences live here than may");
    refused(&step(2, &[2], vec![previous(2, grants(0, &[2]))]), "sampled no token yet");
    refused(
        &step(2, &[], vec![given(1, 8, &tokens([VOCAB]), Outputs::None, grants(2, &[2]))]),
        "outside the vocabulary",
    );
    refused(&step(2, &[], vec![rows(1, 8, grants(2, &[6]))]), "outside the pool");
    refused(&step(3, &[], vec![rows(1, 8, grants(2, &[2]))]), "this rank has run");
    let mut released = step(2, &[], Vec::new());
    released.release.push(SeqId(9));
    refused(&released, "released but does not live here");
    let mut header = step(2, &[], vec![rows(1, 8, grants(2, &[2]))]);
    header.header.rows_of_rank = vec![3];
    refused(&header, "another number of rows");
    header.header.rows_of_rank = vec![4];
    header.header.applied = StepId(2);
    refused(&header, "acknowledged before it is run");
    // A gap in the window is a gap.
    let mut gap = step(2, &[2], vec![rows(2, 0, grants(0, &[2]))]);
    gap.rows[0].grants.retain(|grant| grant.pool == Pool::Full);
    refused(&gap, "no block for a position it writes");
}
