//! Fake workers behind real sockets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use phalanx_coordinator::workers::{
    CellError, CellEvent, CellLink, CellOptions, ChannelLink, ClusterToken, Forming, Progress, StepFailure,
    WorkerHandle, Workers, form_cell,
};
use phalanx_proto::{
    BackendReport, Bytes, CellId, Epoch, Fence, LayerKind, Layout, Limits, ModelConfig, NumericsId, Peers, Position,
    Rank, Rope, RowsResult, Scratch, StepHeader, StepId, StepPlan, StepResult, Term, TokenId, Tokens,
};
use phalanx_wire::token::CheckToken;
use phalanx_wire::v1::worker_server::WorkerServer;
use phalanx_wire::{Description, Health, Join, Prepare, PrepareEvent, Release, StepReply, VERSION, v1};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// How a fake worker answers plans.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Answers {
    Well,
    WithFailure,
    AsAnotherRank,
    /// Each reply with a wrong checksum.
    Damaged,
    /// The first reply with a wrong checksum.
    DamagedOnce,
    /// The first plan with the result of another step.
    ForAnotherStep,
    Never,
}

#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) description: Description,
    pub(crate) prepare_fails: bool,
    pub(crate) prepare_hangs: bool,
    pub(crate) answers: Answers,
    pub(crate) token: Option<ClusterToken>,
    pub(crate) seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) joins: Vec<Join>,
    pub(crate) prepared: Vec<Prepare>,
    pub(crate) releases: Vec<Release>,
    /// Steps that ran, in order.
    pub(crate) ran: Vec<u64>,
    results: BTreeMap<u64, StepResult>,
    damaged: bool,
}

impl Fake {
    pub(crate) fn new() -> Self {
        Self {
            description: description(),
            prepare_fails: false,
            prepare_hangs: false,
            answers: Answers::Well,
            token: None,
            seen: Arc::default(),
        }
    }

    pub(crate) fn described(change: impl FnOnce(&mut Description)) -> Self {
        let mut fake = Self::new();
        change(&mut fake.description);
        fake
    }

    pub(crate) fn answering(answers: Answers) -> Self {
        Self { answers, ..Self::new() }
    }

    /// Runs each step once, and tells its result as often as it is asked.
    fn answer(&self, plan: v1::Envelope) -> Option<Result<v1::Envelope, Status>> {
        let mut seen = self.seen.lock().unwrap();
        let plan = match StepPlan::try_from(plan) {
            Ok(plan) => plan,
            Err(error) => return Some(Err(Status::data_loss(error.to_string()))),
        };
        let Some(prepared) = seen.prepared.last() else {
            return Some(Err(Status::failed_precondition("the worker has no epoch")));
        };
        let (fence, rank, step) = (plan.header.fence, prepared.rank, plan.header.fence.step.0);
        let failure = |message: &str| StepFailure { fence, message: message.to_owned(), blamed: vec![Rank(0)] };
        if step == seen.ran.len() as u64 + 1 {
            seen.ran.push(step);
            seen.results.insert(step, result_of(&plan, rank));
        }
        let result = seen.results.get(&step).cloned();
        let reply: StepReply = match self.answers {
            Answers::Well | Answers::Damaged | Answers::DamagedOnce => result.ok_or_else(|| failure("out of step")),
            Answers::AsAnotherRank => Ok(StepResult { rank: Rank(rank.0 + 1), ..result.unwrap() }),
            Answers::ForAnotherStep => Ok(StepResult { fence: fence.next(), ..result.unwrap() }),
            Answers::WithFailure => Err(failure("rank 0 is lost")),
            Answers::Never => return None,
        };
        let mut envelope = v1::Envelope::from(reply);
        let first = !std::mem::replace(&mut seen.damaged, true);
        if self.answers == Answers::Damaged || self.answers == Answers::DamagedOnce && first {
            envelope.crc32c = envelope.crc32c.map(|crc| !crc);
        }
        Some(Ok(envelope))
    }
}

/// A function of the plan.
pub(crate) fn result_of(plan: &StepPlan, rank: Rank) -> StepResult {
    let rows = plan.rows.iter().map(|rows| {
        let Tokens::Given(tokens) = &rows.tokens else { panic!("not given") };
        RowsResult {
            seq: rows.seq,
            position: Position(rank.0),
            tokens: tokens.iter().map(|token| TokenId(token.0 * 3 + rank.0)).collect(),
            logprobs: Vec::new(),
            logits: Vec::new(),
        }
    });
    StepResult { fence: plan.header.fence, rank, rows: rows.collect(), ..StepResult::default() }
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::worker_server::Worker for Fake {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinReply>, Status> {
        self.seen.lock().unwrap().joins.push(request.into_inner().try_into().unwrap());
        Ok(Response::new(self.description.clone().into()))
    }

    type PrepareStream = Boxed<v1::PrepareEvent>;

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Result<Response<Self::PrepareStream>, Status> {
        self.seen.lock().unwrap().prepared.push(request.into_inner().try_into().unwrap());
        let progress = PrepareEvent::Progress(Progress { stage: "experts".to_owned(), done_bytes: 1, total_bytes: 2 });
        let last = if self.prepare_fails {
            Err(Status::failed_precondition("shard 2 is truncated"))
        } else {
            Ok(PrepareEvent::Ready { allocated_bytes: 77 })
        };
        let events = tokio_stream::iter([Ok(progress), last]).map(|event| event.map(Into::into));
        if self.prepare_hangs {
            return Ok(Response::new(Box::pin(events.take(1).chain(tokio_stream::pending()))));
        }
        Ok(Response::new(Box::pin(events)))
    }

    type StepsStream = Boxed<v1::Envelope>;

    async fn steps(&self, request: Request<Streaming<v1::Envelope>>) -> Result<Response<Self::StepsStream>, Status> {
        let fake = self.clone();
        let replies = request.into_inner().filter_map(move |plan| fake.answer(plan.ok()?));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn health(&self, _request: Request<v1::HealthRequest>) -> Result<Response<v1::HealthReply>, Status> {
        Ok(Response::new(Health::default().into()))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        self.seen.lock().unwrap().releases.push(request.into_inner().into());
        Ok(Response::new(v1::ReleaseReply {}))
    }
}

/// A fake worker with a runtime of its own, so that it can die with all its sockets.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
    runtime: Option<Runtime>,
}

impl Running {
    pub(crate) fn start(fake: Fake) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::clone(&fake.seen);
        runtime.spawn(async move {
            let check = CheckToken::new(fake.token.clone());
            let service = InterceptedService::new(WorkerServer::new(fake), check);
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { address, seen, runtime: Some(runtime) }
    }

    pub(crate) fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) fn description() -> Description {
    Description {
        version: VERSION.to_owned(),
        numerics: NumericsId("cpu-1/exact".to_owned()),
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
            vocab: 300,
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
        data_address: "0.0.0.0:7001".parse().unwrap(),
        memory_pool: String::new(),
    }
}

pub(crate) const OPTIONS: CellOptions = CellOptions {
    cell: CellId(3),
    term: Term(4),
    instance: 5,
    epoch: Epoch(6),
    survive: 1,
    prepare_wait: Duration::from_secs(30),
};

pub(crate) fn limits(config: &ModelConfig, _layout: Layout) -> Limits {
    Limits {
        seqs_max: 4,
        step_rows_max: 64,
        block_size: Limits::BLOCK_SIZE,
        full_blocks: 64,
        window_blocks: 16,
        context: config.context.min(1024),
    }
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

pub(crate) async fn connect(address: impl ToString) -> WorkerHandle {
    WorkerHandle::connect(&address.to_string(), None, soon()).await.unwrap()
}

pub(crate) fn start(fakes: impl IntoIterator<Item = Fake>) -> Vec<Running> {
    fakes.into_iter().map(Running::start).collect()
}

pub(crate) async fn form(running: &[Running]) -> Result<(Workers, Vec<Forming>), CellError> {
    let mut handles = Vec::new();
    for worker in running {
        handles.push(connect(worker.address).await);
    }
    let mut events = Vec::new();
    let workers = form_cell(handles, OPTIONS, limits, &Default::default(), &mut |event| events.push(event)).await?;
    Ok((workers, events))
}

pub(crate) fn plan(step: u64) -> StepPlan {
    let fence = Fence { term: OPTIONS.term, epoch: OPTIONS.epoch, step: StepId(step) };
    StepPlan {
        header: StepHeader { fence, deadline_ms: 1000, rows_of_rank: vec![0; 3], ..StepHeader::default() },
        ..StepPlan::default()
    }
}

pub(crate) async fn heard(link: &mut ChannelLink) -> CellEvent {
    tokio::time::timeout(Duration::from_secs(30), link.recv()).await.expect("an event")
}
