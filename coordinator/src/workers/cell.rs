//! A cell is formed: all workers join, agree on what they are, get their ranks, and make the first epoch ready.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use phalanx_proto::{
    Bytes, CellId, Epoch, Fence, Layout, LayoutError, Limits, MemoryPlan, MemoryRefused, ModelConfig, NumericsId,
    Placement, Rank, StepId, Term,
};
use phalanx_wire::{Description, Join, Prepare, Progress, Release, VERSION};
use tracing::warn;

use super::handle::{WorkerError, WorkerHandle};
use super::link::ChannelLink;

/// How long workers may take to give up an epoch that will not be.
const RELEASE_WAIT: Duration = Duration::from_secs(2);

/// Which cell is formed, and under whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CellOptions {
    /// The cell.
    pub cell: CellId,
    /// The coordinator's reign.
    pub term: Term,
    /// Tells coordinators of the same term apart: a random number, drawn when this one started.
    pub instance: u64,
    /// The epoch to make ready.
    pub epoch: Epoch,
    /// Lost ranks whose experts the others shall have room for.
    pub survive: u32,
    /// Longest time for loading.
    pub prepare_wait: Duration,
}

impl CellOptions {
    /// What gives the workers of this cell back, and no others.
    #[must_use]
    pub const fn release(self) -> Release {
        Release { cell: self.cell, term: self.term, instance: self.instance }
    }
}

/// What happens while a cell is formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forming {
    /// A worker has joined.
    Joined {
        /// The rank it will have.
        rank: Rank,
        /// Its address.
        address: String,
    },
    /// The memory of a rank is planned, and there is enough.
    Planned {
        /// The worker's address.
        address: String,
        /// What is needed.
        plan: MemoryPlan,
        /// What there is, without what other ranks take of it.
        memory: Bytes,
    },
    /// A rank has come this far.
    Loading {
        /// The rank.
        rank: Rank,
        /// How far.
        progress: Progress,
    },
    /// A rank is ready.
    Ready {
        /// The rank.
        rank: Rank,
        /// Bytes of weights, KV and buffers it holds.
        allocated: Bytes,
    },
}

/// Why there is no cell.
#[derive(Debug, thiserror::Error)]
pub enum CellError {
    /// A worker cannot be reached, refuses, or fails.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The number of workers is impossible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// One worker cannot have two ranks.
    #[error("the worker at {address} is named twice: name each worker once")]
    Twice {
        /// Its address.
        address: String,
    },
    /// A worker of another build than the coordinator.
    #[error("the worker at {address} is of version {theirs}, this coordinator of {VERSION}: run the same build")]
    Version {
        /// Its address.
        address: String,
        /// Its version.
        theirs: String,
    },
    /// Workers that would not compute the same.
    #[error(
        "the worker at {odd} has {what} `{theirs}`, the one at {other} has `{ours}`: all workers of a cell need the same"
    )]
    Differ {
        /// In what.
        what: &'static str,
        /// The worker that differs from most.
        odd: String,
        /// What it has.
        theirs: String,
        /// One of the others.
        other: String,
        /// What that one has.
        ours: String,
    },
    /// The model does not fit.
    #[error("the worker at {address} has too little memory")]
    Memory {
        /// Its address.
        address: String,
        /// What is needed and what there is.
        source: MemoryRefused,
    },
}

/// A cell that is ready for its first step.
#[derive(Debug)]
pub struct Workers {
    /// Term and epoch; the first step is the one after.
    pub fence: Fence,
    /// The model's shape.
    pub config: ModelConfig,
    /// The checkpoint's name.
    pub model: String,
    /// Which bits the cell computes.
    pub numerics: NumericsId,
    /// How the model is divided.
    pub layout: Layout,
    /// Where each expert lives.
    pub placement: Placement,
    /// The bounds of each rank.
    pub limits: Limits,
    /// The memory of each rank.
    pub plans: Vec<MemoryPlan>,
    /// The workers, by rank.
    pub handles: Vec<WorkerHandle>,
    /// What gives them back.
    pub release: Release,
    /// Plans to them and replies from them.
    pub link: ChannelLink,
}

/// Memory that several workers share, and what is left of each. Cells formed with the same pools never count the same
/// memory twice.
#[derive(Debug, Default)]
pub struct MemoryPools(Mutex<BTreeMap<String, Bytes>>);

/// Makes a cell of `workers`, whose ranks are in the order given. `limits` decides how much of everything there may
/// be, once the model is known; `on_event` hears how it goes. If anything fails, the workers are given back.
///
/// # Errors
/// The first thing that stands in the way, with the worker's name.
pub async fn form_cell(
    workers: Vec<WorkerHandle>,
    options: CellOptions,
    limits: impl FnOnce(&ModelConfig, Layout) -> Limits + Send,
    pools: &MemoryPools,
    on_event: &mut (dyn FnMut(Forming) + Send),
) -> Result<Workers, CellError> {
    let count = u32::try_from(workers.len()).unwrap_or(u32::MAX);
    let layout = Layout::new(count, options.survive)?;
    let mut names = BTreeSet::new();
    if let Some(twice) = workers.iter().find(|worker| !names.insert(worker.address())) {
        return Err(CellError::Twice { address: twice.address().to_owned() });
    }
    let handles: Vec<_> = layout.ranks().zip(workers).map(|(rank, worker)| worker.with_rank(rank)).collect();
    let formed = form(&handles, layout, options, limits, pools, on_event).await;
    if formed.is_err() {
        release_all(&handles, options.release(), RELEASE_WAIT).await;
    }
    formed
}

/// Gives all workers back that joined by these names, those that can be reached within `wait`.
pub async fn release_all(handles: &[WorkerHandle], release: Release, wait: Duration) {
    let released = join_all(handles.iter().map(|handle| handle.release(release, wait))).await;
    for error in released.into_iter().filter_map(Result::err) {
        warn!("{error}");
    }
}

async fn form(
    handles: &[WorkerHandle],
    layout: Layout,
    options: CellOptions,
    limits: impl FnOnce(&ModelConfig, Layout) -> Limits + Send,
    pools: &MemoryPools,
    on_event: &mut (dyn FnMut(Forming) + Send),
) -> Result<Workers, CellError> {
    let CellOptions { cell, term, instance, epoch, .. } = options;
    let join = Join { cell, term, instance, version: VERSION.to_owned() };
    let joined = try_join_all(handles.iter().map(|handle| handle.join(join.clone()))).await?;
    for (rank, handle) in layout.ranks().zip(handles) {
        on_event(Forming::Joined { rank, address: handle.address().to_owned() });
    }
    check_alike(handles, &joined)?;
    let Description { config, model, numerics, .. } = joined[0].clone();

    let limits = limits(&config, layout);
    let layers = u32::try_from(config.layers.len()).expect("`ModelConfig::check` bounds the layers");
    let placement = Placement::contiguous(layers, config.experts, layout);
    let plans = plan_memory(handles, &joined, layout, &placement, &limits, pools, on_event)?;

    let fence = Fence { term, epoch, step: StepId(0) };
    let peers: Vec<SocketAddr> = joined.iter().map(|description| description.data_address).collect();
    let on_event = Mutex::new(on_event);
    let tell = |event| (on_event.lock().unwrap_or_else(PoisonError::into_inner))(event);
    try_join_all(layout.ranks().zip(handles).map(|(rank, handle)| {
        let (placement, peers) = (placement.clone(), peers.clone());
        let request = Prepare { fence, cell, rank, layout, placement, limits, peers };
        async move {
            let on_progress = |progress| tell(Forming::Loading { rank, progress });
            let allocated = handle.prepare(request, options.prepare_wait, on_progress).await?;
            tell(Forming::Ready { rank, allocated: Bytes(allocated) });
            Ok::<_, WorkerError>(())
        }
    }))
    .await?;

    let (link, ports) = ChannelLink::new(layout.ep);
    try_join_all(handles.iter().zip(ports).map(|(handle, port)| handle.carry(port))).await?;
    let handles = handles.to_vec();
    let release = options.release();
    Ok(Workers { fence, config, model, numerics, layout, placement, limits, plans, handles, release, link })
}

/// The plan of each rank's memory, if it fits; workers that share a memory share it here, too.
fn plan_memory(
    handles: &[WorkerHandle],
    joined: &[Description],
    layout: Layout,
    placement: &Placement,
    limits: &Limits,
    pools: &MemoryPools,
    on_event: &mut (dyn FnMut(Forming) + Send),
) -> Result<Vec<MemoryPlan>, CellError> {
    let mut left = pools.0.lock().unwrap_or_else(PoisonError::into_inner);
    layout
        .ranks()
        .zip(handles.iter().zip(joined))
        .map(|(rank, (handle, description))| {
            let backend = &description.backend;
            let pool = description.memory_pool.as_str();
            let has = if pool.is_empty() { backend.memory } else { *left.get(pool).unwrap_or(&backend.memory) };
            let plan = MemoryPlan::new(&description.config, layout, placement, rank, limits, backend);
            let has = has.min(backend.memory);
            let plan = plan.fit(has);
            let plan = plan.map_err(|source| CellError::Memory { address: handle.address().to_owned(), source })?;
            left.insert(pool.to_owned(), Bytes(has.0 - plan.total().0));
            on_event(Forming::Planned { address: handle.address().to_owned(), plan: plan.clone(), memory: has });
            Ok(plan)
        })
        .collect()
}

/// All workers must be of this build, and of one model, configuration and arithmetic.
fn check_alike(handles: &[WorkerHandle], joined: &[Description]) -> Result<(), CellError> {
    for (handle, description) in handles.iter().zip(joined) {
        if description.version != VERSION {
            let (address, theirs) = (handle.address().to_owned(), description.version.clone());
            return Err(CellError::Version { address, theirs });
        }
    }
    alike("numerics", handles, joined, |d| d.numerics.to_string())?;
    alike("model", handles, joined, |d| d.model.clone())?;
    alike("configuration", handles, joined, |d| format!("{:#?}", d.config))
}

/// Names the first worker that differs from what most have.
fn alike(
    what: &'static str,
    handles: &[WorkerHandle],
    joined: &[Description],
    value: impl Fn(&Description) -> String,
) -> Result<(), CellError> {
    let values: Vec<String> = joined.iter().map(value).collect();
    let mut counts: BTreeMap<&String, usize> = BTreeMap::new();
    values.iter().for_each(|value| *counts.entry(value).or_default() += 1);
    // The first among equals.
    let common = (0..values.len()).rev().max_by_key(|&at| counts[&values[at]]);
    let Some(common) = common else { return Ok(()) };
    let Some(odd) = values.iter().position(|value| *value != values[common]) else { return Ok(()) };
    // Of long values only the line where they part.
    let mut lines = values[odd].lines().zip(values[common].lines());
    let (theirs, ours) = lines.find(|(a, b)| a != b).unwrap_or((&values[odd], &values[common]));
    let text = |line: &str| line.trim().trim_end_matches(',').to_owned();
    Err(CellError::Differ {
        what,
        odd: handles[odd].address().to_owned(),
        theirs: text(theirs),
        other: handles[common].address().to_owned(),
        ours: text(ours),
    })
}
