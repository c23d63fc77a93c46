//! Workers as the coordinator sees them: real sockets, and fake workers behind them.

#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;
mod resume;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fake::{Answers, Fake, OPTIONS, Running, connect, description, form, heard, limits, plan, soon, start};
use phalanx_coordinator::workers::{
    CellError, CellEvent, CellLink, CellOptions, ChannelLink, ClusterToken, Forming, LinkError, Progress, WorkerError,
    WorkerHandle, form_cell, release_all,
};
use phalanx_proto::{
    Bytes, CellId, Epoch, Fence, Layout, MemoryPlan, NumericsId, Placement, Rank, StepId, StepResult, Term,
};
use phalanx_wire::{Description, Health, Join, VERSION};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::Instant;

async fn refused(fakes: impl IntoIterator<Item = Fake>) -> (CellError, Vec<Running>) {
    let running = start(fakes);
    (form(&running).await.expect_err("a refusal"), running)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_is_formed_steps_and_is_given_back() {
    let running = start([Fake::new(), Fake::new(), Fake::new()]);
    let (mut workers, events) = form(&running).await.unwrap();
    assert_eq!(workers.fence, Fence { term: Term(4), epoch: Epoch(6), step: StepId(0) });
    assert_eq!(workers.config, description().config);
    assert_eq!(workers.layout, Layout::new(3, 1).unwrap());
    assert_eq!(workers.plans.len(), 3);

    for rank in workers.layout.ranks() {
        let address = running[rank.index()].address.to_string();
        let progress = Progress { stage: "experts".to_owned(), done_bytes: 1, total_bytes: 2 };
        let expected = [
            Forming::Joined { rank, address },
            Forming::Loading { rank, progress },
            Forming::Ready { rank, allocated: Bytes(77) },
        ];
        let of_rank: Vec<&Forming> = events.iter().filter(|event| expected.contains(event)).collect();
        assert_eq!(of_rank, expected.iter().collect::<Vec<_>>());

        let seen = running[rank.index()].seen.lock().unwrap();
        let version = VERSION.to_owned();
        assert_eq!(seen.joins, [Join { cell: CellId(3), term: Term(4), instance: 5, version }]);
        let prepared = &seen.prepared[0];
        assert_eq!((prepared.rank, prepared.cell, prepared.fence), (rank, CellId(3), workers.fence));
        assert_eq!((&prepared.placement, prepared.limits), (&workers.placement, workers.limits));
        // The worker listens everywhere; others reach it where the coordinator did.
        assert_eq!(prepared.peers, vec!["127.0.0.1:7001".parse::<SocketAddr>().unwrap(); 3]);
    }

    for step in 1..=20 {
        workers.link.send(vec![plan(step); 3]).await.unwrap();
        let mut ranks = BTreeSet::new();
        for _ in 0..3 {
            let CellEvent::Reply { rank, reply: Ok(result) } = heard(&mut workers.link).await else { panic!("lost") };
            assert_eq!((result.rank, result.fence.step), (rank, StepId(step)));
            ranks.insert(rank);
        }
        assert_eq!(ranks.len(), 3);
    }
    assert_eq!(workers.handles[2].health().await.unwrap(), Health::default());
    release_all(&workers.handles, workers.release, Duration::from_secs(10)).await;
    for worker in &running {
        assert_eq!(worker.seen.lock().unwrap().releases, [OPTIONS.release()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_that_differs_from_most_is_named() {
    let others = |d: &mut Description| d.numerics = NumericsId("cpu-2/fast".to_owned());
    // Also when it is the first one.
    for odd in 0..3 {
        let mut fakes = vec![Fake::new(); 3];
        fakes[odd] = Fake::described(others);
        fakes.iter_mut().for_each(|fake| fake.seen = Arc::default());
        let (error, running) = refused(fakes).await;
        let CellError::Differ { what: "numerics", odd: named, theirs, ours, .. } = &error else { panic!("{error}") };
        assert_eq!(*named, running[odd].address.to_string());
        assert_eq!((theirs.as_str(), ours.as_str()), ("cpu-2/fast", "cpu-1/exact"));
        // All are given back.
        assert!(running.iter().all(|worker| worker.seen.lock().unwrap().releases == [OPTIONS.release()]));
    }

    let (error, _) = refused([Fake::new(), Fake::described(|d| d.model = "other".to_owned())]).await;
    assert!(matches!(error, CellError::Differ { what: "model", .. }), "{error}");
    let (error, _) = refused([Fake::new(), Fake::described(|d| d.config.eps = 1e-6)]).await;
    assert!(error.to_string().contains("has configuration `eps: 1e-6`"), "{error}");
    let (error, running) = refused([Fake::new(), Fake::described(|d| d.version = "9.9.9".to_owned())]).await;
    assert!(matches!(&error, CellError::Version { theirs, .. } if theirs == "9.9.9"), "{error}");
    assert!(error.to_string().contains(&running[1].address.to_string()), "{error}");
}

/// What each of two ranks needs.
fn needed() -> u64 {
    let Description { config, backend, .. } = description();
    let layout = Layout::new(2, OPTIONS.survive).unwrap();
    let placement = Placement::contiguous(2, config.experts, layout);
    MemoryPlan::new(&config, layout, &placement, Rank(0), &limits(&config, layout), &backend).total().0
}

fn with_memory(memory: u64, pool: &str) -> Fake {
    Fake::described(|d| {
        d.backend.memory = Bytes(memory);
        d.memory_pool = pool.to_owned();
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_fit_is_refused_before_it_is_loaded() {
    let needed = needed();
    let (error, running) = refused([with_memory(needed, ""), with_memory(needed - 1, "")]).await;
    let CellError::Memory { address, source } = &error else { panic!("{error}") };
    assert_eq!((address, source.plan.rank), (&running[1].address.to_string(), Rank(1)));
    assert!(running.iter().all(|worker| worker.seen.lock().unwrap().prepared.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_share_a_memory_must_fit_it_together() {
    let needed = needed();
    let (error, _) = refused([with_memory(2 * needed - 1, "host"), with_memory(2 * needed - 1, "host")]).await;
    assert!(matches!(&error, CellError::Memory { source, .. } if source.plan.rank == Rank(1)), "{error}");
    for pools in [["host", "other"], ["", ""]] {
        form(&start(pools.map(|pool| with_memory(needed, pool)))).await.unwrap();
    }
    form(&start(["host"; 2].map(|pool| with_memory(2 * needed, pool)))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_cannot_load_is_named_and_the_others_are_given_back() {
    let waits = Fake { prepare_hangs: true, ..Fake::new() };
    let fails = Fake { prepare_fails: true, ..Fake::new() };
    let (error, running) = refused([waits, fails]).await;
    let expected = format!("rank 1 at {} fails prepare: shard 2 is truncated", running[1].address);
    assert_eq!(error.to_string(), expected);
    assert!(running.iter().all(|worker| worker.seen.lock().unwrap().releases == [OPTIONS.release()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn loading_ends_at_its_deadline() {
    let running = start([Fake { prepare_hangs: true, ..Fake::new() }]);
    let handle = connect(running[0].address).await;
    let options = CellOptions { survive: 0, prepare_wait: Duration::from_millis(50), ..OPTIONS };
    let error = form_cell(vec![handle], options, limits, &Default::default(), &mut |_| {}).await.unwrap_err();
    assert!(matches!(error, CellError::Worker(WorkerError::Deadline { call: "prepare", .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_is_named_even_when_nothing_is_asked_of_it() {
    let mut running = start([Fake::new(), Fake::new(), Fake::new()]);
    let (mut workers, _) = form(&running).await.unwrap();
    running[1].kill();
    let CellEvent::Lost { rank, address, why } = heard(&mut workers.link).await else { panic!("a reply") };
    assert_eq!((rank, address), (Rank(1), running[1].address.to_string()));
    assert!(!why.is_empty());
    // The others are there still.
    workers.handles[0].health().await.unwrap();
    workers.handles[2].health().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_within_a_step_is_named() {
    let mut running = start([Fake::new(), Fake::answering(Answers::Never)]);
    let (mut workers, _) = form(&running).await.unwrap();
    workers.link.send(vec![plan(1); 2]).await.unwrap();
    assert!(matches!(heard(&mut workers.link).await, CellEvent::Reply { rank: Rank(0), reply: Ok(_) }));
    running[1].kill();
    assert!(matches!(heard(&mut workers.link).await, CellEvent::Lost { rank: Rank(1), .. }));
}

/// Passes bytes on until it is told to freeze; then it keeps both connections and says nothing more.
async fn freezing_proxy(to: SocketAddr) -> (SocketAddr, Arc<Notify>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let freeze = Arc::new(Notify::new());
    let frozen = Arc::clone(&freeze);
    tokio::spawn(async move {
        let (mut here, _) = listener.accept().await.unwrap();
        let mut there = TcpStream::connect(to).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut here, &mut there) => {}
            () = frozen.notified() => std::future::pending().await,
        }
    });
    (address, freeze)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_falls_silent_is_named_even_when_nothing_is_asked_of_it() {
    let running = start([Fake::new(), Fake::new()]);
    let (proxy, freeze) = freezing_proxy(running[1].address).await;
    let handles = vec![connect(running[0].address).await, connect(proxy).await];
    let mut workers = form_cell(handles, OPTIONS, limits, &Default::default(), &mut |_| {}).await.unwrap();
    freeze.notify_one();
    let CellEvent::Lost { rank, address, .. } = heard(&mut workers.link).await else { panic!("a reply") };
    assert_eq!((rank, address), (Rank(1), proxy.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_passed_on_and_nonsense_loses_the_worker() {
    let running = start([
        Fake::answering(Answers::WithFailure),
        Fake::answering(Answers::AsAnotherRank),
        Fake::answering(Answers::Damaged),
    ]);
    let (mut workers, _) = form(&running).await.unwrap();
    workers.link.send(vec![plan(1); 3]).await.unwrap();
    let mut events = Vec::new();
    for _ in 0..3 {
        events.push(heard(&mut workers.link).await);
    }
    events.sort_by_key(|event| match event {
        CellEvent::Reply { rank, .. } | CellEvent::Lost { rank, .. } => *rank,
    });
    let CellEvent::Reply { reply: Err(failure), .. } = &events[0] else { panic!("{events:?}") };
    assert_eq!(failure.blamed, [Rank(0)]);
    assert!(matches!(&events[1], CellEvent::Lost { why, .. } if why.contains("as rank 2")), "{events:?}");
    assert!(matches!(&events[2], CellEvent::Lost { why, .. } if why.contains("checksum")), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_is_sent_and_its_lack_is_told() {
    let token = ClusterToken::parse("correct-horse-battery-staple").unwrap();
    let running = start([Fake { token: Some(token.clone()), ..Fake::new() }]);
    let options = CellOptions { survive: 0, ..OPTIONS };
    let handle = connect(running[0].address).await;
    let error = form_cell(vec![handle], options, limits, &Default::default(), &mut |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("cluster token"), "{error}");
    let address = running[0].address.to_string();
    let handle = WorkerHandle::connect(&address, Some(&token), soon()).await.unwrap();
    form_cell(vec![handle], options, limits, &Default::default(), &mut |_| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_lead_nowhere_are_told() {
    for wrong in ["", "localhost", ":7001", "localhost:port", "localhost:99999", "http://localhost:7001", "a b:1"] {
        let error = WorkerHandle::connect(wrong, None, soon()).await.unwrap_err();
        assert!(matches!(error, WorkerError::Address { .. }), "{wrong}: {error}");
    }
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let deadline = Instant::now() + Duration::from_millis(200);
    let error = WorkerHandle::connect(&nobody, None, deadline).await.unwrap_err();
    assert!(matches!(error, WorkerError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&nobody), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_needs_workers_each_once() {
    let error = form_cell(Vec::new(), OPTIONS, limits, &Default::default(), &mut |_| {}).await.unwrap_err();
    assert!(matches!(error, CellError::Layout(_)), "{error}");
    let running = start([Fake::new()]);
    let handle = connect(running[0].address).await;
    let error =
        form_cell(vec![handle.clone(), handle], OPTIONS, limits, &Default::default(), &mut |_| {}).await.unwrap_err();
    assert!(matches!(error, CellError::Twice { .. }), "{error}");
    assert!(running[0].seen.lock().unwrap().joins.is_empty());
}

#[tokio::test]
async fn a_link_of_channels_carries_plans_and_events() {
    let (mut link, mut ports) = ChannelLink::new(2);
    assert_eq!(link.send(vec![plan(1)]).await, Err(LinkError::Count { plans: 1, ranks: 2 }));
    link.send(vec![plan(1); 2]).await.unwrap();
    let mut last = ports.pop().unwrap();
    assert_eq!((last.rank, last.plans.recv().await), (Rank(1), Some(plan(1))));
    let reply = CellEvent::Reply { rank: Rank(1), reply: Ok(StepResult::default()) };
    last.events.send(reply.clone()).await.unwrap();
    assert_eq!(link.recv().await, reply);
    drop(last);
    assert_eq!(link.send(vec![plan(2); 2]).await, Err(LinkError::Closed { rank: Rank(1) }));
}
