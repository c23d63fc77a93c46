//! What every communicator promises, checked over threads and over sockets.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use phalanx_kernels::HostParts;
use phalanx_model::{CollectiveError, Collectives, Exchange, ExchangeKind};
use phalanx_proto::{CellId, Epoch, ExchangeCounters, Fence, LayerIdx, Rank, StepId, Term};
use phalanx_worker::collectives::tcp::{self, ConnectError, Listener, Refusal, Tcp};
use phalanx_worker::collectives::{GroupId, local};
use phalanx_worker::progress::ProgressCell;

/// Longer than any test; reached only by a hang.
const PATIENCE: Duration = Duration::from_secs(120);

/// splitmix64.
#[derive(Clone)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

const ROW: usize = 24;

/// What `from` sends to `to` in the `round`th exchange: nothing, a row, some rows, or more than a socket holds.
fn part(round: u32, from: u32, to: u32) -> Vec<u8> {
    let mut rng = Rng(u64::from(round) << 32 | u64::from(from) << 16 | u64::from(to));
    let rows = match rng.below(8) {
        0 => 0,
        1 => 1,
        2..7 => rng.below(1000),
        _ => 100_000 + rng.below(100_000),
    };
    let mut bytes = Vec::with_capacity(rows * ROW);
    while bytes.len() < rows * ROW {
        bytes.extend_from_slice(&rng.next().to_le_bytes());
    }
    bytes
}

fn parts_from(round: u32, from: u32, n: u32) -> HostParts {
    HostParts { by_rank: (0..n).map(|to| part(round, from, to)).collect() }
}

fn parts_to(round: u32, to: u32, n: u32) -> HostParts {
    HostParts { by_rank: (0..n).map(|from| part(round, from, to)).collect() }
}

fn fence(step: u64) -> Fence {
    Fence { term: Term(3), epoch: Epoch(5), step: StepId(step) }
}

fn exchange(layer: u32, kind: ExchangeKind) -> Exchange {
    Exchange { layer: LayerIdx(layer), kind, row_bytes: ROW }
}

const DISPATCH: ExchangeKind = ExchangeKind::Dispatch;
const COMBINE: ExchangeKind = ExchangeKind::Combine;

/// Runs every rank in a thread of its own; a rank's communicator is dropped when its thread ends.
fn each<C: Collectives<HostParts>, R: Send>(group: Vec<C>, work: impl Fn(C) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = group.into_iter().map(|c| scope.spawn(|| work(c))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn swap<C: Collectives<HostParts>>(
    c: &mut C,
    exchange: Exchange,
    send: &mut HostParts,
    received: &mut HostParts,
) -> Result<(), CollectiveError> {
    c.start(exchange, send)?;
    c.finish(exchange, received)
}

fn parts_arrive_equal<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len() as u32;
    each(group, |mut c| {
        let rank = c.rank().0;
        assert_eq!(c.size(), n);
        let mut received = HostParts::default();
        for step in 1..=4 {
            c.begin(fence(step), Instant::now() + PATIENCE);
            for layer in 0..5 {
                for kind in [DISPATCH, COMBINE] {
                    let round = step as u32 * 100 + layer * 2 + kind as u32;
                    let mut send = parts_from(round, rank, n);
                    swap(&mut c, exchange(layer, kind), &mut send, &mut received).unwrap();
                    assert!(send.by_rank.iter().all(Vec::is_empty), "what was sent is taken");
                    assert!(received == parts_to(round, rank, n), "round {round} at rank {rank} of {n}");
                }
            }
        }
    });
}

fn combine_undoes_dispatch<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len() as u32;
    each(group, |mut c| {
        let mut rows = HostParts::new(n as usize);
        let mut back = HostParts::new(n as usize);
        c.begin(fence(1), Instant::now() + PATIENCE);
        for layer in 0..20 {
            let mut send = parts_from(layer, c.rank().0, n);
            swap(&mut c, exchange(layer, DISPATCH), &mut send, &mut rows).unwrap();
            swap(&mut c, exchange(layer, COMBINE), &mut rows, &mut back).unwrap();
            assert!(back == parts_from(layer, c.rank().0, n), "layer {layer}");
        }
    });
}

/// The last rank leaves after one step; every other rank says so, and then serves nothing.
fn a_rank_that_stops_is_named<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len() as u32;
    let last = Rank(n - 1);
    each(group, |mut c| {
        let mut send = parts_from(1, c.rank().0, n);
        let mut received = HostParts::default();
        c.begin(fence(1), Instant::now() + PATIENCE);
        swap(&mut c, exchange(0, DISPATCH), &mut send, &mut received).unwrap();
        if c.rank() == last {
            return;
        }
        c.begin(fence(2), Instant::now() + PATIENCE);
        let mut send = parts_from(2, c.rank().0, n);
        let error = swap(&mut c, exchange(0, DISPATCH), &mut send, &mut received).unwrap_err();
        assert!(matches!(error, CollectiveError::Lost { .. }), "{error}");
        assert_eq!(error.blamed(), [last], "{error}");
        c.begin(fence(3), Instant::now() + PATIENCE);
        assert_eq!(c.start(exchange(0, DISPATCH), &mut HostParts::new(n as usize)), Err(CollectiveError::Broken));
    });
}

/// The last rank lives but takes no part until the others have given up.
fn a_rank_that_hangs_is_named<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len() as u32;
    let last = Rank(n - 1);
    let given_up = std::sync::Barrier::new(n as usize);
    each(group, |mut c| {
        if c.rank() != last {
            c.begin(fence(1), Instant::now() + Duration::from_millis(300));
            let mut send = parts_from(2, c.rank().0, n);
            let error = swap(&mut c, exchange(0, DISPATCH), &mut send, &mut HostParts::default()).unwrap_err();
            let named = matches!(error, CollectiveError::Lost { .. } | CollectiveError::Deadline { .. });
            assert!(named, "{error}");
            assert_eq!(error.blamed(), [last], "{error}");
        }
        given_up.wait();
    });
}

/// Rank 1 is a step ahead: nobody uses its rows.
fn another_moment_is_refused<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len();
    each(group, |mut c| {
        let ours = fence(7 + u64::from(c.rank() == Rank(1)));
        c.begin(ours, Instant::now() + PATIENCE);
        let error = swap(&mut c, exchange(0, COMBINE), &mut HostParts::new(n), &mut HostParts::default()).unwrap_err();
        let refused = matches!(error, CollectiveError::Fence { theirs, .. } if theirs != ours);
        assert!(refused || matches!(error, CollectiveError::Lost { .. }), "{error}");
    });
}

fn another_exchange_is_refused<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len();
    each(group, |mut c| {
        c.begin(fence(1), Instant::now() + PATIENCE);
        let here = exchange(c.rank().0, DISPATCH);
        let error = swap(&mut c, here, &mut HostParts::new(n), &mut HostParts::default()).unwrap_err();
        assert!(matches!(error, CollectiveError::Corrupt { .. } | CollectiveError::Lost { .. }), "{error}");
    });
}

/// Rank 0 is through with one exchange and sends the next while rank 1 has not read the first.
fn a_rank_may_be_one_exchange_ahead<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len() as u32;
    let started = std::sync::Barrier::new(n as usize);
    let ahead = std::sync::Barrier::new(n as usize);
    each(group, |mut c| {
        let me = c.rank().0;
        let small = |fill: u32| HostParts { by_rank: vec![vec![fill as u8; ROW]; n as usize] };
        let all = |base: u32| HostParts { by_rank: (0..n).map(|r| vec![(base + r) as u8; ROW]).collect() };
        let mut received = HostParts::default();
        c.begin(fence(1), Instant::now() + PATIENCE);
        c.start(exchange(0, DISPATCH), &mut small(10 + me)).unwrap();
        started.wait();
        if me == 1 {
            ahead.wait();
        }
        c.finish(exchange(0, DISPATCH), &mut received).unwrap();
        assert!(received == all(10));
        c.begin(fence(2), Instant::now() + PATIENCE);
        c.start(exchange(0, DISPATCH), &mut small(20 + me)).unwrap();
        if me != 1 {
            ahead.wait();
        }
        c.finish(exchange(0, DISPATCH), &mut received).unwrap();
        assert!(received == all(20));
    });
}

fn counters_count<C: Collectives<HostParts>>(group: Vec<C>, frame: usize) {
    let n = group.len() as u32;
    each(group, |mut c| {
        let me = c.rank().0;
        for step in 1..=2 {
            c.begin(fence(step), Instant::now() + PATIENCE);
            for kind in [DISPATCH, COMBINE, COMBINE] {
                let mut send = parts_from(kind as u32, me, n);
                swap(&mut c, exchange(0, kind), &mut send, &mut HostParts::default()).unwrap();
            }
        }
        let others = || (0..n).filter(|&r| r != me);
        let sent = |round| others().map(|to| part(round, me, to).len()).sum::<usize>();
        let received = |round| others().map(|from| part(round, from, me).len()).sum::<usize>();
        let frames = 3 * others().count() * frame;
        let expected = ExchangeCounters {
            dispatch_rows: (sent(0) / ROW) as u64,
            combine_rows: (2 * sent(1) / ROW) as u64,
            bytes_sent: (sent(0) + 2 * sent(1) + frames) as u64,
            bytes_received: (received(0) + 2 * received(1) + frames) as u64,
        };
        assert_eq!(c.counters(), expected);
    });
}

macro_rules! promises {
    ($name:ident, $group:expr, $frame:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn parts_arrive_equal() {
                [1, 2, 3, 5].into_iter().for_each(|n| super::parts_arrive_equal($group(n)));
            }

            #[test]
            fn combine_undoes_dispatch() {
                [1, 2, 3, 5].into_iter().for_each(|n| super::combine_undoes_dispatch($group(n)));
            }

            #[test]
            fn a_rank_that_stops_is_named() {
                [2, 3, 5].into_iter().for_each(|n| super::a_rank_that_stops_is_named($group(n)));
            }

            #[test]
            fn a_rank_that_hangs_is_named() {
                [2, 3, 5].into_iter().for_each(|n| super::a_rank_that_hangs_is_named($group(n)));
            }

            #[test]
            fn another_moment_is_refused() {
                [2, 3, 5].into_iter().for_each(|n| super::another_moment_is_refused($group(n)));
            }

            #[test]
            fn another_exchange_is_refused() {
                [2, 3, 5].into_iter().for_each(|n| super::another_exchange_is_refused($group(n)));
            }

            #[test]
            fn a_rank_may_be_one_exchange_ahead() {
                [2, 3, 5].into_iter().for_each(|n| super::a_rank_may_be_one_exchange_ahead($group(n)));
            }

            #[test]
            fn counters_count() {
                [1, 2, 3, 5].into_iter().for_each(|n| super::counters_count($group(n), $frame));
            }
        }
    };
}

promises!(threads, local::group, 0);
promises!(sockets, tcp_group, tcp::HEADER_BYTES);

const PAYLOAD_MAX: u32 = 8 << 20;

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn token(text: &str) -> Option<Arc<[u8]>> {
    Some(Arc::from(text.as_bytes()))
}

fn listener() -> Listener {
    Listener::bind(any_port(), token("a token of the cluster")).unwrap()
}

fn group(epoch: u64) -> GroupId {
    GroupId { cell: CellId(1), term: Term(3), epoch: Epoch(epoch) }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(500)
}

fn join(listener: &Listener, rank: u32, peers: &[SocketAddr]) -> Result<Tcp, ConnectError> {
    tcp::connect(listener, group(5), Rank(rank), peers, PAYLOAD_MAX, Instant::now() + PATIENCE)
}

fn tcp_group(n: u32) -> Vec<Tcp> {
    let listeners: Vec<_> = (0..n).map(|_| listener()).collect();
    let peers: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
    std::thread::scope(|scope| {
        let peers = &peers;
        let threads: Vec<_> = (0u32..).zip(&listeners).map(|(r, l)| scope.spawn(move || join(l, r, peers))).collect();
        threads.into_iter().map(|t| t.join().unwrap().unwrap()).collect()
    })
}

/// Runs rank 0 and a rank 1 that is not what rank 0 expects, then the true rank 1, which joins.
fn refused_then_joined(stranger: impl Fn(&[SocketAddr]) -> ConnectError + Sync) -> ConnectError {
    let listeners = [listener(), listener()];
    let peers: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| join(&listeners[0], 0, &peers));
        let refusal = stranger(&peers);
        let one = join(&listeners[1], 1, &peers).unwrap();
        parts_arrive_equal(vec![zero.join().unwrap().unwrap(), one]);
        refusal
    })
}

#[test]
fn another_epoch_cell_or_size_is_refused_and_the_wait_goes_on() {
    let with = |peers: &[SocketAddr], group: GroupId| {
        tcp::connect(&listener(), group, Rank(1), peers, PAYLOAD_MAX, soon()).unwrap_err()
    };
    let old = refused_then_joined(|peers| with(peers, group(4)));
    assert!(matches!(old, ConnectError::Refused { rank: Rank(0), why: Refusal::Stale }), "{old}");
    let early = refused_then_joined(|peers| with(peers, group(6)));
    assert!(matches!(&early, ConnectError::Deadline { waiting_for, .. } if *waiting_for == [Rank(0)]), "{early}");
    assert!(early.to_string().contains("not entered this epoch"), "{early}");
    let cell = refused_then_joined(|peers| with(peers, GroupId { cell: CellId(2), ..group(5) }));
    assert!(matches!(cell, ConnectError::Refused { rank: Rank(0), why: Refusal::Cell }), "{cell}");
    let size = refused_then_joined(|peers| with(&[peers, peers].concat(), group(5)));
    assert!(matches!(size, ConnectError::Refused { rank: Rank(0), why: Refusal::Rank }), "{size}");
    let nowhere = with(&[any_port()], group(5));
    assert!(matches!(nowhere, ConnectError::NoSuchRank { rank: Rank(1), size: 1 }), "{nowhere}");
}

#[test]
fn another_token_or_none_is_refused_and_the_wait_goes_on() {
    for token in [token("a token of the clusteR"), None] {
        let refusal = refused_then_joined(|peers| {
            let listener = Listener::bind(any_port(), token.clone()).unwrap();
            tcp::connect(&listener, group(5), Rank(1), peers, PAYLOAD_MAX, soon()).unwrap_err()
        });
        assert!(matches!(refusal, ConnectError::Refused { rank: Rank(0), why: Refusal::Token }), "{refusal}");
    }
}

#[test]
fn beyond_loopback_a_token_is_required() {
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    assert!(Listener::bind(everywhere, None).is_err());
    assert!(Listener::bind(everywhere, token("a token of the cluster")).is_ok());
}

#[test]
fn silent_and_chattering_strangers_do_not_keep_ranks_apart() {
    let listeners = [listener(), listener()];
    let peers: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
    let mut strangers: Vec<_> = (0..100).map(|_| TcpStream::connect(peers[0]).unwrap()).collect();
    for stranger in strangers.iter_mut().step_by(2) {
        stranger
            .write_all(
                b"GET / HTTP/1.1\r\nHost: here\r\nAccept: everything that there is, and then some more of it\r\n\r\n",
            )
            .unwrap();
    }
    let joined = std::thread::scope(|scope| {
        let zero = scope.spawn(|| join(&listeners[0], 0, &peers));
        let one = join(&listeners[1], 1, &peers).unwrap();
        vec![zero.join().unwrap().unwrap(), one]
    });
    parts_arrive_equal(joined);
}

#[test]
fn nobody_waits_for_ever_for_a_rank_that_never_comes() {
    let here = listener();
    let peers = [here.local_addr().unwrap(), listener().local_addr().unwrap()];
    let error = tcp::connect(&here, group(5), Rank(0), &peers, PAYLOAD_MAX, soon()).unwrap_err();
    assert!(matches!(&error, ConnectError::Deadline { waiting_for, .. } if *waiting_for == [Rank(1)]), "{error}");
}

#[test]
fn whom_a_rank_waits_for_can_be_seen_meanwhile() {
    let mut group = tcp_group(3);
    let progress = ProgressCell::default();
    let late = group.pop().unwrap();
    let early = vec![group.remove(0).watched_by(progress.clone()), group.remove(0)];
    let exchange_once = |mut c: Tcp| {
        c.begin(fence(4), Instant::now() + PATIENCE);
        let mut send = parts_from(1, c.rank().0, 3);
        swap(&mut c, exchange(0, DISPATCH), &mut send, &mut HostParts::default()).unwrap();
    };
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| each(early, exchange_once));
        while progress.get().waiting_for != [Rank(2)] {
            std::thread::yield_now();
        }
        assert_eq!(progress.get().step, StepId(4));
        exchange_once(late);
        waiting.join().unwrap();
    });
}

#[test]
fn parts_longer_than_agreed_are_not_sent() {
    each(tcp_group(2), |mut c| {
        c.begin(fence(1), Instant::now() + PATIENCE);
        let mut send = HostParts { by_rank: vec![vec![0; PAYLOAD_MAX as usize + 1]; 2] };
        let error = swap(&mut c, exchange(0, DISPATCH), &mut send, &mut HostParts::default()).unwrap_err();
        assert!(matches!(error, CollectiveError::Corrupt { .. } | CollectiveError::Lost { .. }), "{error}");
    });
}

/// Forwards one connection, and flips a bit of the byte at `flip` counted from when `armed` was set.
fn damage(listener: TcpListener, to: SocketAddr, armed: Arc<AtomicBool>, flip: (usize, u8)) {
    let near = listener.accept().unwrap().0;
    let far = TcpStream::connect(to).unwrap();
    let pump = |mut from: TcpStream, mut to: TcpStream, flip: Option<(usize, u8)>| {
        let armed = Arc::clone(&armed);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            let mut seen = 0;
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                if armed.load(Ordering::SeqCst) {
                    if let Some((at, bit)) = flip
                        && (seen..seen + n).contains(&at)
                    {
                        bytes[at - seen] ^= 1 << bit;
                    }
                    seen += n;
                }
                if to.write_all(&bytes[..n]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        })
    };
    let back = pump(far.try_clone().unwrap(), near.try_clone().unwrap(), None);
    pump(near, far, Some(flip)).join().unwrap();
    back.join().unwrap();
}

#[test]
fn every_flipped_bit_is_seen() {
    const ROWS: usize = 300;
    let seed = std::process::id();
    println!("seed {seed}");
    let mut rng = Rng(seed.into());
    for round in 0..100 {
        // A third of the flips hits the header.
        let within = if round % 3 == 0 { tcp::HEADER_BYTES } else { tcp::HEADER_BYTES + ROWS * ROW };
        let flip = (rng.below(within), rng.below(8) as u8);
        let armed = Arc::new(AtomicBool::new(false));
        let listeners = [listener(), listener()];
        let [zero, one] = [0, 1].map(|r: usize| listeners[r].local_addr().unwrap());
        let proxy = TcpListener::bind(any_port()).unwrap();
        let by_proxy = [proxy.local_addr().unwrap(), one];
        std::thread::scope(|scope| {
            let wire = Arc::clone(&armed);
            scope.spawn(move || damage(proxy, zero, wire, flip));
            let zero = scope.spawn(|| join(&listeners[0], 0, &[zero, one]).unwrap());
            let one = join(&listeners[1], 1, &by_proxy).unwrap();
            let group = vec![zero.join().unwrap(), one];
            armed.store(true, Ordering::SeqCst);
            let errors = each(group, |mut c| {
                c.begin(fence(1), Instant::now() + PATIENCE);
                let mut send = HostParts { by_rank: vec![vec![c.rank().0 as u8; ROWS * ROW]; 2] };
                let mut received = HostParts::default();
                let first = swap(&mut c, exchange(0, DISPATCH), &mut send, &mut received);
                // Rank 1 received true bytes, and may learn only now that its own were damaged.
                first
                    .and_then(|()| swap(&mut c, exchange(0, COMBINE), &mut received.clone(), &mut received))
                    .unwrap_err()
            });
            assert!(matches!(errors[0], CollectiveError::Corrupt { rank: Rank(1), .. }), "{flip:?}: {}", errors[0]);
            assert!(matches!(errors[1], CollectiveError::Lost { rank: Rank(1), .. }), "{flip:?}: {}", errors[1]);
        });
    }
}
