//! Ranks that share experts over the stand-in and begin a step before the last one is read: same results, however each of
//! them does it; and what becomes of both steps when something fails in one of them.

use std::sync::atomic::Ordering;

use phalanx_model::packed::Stored;
use phalanx_model::{Checkpoint, ForwardError, GptOss};
use phalanx_proto::{
    Admission, BlockGrant, BlockId, History, Layout, Limits, Outputs, Placement, Pool, Position, Rows, RowsResult,
    Sampling, SeqId, Start, StepHeader, StepPlan, StepResult, TokenId, Tokens,
};

use super::promises::Rng;
use super::*;
use crate::rank::{LoadedRank, shape};
use crate::runner::{Runner, StepError};

#[path = "../../../../../tests/support/paths.rs"]
mod paths;

const SEQS: u32 = 8;
const STRETCHES: u32 = 4;
const LIMITS: Limits = Limits {
    seqs_max: SEQS,
    step_rows_max: 64,
    block_size: Limits::BLOCK_SIZE,
    full_blocks: SEQS * STRETCHES,
    window_blocks: SEQS * STRETCHES,
    context: STRETCHES * Limits::BLOCK_SIZE,
};
/// A step that is not to end by its deadline.
const LONG: u32 = 120_000;

/// Whether exchanges are captured here.
fn captures() -> bool {
    module_path!().ends_with("_captured")
}

/// One rank of a cell.
struct Member {
    rank: Box<dyn LoadedRank>,
    device: Arc<Ordered>,
    world: Arc<Mutex<World>>,
}

fn member(checkpoint: &Checkpoint, control: Tcp) -> Member {
    let (rank, ranks) = (control.rank(), control.size());
    let config = checkpoint.config();
    let placement = Placement::contiguous(config.layers.len() as u32, config.experts, Layout::new(ranks, 0).unwrap());
    let device = Ordered::new();
    let backend = Cuda::new(Arc::clone(&device) as _, Precision::Fast).unwrap();
    let stored = Stored { checkpoint, packed: None };
    let model = GptOss::load(backend, stored, &placement, rank, ranks, &LIMITS, &mut |_, _| ()).unwrap();
    let shape = shape(&model, ranks, &LIMITS);
    let port = Port::new(model.backend(), shape.slots_bytes()).unwrap();
    let nccl = Nccl::join(API, control, port, JoinOptions { shape, captures: captures(), ..options() }).unwrap();
    let world = fake::world_of(nccl.communicator().raw());
    Member { rank: Box::new(Runner::new(model, nccl, LIMITS, epoch())), device, world }
}

/// Does something on every rank of a cell, each on a thread of its own; a rank is gone when its thread ends. Every communicator
/// has then ended once, and none was misused.
fn cell<R: Send>(ranks: u32, work: impl Fn(usize, Member) -> R + Sync) -> Vec<R> {
    let checkpoint = Checkpoint::open(&paths::fixture("tiny-a")).unwrap();
    let world = Mutex::new(None);
    let outcomes = std::thread::scope(|scope| {
        let start = |control: Tcp| {
            scope.spawn(|| {
                let rank = control.rank().index();
                let member = member(&checkpoint, control);
                *fake::lock(&world) = Some(Arc::clone(&member.world));
                work(rank, member)
            })
        };
        let threads: Vec<_> = controls(ranks).into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    clean(&world.into_inner().unwrap().unwrap(), ranks as usize);
    outcomes
}

/// What a sequence does in a step.
#[derive(Clone, Copy)]
enum Turn {
    /// It comes with a prompt of so many tokens.
    Comes(u32),
    /// The same, and wants the logits of all of them.
    IsRead(u32),
    /// Its next token.
    Goes,
    /// It leaves.
    Leaves,
}

/// How many tokens a sequence has, and how many stretches were given to it.
#[derive(Clone, Copy, Default)]
struct Reached {
    tokens: u32,
    granted: u32,
}

fn sampling(seq: u32, looks_back: bool) -> Sampling {
    match seq {
        1 => Sampling { temperature: 0.9, seed: 7, ..Sampling::GREEDY },
        2 => Sampling { logprobs: Some(2), ..Sampling::GREEDY },
        3 if looks_back => Sampling { presence_penalty: 0.6, ..Sampling::GREEDY },
        _ => Sampling::GREEDY,
    }
}

/// A prompt of so many tokens.
fn prompt(seq: u32, count: u32) -> Vec<TokenId> {
    (0..count).map(|i| TokenId((seq * 31 + i * 7) % 480)).collect()
}

/// The plans of each step and rank, `[steps][ranks]`: sequences come, go on, are read and leave; some steps have rows on one
/// rank alone, one has none, and one has so many that they go the exact way.
fn plans(ranks: u32, looks_back: bool) -> Vec<Vec<StepPlan>> {
    use Turn::{Comes, Goes, IsRead, Leaves};
    let go = |seqs: &[u32]| seqs.iter().map(|&seq| (seq, Goes)).collect::<Vec<_>>();
    let all = [0, 1, 2, 3];
    let with = |mut turns: Vec<(u32, Turn)>, more: &[(u32, Turn)]| {
        turns.extend_from_slice(more);
        turns
    };
    let steps = vec![
        vec![(0, Comes(2)), (1, Comes(4)), (2, Comes(3)), (3, Comes(1))],
        go(&all),
        go(&all),
        with(go(&all), &[(4, Comes(5))]),
        go(&[0, 1, 2, 3, 4]),
        go(&[1]),
        go(&[0, 2]),
        Vec::new(),
        with(go(&all), &[(5, Comes(30))]),
        go(&[0, 1, 2, 3, 4, 5]),
        vec![(0, Leaves), (1, Goes), (6, Comes(2))],
        with(go(&[1, 2, 3, 6]), &[(7, IsRead(3))]),
        with(go(&[1, 2, 3, 6]), &[(7, Leaves)]),
        go(&[1, 2, 3, 4, 5, 6]),
    ];
    let mut reached = [Reached::default(); SEQS as usize];
    let ways = (looks_back, &prompt as &Prompt<'_>);
    (1..).zip(steps).map(|(step, turns)| plans_of(ranks, step, &turns, &mut reached, ways)).collect()
}

type Prompt<'a> = dyn Fn(u32, u32) -> Vec<TokenId> + 'a;

fn plans_of(
    ranks: u32,
    step: u64,
    turns: &[(u32, Turn)],
    reached: &mut [Reached],
    (looks_back, prompt): (bool, &Prompt<'_>),
) -> Vec<StepPlan> {
    let mut plans = vec![StepPlan::default(); ranks as usize];
    for &(number, turn) in turns {
        let plan = &mut plans[(number % ranks) as usize];
        let seq = SeqId(u64::from(number) + 1);
        let (start, tokens, outputs) = match turn {
            Turn::Leaves => {
                plan.release.push(seq);
                continue;
            }
            Turn::Goes => (Start::AfterPrevious, Tokens::Previous, Outputs::Sample),
            Turn::Comes(count) | Turn::IsRead(count) => {
                let (sampling, history) = (sampling(number, looks_back), History::default());
                plan.admit.push(Admission { seq, sampling, bias: Vec::new(), constraint: None, cached: 0, history });
                let outputs = if matches!(turn, Turn::IsRead(_)) { Outputs::AllLogits } else { Outputs::Sample };
                (Start::At(Position(0)), Tokens::Given(prompt(number, count)), outputs)
            }
        };
        let Reached { tokens: computed, granted } = &mut reached[number as usize];
        *computed += tokens.rows() as u32;
        let end = computed.div_ceil(Limits::BLOCK_SIZE);
        let grants = (*granted..end).flat_map(|index| {
            let block = BlockId(number * STRETCHES + index);
            [Pool::Full, Pool::Window].map(|pool| BlockGrant { pool, index, block })
        });
        let grants = grants.collect();
        *granted = end;
        plan.rows.push(Rows { seq, start, tokens, outputs, grants });
    }
    let rows_of_rank: Vec<u32> = plans.iter().map(|plan| plan.row_count() as u32).collect();
    for plan in &mut plans {
        let applied = StepId(step.saturating_sub(3));
        plan.header = StepHeader { fence: fence(step), deadline_ms: LONG, applied, rows_of_rank: rows_of_rank.clone() };
    }
    plans
}

/// The plans of one rank.
fn of_rank(plans: &[Vec<StepPlan>], rank: usize) -> Vec<StepPlan> {
    plans.iter().map(|of_step| of_step[rank].clone()).collect()
}

/// How a rank goes through its plans.
#[derive(Clone, Copy, Debug)]
enum Pace {
    /// Each is finished before the next begins.
    OneByOne,
    /// Each begins before the last one is finished, where it may.
    Ahead,
    /// Now so and now so.
    Any(u64),
}

/// What came of each plan, and how many began while one was under way.
fn drive(member: &mut Member, plans: &[StepPlan], pace: Pace) -> (Vec<Result<StepResult, StepError>>, usize) {
    let Member { rank, device, .. } = member;
    let (mut outcomes, mut under_way, mut ahead) = (Vec::new(), None, 0);
    let mut rng = Rng(if let Pace::Any(seed) = pace { seed } else { 0 });
    for plan in plans {
        let waits = match pace {
            Pace::OneByOne => true,
            Pace::Ahead => false,
            Pace::Any(_) => rng.below(3) == 0,
        };
        if let Some(before) = under_way.take_if(|_| waits || !rank.overlaps(&plan.header)) {
            outcomes.push(rank.finish(before));
        }
        let before = device.waits.load(Ordering::SeqCst);
        if let Err(refused) = rank.begin(plan, &()) {
            outcomes.extend(under_way.take().map(|before| rank.finish(before)));
            outcomes.push(Err(refused));
            continue;
        }
        if let Some(earlier) = under_way.take() {
            let reads = plan.rows.iter().any(|rows| rows.outputs == Outputs::AllLogits);
            let waited = device.waits.load(Ordering::SeqCst) > before;
            assert!(reads || !waited, "the host only enqueues");
            ahead += 1;
            while matches!(pace, Pace::Any(_)) && rng.below(2) == 0 && !rank.is_done() {
                std::thread::yield_now();
            }
            outcomes.push(rank.finish(earlier));
        }
        under_way = Some(plan.header.fence);
    }
    outcomes.extend(under_way.map(|last| rank.finish(last)));
    (outcomes, ahead)
}

type Told = Vec<(SeqId, Vec<RowsResult>)>;

/// What each sequence was given, whatever its rank.
fn told<'a>(results: impl IntoIterator<Item = &'a StepResult>) -> Told {
    let mut told: Told = (1..=u64::from(SEQS)).map(|seq| (SeqId(seq), Vec::new())).collect();
    for rows in results.into_iter().flat_map(|result| &result.rows) {
        told[rows.seq.0 as usize - 1].1.push(rows.clone());
    }
    told
}

/// What all sequences were given by ranks that go at such a pace, and how many steps began early on each.
fn given(ranks: u32, looks_back: bool, pace: impl Fn(usize) -> Pace + Sync) -> (Told, Vec<usize>) {
    let plans = plans(ranks, looks_back);
    let outcomes = cell(ranks, |rank, mut member| drive(&mut member, &of_rank(&plans, rank), pace(rank)));
    let (outcomes, ahead): (Vec<_>, Vec<_>) = outcomes.into_iter().unzip();
    let results: Vec<StepResult> = outcomes.into_iter().flatten().map(Result::unwrap).collect();
    assert_eq!(results.len(), plans.len() * ranks as usize);
    // Steps are told in their order; ranks one after the other.
    (told(&results), ahead)
}

#[test]
fn steps_begun_early_give_the_same_on_one_two_and_four_ranks() {
    let mut expected = None;
    for ranks in [1, 2, 4] {
        let (plain, none) = given(ranks, false, |_| Pace::OneByOne);
        let (early, ahead) = given(ranks, false, |_| Pace::Ahead);
        assert!(none.iter().all(|&ahead| ahead == 0));
        // All but the first, and the one that goes the exact way.
        assert_eq!(ahead, vec![12; ranks as usize]);
        assert!(plain.iter().all(|(_, rows)| !rows.is_empty()));
        let expected = expected.get_or_insert_with(|| plain.clone());
        assert!(plain == *expected, "{ranks} ranks, one by one");
        assert!(early == *expected, "{ranks} ranks, early");
    }
}

/// One rank's sequence looks back at its tokens, so that rank waits where others do not; and each goes at its own pace.
#[test]
fn ranks_that_hurry_and_ranks_that_wait_agree_and_never_hang() {
    let (expected, _) = given(1, true, |_| Pace::OneByOne);
    let mut ahead = vec![0; 4];
    for (seed, ranks) in [(0, 2), (1, 4), (2, 4)] {
        let pace = |rank| if rank == 2 { Pace::Ahead } else { Pace::Any(seed * 16 + rank as u64) };
        let (given, early) = given(ranks, true, pace);
        assert!(given == expected, "seed {seed}, {ranks} ranks");
        ahead.iter_mut().zip(early).for_each(|(sum, early)| *sum += early);
    }
    assert!(ahead.iter().all(|&ahead| ahead > 3), "{ahead:?}");
}

type Outcome = Result<StepResult, StepError>;

/// Runs the first two steps.
fn settle_two(member: &mut Member, plans: &[StepPlan]) {
    plans[..2].iter().for_each(|plan| assert!(member.rank.run(plan, &()).is_ok()));
}

/// Begins the third step and the fourth, does something, and tells what came of both. More plans do no harm.
fn third_and_fourth(member: &mut Member, plans: &[StepPlan], then: impl FnOnce(&mut Member)) -> [Outcome; 2] {
    member.rank.begin(&plans[2], &()).unwrap();
    assert!(member.rank.overlaps(&plans[3].header));
    member.rank.begin(&plans[3], &()).unwrap();
    then(member);
    let outcomes = [2, 3].map(|step: usize| member.rank.finish(plans[step].header.fence));
    for (plan, outcome) in plans[2..4].iter().zip(&outcomes) {
        assert_eq!(member.rank.run(plan, &()), *outcome, "sent again, it is told again");
    }
    if let Err(failure) = &outcomes[1] {
        assert!(failure.ends_epoch());
        assert_eq!(member.rank.run(&plans[4], &()).as_ref(), Err(failure), "the epoch is over");
    }
    outcomes
}

fn blamed(outcome: &Outcome) -> &[Rank] {
    match outcome {
        Err(StepError::Forward(ForwardError::Collective(error))) => error.blamed(),
        other => panic!("{other:?}"),
    }
}

/// The results of the third and the fourth step on each rank, undisturbed.
fn undisturbed(ranks: u32, plans: &[Vec<StepPlan>]) -> Vec<[Outcome; 2]> {
    cell(ranks, |rank, mut member| {
        let plans = of_rank(plans, rank);
        settle_two(&mut member, &plans);
        third_and_fourth(&mut member, &plans, |_| ())
    })
}

fn rows(outcome: &Outcome) -> &[RowsResult] {
    &outcome.as_ref().unwrap().rows
}

#[test]
fn a_rank_that_dies_before_both_steps_fails_both_on_all_others() {
    for ranks in [2, 4] {
        let plans = plans(ranks, false);
        let outcomes = cell(ranks, |rank, mut member| {
            let plans = of_rank(&plans, rank);
            settle_two(&mut member, &plans);
            (rank != 1).then(|| third_and_fourth(&mut member, &plans, |_| ()))
        });
        for [third, fourth] in outcomes.into_iter().flatten() {
            assert_eq!(blamed(&third), [Rank(1)]);
            assert_eq!(third, fourth);
        }
    }
}

/// Nobody asks for the results before they are there: that they never will be is heard all the same.
#[test]
fn that_a_rank_is_gone_is_heard_while_nobody_waits() {
    let plans = plans(2, false);
    cell(2, |rank, mut member| {
        let plans = of_rank(&plans, rank);
        settle_two(&mut member, &plans);
        if rank == 1 {
            return;
        }
        let [third, fourth] = third_and_fourth(&mut member, &plans, |member| {
            while !member.rank.is_done() {
                std::thread::yield_now();
            }
        });
        // Not the deadline of either step, which would be said.
        assert!(!third.as_ref().unwrap_err().to_string().contains("deadline passed"), "{third:?}");
        assert_eq!((blamed(&third), &third), (&[Rank(1)][..], &fourth));
    });
}

/// The third step is whole on all ranks before one dies, or takes no part in the fourth.
#[test]
fn a_rank_that_dies_between_two_steps_fails_the_second_alone() {
    let plans = plans(2, false);
    let expected = undisturbed(2, &plans);
    let outcomes = cell(2, |rank, mut member| {
        let plans = of_rank(&plans, rank);
        settle_two(&mut member, &plans);
        if rank == 1 {
            return [member.rank.run(&plans[2], &()), Err(StepError::Table(phalanx_proto::TableId(0)))];
        }
        third_and_fourth(&mut member, &plans, |_| ())
    });
    assert!(outcomes.iter().zip(&expected).all(|([third, _], [expected, _])| rows(third) == rows(expected)));
    assert_eq!(blamed(&outcomes[0][1]), [Rank(1)]);
}

/// A rank that refuses a plan touches nothing; the others, which are in that step, end it with its deadline, or as soon as the
/// refusing rank gives the epoch up.
#[test]
fn a_step_that_a_rank_refuses_ends_on_the_others() {
    let mut plans = plans(2, false);
    let expected = undisturbed(2, &plans);
    plans[3].iter_mut().for_each(|plan| plan.header.deadline_ms = 300);
    for stays in [true, false] {
        let over = std::sync::Barrier::new(2);
        let outcomes = cell(2, |rank, mut member| {
            let mut plans = of_rank(&plans, rank);
            if !stays {
                plans[3].header.deadline_ms = LONG;
            }
            settle_two(&mut member, &plans);
            if rank == 0 {
                let outcomes = third_and_fourth(&mut member, &plans, |_| ());
                if stays {
                    over.wait();
                }
                return outcomes;
            }
            member.rank.begin(&plans[2], &()).unwrap();
            plans[3].header.rows_of_rank.pop();
            let refused = member.rank.begin(&plans[3], &()).unwrap_err();
            assert!(!refused.ends_epoch());
            let third = member.rank.finish(plans[2].header.fence);
            if stays {
                over.wait();
            }
            [third, Err(refused)]
        });
        assert!(outcomes.iter().zip(&expected).all(|([third, _], [expected, _])| rows(third) == rows(expected)));
        assert_eq!(blamed(&outcomes[0][1]), [Rank(1)], "{:?}", outcomes[0][1]);
        let late = outcomes[0][1].as_ref().unwrap_err().to_string().contains("deadline passed");
        assert_eq!(late, stays);
    }
}

/// NCCL fails at rank 0, once both steps are under way, or in the middle of enqueuing the second.
#[test]
fn a_failure_in_either_step_fails_both_and_all_ranks_name_it() {
    // Of what is captured, no call is left that could fail in the middle.
    for enqueuing in [false, true].into_iter().take(if captures() { 1 } else { 2 }) {
        let plans = plans(2, false);
        let expected = undisturbed(2, &plans);
        let outcomes = cell(2, |rank, mut member| {
            let plans = of_rank(&plans, rank);
            settle_two(&mut member, &plans);
            let world = Arc::clone(&member.world);
            if rank == 0 && enqueuing {
                member.rank.begin(&plans[2], &()).unwrap();
                fake::lock(&world).faults(0).send = 2;
                member.rank.begin(&plans[3], &()).unwrap();
                return [2, 3].map(|step: usize| member.rank.finish(plans[step].header.fence));
            }
            third_and_fourth(&mut member, &plans, |_| {
                if rank == 0 {
                    fake::lock(&world).faults(0).async_error = 1;
                }
            })
        });
        let [third, fourth] = &outcomes[0];
        let why = if enqueuing { "ncclSend failed" } else { "unhandled CUDA error" };
        assert!(third.as_ref().unwrap_err().to_string().contains(why), "{third:?}");
        assert_eq!((third, blamed(third)), (fourth, &[Rank(0)][..]));
        // The other one may have had all of a step before, but not of one that was never sent.
        let [third, fourth] = &outcomes[1];
        for (outcome, expected) in [third, fourth].into_iter().zip(&expected[1]) {
            assert!(outcome.is_err() || rows(outcome) == rows(expected));
        }
        assert!(third.is_ok() || third == fourth);
        assert!(fourth.is_ok() && !enqueuing || blamed(fourth) == [Rank(0)]);
    }
}

/// After a death in the middle of two steps, a new epoch of all ranks, or of fewer, goes on from the tokens there were.
#[test]
fn after_a_failure_a_new_epoch_goes_on_with_the_same_tokens() {
    let live = [0, 1, 2, 3];
    let steps = |ranks, prompt: &Prompt<'_>, lengths: [u32; 4], steps: u64| -> Vec<Vec<StepPlan>> {
        let mut reached = [Reached::default(); SEQS as usize];
        let turns =
            |step| live.map(|seq| (seq, if step == 1 { Turn::Comes(lengths[seq as usize]) } else { Turn::Goes }));
        (1..=steps).map(|step| plans_of(ranks, step, &turns(step), &mut reached, (false, prompt))).collect()
    };
    let tokens = |outcomes: Vec<Vec<Outcome>>| -> Vec<Vec<TokenId>> {
        let results: Vec<StepResult> = outcomes.into_iter().flatten().filter_map(Result::ok).collect();
        let told = told(&results);
        live.map(|seq| told[seq as usize].1.iter().flat_map(|rows| rows.tokens.clone()).collect()).to_vec()
    };
    let run = |ranks, plans: &[Vec<StepPlan>], dies_after: usize| {
        tokens(cell(ranks, |rank, mut member| {
            let plans = of_rank(plans, rank);
            let done = if rank == 1 { dies_after.min(plans.len()) } else { plans.len() };
            drive(&mut member, &plans[..done], Pace::Ahead).0
        }))
    };
    let lengths = [3, 1, 2, 4];
    let whole = run(2, &steps(2, &prompt, lengths, 9), usize::MAX);
    assert!(whole.iter().all(|tokens| tokens.len() == 9));
    let before = run(2, &steps(2, &prompt, lengths, 9), 5);
    for ranks in [1, 2, 4] {
        // Only what both ranks have told counts: the step after is planned again.
        let kept = before.iter().map(Vec::len).min().unwrap();
        assert_eq!(kept, 5);
        let so_far = |seq: u32, _: u32| {
            let mut all = prompt(seq, lengths[seq as usize]);
            all.extend(&before[seq as usize][..kept]);
            all
        };
        let after = run(ranks, &steps(ranks, &so_far, lengths, 4), usize::MAX);
        for (seq, whole) in whole.iter().enumerate() {
            let all = [&before[seq][..kept], &after[seq]].concat();
            assert!(all == *whole, "sequence {seq}, {ranks} ranks");
        }
    }
}
