//! The model behind a worker's service: loads a share of a checkpoint on a device and runs its plans.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_kernels::KernelError;
use phalanx_model::{Checkpoint, ForwardError};
use phalanx_proto::{BackendReport, Fence, Rank, StepHeader, StepPlan, StepResult};
use phalanx_wire::{Description, Prepare, Progress, StepFailure, VERSION};

use crate::collectives::GroupId;
use crate::collectives::tcp::{self, Listener};
use crate::device::{Device, DeviceReport};
use crate::progress::ProgressCell;
use crate::rank::{LoadedModel, LoadedRank, Share};
use crate::runner::StepError;
use crate::service::{Host, HostError, NoResult};
use crate::tenure::Tenure;

/// Longest wait for the other ranks of an epoch to load and connect.
const GATHER_WAIT: Duration = Duration::from_secs(1800);

/// A checkpoint and the device that computes with it.
pub struct ModelHost {
    checkpoint: Arc<Checkpoint>,
    device: Device,
    report: DeviceReport,
    listener: Listener,
    data_address: SocketAddr,
    progress: ProgressCell,
    /// Which rank it is in its epoch.
    me: Rank,
    rank: Option<Box<dyn LoadedRank>>,
}

/// Why there is no host.
#[derive(Debug, thiserror::Error)]
pub enum NoHost {
    /// The listener has no address.
    #[error("cannot tell where other workers connect: {0}")]
    Listener(#[from] std::io::Error),
    /// The device does not answer.
    #[error(transparent)]
    Device(#[from] KernelError),
}

impl ModelHost {
    /// A host whose data connections come in on `listener`.
    ///
    /// # Errors
    /// The listener has no address, or the device does not answer.
    pub fn new(checkpoint: Arc<Checkpoint>, device: Device, listener: Listener) -> Result<Self, NoHost> {
        let data_address = listener.local_addr()?;
        let report = device.look(&checkpoint)?;
        let progress = ProgressCell::default();
        Ok(Self { checkpoint, device, report, listener, data_address, progress, me: Rank(0), rank: None })
    }
}

impl Host for ModelHost {
    fn describe(&self) -> Description {
        let DeviceReport { numerics, backend, memory_pool } = self.report.clone();
        Description {
            version: VERSION.to_owned(),
            numerics,
            config: self.checkpoint.config().clone(),
            model: self.checkpoint.name().to_owned(),
            backend,
            data_address: self.data_address,
            memory_pool,
        }
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
        // The old epoch's memory is needed for the new one's.
        self.release();
        let Prepare { fence, cell, rank, layout, placement, limits, peers } = request;
        let share = Share { checkpoint: &self.checkpoint, placement, rank: *rank, ranks: layout.ep, limits: *limits };
        let mut on_stage = |stage: &str, done_bytes, total_bytes| {
            on_progress(Progress { stage: stage.to_owned(), done_bytes, total_bytes });
        };
        let model = LoadedModel::load(&self.device, share, &mut on_stage)?;
        on_progress(Progress { stage: "connecting".to_owned(), done_bytes: 0, total_bytes: 0 });
        let group = GroupId { cell: *cell, term: fence.term, epoch: fence.epoch };
        let payload_max = payload_max(request, &self.report.backend, &self.checkpoint);
        let deadline = Instant::now() + GATHER_WAIT;
        let collectives = tcp::connect(&self.listener, group, *rank, peers, payload_max, deadline, tenure)?;
        let collectives = collectives.watched_by(self.progress.clone());
        let rank = model.join_over(collectives, self.device.exchange, *limits, *fence, payload_max)?;
        let allocated = rank.allocated();
        (self.me, self.rank) = (request.rank, Some(rank));
        Ok(allocated)
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), NoResult> {
        let fence = plan.header.fence;
        let rank = self.rank.as_mut().ok_or_else(|| no_epoch(fence))?;
        rank.begin(plan, &self.progress).map_err(|error| no_result(fence, self.me, &error))
    }

    fn is_done(&mut self) -> bool {
        self.rank.as_mut().is_none_or(|rank| rank.is_done())
    }

    fn overlaps(&self, header: &StepHeader) -> bool {
        self.rank.as_ref().is_none_or(|rank| rank.overlaps(header))
    }

    fn finish(&mut self, fence: Fence) -> Result<StepResult, NoResult> {
        let rank = self.rank.as_mut().ok_or_else(|| no_epoch(fence))?;
        rank.finish(fence).map_err(|error| no_result(fence, self.me, &error))
    }

    fn release(&mut self) {
        self.rank = None;
    }
}

fn no_epoch(fence: Fence) -> NoResult {
    let message = "this worker has no epoch".to_owned();
    NoResult::Refused(StepFailure { fence, message, blamed: Vec::new() })
}

fn no_result(fence: Fence, me: Rank, error: &StepError) -> NoResult {
    let blamed = match error {
        StepError::Forward(ForwardError::Collective(error)) => error.blamed().to_vec(),
        StepError::Forward(ForwardError::Kernel(error)) => match error {
            KernelError::Device { .. } | KernelError::Late { .. } => vec![me],
            KernelError::Received { rank, .. } => u32::try_from(*rank).map(Rank).into_iter().collect(),
            _ => Vec::new(),
        },
        _ => Vec::new(),
    };
    let failure = StepFailure { fence, message: error.to_string(), blamed };
    if error.ends_epoch() { NoResult::Failed(failure) } else { NoResult::Refused(failure) }
}

/// Most bytes from one rank to another in one exchange.
fn payload_max(request: &Prepare, backend: &BackendReport, checkpoint: &Checkpoint) -> u32 {
    let config = checkpoint.config();
    let wire = u64::from(config.hidden) * u64::from(backend.wire_bytes);
    let (rows, top_k) = (u64::from(request.limits.step_rows_max), u64::from(config.top_k));
    u32::try_from(rows * (4 * top_k + wire).max(top_k * wire)).unwrap_or(u32::MAX)
}
