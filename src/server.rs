//! A coordinator with its HTTP face: forms a cell of workers, drives it, serves it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use phalanx_coordinator::api::{self, ApiConfig, ApiLimits, App};
use phalanx_coordinator::driver::{CellInfo, Driver};
use phalanx_coordinator::engine_client;
use phalanx_coordinator::metrics::Metrics;
use phalanx_coordinator::workers::{CellOptions, Forming, WorkerHandle, Workers, form_cell, release_all};
use phalanx_planner::{Engine, EngineConfig};
use phalanx_proto::{CellId, Epoch, Rank, Term, TokenId};
use phalanx_wire::ClusterToken;
use phalanx_worker::device::Device;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::children::Children;
use crate::cli::LimitArgs;
use crate::commands::serve::ApiArgs;
use crate::commands::{advance, byte_bar};

/// Longest wait for a worker to answer at all.
const CONNECT_WAIT: Duration = Duration::from_secs(30);
/// Longest time for loading.
const PREPARE_WAIT: Duration = Duration::from_secs(3600);
/// Longest wait for workers to let go of the cell.
const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// Longest wait for the driver after its last request.
const DRIVER_WAIT: Duration = Duration::from_secs(2);
/// Submissions that may await the driver's attention.
const SUBMISSIONS_MAX: usize = 256;
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

/// What a coordinator serves and with whom.
#[derive(Debug)]
pub struct ServerOptions {
    /// Addresses of the workers, by rank.
    pub workers: Vec<String>,
    /// Where to listen for HTTP.
    pub listen: SocketAddr,
    /// What the API says.
    pub api: ApiArgs,
    /// How much each worker takes at once.
    pub limits: LimitArgs,
    /// The secret shared with the workers.
    pub token: Option<ClusterToken>,
}

/// A coordinator that serves.
pub struct Server {
    address: SocketAddr,
    model: String,
    workers: Vec<WorkerHandle>,
    term: Term,
    drain: watch::Sender<bool>,
    shutdown: watch::Sender<bool>,
    driver: JoinHandle<()>,
    api: JoinHandle<()>,
}

impl Server {
    /// Forms the cell and serves it.
    ///
    /// # Errors
    /// A worker cannot be reached or does not load, or the address is taken.
    pub async fn start(options: ServerOptions) -> Result<Self> {
        let ServerOptions { workers, listen, api, limits, token } = options;
        // Before anything loads: a taken address would make the wait worthless.
        let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;

        let deadline = tokio::time::Instant::now() + CONNECT_WAIT;
        let mut handles = Vec::with_capacity(workers.len());
        for worker in &workers {
            handles.push(WorkerHandle::connect(worker, token.as_ref(), deadline).await?);
        }
        // Nothing remembers terms between starts, so the coordinator that starts later reigns: one that is started
        // again after it was killed finds its workers free to take.
        let term = Term(SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs()));
        let instance = getrandom::u64().context("the system has no randomness")?;
        let (cell, epoch, survive) = (CellId(0), Epoch(1), 0);
        let cell = CellOptions { cell, term, instance, epoch, survive, prepare_wait: PREPARE_WAIT };
        let mut bar = LoadingBar::new();
        let formed = form_cell(handles, cell, |model, _| limits.limits(model), &mut |event| bar.show(&event)).await;
        bar.finish();
        let Workers { fence, config, model, numerics, layout, limits, plans, handles, link, .. } = formed?;
        for plan in &plans {
            tracing::info!(rank = plan.rank.0, bytes = plan.total().0, "memory planned");
        }

        let model = api.served_model_name.clone().unwrap_or(model);
        let metrics = Arc::new(Metrics::new(&model, 1));
        let (client, commands) = engine_client::channel(SUBMISSIONS_MAX);
        let engine_config = EngineConfig::new(&config, limits, layout.ep);
        let info = CellInfo { addresses: workers, numerics };
        let engine = Engine::new(engine_config, fence);
        let (drain, draining) = watch::channel(false);
        let mut ready = commands.status.subscribe();
        let driver = tokio::spawn(Driver::new(engine, link, info, commands, metrics.cell(0).clone()).run(draining));
        // The driver's first word is that the cell is ready.
        ready.changed().await.context("the driver ended at once")?;

        let config = ApiConfig {
            served_model_name: model.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            context: limits.context,
            eos: config.eos.iter().map(|&id| TokenId(id)).collect(),
            reasoning_effort: api.effort(),
            api_keys: api.keys(),
            limits: api_limits(&api),
            model_identity: api.model_identity,
            current_date: api.current_date,
        };
        // Reading the vocabulary takes a while.
        let app = tokio::task::spawn_blocking(move || App::new(config, client, metrics)).await?;
        let (shutdown, mut shut) = watch::channel(false);
        let api = tokio::spawn(async move {
            let asked = async move {
                // An error means that nobody is left to ask.
                drop(shut.wait_for(|&asked| asked).await);
            };
            api::serve(listener, app, asked).await;
        });
        Ok(Self { address, model, workers: handles, term, drain, shutdown, driver, api })
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

    /// Takes no more requests, finishes those there are, and lets the workers go.
    pub async fn drain(self) {
        self.drain.send_replace(true);
        self.shutdown.send_replace(true);
        // Both end by themselves; neither can be helped if it does not.
        drop(self.api.await);
        drop(tokio::time::timeout(DRIVER_WAIT, self.driver).await);
        release_all(&self.workers, self.term, RELEASE_WAIT).await;
    }
}

fn api_limits(args: &ApiArgs) -> ApiLimits {
    let mut limits = ApiLimits::default();
    if let Some(seconds) = args.drain_seconds {
        limits.grace = Duration::from_secs(seconds);
    }
    limits
}

/// What a server with workers of its own serves.
#[derive(Debug)]
pub struct LocalOptions {
    /// The model, as the workers are told.
    pub model: String,
    /// How many workers.
    pub workers: u32,
    /// How each computes.
    pub device: Device,
    /// How much each takes at once.
    pub limits: LimitArgs,
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
        let LocalOptions { model, workers, device, limits, listen, api, token } = options;
        let token = token.map_or_else(random_token, Ok)?;
        let children = Children::start(workers, &model, &device, &token).await?;
        let addresses = children.addresses().iter().map(SocketAddr::to_string).collect();
        let options = ServerOptions { workers: addresses, listen, api, limits, token: Some(token) };
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

    /// Takes no more requests, finishes those there are, and ends the workers.
    pub async fn drain(self) {
        self.server.drain().await;
        self.children.stop().await;
    }

    /// Ends the workers now, whatever is under way.
    pub async fn stop_now(self) {
        self.server.driver.abort();
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

/// A bar over the bytes that all workers load.
struct LoadingBar {
    bar: ProgressBar,
    ranks: BTreeMap<Rank, (u64, u64)>,
}

impl LoadingBar {
    fn new() -> Self {
        Self { bar: byte_bar("loading"), ranks: BTreeMap::new() }
    }

    fn show(&mut self, event: &Forming) {
        if let Forming::Loading { rank, progress } = event
            && progress.total_bytes > 0
        {
            self.ranks.insert(*rank, (progress.done_bytes, progress.total_bytes));
            let sum = self.ranks.values().fold((0, 0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
            advance(&self.bar, sum.0, sum.1);
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
