//! The worker's service over real sockets, with a host that does what plans tell it.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use phalanx_proto::{
    BackendReport, Bytes, CellId, Epoch, Fence, LayerIdx, LayerKind, Layout, Limits, ModelConfig, NumericsId, Outputs,
    Peers, Placement, Position, Rank, Rope, Rows, Scratch, SeqId, Start, StepHeader, StepId, StepPlan, StepResult,
    Term, TokenId, Tokens,
};
use phalanx_wire::token::SendToken;
use phalanx_wire::v1::worker_client::WorkerClient;
use phalanx_wire::{
    ClusterToken, Description, Health, Join, Prepare, PrepareEvent, Progress, StepFailure, StepReply, WorkerState, v1,
};
use phalanx_worker::progress::ProgressCell;
use phalanx_worker::runner::{Outcomes, STEPS_IN_FLIGHT};
use phalanx_worker::service::{Host, HostError, NoResult, ServeError, serve};
use phalanx_worker::tenure::Tenure;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

/// What a plan tells the fake host, as its deadline.
const OBEY: u32 = 0;
const FAIL: u32 = 1;
const PANIC: u32 = 2;
const HANG: u32 = 3;
/// Is done once the next step has begun.
const HOLD: u32 = 4;
/// Is not done until it is waited for, and no step may begin before.
const ALONE: u32 = 5;
/// Is done once the next step has begun, and fails then.
const FALTER: u32 = 6;
/// Panics when it is asked whether it is done.
const STARTLE: u32 = 7;
/// Waits for peers that never come.
const AWAIT: u32 = 8;
/// Sequences of an epoch that waits for peers that never come.
const ALONE_IN_CELL: u32 = 14;

/// Counts the steps it runs, and hangs until `wake` says so.
struct FakeHost {
    steps: Arc<Mutex<Vec<Fence>>>,
    wake: mpsc::Receiver<()>,
    progress: ProgressCell,
    tenure: Tenure,
    outcomes: Outcomes<StepFailure>,
    /// Begun, and run when finished.
    begun: VecDeque<StepPlan>,
}

impl FakeHost {
    fn new(steps: Arc<Mutex<Vec<Fence>>>, wake: mpsc::Receiver<()>) -> Self {
        Self {
            steps,
            wake,
            progress: ProgressCell::default(),
            tenure: Tenure::default(),
            outcomes: Outcomes::new(Fence::default()),
            begun: VecDeque::new(),
        }
    }

    /// As collectives do.
    fn wait_for_peers(&self) {
        while !self.tenure.is_over() {
            std::thread::yield_now();
        }
    }

    fn step(&self, plan: &StepPlan) -> StepReply {
        let fence = plan.header.fence;
        self.steps.lock().unwrap().push(fence);
        self.progress.begin(fence.step);
        match plan.header.deadline_ms {
            FAIL | FALTER => {
                return Err(StepFailure { fence, message: "rank 2 is lost".to_owned(), blamed: vec![Rank(2)] });
            }
            PANIC => panic!("told to"),
            HANG => {
                self.progress.at(LayerIdx(7), "combine");
                self.progress.waiting_for([Rank(3)]);
                self.wake.recv().unwrap();
            }
            AWAIT => {
                self.wait_for_peers();
                return Err(StepFailure { fence, message: "the epoch is over".to_owned(), blamed: Vec::new() });
            }
            _ => {}
        }
        Ok(StepResult { fence, rank: Rank(1), ..StepResult::default() })
    }
}

impl Host for FakeHost {
    fn describe(&self) -> Description {
        description()
    }

    fn progress(&self) -> ProgressCell {
        self.progress.clone()
    }

    fn prepare(
        &mut self,
        request: &Prepare,
        tenure: &Tenure,
        on_progress: &dyn Fn(Progress),
    ) -> Result<u64, HostError> {
        if request.limits.seqs_max == 13 {
            let cause = std::io::Error::new(ErrorKind::NotFound, "no such shard");
            return Err(Box::new(std::io::Error::other(cause)));
        }
        on_progress(Progress { stage: "experts".to_owned(), done_bytes: 1, total_bytes: 2 });
        self.tenure = tenure.clone();
        if request.limits.seqs_max == ALONE_IN_CELL {
            self.wait_for_peers();
            return Err("the peers never came".into());
        }
        self.outcomes = Outcomes::new(request.fence);
        Ok(4096)
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), NoResult> {
        assert!(self.overlaps(&plan.header), "the step under way is told first");
        let waits = plan.rows.iter().any(|rows| rows.outputs == Outputs::AllLogits);
        assert!(!waits || self.begun.is_empty(), "nobody is told of the step under way while this one waits");
        self.begun.push_back(plan.clone());
        assert!(self.begun.len() <= 2);
        Ok(())
    }

    fn is_done(&mut self) -> bool {
        self.begun.front().is_none_or(|plan| match plan.header.deadline_ms {
            HOLD | FALTER => self.begun.len() > 1,
            ALONE => false,
            STARTLE => panic!("asked"),
            _ => true,
        })
    }

    fn overlaps(&self, _header: &StepHeader) -> bool {
        self.begun.back().is_none_or(|plan| plan.header.deadline_ms != ALONE)
    }

    fn finish(&mut self, fence: Fence) -> Result<StepResult, NoResult> {
        let plan = &self.begun.pop_front().unwrap();
        assert_eq!(plan.header.fence, fence);
        match self.outcomes.of(fence) {
            Ok(Some(outcome)) => outcome.map_err(NoResult::Failed),
            Ok(None) => {
                let outcome = self.step(plan);
                self.outcomes.keep(&plan.header, &outcome);
                outcome.map_err(NoResult::Failed)
            }
            Err(error) => Err(NoResult::Refused(StepFailure { fence, message: error.to_string(), blamed: Vec::new() })),
        }
    }

    fn release(&mut self) {}
}

fn description() -> Description {
    Description {
        version: phalanx_wire::VERSION.to_owned(),
        numerics: NumericsId("fake".to_owned()),
        config: ModelConfig {
            hidden: 64,
            intermediate: 32,
            layers: vec![LayerKind::Sliding, LayerKind::Full],
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            experts: 8,
            top_k: 2,
            window: 5,
            vocab: 1 << 20,
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
            eos: vec![3],
        },
        model: "tiny".to_owned(),
        backend: BackendReport {
            tile_rows: 16,
            dense_block_bytes: 64,
            mxfp4_block_bytes: 17,
            kv_bytes: 4,
            wire_bytes: 4,
            threads: 1,
            process_base: Bytes(1 << 20),
            operand_block_bytes: 128,
            item_tile: 0,
            scratch: Scratch::default(),
            peers: Peers::default(),
            embedding_mapped: true,
            memory: Bytes(1 << 30),
        },
        data_address: "127.0.0.1:7001".parse().unwrap(),
        memory_pool: "here".to_owned(),
    }
}

/// A worker in this process. Dropping it lets its tasks end with the runtime.
struct Worker {
    address: SocketAddr,
    steps: Arc<Mutex<Vec<Fence>>>,
    wake: mpsc::Sender<()>,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), ServeError>>,
}

async fn worker(token: Option<ClusterToken>) -> Worker {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let steps = Arc::default();
    let (wake, woken) = mpsc::channel();
    let host = FakeHost::new(Arc::clone(&steps), woken);
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(serve(listener, host, token, async move { drop(stopped.await) }));
    Worker { address, steps, wake, stop, served }
}

type Client = WorkerClient<InterceptedService<Channel, SendToken>>;

async fn client_with(address: SocketAddr, token: Option<&ClusterToken>) -> Client {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    WorkerClient::with_interceptor(channel, SendToken::new(token)).max_encoding_message_size(1 << 30)
}

async fn client(worker: &Worker) -> Client {
    client_with(worker.address, None).await
}

async fn join(client: &mut Client, term: u64, instance: u64) -> Result<Description, tonic::Status> {
    let version = phalanx_wire::VERSION.to_owned();
    let join = Join { cell: CellId(0), term: Term(term), instance, version };
    let reply = client.join(v1::JoinRequest::from(join)).await?;
    Ok(reply.into_inner().try_into().unwrap())
}

fn request(term: u64, epoch: u64) -> Prepare {
    let layout = Layout::new(4, 1).unwrap();
    Prepare {
        fence: fence(term, epoch, 0),
        cell: CellId(0),
        rank: Rank(1),
        layout,
        placement: Placement::contiguous(2, 8, layout),
        limits: Limits {
            seqs_max: 4,
            step_rows_max: 64,
            block_size: Limits::BLOCK_SIZE,
            full_blocks: 64,
            window_blocks: 16,
            context: 1024,
        },
        peers: vec!["127.0.0.1:1".parse().unwrap(); 4],
    }
}

async fn prepare(client: &mut Client, request: Prepare) -> Result<Vec<PrepareEvent>, tonic::Status> {
    let mut stream = client.prepare(v1::PrepareRequest::from(request)).await?.into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await? {
        events.push(event.try_into().unwrap());
    }
    Ok(events)
}

async fn release(client: &mut Client, term: u64, instance: u64) -> Result<(), tonic::Status> {
    client.release(v1::ReleaseRequest { term, cell: 0, instance }).await.map(drop)
}

async fn health(client: &mut Client) -> Health {
    client.health(v1::HealthRequest {}).await.unwrap().into_inner().try_into().unwrap()
}

fn fence(term: u64, epoch: u64, step: u64) -> Fence {
    Fence { term: Term(term), epoch: Epoch(epoch), step: StepId(step) }
}

fn plan(fence: Fence, what: u32) -> StepPlan {
    StepPlan {
        header: StepHeader { fence, deadline_ms: what, rows_of_rank: vec![0; 4], ..StepHeader::default() },
        ..StepPlan::default()
    }
}

/// Both ends of a stream of steps.
struct Steps {
    plans: tokio::sync::mpsc::Sender<v1::Envelope>,
    replies: Streaming<v1::Envelope>,
}

impl Steps {
    async fn open(client: &mut Client) -> Self {
        let (plans, stream) = tokio::sync::mpsc::channel(64);
        let replies = client.steps(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { plans, replies }
    }

    async fn send(&self, plan: StepPlan) {
        self.plans.send(plan.into()).await.unwrap();
    }

    async fn reply(&mut self) -> StepReply {
        self.replies.message().await.unwrap().expect("a reply").try_into().unwrap()
    }

    async fn run(&mut self, plan: StepPlan) -> StepReply {
        self.send(plan).await;
        self.reply().await
    }

    /// Why the stream ends, without another plan. What was under way may be answered before.
    async fn end(mut self) -> tonic::Status {
        loop {
            if let Err(why) = self.replies.message().await {
                return why;
            }
        }
    }

    /// Sends a plan that ends the stream.
    async fn run_last(mut self, plan: StepPlan) -> tonic::Status {
        self.send(plan).await;
        self.replies.message().await.unwrap_err()
    }
}

/// A worker with epoch 1 of term 1 prepared.
async fn ready() -> (Worker, Client, Steps) {
    let worker = worker(None).await;
    let mut client = client(&worker).await;
    join(&mut client, 1, 10).await.unwrap();
    prepare(&mut client, request(1, 1)).await.unwrap();
    let steps = Steps::open(&mut client).await;
    (worker, client, steps)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_joins_prepares_steps_and_is_released() {
    let worker = worker(None).await;
    let mut client = client(&worker).await;
    assert_eq!(health(&mut client).await.state, WorkerState::Idle);
    assert_eq!(join(&mut client, 1, 10).await.unwrap(), description());

    let events = prepare(&mut client, request(1, 1)).await.unwrap();
    let progress = Progress { stage: "experts".to_owned(), done_bytes: 1, total_bytes: 2 };
    assert_eq!(events, [PrepareEvent::Progress(progress), PrepareEvent::Ready { allocated_bytes: 4096 }]);
    assert_eq!(health(&mut client).await.state, WorkerState::Ready);

    let mut steps = Steps::open(&mut client).await;
    for step in 1..=20 {
        let result = steps.run(plan(fence(1, 1, step), OBEY)).await.unwrap();
        assert_eq!((result.fence, result.rank), (fence(1, 1, step), Rank(1)));
    }
    assert_eq!(health(&mut client).await.fence, fence(1, 1, 20));

    release(&mut client, 1, 10).await.unwrap();
    assert_eq!(health(&mut client).await, Health { progress: health(&mut client).await.progress, ..Health::default() });
    let refused = steps.end().await;
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("no epoch"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_sent_ahead_are_answered_in_order() {
    let (worker, _client, mut steps) = ready().await;
    let ahead = 40;
    for step in 1..=ahead {
        steps.send(plan(fence(1, 1, step), OBEY)).await;
    }
    for step in 1..=ahead {
        assert_eq!(steps.reply().await.unwrap().fence, fence(1, 1, step));
    }
    assert_eq!(worker.steps.lock().unwrap().len(), 40);
}

/// A step that is under way is answered when the next has begun, or what else is asked for comes.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_step_begins_before_the_last_one_is_done() {
    let (_worker, mut client, mut steps) = ready().await;
    for step in 1..=3 {
        steps.send(plan(fence(1, 1, step), HOLD)).await;
    }
    for step in 1..=2 {
        assert_eq!(steps.reply().await.unwrap().fence, fence(1, 1, step));
    }
    let stepping = health(&mut client).await;
    assert_eq!((stepping.state, stepping.fence), (WorkerState::Stepping, fence(1, 1, 2)));
    // One that fails behind it does so after it is answered.
    steps.send(plan(fence(1, 1, 4), FAIL)).await;
    assert_eq!(steps.reply().await.unwrap().fence, fence(1, 1, 3));
    assert_eq!(steps.reply().await.unwrap_err().blamed, [Rank(2)]);
    assert_eq!(health(&mut client).await.state, WorkerState::Failed);

    prepare(&mut client, request(1, 2)).await.unwrap();
    steps.send(plan(fence(1, 2, 1), HOLD)).await;
    let before = steps.run(plan(fence(1, 3, 1), OBEY)).await.unwrap();
    assert_eq!(before.fence, fence(1, 2, 1));
    release(&mut client, 1, 10).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_of_a_step_is_not_held_back_by_one_that_waits_for_it() {
    let (_worker, _client, mut steps) = ready().await;
    steps.send(plan(fence(1, 1, 1), ALONE)).await;
    steps.send(plan(fence(1, 1, 2), HOLD)).await;
    assert_eq!(steps.reply().await.unwrap().fence, fence(1, 1, 1));
    steps.send(plan(fence(1, 1, 3), OBEY)).await;
    for step in 2..=3 {
        assert_eq!(steps.reply().await.unwrap().fence, fence(1, 1, step));
    }
    // Logits are waited for within the step that asks for them.
    steps.send(plan(fence(1, 1, 4), HOLD)).await;
    let rows = Rows {
        seq: SeqId(9),
        start: Start::At(Position(0)),
        tokens: Tokens::Given(vec![TokenId(1)]),
        grants: Vec::new(),
        outputs: Outputs::AllLogits,
    };
    steps.send(StepPlan { rows: vec![rows], ..plan(fence(1, 1, 5), OBEY) }).await;
    for step in 4..=5 {
        assert_eq!(steps.reply().await.unwrap().fence, fence(1, 1, step));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_step_failed_says_so_while_the_next_one_is_under_way() {
    let (_worker, mut client, mut steps) = ready().await;
    steps.send(plan(fence(1, 1, 1), FALTER)).await;
    steps.send(plan(fence(1, 1, 2), HOLD)).await;
    assert_eq!(steps.reply().await.unwrap_err().blamed, [Rank(2)]);
    for _ in 0..20 {
        assert_eq!(health(&mut client).await.state, WorkerState::Failed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_of_another_moment_is_refused_and_touches_nothing() {
    let (worker, mut client, mut steps) = ready().await;
    steps.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
    steps.run(plan(fence(1, 1, 2), OBEY)).await.unwrap();
    for wrong in [fence(1, 1, 0), fence(1, 1, 4)] {
        let refused = steps.run(plan(wrong, OBEY)).await.unwrap_err();
        assert_eq!(refused.fence, wrong);
        assert!(!refused.message.is_empty() && refused.blamed.is_empty());
    }
    // An epoch that is not here: nothing more can come of the stream.
    for wrong in [fence(1, 2, 3), fence(2, 1, 3), fence(0, 1, 3)] {
        let refused = Steps::open(&mut client).await.run_last(plan(wrong, OBEY)).await;
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    }
    assert_eq!(health(&mut client).await.state, WorkerState::Ready);
    steps.run(plan(fence(1, 1, 3), OBEY)).await.unwrap();
    assert_eq!(seen(&worker), [1, 2, 3]);
}

fn seen(worker: &Worker) -> Vec<u64> {
    worker.steps.lock().unwrap().iter().map(|fence| fence.step.0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_sent_again_on_another_stream_are_answered_and_run_once() {
    let (worker, mut client, mut steps) = ready().await;
    let last = STEPS_IN_FLIGHT as u64;
    for step in 1..=last {
        steps.send(plan(fence(1, 1, step), OBEY)).await;
    }
    steps.reply().await.unwrap();
    drop(steps);
    // Some of the plans have run, some are before the worker still, some were lost on the way.
    let mut steps = Steps::open(&mut client).await;
    for step in 2..=last + 1 {
        steps.send(plan(fence(1, 1, step), OBEY)).await;
    }
    for step in 2..=last + 1 {
        assert_eq!(steps.reply().await.unwrap().fence, fence(1, 1, step));
    }
    assert_eq!(seen(&worker), (1..=last + 1).collect::<Vec<_>>());
    // Told again, a step does not bring the past back.
    steps.run(plan(fence(1, 1, 2), OBEY)).await.unwrap();
    assert_eq!(health(&mut client).await.fence, fence(1, 1, last + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_plan_ends_its_stream_and_runs_when_it_is_sent_again() {
    let (worker, mut client, steps) = ready().await;
    let mut damaged = v1::Envelope::from(plan(fence(1, 1, 1), OBEY));
    damaged.crc32c = damaged.crc32c.map(|crc| crc ^ 1);
    let cases = [(damaged, Code::DataLoss, "checksum"), (v1::Envelope::default(), Code::InvalidArgument, "crc32c")];
    drop(steps);
    for (wrong, code, why) in cases {
        let mut steps = Steps::open(&mut client).await;
        steps.plans.send(wrong).await.unwrap();
        // What comes after it does not run, not even the plan that would be next; the stream may have ended by then.
        drop(steps.plans.send(plan(fence(1, 1, 1), OBEY).into()).await);
        let refused = steps.replies.message().await.unwrap_err();
        assert_eq!(refused.code(), code);
        assert!(refused.message().contains(why), "{refused}");
    }
    assert_eq!(health(&mut client).await.fence, fence(1, 1, 0));
    let mut steps = Steps::open(&mut client).await;
    steps.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
    assert_eq!(seen(&worker), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_logits_than_fit_a_reply_are_refused_before_the_step() {
    let (worker, _client, mut steps) = ready().await;
    let ask = |rows: usize| StepPlan {
        rows: vec![Rows {
            seq: SeqId(1),
            start: Start::At(Position(0)),
            tokens: Tokens::Given(vec![TokenId(0); rows]),
            outputs: Outputs::AllLogits,
            grants: Vec::new(),
        }],
        ..plan(fence(1, 1, 1), OBEY)
    };
    let max = phalanx_wire::logit_rows_max(1 << 20);
    let refused = steps.run(ask(max + 1)).await.unwrap_err();
    assert!(refused.message.contains(&format!("ask for {max} at most")), "{refused}");
    assert!(worker.steps.lock().unwrap().is_empty());
    steps.run(ask(max)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_step_ends_the_epoch_and_another_may_be_prepared() {
    let (_worker, mut client, mut steps) = ready().await;
    steps.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
    let failure = steps.run(plan(fence(1, 1, 2), FAIL)).await.unwrap_err();
    assert_eq!(failure.blamed, [Rank(2)]);
    let health_now = health(&mut client).await;
    assert_eq!(health_now.state, WorkerState::Failed);
    assert!(health_now.last_error.unwrap().contains("rank 2 is lost"));
    // Who was to blame is told again, with what came before.
    steps.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
    for step in [2, 3] {
        assert_eq!(steps.run(plan(fence(1, 1, step), OBEY)).await.unwrap_err().blamed, [Rank(2)]);
    }
    assert_eq!(health(&mut client).await.state, WorkerState::Failed);

    prepare(&mut client, request(1, 2)).await.unwrap();
    steps.run(plan(fence(1, 2, 1), OBEY)).await.unwrap();
    assert_eq!(health(&mut client).await.last_error, None);
}

/// Both are answered once, with the failure of the first; and so is what comes after.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_fails_fails_the_one_that_began_meanwhile() {
    let (worker, mut client, mut steps) = ready().await;
    for (step, what) in [(1, FALTER), (2, OBEY), (3, OBEY)] {
        steps.send(plan(fence(1, 1, step), what)).await;
    }
    for _ in 1..=3 {
        assert_eq!(steps.reply().await.unwrap_err().blamed, [Rank(2)]);
    }
    assert_eq!(seen(&worker), [1]);
    assert_eq!(health(&mut client).await.state, WorkerState::Failed);
}

/// A step under way is waited for and answered before its epoch is given up.
#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_ends_after_the_step_that_is_under_way() {
    let (_worker, mut client, mut steps) = ready().await;
    for epoch in [1, 2] {
        steps.send(plan(fence(1, epoch, 1), HOLD)).await;
        while health(&mut client).await.state != WorkerState::Stepping {
            tokio::task::yield_now().await;
        }
        prepare(&mut client, request(1, epoch + 1)).await.unwrap();
        assert_eq!(steps.reply().await.unwrap().fence, fence(1, epoch, 1));
    }
    steps.run(plan(fence(1, 3, 1), OBEY)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_coordinator_keeps_the_worker_until_a_higher_term_comes() {
    let worker = worker(None).await;
    let mut client = client(&worker).await;
    join(&mut client, 5, 10).await.unwrap();
    join(&mut client, 5, 10).await.unwrap();
    for (term, instance) in [(5, 11), (4, 10), (4, 11)] {
        let refused = join(&mut client, term, instance).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("under term 5"), "{refused}");
    }
    prepare(&mut client, request(5, 1)).await.unwrap();
    let mut steps = Steps::open(&mut client).await;
    steps.run(plan(fence(5, 1, 1), OBEY)).await.unwrap();

    join(&mut client, 6, 11).await.unwrap();
    let refused = steps.end().await;
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("under term 6 now"), "{refused}");
    assert_eq!(prepare(&mut client, request(5, 2)).await.unwrap_err().code(), Code::FailedPrecondition);
    prepare(&mut client, request(6, 1)).await.unwrap();
    let mut steps = Steps::open(&mut client).await;

    // What is another's is not released.
    for (term, instance) in [(5, 10), (6, 10), (7, 11)] {
        release(&mut client, term, instance).await.unwrap();
    }
    steps.run(plan(fence(6, 1, 1), OBEY)).await.unwrap();
    release(&mut client, 6, 11).await.unwrap();
    assert_eq!(steps.end().await.code(), Code::FailedPrecondition);
    join(&mut client, 1, 12).await.unwrap();
    prepare(&mut client, request(1, 1)).await.unwrap();
}

/// An epoch whose other ranks never come.
fn alone(term: u64) -> Prepare {
    Prepare { limits: Limits { seqs_max: ALONE_IN_CELL, ..request(1, 1).limits }, ..request(term, 1) }
}

/// A worker whose model thread waits for peers, on behalf of term 1, and the stream that says so.
async fn waiting() -> (Worker, Client, Streaming<v1::PrepareEvent>) {
    let worker = worker(None).await;
    let mut client = client(&worker).await;
    join(&mut client, 1, 10).await.unwrap();
    let mut events = client.prepare(v1::PrepareRequest::from(alone(1))).await.unwrap().into_inner();
    events.message().await.unwrap().expect("progress");
    (worker, client, events)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_ends_the_wait_for_peers() {
    let (_worker, mut client, mut events) = waiting().await;
    release(&mut client, 1, 10).await.unwrap();
    assert_eq!(events.message().await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(health(&mut client).await.state, WorkerState::Idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_higher_term_ends_the_wait_for_peers() {
    let (_worker, mut client, _events) = waiting().await;
    join(&mut client, 2, 11).await.unwrap();
    prepare(&mut client, request(2, 1)).await.unwrap();
    Steps::open(&mut client).await.run(plan(fence(2, 1, 1), OBEY)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_gives_up_a_prepare_gives_the_worker_back() {
    let (_worker, mut client, events) = waiting().await;
    drop(events);
    // Of the same term, which would be refused as long as the worker belonged to the first.
    while join(&mut client, 1, 11).await.is_err() {
        tokio::task::yield_now().await;
    }
    prepare(&mut client, request(1, 1)).await.unwrap();
    Steps::open(&mut client).await.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_or_a_higher_term_ends_a_step_that_waits_for_peers() {
    for taken_over in [false, true] {
        let (_worker, mut client, steps) = ready().await;
        steps.send(plan(fence(1, 1, 1), AWAIT)).await;
        while health(&mut client).await.state != WorkerState::Stepping {
            tokio::task::yield_now().await;
        }
        let term = if taken_over {
            2
        } else {
            release(&mut client, 1, 10).await.unwrap();
            1
        };
        join(&mut client, term, 11).await.unwrap();
        assert_eq!(steps.end().await.code(), Code::FailedPrecondition);
        prepare(&mut client, request(term, 1)).await.unwrap();
        Steps::open(&mut client).await.run(plan(fence(term, 1, 1), OBEY)).await.unwrap();
    }
}

/// As a coordinator asks that names it twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_one_rank() {
    let (_worker, mut client, _events) = waiting().await;
    let refused = prepare(&mut client, Prepare { rank: Rank(2), ..alone(1) }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("rank 1 already"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_cannot_be_is_refused_and_the_worker_stays() {
    let worker = worker(None).await;
    let mut client = client(&worker).await;
    let unjoined = prepare(&mut client, request(1, 1)).await.unwrap_err();
    assert_eq!(unjoined.code(), Code::FailedPrecondition);
    assert!(unjoined.message().contains("must join"), "{unjoined}");

    join(&mut client, 1, 10).await.unwrap();
    let other_cell = Prepare { cell: CellId(1), ..request(1, 1) };
    assert_eq!(prepare(&mut client, other_cell).await.unwrap_err().code(), Code::FailedPrecondition);
    let layout = Layout::new(4, 1).unwrap();
    // As many entries as the model's, but of another shape.
    let other_shape = Prepare { placement: Placement::contiguous(8, 2, layout), ..request(1, 1) };
    assert_eq!(prepare(&mut client, other_shape).await.unwrap_err().code(), Code::InvalidArgument);
    let too_long = Prepare { limits: Limits { context: 4097, ..request(1, 1).limits }, ..request(1, 1) };
    assert_eq!(prepare(&mut client, too_long).await.unwrap_err().code(), Code::InvalidArgument);
    let unreadable = v1::PrepareRequest { rank: 9, ..request(1, 1).into() };
    let refused = client.prepare(unreadable).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("`rank`"), "{refused}");

    let fails = Prepare { limits: Limits { seqs_max: 13, ..request(1, 1).limits }, ..request(1, 1) };
    let failed = prepare(&mut client, fails).await.unwrap_err();
    assert!(failed.message().contains("no such shard"), "{failed}");
    assert_eq!(health(&mut client).await.state, WorkerState::Failed);

    // An epoch is never prepared twice, not even after it failed.
    let replayed = prepare(&mut client, request(1, 1)).await.unwrap_err();
    assert_eq!(replayed.code(), Code::FailedPrecondition);
    assert!(replayed.message().contains("higher epoch"), "{replayed}");
    prepare(&mut client, request(1, 2)).await.unwrap();
    assert_eq!(prepare(&mut client, request(1, 2)).await.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_answers_while_a_step_hangs() {
    let (worker, mut client, mut steps) = ready().await;
    steps.send(plan(fence(1, 1, 1), HANG)).await;
    let hanging = loop {
        let health = health(&mut client).await;
        if !health.progress.waiting_for.is_empty() {
            break health;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(hanging.state, WorkerState::Stepping);
    assert_eq!(hanging.progress.step, StepId(1));
    assert_eq!((hanging.progress.layer, hanging.progress.op.as_str()), (LayerIdx(7), "combine"));
    assert_eq!(hanging.progress.waiting_for, [Rank(3)]);
    worker.wake.send(()).unwrap();
    steps.reply().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_answered_and_ends_the_worker() {
    let (worker, _client, mut steps) = ready().await;
    let failure = steps.run(plan(fence(1, 1, 1), PANIC)).await.unwrap_err();
    assert!(failure.message.contains("panicked: told to"), "{failure}");
    let ended = worker.served.await.unwrap().unwrap_err();
    assert!(matches!(&ended, ServeError::Panicked(why) if why == "told to"), "{ended}");
    assert!(TcpStream::connect(worker.address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_between_steps_is_answered_too() {
    let (worker, _client, mut steps) = ready().await;
    let failure = steps.run(plan(fence(1, 1, 1), STARTLE)).await.unwrap_err();
    assert!(failure.message.contains("panicked: asked"), "{failure}");
    assert!(matches!(worker.served.await.unwrap().unwrap_err(), ServeError::Panicked(why) if why == "asked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_shuts_down_with_a_stream_open() {
    let (worker, _client, mut steps) = ready().await;
    steps.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
    worker.stop.send(()).unwrap();
    worker.served.await.unwrap().unwrap();
    assert!(!matches!(steps.replies.message().await, Ok(Some(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_asks_for_the_token() {
    let token = ClusterToken::parse("correct-horse-battery-staple").unwrap();
    let other = ClusterToken::parse("correct-horse-battery-stapel").unwrap();
    let worker = worker(Some(token.clone())).await;
    for wrong in [None, Some(&other)] {
        let mut client = client_with(worker.address, wrong).await;
        let (plans, stream) = tokio::sync::mpsc::channel(1);
        let refused = [
            join(&mut client, 1, 1).await.unwrap_err(),
            prepare(&mut client, request(1, 1)).await.unwrap_err(),
            client.steps(ReceiverStream::new(stream)).await.unwrap_err(),
            client.health(v1::HealthRequest {}).await.unwrap_err(),
            release(&mut client, 1, 10).await.unwrap_err(),
        ];
        drop(plans);
        for refused in refused {
            assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
            assert!(!refused.message().contains("horse"));
        }
    }
    let mut client = client_with(worker.address, Some(&token)).await;
    join(&mut client, 1, 1).await.unwrap();
}

#[tokio::test]
async fn beyond_loopback_there_is_no_worker_without_a_token() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let host = FakeHost::new(Arc::default(), mpsc::channel().1);
    let refused = serve(listener, host, None, std::future::pending()).await.unwrap_err();
    assert!(refused.to_string().contains("PHALANX_CLUSTER_TOKEN"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_too_long_is_refused_and_the_worker_stays() {
    let (_worker, mut client, mut steps) = ready().await;
    let long = v1::Envelope { payload: vec![0; phalanx_wire::REQUEST_BYTES_MAX].into(), crc32c: Some(0) };
    steps.plans.send(long).await.unwrap();
    assert_eq!(steps.replies.message().await.unwrap_err().code(), Code::ResourceExhausted);
    let mut steps = Steps::open(&mut client).await;
    steps.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
}

/// A call with the first bytes of a message that claims to be longer than memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_of_a_gibibyte_is_refused_at_once() {
    let worker = worker(None).await;
    join(&mut client(&worker).await, 1, 1).await.unwrap();
    for call in ["Join", "Prepare", "Steps", "Health", "Release"] {
        let stream = TcpStream::connect(worker.address).await.unwrap();
        let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = http::Request::post(format!("http://{}/phalanx.v1.Worker/{call}", worker.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        let (response, mut body) = client.send_request(request, false).unwrap();
        body.send_data(vec![0, 0x40, 0, 0, 0, 1, 2, 3].into(), false).unwrap();
        let response = response.await.unwrap();
        let mut status = response.headers().get("grpc-status").cloned();
        if status.is_none() {
            let mut replies = response.into_body();
            while let Some(data) = replies.data().await {
                assert!(data.unwrap().is_empty());
            }
            status = replies.trailers().await.unwrap().unwrap().get("grpc-status").cloned();
        }
        // OUT_OF_RANGE or RESOURCE_EXHAUSTED.
        let status = status.unwrap();
        assert!(["8", "11"].contains(&status.to_str().unwrap()), "{call}: {status:?}");
        connection.abort();
    }
    join(&mut client(&worker).await, 1, 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_silence_are_closed_and_the_worker_stays() {
    let worker = worker(None).await;
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    for length in [1, 24, 100, 10_000] {
        let garbage = std::iter::repeat_with(|| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            noise.to_le_bytes()[7]
        });
        let mut stream = TcpStream::connect(worker.address).await.unwrap();
        drop(stream.write_all(&garbage.take(length).collect::<Vec<u8>>()).await);
        expect_end(&mut stream).await;
    }
    // Garbage behind a right preface.
    let mut stream = TcpStream::connect(worker.address).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    drop(stream.write_all(&[0xff; 1000]).await);
    expect_end(&mut stream).await;
    // Silence, and a preface that stops half way.
    for word in [&b""[..], b"PRI * HTTP/2.0"] {
        let mut stream = TcpStream::connect(worker.address).await.unwrap();
        stream.write_all(word).await.unwrap();
        expect_end(&mut stream).await;
    }
    join(&mut client(&worker).await, 1, 1).await.unwrap();
}

/// Reads until the worker closes the connection.
async fn expect_end(stream: &mut TcpStream) {
    let mut ignored = [0; 1024];
    let end = async { while stream.read(&mut ignored).await.is_ok_and(|read| read > 0) {} };
    tokio::time::timeout(Duration::from_secs(30), end).await.expect("the worker closes the connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_reset_in_haste_do_not_hurt_the_worker() {
    let worker = worker(None).await;
    let stream = TcpStream::connect(worker.address).await.unwrap();
    let (client_of_h2, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..2000 {
        // Once the worker has had enough it closes the connection.
        let Ok(mut ready) = client_of_h2.clone().ready().await else { break };
        let request = http::Request::post(format!("http://{}/phalanx.v1.Worker/Health", worker.address));
        let Ok((_, mut body)) = ready.send_request(request.body(()).unwrap(), false) else { break };
        body.send_reset(h2::Reason::CANCEL);
    }
    connection.abort();
    join(&mut client(&worker).await, 1, 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_idle_connections_leave_room_for_the_coordinator() {
    let worker = worker(None).await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(TcpStream::connect(worker.address).await.unwrap());
    }
    join(&mut client(&worker).await, 1, 1).await.unwrap();
    drop(idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_steps_are_few_and_their_places_come_back() {
    let (_worker, mut client, steps) = ready().await;
    let mut open = vec![steps];
    let refused = loop {
        let (plans, stream) = tokio::sync::mpsc::channel(1);
        match client.steps(ReceiverStream::new(stream)).await {
            Ok(replies) => open.push(Steps { plans, replies: replies.into_inner() }),
            Err(refused) => break refused,
        }
        assert!(open.len() < 100, "never refused");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(open);
    let mut steps = loop {
        let (plans, stream) = tokio::sync::mpsc::channel(1);
        if let Ok(replies) = client.steps(ReceiverStream::new(stream)).await {
            break Steps { plans, replies: replies.into_inner() };
        }
        tokio::task::yield_now().await;
    };
    steps.run(plan(fence(1, 1, 1), OBEY)).await.unwrap();
}
