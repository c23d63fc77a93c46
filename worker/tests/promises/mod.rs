//! What every communicator promises, whatever carries its bytes.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "each user takes a part")]

use std::time::{Duration, Instant};

use phalanx_kernels::HostParts;
use phalanx_model::{CollectiveError, Collectives, Exchange, ExchangeKind};
use phalanx_proto::{Epoch, ExchangeCounters, Fence, LayerIdx, Rank, StepId, Term};

/// Longer than any test; reached only by a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// splitmix64.
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

pub(crate) const ROW: usize = 24;

/// What `from` sends to `to` in the `round`th exchange: nothing, a row, some rows, or more than a socket holds.
pub(crate) fn part(round: u32, from: u32, to: u32) -> Vec<u8> {
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

pub(crate) fn parts_from(round: u32, from: u32, n: u32) -> HostParts {
    HostParts { by_rank: (0..n).map(|to| part(round, from, to)).collect() }
}

pub(crate) fn parts_to(round: u32, to: u32, n: u32) -> HostParts {
    HostParts { by_rank: (0..n).map(|from| part(round, from, to)).collect() }
}

pub(crate) fn fence(step: u64) -> Fence {
    Fence { term: Term(3), epoch: Epoch(5), step: StepId(step) }
}

pub(crate) fn exchange(layer: u32, kind: ExchangeKind) -> Exchange {
    Exchange { layer: LayerIdx(layer), kind, row_bytes: ROW }
}

pub(crate) const DISPATCH: ExchangeKind = ExchangeKind::Dispatch;
pub(crate) const COMBINE: ExchangeKind = ExchangeKind::Combine;

/// Runs every rank in a thread of its own; a rank's communicator is dropped when its thread ends.
pub(crate) fn each<C: Collectives<HostParts>, R: Send>(group: Vec<C>, work: impl Fn(C) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = group.into_iter().map(|c| scope.spawn(|| work(c))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

pub(crate) fn swap<C: Collectives<HostParts>>(
    c: &mut C,
    exchange: Exchange,
    send: &mut HostParts,
    received: &mut HostParts,
) -> Result<(), CollectiveError> {
    c.start(exchange, send)?;
    c.finish(exchange, received)
}

pub(crate) fn parts_arrive_equal<C: Collectives<HostParts>>(group: Vec<C>) {
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

pub(crate) fn combine_undoes_dispatch<C: Collectives<HostParts>>(group: Vec<C>) {
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
pub(crate) fn a_rank_that_stops_is_named<C: Collectives<HostParts>>(group: Vec<C>) {
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
pub(crate) fn a_rank_that_hangs_is_named<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len() as u32;
    let last = Rank(n - 1);
    let (ready, given_up) = (std::sync::Barrier::new(n as usize), std::sync::Barrier::new(n as usize));
    each(group, |mut c| {
        let mut send = parts_from(2, c.rank().0, n);
        ready.wait();
        if c.rank() != last {
            // Long enough for the others to send theirs.
            c.begin(fence(1), Instant::now() + Duration::from_secs(1));
            let error = swap(&mut c, exchange(0, DISPATCH), &mut send, &mut HostParts::default()).unwrap_err();
            let named = matches!(error, CollectiveError::Lost { .. } | CollectiveError::Deadline { .. });
            assert!(named, "{error}");
            assert_eq!(error.blamed(), [last], "{error}");
        }
        given_up.wait();
    });
}

/// Rank 1 is a step ahead: nobody uses its rows.
pub(crate) fn another_moment_is_refused<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len();
    each(group, |mut c| {
        let ours = fence(7 + u64::from(c.rank() == Rank(1)));
        c.begin(ours, Instant::now() + PATIENCE);
        let error = swap(&mut c, exchange(0, COMBINE), &mut HostParts::new(n), &mut HostParts::default()).unwrap_err();
        let refused = matches!(error, CollectiveError::Fence { theirs, .. } if theirs != ours);
        assert!(refused || matches!(error, CollectiveError::Lost { .. }), "{error}");
    });
}

pub(crate) fn another_exchange_is_refused<C: Collectives<HostParts>>(group: Vec<C>) {
    let n = group.len();
    each(group, |mut c| {
        c.begin(fence(1), Instant::now() + PATIENCE);
        let here = exchange(c.rank().0, DISPATCH);
        let error = swap(&mut c, here, &mut HostParts::new(n), &mut HostParts::default()).unwrap_err();
        assert!(matches!(error, CollectiveError::Corrupt { .. } | CollectiveError::Lost { .. }), "{error}");
    });
}

/// Rank 0 is through with one exchange and sends the next while rank 1 has not read the first.
pub(crate) fn a_rank_may_be_one_exchange_ahead<C: Collectives<HostParts>>(group: Vec<C>) {
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

pub(crate) fn counters_count<C: Collectives<HostParts>>(group: Vec<C>, frame: usize) {
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
                [1, 2, 3, 5].into_iter().for_each(|n| promises::parts_arrive_equal($group(n)));
            }

            #[test]
            fn combine_undoes_dispatch() {
                [1, 2, 3, 5].into_iter().for_each(|n| promises::combine_undoes_dispatch($group(n)));
            }

            #[test]
            fn a_rank_that_stops_is_named() {
                [2, 3, 5].into_iter().for_each(|n| promises::a_rank_that_stops_is_named($group(n)));
            }

            #[test]
            fn a_rank_that_hangs_is_named() {
                [2, 3, 5].into_iter().for_each(|n| promises::a_rank_that_hangs_is_named($group(n)));
            }

            #[test]
            fn another_moment_is_refused() {
                [2, 3, 5].into_iter().for_each(|n| promises::another_moment_is_refused($group(n)));
            }

            #[test]
            fn another_exchange_is_refused() {
                [2, 3, 5].into_iter().for_each(|n| promises::another_exchange_is_refused($group(n)));
            }

            #[test]
            fn counters_count() {
                [1, 2, 3, 5].into_iter().for_each(|n| promises::counters_count($group(n), $frame));
            }
        }
    };
}
