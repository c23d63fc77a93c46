//! Connections that break, and bytes that change on their way: the driver hears nothing of it, or of a loss.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use phalanx_coordinator::workers::{
    CellEvent, CellLink, CellOptions, ChannelLink, MemoryPools, PLANS_AHEAD_MAX, Workers, form_cell,
};
use phalanx_proto::{Outputs, Position, Rank, Rows, SeqId, Start, StepPlan, TokenId, Tokens};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use super::fake::{Answers, Fake, OPTIONS, Running, connect, heard, limits, plan, result_of, start};

/// splitmix64.
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

#[derive(Clone, Copy, PartialEq)]
enum Harm {
    /// Ends the connection within any byte.
    Cut,
    /// Changes a bit of any byte. What then waits for bytes that never come is cut.
    Flip,
}

/// How long a connection lives on after a bit was changed.
const AFTER_FLIP: Duration = Duration::from_millis(5);

/// Passes bytes on between a coordinator and a worker, and does harm to each connection.
struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    to: Mutex<SocketAddr>,
    harm: Harm,
    rng: Mutex<Rng>,
    armed: AtomicBool,
    done: AtomicUsize,
    cut: Notify,
}

impl Proxy {
    async fn start(to: SocketAddr, harm: Harm, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            to: Mutex::new(to),
            harm,
            rng: Mutex::new(Rng(seed)),
            armed: AtomicBool::new(false),
            done: AtomicUsize::new(0),
            cut: Notify::new(),
        });
        let proxy = Self { address, shared: Arc::clone(&shared) };
        tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                let to = *shared.to.lock().unwrap();
                let Ok(there) = TcpStream::connect(to).await else { continue };
                tokio::spawn(Arc::clone(&shared).connection(here, there));
            }
        });
        proxy
    }

    /// From now on each connection is harmed.
    fn arm(&self) {
        self.shared.armed.store(true, Ordering::SeqCst);
    }

    /// Ends the connection there is.
    fn cut(&self) {
        self.shared.cut.notify_waiters();
    }

    /// How many connections have been harmed.
    fn done(&self) -> usize {
        self.shared.done.load(Ordering::SeqCst)
    }
}

impl Shared {
    async fn connection(self: Arc<Self>, here: TcpStream, there: TcpStream) {
        here.set_nodelay(true).unwrap();
        there.set_nodelay(true).unwrap();
        // Enough for some plans to come through.
        let left = Mutex::new(1000 + self.rng.lock().unwrap().below(6000));
        let (from_here, to_here) = here.into_split();
        let (from_there, to_there) = there.into_split();
        tokio::select! {
            () = self.pass(from_here, to_there, &left) => {}
            () = self.pass(from_there, to_here, &left) => {}
            () = self.cut.notified() => {}
        }
    }

    /// Passes bytes on until the connection ends or is to end.
    async fn pass(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, left: &Mutex<usize>) {
        let mut bytes = [0; 512];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            let harmed_at = self.armed.load(Ordering::SeqCst).then(|| harmed_at(left, count)).flatten();
            let Some(at) = harmed_at else {
                if to.write_all(&bytes[..count]).await.is_err() {
                    return;
                }
                continue;
            };
            self.done.fetch_add(1, Ordering::SeqCst);
            if self.harm == Harm::Cut {
                drop(to.write_all(&bytes[..at]).await);
                return;
            }
            bytes[at] ^= 1 << self.rng.lock().unwrap().below(8);
            drop(to.write_all(&bytes[..count]).await);
            let rest = async { while let Ok(1..) = tokio::io::copy(&mut from, &mut to).await {} };
            drop(tokio::time::timeout(AFTER_FLIP, rest).await);
            return;
        }
    }
}

/// Which of the next `count` bytes is harmed, if one of them is; only one of a connection is.
fn harmed_at(left: &Mutex<usize>, count: usize) -> Option<usize> {
    let mut left = left.lock().unwrap();
    let at = *left;
    if at < count {
        *left = usize::MAX;
        return Some(at);
    }
    *left = at.saturating_sub(count);
    None
}

/// A plan whose result says what it was.
fn work(step: u64) -> StepPlan {
    let tokens = (0..step % 40 + 1).map(|i| TokenId((step * 1000 + i) as u32)).collect();
    let rows = Rows {
        seq: SeqId(step),
        start: Start::At(Position(0)),
        tokens: Tokens::Given(tokens),
        outputs: Outputs::Sample,
        grants: Vec::new(),
    };
    StepPlan { rows: vec![rows], ..plan(step) }
}

async fn cell(addresses: impl IntoIterator<Item = SocketAddr>) -> Workers {
    let mut handles = Vec::new();
    for address in addresses {
        handles.push(connect(address).await);
    }
    form_cell(handles, OPTIONS, limits, &MemoryPools::default(), &mut |_| {}).await.unwrap()
}

/// Sends plans for the steps `from..=to` ahead of their results; each rank's must come once, in order, and right.
async fn drive(link: &mut ChannelLink, ranks: usize, from: u64, to: u64, rng: &mut Rng) {
    let (mut sent, mut got) = (from - 1, vec![from - 1; ranks]);
    while got.iter().any(|&step| step < to) {
        let ahead = 1 + rng.below(PLANS_AHEAD_MAX) as u64;
        while sent < to && sent - got.iter().min().unwrap() < ahead {
            sent += 1;
            link.send(vec![work(sent); ranks]).await.unwrap();
        }
        match heard(link).await {
            CellEvent::Reply { rank, reply: Ok(result) } => {
                got[rank.index()] += 1;
                assert_eq!(result, result_of(&work(got[rank.index()]), rank));
            }
            other => panic!("{other:?}"),
        }
    }
}

async fn harmed(harm: Harm, seed: u64) {
    // Seen when a test fails.
    println!("seed {seed}");
    const STEPS: u64 = 250;
    let running = start([Fake::new(), Fake::new()]);
    let mut proxies = Vec::new();
    for (worker, seed) in running.iter().zip([seed * 2, seed * 2 + 1]) {
        proxies.push(Proxy::start(worker.address, harm, seed).await);
    }
    let mut workers = cell(proxies.iter().map(|proxy| proxy.address)).await;
    proxies.iter().for_each(Proxy::arm);
    drive(&mut workers.link, 2, 1, STEPS, &mut Rng(seed)).await;
    for (worker, proxy) in running.iter().zip(&proxies) {
        assert_eq!(worker.seen.lock().unwrap().ran, (1..=STEPS).collect::<Vec<_>>(), "each step once");
        assert!(proxy.done() > 0, "no connection harmed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_anywhere_lose_and_double_nothing() {
    for seed in 0..2 {
        harmed(Harm::Cut, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bits_changed_anywhere_give_no_wrong_result() {
    for seed in 0..3 {
        harmed(Harm::Flip, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "full tier: a hundred cells with broken connections"]
async fn no_harm_to_connections_is_seen_by_the_driver() {
    for seed in 100..150 {
        harmed(Harm::Cut, seed).await;
        harmed(Harm::Flip, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_while_idle_is_mended() {
    let running = start([Fake::new(), Fake::new()]);
    let proxy = Proxy::start(running[1].address, Harm::Cut, 1).await;
    let mut workers = cell([running[0].address, proxy.address]).await;
    let rng = &mut Rng(5);
    for round in 0..10 {
        drive(&mut workers.link, 2, round * 3 + 1, round * 3 + 3, rng).await;
        proxy.cut();
    }
    drive(&mut workers.link, 2, 31, 33, rng).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_reply_is_asked_for_again() {
    let running = start([Fake::answering(Answers::DamagedOnce)]);
    let mut workers = one(running[0].address).await;
    drive(&mut workers.link, 1, 1, 20, &mut Rng(5)).await;
    assert_eq!(running[0].seen.lock().unwrap().ran.len(), 20);
}

async fn one(address: SocketAddr) -> Workers {
    let options = CellOptions { survive: 0, ..OPTIONS };
    form_cell(vec![connect(address).await], options, limits, &MemoryPools::default(), &mut |_| {}).await.unwrap()
}

async fn lost(link: &mut ChannelLink) -> (Rank, String, String) {
    match heard(link).await {
        CellEvent::Lost { rank, address, why } => (rank, address, why),
        reply @ CellEvent::Reply { .. } => panic!("{reply:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_started_anew_is_lost_by_name() {
    let running = start([Fake::new(), Fake::new()]);
    let proxy = Proxy::start(running[1].address, Harm::Cut, 1).await;
    let mut workers = cell([running[0].address, proxy.address]).await;
    let rng = &mut Rng(5);
    drive(&mut workers.link, 2, 1, 3, rng).await;
    let anew = Running::start(Fake::new());
    *proxy.shared.to.lock().unwrap() = anew.address;
    proxy.cut();
    workers.link.send(vec![work(4); 2]).await.unwrap();
    let first = heard(&mut workers.link).await;
    let second = heard(&mut workers.link).await;
    let (reply, loss) = if matches!(first, CellEvent::Lost { .. }) { (second, first) } else { (first, second) };
    assert!(matches!(reply, CellEvent::Reply { rank: Rank(0), reply: Ok(_) }), "{reply:?}");
    let CellEvent::Lost { rank, address, why } = loss else { panic!("{loss:?}") };
    assert_eq!((rank, address), (Rank(1), proxy.address.to_string()));
    assert!(why.contains("no epoch"), "{why}");
    assert!(anew.seen.lock().unwrap().ran.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_gone_for_good_is_lost_by_name() {
    let mut running = start([Fake::new()]);
    let proxy = Proxy::start(running[0].address, Harm::Cut, 1).await;
    // Behind the proxy there is somebody who listens, for a while.
    let mut workers = one(proxy.address).await;
    drive(&mut workers.link, 1, 1, 3, &mut Rng(5)).await;
    running[0].kill();
    let (rank, address, why) = lost(&mut workers.link).await;
    assert_eq!((rank, address), (Rank(0), proxy.address.to_string()));
    assert!(why.contains("cannot be resumed"), "{why}");

    // Nobody listens any more.
    let mut running = start([Fake::new()]);
    let mut workers = one(running[0].address).await;
    drive(&mut workers.link, 1, 1, 3, &mut Rng(5)).await;
    running[0].kill();
    let (_, address, why) = lost(&mut workers.link).await;
    assert_eq!(address, running[0].address.to_string());
    assert!(why.contains("refused"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_what_was_not_asked_loses_the_worker() {
    let running = start([Fake::answering(Answers::ForAnotherStep)]);
    let mut workers = one(running[0].address).await;
    workers.link.send(vec![work(1)]).await.unwrap();
    let (_, _, why) = lost(&mut workers.link).await;
    assert!(why.contains("step 2") && why.contains("not asked"), "{why}");
}
