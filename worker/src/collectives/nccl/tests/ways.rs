//! Layers of experts over the stand-in: whichever way rows travel, the same arrives; and what is seen when a rank fails
//! while nobody waits.

use std::sync::atomic::Ordering;

use phalanx_kernels::cuda::{Experts, Places, Routes, Rows};
use phalanx_kernels::memory::Source;
use phalanx_kernels::{DenseUse, ExpertShape, ExpertSource, RopeTable, Stack, StepInputs, TokenSource};

use super::promises::Rng;
use super::*;

const HIDDEN: usize = 32;
const EXPERTS: usize = 8;
const TOP_K: usize = 3;
const ROWS_MAX: usize = 24;
const SHAPE: ExpertShape = ExpertShape { hidden: HIDDEN, intermediate: 32, limit: 7.0 };

/// Whether exchanges are captured here.
fn captures() -> bool {
    module_path!().ends_with("_captured")
}

/// Experts of each row of each rank, in the order of the choices.
pub(super) type Routing = Vec<Vec<[usize; TOP_K]>>;

/// One rank with one layer of experts, which it uses again and again.
pub(super) struct Member {
    pub(super) nccl: Nccl,
    /// The step that has begun.
    begun: Fence,
    /// Where the host's waits can be counted.
    pub(super) device: Option<Arc<Ordered>>,
    pub(super) backend: Cuda,
    held: Experts,
    places: Places,
    routes: Routes,
    x: Rows,
    outgoing: Parts,
    incoming: Parts,
}

/// What came of a step.
#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    pub(super) residual: Vec<u32>,
    /// What the first dispatch brought, if it was not gathered.
    received: Option<HostParts>,
}

fn bf16(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

fn number(rng: &mut Rng) -> f32 {
    rng.below(2001) as f32 / 1000.0 - 1.0
}

impl Member {
    fn new(control: Tcp, routing: &Routing) -> Self {
        let device = Ordered::new();
        let backend = Cuda::new(Arc::clone(&device) as _, Precision::Fast).unwrap();
        Self { device: Some(device), ..Self::on(API, backend, control, routing) }
    }

    fn on(api: Api, mut b: Cuda, control: Tcp, routing: &Routing) -> Self {
        let (me, n) = (control.rank(), control.size() as usize);
        let mut routes = b.routes(ROWS_MAX, TOP_K);
        let row_bytes = [b.dispatch_record(TOP_K, HIDDEN), b.combine_record(HIDDEN)];
        let room = n * (64 + 32 * row_bytes[0].max(TOP_K * row_bytes[1]));
        let shape = Shape { ranks: n, experts: EXPERTS, top_k: TOP_K, row_bytes, rows_max: ROWS_MAX as u32, room };
        let port = Port::new(&b, shape.slots_bytes()).unwrap();
        let options = JoinOptions { shape, channels_max: Some(1), captures: captures(), ..options() };
        let nccl = Nccl::join(api, control, port, options).unwrap();

        let per_rank = EXPERTS.div_ceil(n);
        let mut held = b.experts(per_rank, SHAPE);
        let places: Vec<_> = (0..EXPERTS).map(|e| ((e / per_rank) as u32, (e % per_rank) as u32)).collect();
        for (expert, _) in places.iter().enumerate().filter(|(_, place)| place.0 == me.0) {
            let mut rng = Rng(expert as u64);
            let mut bytes = |n: usize, low: usize, high: usize| -> Vec<u8> {
                (0..n).map(|_| (low + rng.below(high - low)) as u8).collect()
            };
            let (up, up_scales) = (bytes(32 * HIDDEN, 0, 256), bytes(2 * 32 * HIDDEN / 32, 122, 127));
            let (down, down_scales) = (bytes(HIDDEN * 32 / 2, 0, 256), bytes(HIDDEN * 32 / 32, 122, 127));
            let (up_bias, down_bias) = (bf16((0..64).map(|_| number(&mut rng))), bf16((0..HIDDEN).map(|_| 0.5)));
            let source = ExpertSource {
                gate_up_blocks: Source::memory(&up),
                gate_up_scales: Source::memory(&up_scales),
                gate_up_bias: Source::memory(&up_bias),
                down_blocks: Source::memory(&down),
                down_scales: Source::memory(&down_scales),
                down_bias: Source::memory(&down_bias),
            };
            b.load_expert(&mut held, expert % per_rank, &source).unwrap();
        }
        // The router is the unit matrix, so a row's largest numbers are those of the experts to choose.
        let unit = bf16((0..EXPERTS * HIDDEN).map(|i| f32::from(u8::from(i / HIDDEN == i % HIDDEN))));
        let unit = [Stack { weight: Source::memory(&unit), bias: None }];
        let router = b.dense(DenseUse::Router, HIDDEN, &unit).unwrap();
        // A row's numbers depend on its place among the rows of all ranks.
        let before: usize = routing[..me.index()].iter().map(Vec::len).sum();
        let rows = &routing[me.index()];
        let numbers: Vec<f32> = (before..)
            .zip(rows)
            .flat_map(|(row, chosen)| {
                let mut rng = Rng(1000 + row as u64);
                let mut numbers: Vec<f32> = (0..HIDDEN).map(|_| number(&mut rng)).collect();
                chosen.iter().enumerate().for_each(|(k, &expert)| numbers[expert] = 4.0 - k as f32);
                numbers
            })
            .collect();
        let inputs = StepInputs {
            tokens: vec![TokenSource::Given(0); rows.len()],
            positions: vec![0; rows.len()],
            sequences: vec![0; rows.len()],
            tables: Vec::new(),
        };
        b.begin(&inputs, &RopeTable { inv_freq: vec![1.0; 4], scale: 1.0 });
        let mut x = b.rows(ROWS_MAX, HIDDEN);
        b.write(&mut x, &numbers);
        b.route(&x, &router, &mut routes);
        let places = b.places(&places);
        let (outgoing, incoming) = (b.parts(n, room), b.parts(n, room));
        b.finish().unwrap();
        Self { nccl, begun: epoch(), device: None, backend: b, held, places, routes, x, outgoing, incoming }
    }

    pub(super) fn dispatch(&mut self, layer: u32) -> Result<(), CollectiveError> {
        let b = &mut self.backend;
        let row_bytes = b.dispatch_record(TOP_K, HIDDEN);
        let exchange = Exchange { row_bytes, ..exchange(layer, DISPATCH) };
        self.nccl.prepare(exchange, &mut self.outgoing);
        b.dispatch(&self.x, &self.routes, &self.places, &mut self.outgoing);
        self.nccl.start(exchange, &mut self.outgoing)?;
        self.nccl.finish(exchange, &mut self.incoming)
    }

    pub(super) fn experts_and_combine(&mut self, layer: u32) -> Result<(), CollectiveError> {
        let b = &mut self.backend;
        let n = self.nccl.size() as usize;
        let mut work = b.work(n * ROWS_MAX, TOP_K, SHAPE);
        b.receive(&self.incoming, &self.held, &mut work);
        b.gate_up(&self.held, &mut work);
        b.down(&self.held, &work, &mut self.outgoing);
        let exchange = Exchange { row_bytes: b.combine_record(HIDDEN), ..exchange(layer, COMBINE) };
        self.nccl.start(exchange, &mut self.outgoing)?;
        self.nccl.finish(exchange, &mut self.incoming)?;
        b.combine(&self.incoming, &self.routes, &self.places, &mut self.x);
        Ok(())
    }

    pub(super) fn begin(&mut self, step: u64, deadline: Instant, routing: &Routing, way: Option<Way>) {
        self.begun = fence(step);
        self.nccl.begin(self.begun, deadline);
        let rows: Vec<u32> = routing.iter().map(|rows| rows.len() as u32).collect();
        self.nccl.expect(&rows);
        if let Some(way) = way {
            self.nccl.go(way);
        }
    }

    /// Ends the step that has begun and waits for it.
    pub(super) fn settle(&mut self) -> Result<(), CollectiveError> {
        self.nccl.end()?;
        self.nccl.settle(self.begun)
    }

    /// A step of so many layers.
    pub(super) fn step(
        &mut self,
        step: u64,
        routing: &Routing,
        way: Option<Way>,
        layers: u32,
    ) -> Result<Outcome, CollectiveError> {
        self.begin(step, Instant::now() + PATIENCE, routing, way);
        let gathered = matches!(way, Some(Way::Gather { .. }));
        let mut received = None;
        let before = self.device.as_ref().map(|device| device.waits.load(Ordering::SeqCst));
        for layer in 0..layers {
            self.dispatch(layer)?;
            if layer == 0 && layers == 1 && !gathered {
                received = Some(self.incoming.download().unwrap());
            }
            self.experts_and_combine(layer)?;
        }
        // In longer steps it waits for some, so that it is not too far ahead.
        if (2..24).contains(&layers) && !matches!(way, Some(Way::Exact)) {
            let waits = self.device.as_ref().map(|device| device.waits.load(Ordering::SeqCst));
            assert_eq!(waits, before, "the host only enqueues");
        }
        self.settle()?;
        let residual = self.backend.read(&self.x).into_iter().map(f32::to_bits).collect();
        self.backend.finish().unwrap();
        Ok(Outcome { residual, received })
    }
}

/// Does something on every rank of a cell.
pub(super) fn cell<R: Send>(routing: &Routing, work: impl Fn(Member) -> R + Sync) -> Vec<R> {
    cell_of(Member::new, routing, work)
}

fn cell_of<R: Send>(
    make: impl Fn(Tcp, &Routing) -> Member + Sync,
    routing: &Routing,
    work: impl Fn(Member) -> R + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let start = |control| scope.spawn(|| work(make(control, routing)));
        let threads: Vec<_> = controls(routing.len() as u32).into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Residuals of all ranks' rows, with the bytes that all ranks have sent.
fn run(routing: &Routing, way: Option<Way>, layers: u32) -> (Vec<Outcome>, u64) {
    let outcomes = cell(routing, |mut member| {
        let outcome = member.step(1, routing, way, layers).unwrap();
        (outcome, member.nccl.counters())
    });
    let sent = outcomes.iter().map(|(_, counters)| counters.bytes_sent).sum();
    assert_eq!(sent, outcomes.iter().map(|(_, counters)| counters.bytes_received).sum::<u64>());
    (outcomes.into_iter().map(|(outcome, _)| outcome).collect(), sent)
}

pub(super) fn any(seed: u64, rows: &[usize]) -> Routing {
    let mut rng = Rng(seed);
    let mut chosen = || {
        let first = rng.below(EXPERTS);
        [first, (first + 1 + rng.below(3)) % EXPERTS, (first + 4 + rng.below(3)) % EXPERTS]
    };
    rows.iter().map(|&rows| (0..rows).map(|_| chosen()).collect()).collect()
}

/// Rows on some ranks, on one alone, on none; all to one rank, as many as a slot holds.
fn routings(n: usize) -> Vec<(u32, Routing)> {
    let some: Vec<usize> = (0..n).map(|rank| 1 + 3 * rank).collect();
    let one: Vec<usize> = (0..n).map(|rank| if rank + 1 == n { ROWS_MAX } else { 0 }).collect();
    let skewed = vec![vec![[1, 0, 2]; 17]; n];
    vec![(16, any(1, &some)), (ROWS_MAX as u32, any(2, &one)), (8, any(3, &vec![0; n])), (17, skewed)]
}

#[test]
fn every_way_brings_the_same_records_and_bits() {
    for n in [1, 2, 4] {
        for (case, (rows, routing)) in routings(n).into_iter().enumerate() {
            for layers in [1, 2] {
                let (exact, _) = run(&routing, Some(Way::Exact), layers);
                let (slots, _) = run(&routing, Some(Way::Slots { rows }), layers);
                assert!(slots == exact, "{n} ranks, case {case}");
                let (gathered, _) = run(&routing, Some(Way::Gather { rows }), layers);
                let bits = |outcomes: &[Outcome]| outcomes.iter().map(|o| o.residual.clone()).collect::<Vec<_>>();
                assert!(bits(&gathered) == bits(&exact), "{n} ranks, case {case}");
                let (chosen, _) = run(&routing, None, layers);
                assert!(bits(&chosen) == bits(&exact), "{n} ranks, case {case}, as the step's rows choose");
            }
        }
    }
}

/// The same rows on one, two or four ranks.
#[test]
fn the_number_of_ranks_changes_no_bit_and_the_bytes_as_it_should() {
    let rows = any(5, &[16]).concat();
    let divided = |n: usize| -> Routing { rows.chunks(16 / n).map(<[_]>::to_vec).collect() };
    let mut expected = None;
    for n in [1, 2, 4] {
        for way in [Way::Exact, Way::Slots { rows: 16 }, Way::Gather { rows: 16 }] {
            let (outcomes, sent) = run(&divided(n), Some(way), 2);
            let bits: Vec<u32> = outcomes.into_iter().flat_map(|outcome| outcome.residual).collect();
            assert_eq!(bits.len(), 16 * HIDDEN);
            assert!(*expected.get_or_insert_with(|| bits.clone()) == bits, "{n} ranks, {way:?}");
            // Records of 3 slots and 32 bf16, results of 32 bf16; headers of 64 bytes; all from each rank to each other.
            let slots = 2 * (64 + 16 * (3 * 4 + 2 * 32) + 64 + 16 * 3 * 2 * 32);
            let pairs = (n * (n - 1)) as u64;
            match way {
                Way::Exact => assert_eq!(sent == 0, n == 1),
                Way::Slots { .. } | Way::Gather { .. } => assert_eq!(sent, pairs * slots, "{n} ranks, {way:?}"),
            }
        }
    }
}

/// More exchanges than may be on the stream, and step after step.
#[test]
fn long_steps_follow_each_other() {
    let routing = any(7, &[5, 3]);
    let run = |way| {
        cell(&routing, |mut member| {
            (1..4).map(|step| member.step(step, &routing, Some(way), 30).unwrap().residual).collect::<Vec<_>>()
        })
    };
    let exact = run(Way::Exact);
    assert!(exact[0][0] != exact[0][1], "each step adds to the residual");
    assert!(run(Way::Slots { rows: 8 }) == exact);
    assert!(run(Way::Gather { rows: 8 }) == exact);
}

/// A step of 30 layers, without waiting for it.
fn enqueue(member: &mut Member, step: u64, routing: &Routing, way: Way, allowed: Duration) {
    member.begin(step, Instant::now() + allowed, routing, Some(way));
    for layer in 0..30 {
        member.dispatch(layer).unwrap();
        member.experts_and_combine(layer).unwrap();
    }
    member.nccl.end().unwrap();
}

/// Each is longer than the host may be ahead.
#[test]
fn a_step_that_begins_before_the_last_one_is_settled_changes_no_bit() {
    let routing = any(7, &[5, 3]);
    for way in WAYS {
        let one_by_one =
            cell(&routing, |mut member| (1..5).map(|step| member.step(step, &routing, Some(way), 30)).last().unwrap());
        let early = cell(&routing, |mut member| {
            for step in 1..5 {
                enqueue(&mut member, step, &routing, way, PATIENCE);
                // Rank 1 does not wait for the first before it begins the second.
                if member.nccl.rank() == Rank(0) || step > 1 {
                    member.nccl.settle(fence(step - u64::from(member.nccl.rank().0))).unwrap();
                }
            }
            member.nccl.settle(fence(4)).unwrap();
            let most = member.device.as_ref().map(|device| device.exchanges_max());
            assert!(most <= Some(48), "{most:?} are too far ahead");
            member.backend.read(&member.x).into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        let one_by_one: Vec<_> = one_by_one.into_iter().map(|outcome| outcome.unwrap().residual).collect();
        assert!(early == one_by_one, "{way:?}");
    }
}

#[test]
fn no_third_step_begins_before_the_first_is_settled() {
    let routing = any(7, &[1]);
    cell(&routing, |mut member| {
        for step in 1..=2 {
            member.begin(step, Instant::now() + PATIENCE, &routing, Some(WAYS[0]));
            member.dispatch(0).unwrap();
            member.nccl.end().unwrap();
        }
        member.begin(3, Instant::now() + PATIENCE, &routing, Some(WAYS[0]));
        assert_eq!(member.dispatch(0), Err(CollectiveError::Broken));
        assert_eq!(member.nccl.settle(fence(2)), Err(CollectiveError::Broken));
    });
}

/// Rank 1 is a step ahead: what it sent for the first step is found wrong, and the second, which begins meanwhile, is not used.
#[test]
fn a_wrong_slot_of_the_first_step_fails_the_second() {
    let routing = any(10, &[2, 3]);
    for way in WAYS {
        let errors = cell(&routing, |mut member| {
            let ahead = u64::from(member.nccl.rank().0);
            for step in [1, 2] {
                member.begin(step + ahead, Instant::now() + PATIENCE, &routing, Some(way));
                member.dispatch(0).unwrap();
                member.nccl.end().unwrap();
            }
            [1, 2].map(|step| member.nccl.settle(fence(step + ahead)).unwrap_err())
        });
        let [first, second] = &errors[0];
        assert!(matches!(first, CollectiveError::Corrupt { rank: Rank(1), what } if what.contains("another step")));
        assert_eq!(first, second);
    }
}

/// The second step may take 300 ms, and does not begin before the first is done, which takes longer.
#[test]
fn the_time_of_a_step_begins_when_the_one_before_is_settled() {
    let routing = any(12, &[2, 3]);
    let settled = std::sync::Barrier::new(2);
    let outcomes = cell(&routing, |mut member| {
        let way = WAYS[0];
        let late = member.nccl.rank() == Rank(1);
        if late {
            std::thread::sleep(Duration::from_millis(500));
        }
        enqueue(&mut member, 1, &routing, way, PATIENCE);
        if late {
            member.nccl.settle(fence(1)).unwrap();
            settled.wait();
            settled.wait();
            return None;
        }
        enqueue_first_layer(&mut member, 2, &routing, way, Duration::from_millis(300));
        member.nccl.settle(fence(1)).unwrap();
        settled.wait();
        let error = member.nccl.settle(fence(2)).unwrap_err();
        settled.wait();
        Some(error)
    });
    let late = matches!(&outcomes[0], Some(CollectiveError::Deadline { waiting_for, .. }) if *waiting_for == [Rank(1)]);
    assert!(late, "{outcomes:?}");
}

fn enqueue_first_layer(member: &mut Member, step: u64, routing: &Routing, way: Way, allowed: Duration) {
    member.begin(step, Instant::now() + allowed, routing, Some(way));
    member.dispatch(0).unwrap();
    member.nccl.end().unwrap();
}

pub(super) const WAYS: [Way; 2] = [Way::Slots { rows: 8 }, Way::Gather { rows: 8 }];

#[test]
fn a_rank_that_dies_while_nobody_waits_is_named_when_somebody_does() {
    let routing = any(8, &[2, 3, 1]);
    for way in WAYS {
        let errors = cell(&routing, |mut member| {
            member.begin(1, Instant::now() + PATIENCE, &routing, Some(way));
            if member.nccl.rank() == Rank(1) {
                return None;
            }
            member.dispatch(0).unwrap();
            member.experts_and_combine(0).unwrap();
            let error = member.settle().unwrap_err();
            assert_eq!(member.nccl.communicator().state(), State::Aborted, "what is on the stream must end");
            member.nccl.begin(fence(2), Instant::now() + PATIENCE);
            assert_eq!(member.dispatch(0), Err(CollectiveError::Broken));
            Some(error)
        });
        for error in errors.into_iter().flatten() {
            assert!(matches!(error, CollectiveError::Lost { rank: Rank(1), .. }), "{way:?}: {error}");
        }
    }
}

#[test]
fn a_rank_that_takes_no_part_ends_the_step_with_its_deadline() {
    let routing = any(9, &[2, 3]);
    for way in WAYS {
        let done = std::sync::Barrier::new(2);
        cell(&routing, |mut member| {
            if member.nccl.rank() == Rank(0) {
                member.begin(1, Instant::now() + Duration::from_millis(300), &routing, Some(way));
                member.dispatch(0).unwrap();
                let error = member.settle().unwrap_err();
                let late = |waiting_for: &[Rank]| waiting_for == [Rank(1)];
                assert!(
                    matches!(&error, CollectiveError::Deadline { waiting_for, .. } if late(waiting_for)),
                    "{error}"
                );
            }
            done.wait();
        });
    }
}

/// Rank 1 is a step ahead, or in another layer: the device sees it, and nothing of the step is used.
#[test]
fn slots_of_another_moment_are_refused_with_the_rank() {
    let routing = any(10, &[2, 3]);
    for way in WAYS {
        for (step, layer, what) in [(2, 0, "another step"), (1, 1, "another exchange")] {
            let errors = cell(&routing, |mut member| {
                let ahead = member.nccl.rank() == Rank(1);
                member.begin(if ahead { step } else { 1 }, Instant::now() + PATIENCE, &routing, Some(way));
                member.dispatch(if ahead { layer } else { 0 }).unwrap();
                member.settle().unwrap_err()
            });
            let CollectiveError::Corrupt { rank: Rank(1), what: found } = &errors[0] else {
                panic!("{way:?}: {}", errors[0]);
            };
            assert!(found.contains(what), "{way:?}: {found}");
        }
    }
}

#[test]
fn a_step_that_nobody_waited_for_breaks() {
    let routing = any(11, &[1]);
    cell(&routing, |mut member| {
        member.begin(1, Instant::now() + PATIENCE, &routing, Some(WAYS[0]));
        member.dispatch(0).unwrap();
        member.begin(2, Instant::now() + PATIENCE, &routing, Some(WAYS[0]));
        assert_eq!(member.dispatch(0), Err(CollectiveError::Broken));
    });
}

#[test]
fn more_rows_than_a_slot_holds_are_an_error_and_never_dropped() {
    let routing = vec![vec![[1, 0, 2]; 9], vec![[1, 0, 2]; 2]];
    for way in WAYS {
        let errors = cell(&routing, |mut member| member.step(1, &routing, Some(way), 1).err());
        assert!(errors[0].is_some() && errors.iter().flatten().all(|e| e.blamed() == [Rank(0)]), "{way:?}: {errors:?}");
    }
    // As the step's rows choose, there is room.
    let (chosen, _) = run(&routing, None, 1);
    assert_eq!(chosen.len(), 2);
}

/// Ranks as threads that share one GPU, over the true NCCL: `NCCL_MULTI_RANK_GPU_ENABLE=1` lets them.
mod gpu {
    use phalanx_kernels::cuda::driver;
    use phalanx_kernels::cuda::libraries::gpus;

    use super::super::hardware::not_run;
    use super::*;

    /// What makes a rank on the first GPU, if there is what it takes.
    fn ranks() -> Option<impl Fn(Tcp, &Routing) -> Member + Sync> {
        let api = Api::load().map_err(not_run).ok()?;
        gpus().map_err(not_run).ok()?;
        if std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").as_deref() != Ok("1") {
            not_run("ranks may not share a GPU; set NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL_NVLS_ENABLE=0");
            return None;
        }
        let kernels = crate::device::kernel_cache().unwrap_or_else(std::env::temp_dir);
        Some(move |control: Tcp, routing: &Routing| {
            let backend = driver::open(0, &kernels, Precision::Fast).unwrap();
            Member::on(api, backend, control, routing)
        })
    }

    #[test]
    fn one_two_and_four_ranks_give_the_same_bits_whichever_way() {
        let Some(make) = ranks() else { return };
        let rows = any(5, &[16]).concat();
        let mut expected = None;
        for n in [1, 2, 4] {
            let routing: Routing = rows.chunks(16 / n).map(<[_]>::to_vec).collect();
            for way in [Way::Exact, Way::Slots { rows: 16 }, Way::Gather { rows: 16 }] {
                let outcomes = cell_of(&make, &routing, |mut member| {
                    let residual = member.step(1, &routing, Some(way), 30).unwrap().residual;
                    (residual, member.nccl.counters())
                });
                let sent: u64 = outcomes.iter().map(|(_, counters)| counters.bytes_sent).sum();
                let received: u64 = outcomes.iter().map(|(_, counters)| counters.bytes_received).sum();
                assert_eq!(sent, received, "{n} ranks, {way:?}");
                println!("{n} ranks, {way:?}: {sent} bytes");
                let bits: Vec<u32> = outcomes.into_iter().flat_map(|(residual, _)| residual).collect();
                assert!(*expected.get_or_insert_with(|| bits.clone()) == bits, "{n} ranks, {way:?}");
            }
        }
    }

    /// A rank leaves in the middle of a step: the others name it and abort; in a new epoch all begin again.
    #[test]
    fn after_a_death_a_new_epoch_gives_the_same_bits() {
        let Some(make) = ranks() else { return };
        let routing = any(6, &[3, 2]);
        let whole =
            |way| cell_of(&make, &routing, |mut member| member.step(1, &routing, Some(way), 2).unwrap().residual);
        for way in [Way::Exact, Way::Slots { rows: 8 }, Way::Gather { rows: 8 }] {
            let expected = whole(way);
            let errors = cell_of(&make, &routing, |mut member| {
                // Until exchanges are captured, where they are.
                for step in [1, 2] {
                    member.step(step, &routing, Some(way), 2).unwrap();
                }
                member.begin(3, Instant::now() + PATIENCE, &routing, Some(way));
                if member.nccl.rank() == Rank(1) {
                    // As a process that dies: nothing is given back. The ranks share the driver's locks, and whoever gives
                    // memory back holds them until the other's exchange ends, which it must be free to abort.
                    member.nccl.hang_up(controls(1).remove(0));
                    std::mem::forget(member);
                    return None;
                }
                let graphs = member.backend.counts().graphs;
                let sent = member.dispatch(0).and_then(|()| member.experts_and_combine(0));
                let in_flight = member.backend.counts().graphs > graphs;
                assert!(in_flight || !captures() || way == Way::Exact, "no graph holds the exchange");
                let sent = sent.and_then(|()| member.settle());
                assert_eq!(member.nccl.communicator().state(), State::Aborted);
                Some(sent.unwrap_err())
            });
            assert!(errors.iter().flatten().all(|error| error.blamed() == [Rank(1)]), "{way:?}: {errors:?}");
            assert!(whole(way) == expected, "{way:?}");
        }
    }
}
