//! What every communicator promises, checked over threads and over sockets.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use phalanx_kernels::HostParts;
use phalanx_model::{CollectiveError, Collectives};
use phalanx_proto::{CellId, Epoch, Rank, StepId, Term};
use phalanx_worker::collectives::tcp::{self, ConnectError, Listener, Refusal, Tcp};
use phalanx_worker::collectives::{GroupId, local};
use phalanx_worker::progress::ProgressCell;
use phalanx_worker::tenure::Tenure;

#[macro_use]
mod promises;
use promises::{COMBINE, DISPATCH, PATIENCE, ROW, Rng, each, exchange, fence, parts_arrive_equal, parts_from, swap};

promises!(threads, local::group, 0);
promises!(sockets, tcp_group, tcp::HEADER_BYTES);

#[test]
fn a_rank_may_be_one_exchange_ahead() {
    for n in [2, 3, 5] {
        promises::a_rank_may_be_one_exchange_ahead(local::group(n));
        promises::a_rank_may_be_one_exchange_ahead(tcp_group(n));
    }
}

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
    tcp::connect(listener, group(5), Rank(rank), peers, PAYLOAD_MAX, Instant::now() + PATIENCE, &Tenure::default())
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
        tcp::connect(&listener(), group, Rank(1), peers, PAYLOAD_MAX, soon(), &Tenure::default()).unwrap_err()
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
            tcp::connect(&listener, group(5), Rank(1), peers, PAYLOAD_MAX, soon(), &Tenure::default()).unwrap_err()
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
    let error = tcp::connect(&here, group(5), Rank(0), &peers, PAYLOAD_MAX, soon(), &Tenure::default()).unwrap_err();
    assert!(matches!(&error, ConnectError::Deadline { waiting_for, .. } if *waiting_for == [Rank(1)]), "{error}");
}

/// With hours to go, on either side of joining.
#[test]
fn nobody_waits_for_a_rank_on_behalf_of_a_tenure_that_is_over() {
    let later = Instant::now() + Duration::from_secs(3600);
    let listeners = [listener(), listener()];
    let peers: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
    let connect = |rank: u32, tenure: &Tenure| {
        tcp::connect(&listeners[rank as usize], group(5), Rank(rank), &peers, PAYLOAD_MAX, later, tenure)
    };
    std::thread::scope(|scope| {
        let (hold, tenure) = Tenure::begin();
        let waiting = scope.spawn(move || connect(0, &tenure));
        drop(hold);
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(&error, ConnectError::Over { waiting_for, .. } if *waiting_for == [Rank(1)]), "{error}");
    });
    std::thread::scope(|scope| {
        let (hold, tenure) = Tenure::begin();
        let zero = scope.spawn(move || connect(0, &tenure));
        let one = connect(1, &Tenure::default()).unwrap();
        let mut zero = zero.join().unwrap().unwrap();
        let waiting = scope.spawn(move || {
            zero.begin(fence(1), later);
            swap(&mut zero, exchange(0, DISPATCH), &mut parts_from(1, 0, 2), &mut HostParts::default()).unwrap_err()
        });
        drop(hold);
        let error = waiting.join().unwrap();
        assert_eq!((&error, error.blamed()), (&CollectiveError::Over, [].as_slice()));
        drop(one);
    });
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
