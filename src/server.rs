//! A coordinator with its HTTP face: forms a cell of workers, drives it, serves it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use futures::future::{join_all, try_join_all};
use indicatif::ProgressBar;
use phalanx_coordinator::api::{self, ApiConfig, ApiLimits, App};
use phalanx_coordinator::driver::{CellInfo, Driver};
use phalanx_coordinator::engine_client::{self, CellState, CellStatus};
use phalanx_coordinator::metrics::Metrics;
use phalanx_coordinator::workers::{
    CellOptions, Forming, MemoryPools, Release, WorkerError, WorkerHandle, Workers, form_cell, release_all,
};
use phalanx_planner::Engine;
use phalanx_planner::cost::{Calibrated, Cost, DeadlineRule, Formats, Hardware};
use phalanx_proto::{CellId, Epoch, NumericsId, Rank, Term, TokenId};
use phalanx_wire::ClusterToken;
use phalanx_worker::device::Device;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};

use crate::children::Children;
use crate::cli::{EngineArgs, LimitArgs};
use crate::commands::serve::ApiArgs;
use crate::commands::{advance, byte_bar, mib, note};

/// Longest wait for a worker to answer at all.
const CONNECT_WAIT: Duration = Duration::from_secs(30);
/// Longest time for loading.
const PREPARE_WAIT: Duration = Duration::from_secs(3600);
/// Longest wait for workers to let go of the cell.
const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// How long running requests may go on after a stop is asked for, unless the user says otherwise.
const GRACE: Duration = Duration::from_secs(30);
/// Longest wait for clients to take the error that their requests end with when the grace time is over.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(2);
/// How long ranks may wait for each other within a step: many times what such steps take, and what a busy machine may
/// lose.
const DEADLINES: DeadlineRule = DeadlineRule { factor: 20.0, min_ms: 30_000, max_ms: 120_000 };
/// How long a cell with work may go without a step before `/livez` reports it: beyond every deadline, whose end the
/// driver tells itself if it still can.
const STALL_MAX: Duration = Duration::from_secs(150);
/// Exit code after an interrupt, as shells have it.
const EXIT_INTERRUPTED: u8 = 130;
/// Exit code after a request to terminate.
const EXIT_TERMINATED: u8 = 143;

/// The runtime of a command.
///
/// # Errors
/// Its threads cannot be started.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

/// Waits until the user or the system asks this process to end; gives the exit code for that.
pub async fn interrupted() -> u8 {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // Without handlers the signals end the process by themselves.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => EXIT_INTERRUPTED,
        _ = terminate.recv() => EXIT_TERMINATED,
    }
}

/// Waits until a server is asked to end, or has `failed`.
///
/// # Errors
/// It has failed.
pub async fn asked_to_end(failed: impl Future<Output = String>) -> Result<()> {
    tokio::select! {
        _ = interrupted() => Ok(()),
        why = failed => bail!("there is no cell left to serve with: {why}; start the server again"),
    }
}

/// What a coordinator serves and with whom.
#[derive(Debug)]
pub struct ServerOptions {
    /// Addresses of the workers of each cell, by rank.
    pub cells: Vec<Vec<String>>,
    /// Where to listen for HTTP.
    pub listen: SocketAddr,
    /// What the API says.
    pub api: ApiArgs,
    /// How much each worker takes at once.
    pub limits: LimitArgs,
    /// How requests share the workers.
    pub engine: EngineArgs,
    /// The secret shared with the workers.
    pub token: Option<ClusterToken>,
}

/// A coordinator that serves.
pub struct Server {
    address: SocketAddr,
    model: String,
    /// Of each cell, and what gives them back.
    workers: Vec<(Vec<WorkerHandle>, Release)>,
    cells: Vec<watch::Receiver<CellStatus>>,
    drain: watch::Sender<bool>,
    shutdown: watch::Sender<bool>,
    grace: Duration,
    drivers: Vec<JoinHandle<()>>,
    api: JoinHandle<()>,
}

impl Server {
    /// Forms the cells and serves them.
    ///
    /// # Errors
    /// A worker cannot be reached or does not load, or the address is taken.
    pub async fn start(options: ServerOptions) -> Result<Self> {
        // Before anything loads: a taken address would make the wait worthless.
        let listen = options.listen;
        let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;
        // Probes are answered from now on, and all else is told to come again.
        let (early, listener) = twice(listener).context("the system refuses a second handle of the listener")?;
        let (progress, waits_for) = watch::channel("waiting for the workers".to_owned());
        let loading = tokio::spawn(api::serve_loading(early, waits_for, ApiLimits::default()));
        // Nothing remembers terms between starts, so the coordinator that starts later reigns: one that is started
        // again after it was killed finds its workers free to take.
        let term = Term(SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs()));
        let formed = form_cells(&options, term, &progress).await?;
        let ServerOptions { api, engine, .. } = options;
        let Some(Workers { model, config, limits, layout, .. }) = formed.first() else {
            bail!("there is no cell; name at least one worker");
        };
        let grace = api.drain_seconds.map_or(GRACE, Duration::from_secs);
        let model = api.served_model_name.clone().unwrap_or_else(|| model.clone());
        // What the queue and the seats have room for is not refused on its way there, and what they never have room for
        // is refused for good.
        let submissions = engine.queue_requests.saturating_add(limits.seqs_max.saturating_mul(layout.ep));
        let app_limits = ApiLimits::default();
        let choices_max = app_limits.choices_max.min(submissions);
        let app_limits = ApiLimits { stall_max: STALL_MAX, choices_max, ..app_limits };
        let app_config = ApiConfig {
            served_model_name: model.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            context: limits.context,
            vocab: config.vocab,
            eos: config.eos.iter().map(|&id| TokenId(id)).collect(),
            reasoning_effort: api.effort(),
            api_keys: api.keys(),
            limits: app_limits,
            model_identity: api.model_identity,
            current_date: api.current_date,
        };
        let metrics = Arc::new(Metrics::new(&model, formed.len()));
        let (client, commands) = engine_client::channels(formed.len(), submissions as usize);
        let (drain, draining) = watch::channel(false);
        let (mut workers, mut cells, mut drivers) = (Vec::new(), Vec::new(), Vec::new());
        for (cell, (formed, commands)) in formed.into_iter().zip(commands).enumerate() {
            let Workers { fence, config, numerics, layout, limits, handles, release, link, .. } = formed;
            let mut engine = Engine::new(engine.config(&config, limits, layout.ep, &numerics), fence);
            let cost = Cost::new(&config, layout, Formats::BF16, hardware(&numerics));
            engine.set_pace(Calibrated::new(cost, DEADLINES));
            let blocks = engine.stats().blocks;
            metrics.cache_config(cell, limits.block_size, blocks, engine.config().prefix_cache);
            let addresses = handles.iter().map(|handle| handle.address().to_owned()).collect();
            let info = CellInfo { addresses, numerics };
            let mut ready = commands.status.subscribe();
            let driver = Driver::new(engine, link, info, commands, metrics.cell(cell).clone());
            drivers.push(tokio::spawn(driver.run(draining.clone())));
            // The driver's first word is that the cell is ready.
            ready.changed().await.context("the driver ended at once")?;
            workers.push((handles, release));
            cells.push(ready);
        }
        // Reading the vocabulary takes a while.
        let app = tokio::task::spawn_blocking(move || App::new(app_config, client, metrics)).await?;
        drop(progress);
        // Now it accepts nothing more.
        drop(loading.await);
        let (shutdown, mut shut) = watch::channel(false);
        let api = tokio::spawn(async move {
            let asked = async move {
                // An error means that nobody is left to ask.
                drop(shut.wait_for(|&asked| asked).await);
            };
            api::serve(listener, app, asked).await;
        });
        Ok(Self { address, model, workers, cells, drain, shutdown, grace, drivers, api })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The model's name in requests.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Completes when every cell has failed, and says why: nothing but another start helps then.
    pub async fn failed(&self) -> String {
        let reasons = self.cells.iter().map(async |status| {
            let mut status = status.clone();
            let failed = status.wait_for(|status| matches!(status.state, CellState::Failed(_))).await;
            match failed.as_ref().map(|status| &status.state) {
                Ok(CellState::Failed(why)) => why.clone(),
                // A driver that has ended was asked to.
                _ => std::future::pending().await,
            }
        });
        join_all(reasons).await.join("; ")
    }

    /// Takes no more requests, finishes those there are, and lets the workers go. Whoever asks meanwhile is told. What is not
    /// finished when the grace time or `patience` is over ends with an error.
    pub async fn drain(self, patience: impl Future) {
        let Self { workers, drain, shutdown, grace, drivers, api, .. } = self;
        let engines: Vec<_> = drivers.iter().map(JoinHandle::abort_handle).collect();
        let connections = api.abort_handle();
        drain.send_replace(true);
        let mut finished = pin!(async {
            join_all(drivers).await;
            shutdown.send_replace(true);
            // It can only end.
            drop(api.await);
        });
        let is_finished = tokio::select! {
            () = &mut finished => true,
            () = tokio::time::sleep(grace) => false,
            _ = patience => false,
        };
        if !is_finished {
            tracing::warn!("requests that are still running end with an error");
            // To lose its engine is what ends a request.
            engines.iter().for_each(AbortHandle::abort);
            drop(tokio::time::timeout(LAST_WORDS_WAIT, finished).await);
            connections.abort();
        }
        give_back(&workers).await;
    }
}

/// What a cell computes on, roughly: the engine learns how much slower or faster it is.
fn hardware(numerics: &NumericsId) -> Hardware {
    if numerics.0.starts_with("cuda") { Hardware::H100 } else { Hardware::CPU_2_CORES }
}

/// Connects to all workers and forms the cells, side by side. Says on standard error how memory is planned.
async fn form_cells(options: &ServerOptions, term: Term, progress: &watch::Sender<String>) -> Result<Vec<Workers>> {
    let instance = getrandom::u64().context("the system has no randomness")?;
    let deadline = tokio::time::Instant::now() + CONNECT_WAIT;
    let (limits, engine) = (options.limits, options.engine);
    note(format_args!(
        "memory of each worker: room for {} tokens of context and {} sequences, and for the experts of {} lost workers",
        limits.kv_tokens, limits.seqs_max, engine.survive
    ));
    let cells = try_join_all((0u32..).zip(&options.cells).map(async |(cell, workers)| {
        let connect = |worker| WorkerHandle::connect(worker, options.token.as_ref(), deadline);
        let handles = try_join_all(workers.iter().map(|worker| connect(worker))).await?;
        let (epoch, survive) = (Epoch(1), engine.survive);
        let cell = CellOptions { cell: CellId(cell), term, instance, epoch, survive, prepare_wait: PREPARE_WAIT };
        Ok::<_, WorkerError>((handles, cell))
    }))
    .await?;
    let (pools, bar) = (MemoryPools::default(), Mutex::new(LoadingBar::new(progress)));
    let formed = try_join_all(cells.iter().map(async |(handles, cell)| {
        let mut on_event = |event| bar.lock().unwrap_or_else(PoisonError::into_inner).show(cell.cell, event);
        form_cell(handles.clone(), *cell, |model, _| limits.limits(model), &pools, &mut on_event).await
    }))
    .await;
    bar.lock().unwrap_or_else(PoisonError::into_inner).finish();
    let formed = formed.map_err(anyhow::Error::from).and_then(|formed| check_same_model(&formed).map(|()| formed));
    if formed.is_err() {
        // Also those of cells that stood already.
        let cells: Vec<_> = cells.into_iter().map(|(handles, cell)| (handles, cell.release())).collect();
        give_back(&cells).await;
    }
    formed
}

/// Gives the workers of all cells back.
async fn give_back(cells: &[(Vec<WorkerHandle>, Release)]) {
    join_all(cells.iter().map(|(handles, release)| release_all(handles, *release, RELEASE_WAIT))).await;
}

/// Two handles of one listener.
fn twice(listener: TcpListener) -> std::io::Result<(TcpListener, TcpListener)> {
    let listener = listener.into_std()?;
    Ok((TcpListener::from_std(listener.try_clone()?)?, TcpListener::from_std(listener)?))
}

/// All cells serve one model with the same bits.
fn check_same_model(cells: &[Workers]) -> Result<()> {
    let differs = |a: &Workers, b: &Workers| a.model != b.model || a.numerics != b.numerics || a.config != b.config;
    let pairs = cells.first().into_iter().flat_map(|first| (0..).zip(cells).map(move |(n, cell)| (n, first, cell)));
    for (number, first, cell) in pairs {
        if differs(first, cell) {
            bail!(
                "cell {number} serves {} as {}, cell 0 serves {} as {}; give all workers the same model and flags",
                cell.model,
                cell.numerics,
                first.model,
                first.numerics
            );
        }
    }
    Ok(())
}

/// What a server with workers of its own serves.
#[derive(Debug)]
pub struct LocalOptions {
    /// The model, as the workers are told.
    pub model: String,
    /// How many workers each cell has.
    pub workers: u32,
    /// How many cells.
    pub replicas: u32,
    /// How each computes.
    pub device: Device,
    /// What they log.
    pub log: String,
    /// How much each takes at once.
    pub limits: LimitArgs,
    /// How requests share them.
    pub engine: EngineArgs,
    /// Where to listen for HTTP.
    pub listen: SocketAddr,
    /// What the API says.
    pub api: ApiArgs,
    /// The secret shared with the workers; drawn at random if absent.
    pub token: Option<ClusterToken>,
}

/// A server with workers of its own.
pub struct LocalServer {
    server: Server,
    children: Children,
}

impl LocalServer {
    /// Starts the workers, forms the cell and serves it.
    ///
    /// # Errors
    /// A worker does not start or load, or the address is taken.
    pub async fn start(options: LocalOptions) -> Result<Self> {
        let LocalOptions { model, workers, replicas, device, log, limits, engine, listen, api, token } = options;
        let token = token.map_or_else(random_token, Ok)?;
        let children = Children::start(workers * replicas, &model, &device, &log, &token).await?;
        let addresses: Vec<String> = children.addresses().iter().map(SocketAddr::to_string).collect();
        let cells = addresses.chunks(workers as usize).map(<[String]>::to_vec).collect();
        let options = ServerOptions { cells, listen, api, limits, engine, token: Some(token) };
        match Server::start(options).await {
            Ok(server) => Ok(Self { server, children }),
            Err(error) => {
                children.stop().await;
                Err(error)
            }
        }
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// The model's name in requests.
    #[must_use]
    pub fn model(&self) -> &str {
        self.server.model()
    }

    /// See [`Server::failed`].
    pub async fn failed(&self) -> String {
        self.server.failed().await
    }

    /// As [`Server::drain`], and ends the workers.
    pub async fn drain(self, patience: impl Future) {
        self.server.drain(patience).await;
        self.children.stop().await;
    }

    /// Ends the workers now, whatever is under way.
    pub async fn stop_now(self) {
        self.server.drivers.iter().for_each(JoinHandle::abort);
        self.server.api.abort();
        self.children.stop().await;
    }
}

/// A secret that only this process and its workers know.
fn random_token() -> Result<ClusterToken> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).context("the system has no randomness")?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(ClusterToken::parse(&text)?)
}

/// A bar over the bytes that all workers load, and a table of the memory they will take.
struct LoadingBar<'a> {
    bar: ProgressBar,
    /// The same in words.
    progress: &'a watch::Sender<String>,
    ranks: BTreeMap<(CellId, Rank), (u64, u64)>,
}

impl<'a> LoadingBar<'a> {
    fn new(progress: &'a watch::Sender<String>) -> Self {
        Self { bar: byte_bar("loading"), progress, ranks: BTreeMap::new() }
    }

    fn show(&mut self, cell: CellId, event: Forming) {
        match event {
            Forming::Planned { address, plan, memory } => {
                let uses: Vec<String> = plan
                    .uses
                    .iter()
                    .filter(|(_, bytes)| bytes.0 > 0)
                    .map(|(what, bytes)| format!("{} {:.0}", what.name(), mib(bytes.0)))
                    .collect();
                let (rank, needs, has) = (plan.rank, mib(plan.total().0), mib(memory.0));
                note(format_args!(
                    "cell {cell} rank {rank} at {address}: {needs:.0} of {has:.0} MiB ({})",
                    uses.join(", ")
                ));
            }
            Forming::Loading { rank, progress } if progress.total_bytes > 0 => {
                self.bar.set_message(progress.stage.clone());
                self.ranks.insert((cell, rank), (progress.done_bytes, progress.total_bytes));
                let sum = self.ranks.values().fold((0, 0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
                advance(&self.bar, sum.0, sum.1);
                self.progress.send_replace(format!("{:.0} of {:.0} MiB are read", mib(sum.0), mib(sum.1)));
            }
            // Nothing is counted where ranks wait for each other.
            Forming::Loading { rank, progress } => {
                self.bar.set_message(progress.stage.clone());
                self.progress.send_replace(format!("cell {cell} rank {rank} is {}", progress.stage));
            }
            Forming::Joined { .. } | Forming::Ready { .. } => {}
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
