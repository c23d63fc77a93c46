//! The words of the control calls: join, prepare, health; and a step that was not done.

use std::net::SocketAddr;

use phalanx_proto::{
    BackendReport, CellId, Fence, LayerIdx, Layout, Limits, ModelConfig, NumericsId, Placement, Rank, StepId,
    StepResult, Term,
};

use crate::error::{WireError, brief, known, present, short};
use crate::step::{fence, rank, ranks};
use crate::{model, v1};

/// Longest message for people, in bytes; longer ones are cut where they are sent.
pub(crate) const TEXT_BYTES_MAX: usize = 4096;
/// Longest name of a version, model, stage or op, in bytes.
const NAME_BYTES_MAX: usize = 256;

/// The beginning of a text, `max` bytes at most.
pub(crate) fn cut(mut text: String, max: usize) -> String {
    let end = (0..=max.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text.truncate(end.unwrap_or(0));
    text
}

fn name(field: &'static str, text: String) -> Result<String, WireError> {
    brief(field, text, NAME_BYTES_MAX)
}

fn address(field: &'static str, text: &str) -> Result<SocketAddr, WireError> {
    text.parse().map_err(|_| WireError::invalid(field, "is not an address of the form IP:PORT"))
}

/// What came of a step that a worker was asked to do.
pub type StepReply = Result<StepResult, StepFailure>;

/// A step that was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fence}: {message}")]
pub struct StepFailure {
    /// The step.
    pub fence: Fence,
    /// Why.
    pub message: String,
    /// The ranks it is laid to; none if the step itself was wrong.
    pub blamed: Vec<Rank>,
}

/// A coordinator takes a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// The cell that the worker is to be part of.
    pub cell: CellId,
    /// The coordinator's reign.
    pub term: Term,
    /// Tells coordinators of the same term apart: drawn at random when one starts.
    pub instance: u64,
    /// The coordinator's build.
    pub version: String,
}

impl From<Join> for v1::JoinRequest {
    fn from(join: Join) -> Self {
        let Join { cell, term, instance, version } = join;
        Self { cell: cell.0, term: term.0, instance, version }
    }
}

impl TryFrom<v1::JoinRequest> for Join {
    type Error = WireError;

    fn try_from(join: v1::JoinRequest) -> Result<Self, WireError> {
        let v1::JoinRequest { cell, term, instance, version } = join;
        Ok(Self { cell: CellId(cell), term: Term(term), instance, version: name("version", version)? })
    }
}

/// A coordinator gives a worker back, which it joined by these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// The cell that the worker was part of.
    pub cell: CellId,
    /// The coordinator's reign.
    pub term: Term,
    /// Tells coordinators of the same term apart.
    pub instance: u64,
}

impl From<Release> for v1::ReleaseRequest {
    fn from(release: Release) -> Self {
        let Release { cell, term, instance } = release;
        Self { cell: cell.0, term: term.0, instance }
    }
}

impl From<v1::ReleaseRequest> for Release {
    fn from(release: v1::ReleaseRequest) -> Self {
        let v1::ReleaseRequest { term, cell, instance } = release;
        Self { cell: CellId(cell), term: Term(term), instance }
    }
}

/// What a worker says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// The worker's build.
    pub version: String,
    /// What decides the bits of its results.
    pub numerics: NumericsId,
    /// The shape of its model.
    pub config: ModelConfig,
    /// The checkpoint's name; all workers of a cell have the same.
    pub model: String,
    /// Its formats and memory.
    pub backend: BackendReport,
    /// Where other ranks connect to. An unspecified IP stands for the one that the coordinator reached it by.
    pub data_address: SocketAddr,
    /// Names the memory that `backend` has; workers that name the same share it. Empty if nobody else has it.
    pub memory_pool: String,
}

impl From<Description> for v1::JoinReply {
    fn from(description: Description) -> Self {
        let Description { version, numerics, config, model, backend, data_address, memory_pool } = description;
        Self {
            version,
            numerics: numerics.0,
            config: Some(config.into()),
            model,
            backend: Some(backend.into()),
            data_address: data_address.to_string(),
            memory_pool,
        }
    }
}

impl TryFrom<v1::JoinReply> for Description {
    type Error = WireError;

    fn try_from(reply: v1::JoinReply) -> Result<Self, WireError> {
        Ok(Self {
            version: name("version", reply.version)?,
            numerics: NumericsId(brief("numerics", reply.numerics, NumericsId::LEN_MAX)?),
            config: present("config", reply.config)?.try_into()?,
            model: name("model", reply.model)?,
            backend: present("backend", reply.backend)?.try_into()?,
            data_address: address("data_address", &reply.data_address)?,
            memory_pool: name("memory_pool", reply.memory_pool)?,
        })
    }
}

/// A worker is to make an epoch ready.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepare {
    /// Term and epoch; its step is 0, and the first step of the epoch is the one after.
    pub fence: Fence,
    /// The cell.
    pub cell: CellId,
    /// The worker's rank in this epoch.
    pub rank: Rank,
    /// How the cell divides the model.
    pub layout: Layout,
    /// Where each expert lives.
    pub placement: Placement,
    /// How much of everything there may be.
    pub limits: Limits,
    /// Data address of each rank, this one's own among them, `[ep]`.
    pub peers: Vec<SocketAddr>,
}

impl From<Prepare> for v1::PrepareRequest {
    fn from(prepare: Prepare) -> Self {
        let Prepare { fence, cell, rank, layout, placement, limits, peers } = prepare;
        Self {
            fence: Some(fence.into()),
            cell: cell.0,
            rank: rank.0,
            layout: Some(layout.into()),
            placement: Some((&placement).into()),
            limits: Some(limits.into()),
            peers: peers.iter().map(SocketAddr::to_string).collect(),
        }
    }
}

impl TryFrom<v1::PrepareRequest> for Prepare {
    type Error = WireError;

    fn try_from(request: v1::PrepareRequest) -> Result<Self, WireError> {
        let fence = fence(request.fence)?;
        if fence.step != StepId(0) {
            return Err(WireError::invalid("fence", "is not before the first step of its epoch"));
        }
        let layout = Layout::try_from(present("layout", request.layout)?)?;
        let rank = rank("rank", request.rank)?;
        let peers = short("peers", request.peers, Layout::RANKS_MAX as usize)?;
        let peers = peers.iter().map(|peer| address("peers", peer)).collect::<Result<Vec<_>, _>>()?;
        if rank.0 >= layout.ep {
            return Err(WireError::invalid("rank", format!("is {rank} in a layout of {} ranks", layout.ep)));
        }
        if peers.len() != layout.ep as usize {
            return Err(WireError::invalid("peers", format!("has {} entries for {} ranks", peers.len(), layout.ep)));
        }
        Ok(Self {
            fence,
            cell: CellId(request.cell),
            rank,
            layout,
            placement: model::placement(present("placement", request.placement)?, layout)?,
            limits: present("limits", request.limits)?.try_into()?,
            peers,
        })
    }
}

/// How far a worker has come in making an epoch ready.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: String,
    /// Bytes of it that are done.
    pub done_bytes: u64,
    /// All its bytes; 0 if not known.
    pub total_bytes: u64,
}

/// What a worker says while it makes an epoch ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrepareEvent {
    /// It has come this far.
    Progress(Progress),
    /// The epoch may begin.
    Ready {
        /// Bytes of weights, KV and buffers held.
        allocated_bytes: u64,
    },
}

impl From<PrepareEvent> for v1::PrepareEvent {
    fn from(event: PrepareEvent) -> Self {
        use v1::prepare_event::Event;
        let event = match event {
            PrepareEvent::Progress(Progress { stage, done_bytes, total_bytes }) => {
                Event::Progress(v1::Progress { stage: cut(stage, NAME_BYTES_MAX), done_bytes, total_bytes })
            }
            PrepareEvent::Ready { allocated_bytes } => Event::Ready(v1::Ready { allocated_bytes }),
        };
        Self { event: Some(event) }
    }
}

impl TryFrom<v1::PrepareEvent> for PrepareEvent {
    type Error = WireError;

    fn try_from(event: v1::PrepareEvent) -> Result<Self, WireError> {
        use v1::prepare_event::Event;
        Ok(match present("event", event.event)? {
            Event::Progress(v1::Progress { stage, done_bytes, total_bytes }) => {
                Self::Progress(Progress { stage: name("stage", stage)?, done_bytes, total_bytes })
            }
            Event::Ready(v1::Ready { allocated_bytes }) => Self::Ready { allocated_bytes },
        })
    }
}

/// What a worker is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkerState {
    /// No epoch.
    #[default]
    Idle,
    /// An epoch is being made ready.
    Loading,
    /// Between steps.
    Ready,
    /// Within a step.
    Stepping,
    /// The epoch is over; only a new one or a release helps.
    Failed,
}

impl From<WorkerState> for v1::WorkerState {
    fn from(state: WorkerState) -> Self {
        match state {
            WorkerState::Idle => Self::Idle,
            WorkerState::Loading => Self::Loading,
            WorkerState::Ready => Self::Ready,
            WorkerState::Stepping => Self::Stepping,
            WorkerState::Failed => Self::Failed,
        }
    }
}

fn state(value: i32) -> Result<WorkerState, WireError> {
    match known("state", value)? {
        v1::WorkerState::Idle => Ok(WorkerState::Idle),
        v1::WorkerState::Loading => Ok(WorkerState::Loading),
        v1::WorkerState::Ready => Ok(WorkerState::Ready),
        v1::WorkerState::Stepping => Ok(WorkerState::Stepping),
        v1::WorkerState::Failed => Ok(WorkerState::Failed),
        v1::WorkerState::Unspecified => Err(WireError::Unknown { field: "state", value }),
    }
}

/// Where a step is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepProgress {
    /// The step.
    pub step: StepId,
    /// The layer.
    pub layer: LayerIdx,
    /// What is being done there.
    pub op: String,
    /// The ranks whose bytes are awaited.
    pub waiting_for: Vec<Rank>,
}

/// How a worker is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// What it is at.
    pub state: WorkerState,
    /// The last step applied.
    pub fence: Fence,
    /// Where the current step is, or where the last one ended.
    pub progress: StepProgress,
    /// The last error, if there was one.
    pub last_error: Option<String>,
}

impl From<Health> for v1::HealthReply {
    fn from(health: Health) -> Self {
        let Health { state, fence, progress, last_error } = health;
        let StepProgress { step, layer, op, waiting_for } = progress;
        let waiting_for = waiting_for.into_iter().map(|rank| rank.0).collect();
        Self {
            state: v1::WorkerState::from(state).into(),
            fence: Some(fence.into()),
            progress: Some(v1::StepProgress { step: step.0, layer: layer.0, op: cut(op, NAME_BYTES_MAX), waiting_for }),
            last_error: cut(last_error.unwrap_or_default(), TEXT_BYTES_MAX),
        }
    }
}

impl TryFrom<v1::HealthReply> for Health {
    type Error = WireError;

    fn try_from(reply: v1::HealthReply) -> Result<Self, WireError> {
        let v1::StepProgress { step, layer, op, waiting_for } = present("progress", reply.progress)?;
        Ok(Self {
            state: state(reply.state)?,
            fence: fence(reply.fence)?,
            progress: StepProgress {
                step: StepId(step),
                layer: LayerIdx(layer),
                op: name("op", op)?,
                waiting_for: ranks("waiting_for", waiting_for)?,
            },
            last_error: Some(brief("last_error", reply.last_error, TEXT_BYTES_MAX)?).filter(|text| !text.is_empty()),
        })
    }
}
