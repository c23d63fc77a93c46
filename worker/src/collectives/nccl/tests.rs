//! The layer over a stand-in for NCCL: what every communicator promises, and what it does when NCCL fails.

#![allow(clippy::unwrap_used, reason = "tests")]

mod ahead;
mod graphs;
mod ways;

// The same suites where exchanges in slots are captured when they come a second time.
#[allow(clippy::duplicate_mod, reason = "they ask by which name they are included")]
#[path = "tests/ahead.rs"]
mod ahead_captured;
#[allow(clippy::duplicate_mod, reason = "as above")]
#[path = "tests/ways.rs"]
mod ways_captured;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use phalanx_kernels::cuda::{PART_ALIGNMENT, Parts, Port};
use phalanx_kernels::{Backend, Cuda, HostParts, Precision};
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::{CellId, Epoch, ExchangeCounters, Fence, Rank, StepId, Term};

use super::fake::{self, API, OLD_API, Ordered, World};
use super::*;
use crate::collectives::GroupId;
use crate::collectives::tcp::{self, Listener, Tcp};
use crate::tenure::Tenure;

#[path = "../../../../tests/support/hardware.rs"]
mod hardware;
#[path = "../../../tests/promises/mod.rs"]
#[macro_use]
mod promises;
use promises::{COMBINE, DISPATCH, PATIENCE, ROW, each, exchange, fence, swap};

const PAYLOAD_MAX: u32 = 8 << 20;

/// Parts of the host in front of the device's.
struct Hosted {
    nccl: Nccl,
    device: Arc<Ordered>,
    backend: Cuda,
    received: Parts,
}

impl Collectives<HostParts> for Hosted {
    fn rank(&self) -> Rank {
        self.nccl.rank()
    }

    fn size(&self) -> u32 {
        self.nccl.size()
    }

    fn begin(&mut self, fence: Fence, deadline: Instant) {
        self.nccl.begin(fence, deadline);
    }

    fn start(&mut self, exchange: Exchange, send: &mut HostParts) -> Result<(), CollectiveError> {
        // As wide as what is sent: what travels is what counts, and buffers that are gone are freed in order.
        let bytes = send.by_rank.iter().map(|part| part.len() + PART_ALIGNMENT).sum();
        let mut parts = self.backend.parts(send.by_rank.len(), bytes);
        parts.upload(send).unwrap();
        send.clear();
        self.nccl.start(exchange, &mut parts)
    }

    fn finish(&mut self, exchange: Exchange, received: &mut HostParts) -> Result<(), CollectiveError> {
        self.nccl.finish(exchange, &mut self.received)?;
        *received = self.received.download().unwrap();
        Ok(())
    }

    fn counters(&self) -> ExchangeCounters {
        self.nccl.counters()
    }
}

impl Hosted {
    fn world(&self) -> Arc<Mutex<World>> {
        fake::world_of(self.nccl.communicator().raw())
    }
}

fn epoch() -> Fence {
    Fence { term: Term(3), epoch: Epoch(5), step: StepId(0) }
}

/// Control connections of each rank; ranks above the first allow parts of `payload_max`.
fn controls(n: u32) -> Vec<Tcp> {
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    let listeners: Vec<_> = (0..n).map(|_| Listener::bind(address, None).unwrap()).collect();
    let peers: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
    let group = GroupId { cell: CellId(1), term: Term(3), epoch: Epoch(5) };
    std::thread::scope(|scope| {
        let join = |(rank, listener)| {
            let peers = &peers;
            scope.spawn(move || {
                tcp::connect(listener, group, Rank(rank), peers, 4096, Instant::now() + PATIENCE, &Tenure::default())
            })
        };
        let threads: Vec<_> = (0u32..).zip(&listeners).map(join).collect();
        threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
    })
}

fn options() -> JoinOptions {
    let deadline = Instant::now() + PATIENCE;
    // Nothing is said of a step's rows, so nothing goes in slots.
    let shape = Shape { ranks: 0, experts: 0, top_k: 0, row_bytes: [0; 2], rows_max: 0, room: 0 };
    JoinOptions { fence: epoch(), deadline, payload_max: PAYLOAD_MAX, channels_max: Some(4), shape, captures: false }
}

fn join(control: Tcp, options: JoinOptions) -> Result<Hosted, JoinError> {
    join_with(control, 5 * PAYLOAD_MAX as usize, options)
}

fn join_with(control: Tcp, room: usize, options: JoinOptions) -> Result<Hosted, JoinError> {
    let ranks = control.size() as usize;
    let device = Ordered::new();
    let mut backend = Cuda::new(Arc::clone(&device) as _, Precision::Fast).unwrap();
    let port = Port::new(&backend, options.shape.slots_bytes()).unwrap();
    let nccl = Nccl::join(API, control, port, options)?;
    let received = backend.parts(ranks, room);
    Ok(Hosted { nccl, device, backend, received })
}

fn hosted(n: u32) -> Vec<Hosted> {
    each(controls(n), |control| join(control, options()).unwrap())
}

promises!(gpus, hosted, CONTROL_BYTES);

/// Communicators of one id, joined.
fn communicators(api: Api, n: usize) -> (Vec<Communicator>, Arc<Mutex<World>>) {
    let id = api.unique_id().unwrap();
    let start = |rank| Communicator::join(api, id, rank, n, None).unwrap();
    let mut joined: Vec<_> = (0..n).map(start).collect();
    joined.iter_mut().for_each(|c| settle(c).unwrap());
    (joined, fake::world(id))
}

fn settle(communicator: &mut Communicator) -> Result<(), NcclError> {
    communicator.settle("in a test", Instant::now() + PATIENCE, || Ok(()))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(50)
}

/// Nobody used a communicator after its end, or disagreed on a size; and all have ended.
fn clean(world: &Mutex<World>, ended: usize) {
    let world = fake::lock(world);
    assert_eq!(world.misuse, [""; 0]);
    assert_eq!(world.aborted + world.destroyed, ended);
}

#[test]
fn after_exchanges_every_communicator_ends_once() {
    let group = hosted(3);
    let world = group[0].world();
    promises::parts_arrive_equal(group);
    clean(&world, 3);
}

#[test]
fn a_rank_that_does_not_join_is_waited_for_no_longer_than_the_deadline() {
    let id = API.unique_id().unwrap();
    let mut alone = Communicator::join(API, id, 0, 2, None).unwrap();
    assert_eq!((alone.state(), alone.poll()), (State::Initialising, Ok(false)));
    let late = alone.settle("in a test", soon(), || Ok::<_, NcclError>(()));
    assert_eq!(late, Err(NcclError::Late { what: "in a test" }));
    assert_eq!(alone.state(), State::Broken);
    assert!(matches!(alone.poll(), Err(NcclError::NotReady { state: State::Broken })));
    drop(alone);
    clean(&fake::world(id), 1);
}

#[test]
fn a_rank_that_dies_while_joining_is_named() {
    let mut group = controls(3);
    let dead = group.pop().unwrap();
    let errors = std::thread::scope(|scope| {
        // It takes part in the exchange of the id, and is gone before it joins over NCCL.
        scope.spawn(move || {
            let mut dead = dead;
            join::agree(API, &mut dead, epoch(), Instant::now() + PATIENCE).unwrap();
        });
        each(group, |control| join(control, options()).map(|_| ()).unwrap_err())
    });
    for error in errors {
        let named = matches!(&error, JoinError::Control(CollectiveError::Lost { rank: Rank(2), .. }));
        assert!(named, "{error}");
    }
}

/// Rank 2 sends rank 0 what only rank 0 sees: rank 1 hears from rank 0 whom to blame before rank 0 is gone.
#[test]
fn a_rank_that_cannot_join_says_whose_fault_it_is() {
    let mut group = controls(3);
    let dead = group.pop().unwrap();
    let over = std::sync::Barrier::new(3);
    let errors = std::thread::scope(|scope| {
        scope.spawn(|| {
            // A rank that allows longer parts than the others.
            let mut bad = dead.allowing(PAYLOAD_MAX);
            join::agree(API, &mut bad, epoch(), Instant::now() + PATIENCE).unwrap();
            let mut send = HostParts::new(3);
            send.by_rank[0] = vec![0; 5000];
            bad.start(exchange(0, DISPATCH), &mut send).unwrap();
            over.wait();
        });
        each(group, |control| {
            let error = join(control, options()).map(|_| ()).unwrap_err();
            over.wait();
            error
        })
    });
    let corrupt = matches!(&errors[0], JoinError::Control(CollectiveError::Corrupt { rank: Rank(2), .. }));
    assert!(corrupt, "{}", errors[0]);
    let told = matches!(&errors[1], JoinError::Control(CollectiveError::Lost { rank: Rank(2), why, .. })
        if why.contains("rank 0 gave up on it"));
    assert!(told, "{}", errors[1]);
}

/// A rank whose own device is at fault says so before it is gone.
#[test]
fn a_rank_that_nccl_refuses_says_so_before_it_goes() {
    let errors = each(controls(2), |control| {
        let api = if control.rank() == Rank(0) { API } else { fake::REFUSING_API };
        let backend = Cuda::new(Ordered::new(), Precision::Fast).unwrap();
        let port = Port::new(&backend, 0).unwrap();
        Nccl::join(api, control, port, options()).map(|_| ()).unwrap_err()
    });
    let told = matches!(&errors[0], JoinError::Control(CollectiveError::Lost { rank: Rank(1), why, .. })
        if why.contains("gave up on it"));
    assert!(told, "{}", errors[0]);
    assert!(errors[1].to_string().contains("ncclCommInitRankConfig failed: internal error"), "{}", errors[1]);
}

#[test]
fn what_the_library_refuses_is_an_error_with_its_name() {
    let id = API.unique_id().unwrap();
    fake::lock(&fake::world(id)).faults(0).init = 3;
    let error = Communicator::join(API, id, 0, 1, None).unwrap_err();
    assert_eq!(error, NcclError::Call { name: "ncclCommInitRankConfig", code: Code(3) });
    assert!(error.to_string().contains("internal error") && error.to_string().contains("NCCL_DEBUG"), "{error}");
    assert_eq!(Code(77).to_string(), "code 77");
    clean(&fake::world(id), 0);
}

#[test]
fn an_asynchronous_error_breaks_and_is_said_once() {
    let (mut pair, world) = communicators(API, 2);
    fake::lock(&world).faults(0).async_error = 6;
    assert_eq!(pair[0].poll(), Err(NcclError::Failed { code: Code::REMOTE_ERROR }));
    fake::lock(&world).faults(0).async_error = 0;
    assert!(matches!(pair[0].poll(), Err(NcclError::NotReady { state: State::Broken })), "nothing mends it");
    assert_eq!(pair[1].poll(), Ok(true));
    pair[0].abort();
    pair[0].abort();
    assert!(matches!(pair[0].poll(), Err(NcclError::NotReady { state: State::Aborted })));
    drop(pair);
    clean(&world, 2);
}

/// Exchanges until one fails; a rank may be through with one that failed at another.
fn exchanges_until_failure(c: &mut Hosted, rows: usize) -> CollectiveError {
    let n = c.size() as usize;
    for layer in 0..3 {
        let mut send = HostParts { by_rank: vec![vec![7; rows * ROW]; n] };
        if let Err(error) = swap(c, exchange(layer, DISPATCH), &mut send, &mut HostParts::default()) {
            return error;
        }
    }
    panic!("nothing failed at {}", c.rank());
}

/// What each rank says when something goes wrong, and the world it happened in.
fn failing(n: u32, wait: Duration, spoil: impl Fn(&mut World) + Sync) -> (Vec<CollectiveError>, Arc<Mutex<World>>) {
    let group = hosted(n);
    let world = group[0].world();
    spoil(&mut fake::lock(&world));
    let errors = each(group, |mut c| {
        // Only rank 0's patience may end: who waits for whom is then certain.
        c.begin(fence(1), Instant::now() + if c.rank() == Rank(0) { wait } else { PATIENCE });
        let error = exchanges_until_failure(&mut c, 10);
        assert_eq!(c.nccl.communicator().state(), State::Aborted, "what is on the stream must end");
        c.begin(fence(2), Instant::now() + PATIENCE);
        let again = c.start(exchange(0, DISPATCH), &mut HostParts::new(n as usize));
        assert_eq!(again, Err(CollectiveError::Broken), "it serves nothing afterwards");
        error
    });
    (errors, world)
}

#[test]
fn a_rank_whose_gpu_fails_is_named_by_all() {
    let (errors, world) = failing(3, PATIENCE, |world| {
        // It sends nothing any more, and the others hear only of something remote.
        world.faults(1).async_error = 1;
        world.faults(1).sends_nothing = true;
        world.faults(0).async_error = 6;
    });
    for error in &errors {
        assert!(matches!(error, CollectiveError::Lost { .. }), "{error}");
        assert_eq!(error.blamed(), [Rank(1)], "{error}");
    }
    assert!(errors[1].to_string().contains("unhandled CUDA error"), "{}", errors[1]);
    clean(&world, 3);
}

/// NCCL says that something remote failed before the culprit is heard of: there is time for that, whether a call says so
/// or the state does later.
#[test]
fn a_remote_failure_is_not_blamed_on_who_sees_it() {
    for at_once in [true, false] {
        let group = hosted(2);
        let world = group[0].world();
        let count = |of: fn(&fake::Faults) -> u32| of(fake::lock(&world).faults(0));
        if at_once {
            fake::lock(&world).faults(0).async_error = 6;
        }
        let errors = each(group, |c| {
            let mut c = Hosted { nccl: c.nccl.with_grace(PATIENCE), ..c };
            c.begin(fence(1), Instant::now() + PATIENCE);
            let mut send = HostParts { by_rank: vec![vec![7; ROW]; 2] };
            c.start(exchange(0, DISPATCH), &mut send).unwrap();
            if c.rank() == Rank(0) {
                return Some(c.finish(exchange(0, DISPATCH), &mut HostParts::default()).unwrap_err());
            }
            let before = count(|faults| faults.asked);
            while !at_once && count(|faults| faults.asked) < before + 10 {
                std::thread::yield_now();
            }
            fake::lock(&world).faults(0).async_error = 6;
            // It dies only after rank 0 has heard that something failed, and would have said so.
            while count(|faults| faults.asked_failed) == 0 {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            None
        });
        let lost = matches!(&errors[0], Some(CollectiveError::Lost { rank: Rank(1), .. }));
        assert!(lost, "{errors:?}");
        clean(&world, 2);
    }
}

#[test]
fn a_send_that_is_refused_ends_the_group_and_names_the_rank() {
    let (errors, world) = failing(2, PATIENCE, |world| world.faults(0).send = 2);
    assert!(errors[0].to_string().contains("ncclSend failed: system error"), "{}", errors[0]);
    assert!(errors.iter().all(|error| error.blamed() == [Rank(0)]), "{errors:?}");
    clean(&world, 2);
}

#[test]
fn bytes_that_never_come_end_with_the_deadline() {
    let (errors, world) = failing(2, Duration::from_millis(300), |world| world.faults(1).sends_nothing = true);
    assert!(matches!(&errors[0], CollectiveError::Deadline { waiting_for, .. } if *waiting_for == [Rank(1)]));
    // Rank 1 has all of its own, and hears in the next exchange that it was given up on.
    assert_eq!(errors[1].blamed(), [Rank(1)], "{}", errors[1]);
    clean(&world, 2);
}

#[test]
fn a_rank_that_dies_within_an_exchange_is_named() {
    let group = hosted(3);
    let world = group[0].world();
    each(group, |mut c| {
        c.begin(fence(1), Instant::now() + PATIENCE);
        let mut send = HostParts { by_rank: vec![vec![7; ROW]; 3] };
        c.start(exchange(0, COMBINE), &mut send).unwrap();
        if c.rank() == Rank(1) {
            // Its sizes are on their way, its bytes will never be.
            return;
        }
        let error = c.finish(exchange(0, COMBINE), &mut HostParts::default()).unwrap_err();
        assert!(matches!(error, CollectiveError::Lost { rank: Rank(1), .. }), "{error}");
    });
    clean(&world, 3);
}

#[test]
fn a_device_that_fails_is_this_rank_s_fault() {
    let group = hosted(2);
    *fake::lock(&group[1].device.fault) = Some("an illegal address was read".to_owned());
    let errors = each(group, |mut c| {
        c.begin(fence(1), Instant::now() + PATIENCE);
        exchanges_until_failure(&mut c, 1)
    });
    assert!(errors[1].to_string().contains("illegal address"), "{}", errors[1]);
    assert!(errors.iter().all(|error| error.blamed() == [Rank(1)]), "{errors:?}");
}

#[test]
fn parts_of_no_whole_rows_are_refused() {
    let group = hosted(2);
    let world = group[0].world();
    let errors = each(group, |mut c| {
        c.begin(fence(1), Instant::now() + PATIENCE);
        let bytes = if c.rank() == Rank(1) { ROW + 4 } else { ROW };
        let mut error = Ok(());
        for layer in 0..3 {
            let mut send = HostParts { by_rank: vec![vec![0; bytes]; 2] };
            error = error.and_then(|()| swap(&mut c, exchange(layer, DISPATCH), &mut send, &mut HostParts::default()));
        }
        error.unwrap_err()
    });
    let whole = "its payload is not a whole number of rows";
    assert_eq!(errors[0], CollectiveError::Corrupt { rank: Rank(1), what: whole });
    assert_eq!(errors[1].blamed(), [Rank(1)], "{}", errors[1]);
    clean(&world, 2);
}

#[test]
fn a_rank_without_room_for_what_comes_is_named() {
    let group = each(controls(2), |control| {
        let room = if control.rank() == Rank(1) { 2 * ROW } else { PAYLOAD_MAX as usize };
        join_with(control, room, options()).unwrap()
    });
    let world = group[0].world();
    let errors = each(group, |mut c| {
        c.begin(fence(1), Instant::now() + PATIENCE);
        exchanges_until_failure(&mut c, 10)
    });
    assert!(errors[1].to_string().contains("the room for what other ranks send"), "{}", errors[1]);
    assert!(errors.iter().all(|error| error.blamed() == [Rank(1)]), "{errors:?}");
    clean(&world, 2);
}

#[test]
fn parts_longer_than_agreed_are_neither_sent_nor_received() {
    for (allowed, blamed) in [([8, 8], [0, 1]), ([8, 4096], [1, 1])] {
        let group = each(controls(2), |control| {
            let payload_max = allowed[control.rank().index()];
            join(control, JoinOptions { payload_max, ..options() }).unwrap()
        });
        let world = group[0].world();
        let errors = each(group, |mut c| {
            c.begin(fence(1), Instant::now() + PATIENCE);
            // Only rank 1 sends too much, unless both may send little.
            let rows = usize::from(c.rank() == Rank(1) || blamed[0] == 0);
            exchanges_until_failure(&mut c, rows)
        });
        let corrupt =
            |e: &&CollectiveError| matches!(e, CollectiveError::Corrupt { what, .. } if what.contains("longer"));
        assert!(errors.iter().any(|e| corrupt(&e)), "{errors:?}");
        assert!(errors.iter().all(|e| e.blamed()[0].0 == 1 || blamed[0] == 0), "{errors:?}");
        clean(&world, 2);
    }
}

#[test]
fn calls_that_go_on_in_the_background_are_waited_for() {
    let group = hosted(2);
    let world = group[0].world();
    fake::lock(&world).faults(0).slow = 5;
    promises::combine_undoes_dispatch(group);
    clean(&world, 2);
}

/// The ranks that are left go on without the dead one, under new numbers.
#[test]
fn survivors_shrink_and_exchange() {
    let (mut four, world) = communicators(API, 4);
    // One that has waited in vain may be shrunk too.
    four[3].give_up();
    let dead = four.remove(2);
    drop(dead);
    let survivors = std::thread::scope(|scope| {
        let shrink =
            |mut old: Communicator| scope.spawn(move || old.shrink(&[2, 2], Instant::now() + PATIENCE).unwrap());
        let threads: Vec<_> = four.into_iter().map(shrink).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(survivors.iter().map(|c| (c.rank(), c.ranks())).collect::<Vec<_>>(), [(0, 3), (1, 3), (2, 3)]);
    clean(&world, 4);

    let smaller = fake::world_of(survivors[0].raw());
    gathered_and_slotted(survivors);
    clean(&smaller, 3);
}

/// An all-gather, and slots; on the raw communicators.
fn gathered_and_slotted(communicators: Vec<Communicator>) {
    const SLOT: usize = 16;
    let n = communicators.len();
    each_communicator(communicators, |mut c| {
        let stream = fake::new_stream();
        let idle = || {
            let begun = Instant::now();
            while !fake::advance(stream) {
                assert!(begun.elapsed() < PATIENCE);
                std::thread::yield_now();
            }
        };
        let (source, mut into) = ([c.rank() as u8 + 1; 4], vec![0_u8; 4 * n]);
        // SAFETY: both buffers outlive the wait for the stream.
        unsafe { c.all_gather(source.as_ptr().cast(), into.as_mut_ptr().cast(), 4, stream) }.unwrap();
        idle();
        assert_eq!(into, (0..n).flat_map(|rank| [rank as u8 + 1; 4]).collect::<Vec<_>>());

        let source: Vec<u8> = (0..n * SLOT).map(|i| (c.rank() * n + i / SLOT) as u8).collect();
        let mut into = vec![u8::MAX; n * SLOT];
        let transfers = fixed(c.rank(), n, SLOT);
        // SAFETY: both buffers outlive the wait for the stream.
        unsafe { c.enqueue(&transfers, source.as_ptr().cast(), into.as_mut_ptr().cast(), stream) }.unwrap();
        idle();
        for (rank, slot) in into.chunks(SLOT).enumerate().filter(|(rank, _)| *rank != c.rank()) {
            assert!(slot.iter().all(|&byte| usize::from(byte) == rank * n + c.rank()));
        }
        if c.rank() == 0 { drop(c) } else { c.finish(Instant::now() + PATIENCE).unwrap() }
    });
}

fn each_communicator(communicators: Vec<Communicator>, work: impl Fn(Communicator) + Sync) {
    std::thread::scope(|scope| {
        let work = &work;
        communicators.into_iter().for_each(|c| drop(scope.spawn(move || work(c))));
    });
}

#[test]
fn what_cannot_be_shrunk_says_so() {
    let (mut pair, world) = communicators(OLD_API, 2);
    let refused = |c: &mut Communicator, without: &[usize]| match c.shrink(without, soon()) {
        Err(NcclError::Shrink { why }) => why,
        other => panic!("{other:?}"),
    };
    assert!(!OLD_API.can_shrink() && refused(&mut pair[0], &[1]).contains("older than 2.27"));
    drop(pair);
    clean(&world, 2);

    let (mut pair, world) = communicators(API, 2);
    for without in [&[][..], &[0], &[0, 1], &[2]] {
        assert!(refused(&mut pair[0], without).contains("no other ranks"), "{without:?}");
    }
    assert_eq!(pair[0].state(), State::Ready, "nothing was done to it");
    pair[1].abort();
    assert!(matches!(pair[1].shrink(&[0], soon()), Err(NcclError::NotReady { state: State::Aborted })));
    // The other survivor never asks.
    let (mut three, _) = communicators(API, 3);
    assert!(matches!(three[0].shrink(&[2], soon()), Err(NcclError::Late { .. })));
    drop(pair);
    clean(&world, 2);
}

/// The library may refuse to shrink what has failed, at once or later; then nothing is made.
#[test]
fn a_shrink_that_fails_leaves_one_communicator_to_abort() {
    let (mut three, world) = communicators(API, 3);
    fake::lock(&world).faults(0).async_error = 6;
    assert!(
        matches!(three[0].shrink(&[2], Instant::now() + PATIENCE), Err(NcclError::Call { code, .. }) if code.0 == 6)
    );
    assert_eq!(three[0].state(), State::Broken);
    drop(three);
    clean(&world, 3);
}

#[test]
fn nothing_is_enqueued_while_a_call_is_under_way() {
    let (mut pair, world) = communicators(API, 2);
    fake::lock(&world).faults(0).slow = 3;
    let (stream, transfers) = (fake::new_stream(), fixed(0, 2, 8));
    let mut bytes = [0_u8; 32];
    let mut enqueue = |c: &mut Communicator| {
        let into = bytes.as_mut_ptr();
        // SAFETY: the buffer outlives the streams use of it: the communicators end before it does.
        unsafe { c.enqueue(&transfers, into.cast(), into.byte_add(16).cast(), stream) }
    };
    enqueue(&mut pair[0]).unwrap();
    assert_eq!(enqueue(&mut pair[0]), Err(NcclError::Busy));
    settle(&mut pair[0]).unwrap();
    enqueue(&mut pair[0]).unwrap();
    drop(pair);
    clean(&world, 2);
}

#[test]
fn nothing_is_enqueued_unless_ready() {
    let id = API.unique_id().unwrap();
    let mut alone = Communicator::join(API, id, 0, 2, None).unwrap();
    let transfers = fixed(0, 2, 8);
    let enqueue = |c: &mut Communicator| {
        let mut bytes = [0_u8; 16];
        // SAFETY: it is refused before the addresses are used.
        unsafe { c.enqueue(&transfers, bytes.as_ptr().cast(), bytes.as_mut_ptr().cast(), fake::new_stream()) }
    };
    for state in [State::Initialising, State::Broken, State::Aborted] {
        assert_eq!(enqueue(&mut alone), Err(NcclError::NotReady { state }));
        if state == State::Initialising { alone.give_up() } else { alone.abort() }
    }
    clean(&fake::world(id), 1);
}

#[test]
fn an_abort_that_hangs_holds_nobody() {
    let (mut pair, world) = communicators(API, 2);
    fake::lock(&world).faults(0).abort_hangs = true;
    assert!(!pair[0].abort_within(Duration::from_millis(20), || ()));
    assert_eq!(pair[0].state(), State::Aborted);
    assert!(pair[0].abort_within(Duration::ZERO, || ()), "it is not asked again");
    fake::lock(&world).faults(0).abort_hangs = false;
    assert!(pair[1].abort_within(PATIENCE, || ()));
}

/// Whatever the library answers, nothing panics: not the calls, and not the drop.
#[test]
fn a_library_that_fails_everywhere_is_survived() {
    for code in [1, 2, 3, 5, 6, 8, 99] {
        let (mut pair, world) = communicators(API, 2);
        fake::lock(&world).faults(0).all = code;
        fake::lock(&world).faults(1).all = code;
        let second = pair.pop().unwrap();
        assert!(second.finish(soon()).is_err());
        let mut first = pair.pop().unwrap();
        assert!(first.poll().is_err());
        assert!(first.shrink(&[1], soon()).is_err());
        drop(first);
        clean(&world, 2);
    }
}

#[test]
fn all_ranks_learn_the_same_id() {
    let ids =
        each(controls(4), |mut control| join::agree(API, &mut control, epoch(), Instant::now() + PATIENCE).unwrap());
    assert!(ids.iter().all(|id| *id == ids[0]));
}

/// Rank 0 of another build sends something else.
#[test]
fn what_is_no_id_is_refused() {
    let outcomes = each(controls(2), |mut control| {
        if control.rank() == Rank(0) {
            let joining = Exchange { layer: phalanx_proto::LayerIdx(u32::MAX), kind: DISPATCH, row_bytes: 1 };
            control.begin(epoch(), Instant::now() + PATIENCE);
            let mut empty = HostParts::new(2);
            control.start(joining, &mut empty).unwrap();
            control.finish(joining, &mut empty).unwrap();
            return None;
        }
        Some(join::agree(API, &mut control, epoch(), Instant::now() + PATIENCE).unwrap_err())
    });
    assert_eq!(outcomes[1], Some(JoinError::NoId));
}

/// The true library, where it is installed; a GPU is not needed for these.
mod real {
    use phalanx_kernels::cuda::libraries::{Library, Version, gpus};

    use super::hardware::not_run;
    use super::*;

    fn api() -> Option<Api> {
        Api::load().map_err(not_run).ok()
    }

    #[test]
    fn it_has_all_functions_and_makes_ids() {
        let Some(api) = api() else { return };
        assert_ne!(api.unique_id().unwrap(), api.unique_id().unwrap());
        let version = Library::Nccl.version().unwrap();
        assert_eq!(api.can_shrink(), version >= Version::packed(22_700), "{version}");
    }

    #[test]
    fn ranks_agree_on_an_id_of_its_making() {
        let Some(api) = api() else { return };
        let ids = each(controls(3), |mut control| {
            join::agree(api, &mut control, epoch(), Instant::now() + PATIENCE).unwrap()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
    }

    /// Without a GPU joining fails, and says so; with one, a rank joins itself and ends in good order.
    #[test]
    fn joining_ends_well_or_says_why_not() {
        let Some(api) = api() else { return };
        let mut joined = Communicator::join(api, api.unique_id().unwrap(), 0, 1, Some(1));
        let settled = joined.as_mut().map_err(|error| error.clone()).and_then(settle);
        if let Err(missing) = gpus() {
            assert!(matches!(settled, Err(NcclError::Call { .. } | NcclError::Failed { .. })), "{settled:?}");
            return not_run(format!("{missing}; that joining fails without one is checked"));
        }
        settled.unwrap();
        joined.unwrap().finish(Instant::now() + PATIENCE).unwrap();
    }
}
