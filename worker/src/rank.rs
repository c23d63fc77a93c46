//! A rank, whatever it computes on: loaded, joined with the others, run.

use std::time::{Duration, Instant};

use phalanx_kernels::Backend;
use phalanx_kernels::HostParts;
use phalanx_kernels::cpu::Cpu;
use phalanx_kernels::cuda::{Cuda, Port};
use phalanx_model::gpt_oss::incoming_bytes;
use phalanx_model::packed::Stored;
use phalanx_model::{Checkpoint, Collectives, GptOss, LoadError, Watch};
use phalanx_proto::memory::Use;
use phalanx_proto::{Fence, Layout, Limits, MemoryPlan, Placement, Rank, StepHeader, StepPlan, StepResult};

use crate::collectives::nccl::{
    Api, ExchangeRequest, JoinError, JoinOptions, NoCarrier, Offer, Shape, join_if_all_can,
};
use crate::collectives::staged::Staged;
use crate::collectives::tcp::Tcp;
use crate::device::scratch::largest_step;
use crate::device::{Device, Processor};
use crate::runner::{Runner, StepError};
use crate::weight_cache;

/// Longest wait for ranks that TCP has joined to join over NCCL.
const JOIN_WAIT: Duration = Duration::from_secs(120);

/// What a rank holds.
#[derive(Clone, Copy, Debug)]
pub struct Share<'a> {
    /// The model.
    pub checkpoint: &'a Checkpoint,
    /// Where each expert lives.
    pub placement: &'a Placement,
    /// The rank.
    pub rank: Rank,
    /// How many there are.
    pub ranks: u32,
    /// Its bounds.
    pub limits: Limits,
}

/// Hears the name of a stage of loading, the bytes that are done, and all.
pub type OnStage<'a> = &'a mut dyn FnMut(&'static str, u64, u64);

/// A rank's share of a model, on the processor that computes with it. Boxed: one of either is large.
pub enum LoadedModel {
    /// On CPUs.
    Cpu(Box<GptOss<Cpu>>),
    /// On a GPU.
    Cuda(Box<GptOss<Cuda>>),
}

impl LoadedModel {
    /// Loads a rank's share on a device.
    ///
    /// # Errors
    /// The device cannot be used or has too little memory, or the checkpoint is at fault.
    pub fn load(device: &Device, share: Share<'_>, on_stage: OnStage<'_>) -> Result<Self, LoadError> {
        match device.processor {
            Processor::Cpu => {
                let model = load(device.cpu()?, device.weight_cache, share, on_stage)?;
                Ok(Self::Cpu(Box::new(model)))
            }
            Processor::Cuda { .. } => {
                let mut backend = device.cuda(&mut |done, all| on_stage("compiling", done, all))?;
                backend.take_memory(planned(device, share)?)?;
                backend.reserve(&largest_step(share.checkpoint.config(), &share.limits))?;
                Ok(Self::Cuda(Box::new(load(backend, device.weight_cache, share, on_stage)?)))
            }
        }
    }

    /// A rank that is ready for the step after `fence`, and reaches the others over TCP; or, between GPUs, over NCCL where
    /// all ranks can and are asked to.
    ///
    /// # Errors
    /// The ranks are asked for what they cannot, or one of them failed.
    pub fn join_over(
        self,
        control: Tcp,
        exchange: ExchangeRequest,
        limits: Limits,
        fence: Fence,
        payload_max: u32,
    ) -> Result<Box<dyn LoadedRank>, JoinError> {
        let model = match self {
            Self::Cuda(model) if control.size() > 1 => *model,
            Self::Cpu(_) if exchange.insists_on_nccl() => {
                return Err(NoCarrier::Cpu { rank: control.rank(), asked: exchange }.into());
            }
            alone => return Ok(alone.join(control, limits, fence)),
        };
        let shape = shape(&model, control.size(), &limits);
        let deadline = Instant::now() + JOIN_WAIT;
        let options = JoinOptions { fence, deadline, payload_max, channels_max: None, shape, captures: false };
        let slots = if exchange == ExchangeRequest::Tcp { 0 } else { shape.slots_bytes() };
        let port = Port::new(model.backend(), slots)?;
        let offer = Offer::of(exchange, &port);
        Ok(match join_if_all_can(Api::load, control, offer, port, options)? {
            Ok(nccl) => Box::new(Runner::new(model, nccl, limits, fence)),
            Err(control) => Box::new(Runner::new(model, Staged::new(control), limits, fence)),
        })
    }

    /// A rank that is ready for the step after `fence`, and reaches the others over `collectives`.
    #[must_use]
    pub fn join<C: Collectives<HostParts>>(self, collectives: C, limits: Limits, fence: Fence) -> Box<dyn LoadedRank> {
        match self {
            Self::Cpu(model) => Box::new(Runner::new(*model, collectives, limits, fence)),
            Self::Cuda(model) => Box::new(Runner::new(*model, Staged::new(collectives), limits, fence)),
        }
    }
}

/// What decides how the rows of a model's steps travel.
pub(crate) fn shape<B: Backend>(model: &GptOss<B>, ranks: u32, limits: &Limits) -> Shape {
    let (config, backend) = (model.config(), model.backend());
    let (top_k, hidden) = (config.top_k as usize, config.hidden as usize);
    Shape {
        ranks: ranks as usize,
        experts: config.experts as usize,
        top_k,
        row_bytes: [backend.dispatch_record(top_k, hidden), backend.combine_record(hidden)],
        rows_max: limits.step_rows_max,
        room: incoming_bytes(backend, config, ranks, limits),
    }
}

/// Bytes of a GPU that the plan has for a share, beside what its driver takes.
fn planned(device: &Device, share: Share<'_>) -> Result<u64, LoadError> {
    let Share { checkpoint, placement, rank, ranks, limits } = share;
    let backend = device.look(checkpoint)?.backend;
    let layout = Layout { ep: ranks, survive: 0 };
    let plan = MemoryPlan::new(checkpoint.config(), layout, placement, rank, &limits, &backend);
    Ok(plan.total().0.saturating_sub(plan.of(Use::Process).0))
}

fn load<B: Backend>(
    mut backend: B,
    weight_cache: bool,
    share: Share<'_>,
    on_stage: OnStage<'_>,
) -> Result<GptOss<B>, LoadError> {
    let Share { checkpoint, placement, rank, ranks, limits } = share;
    let packed = if weight_cache {
        weight_cache::packed(&mut backend, checkpoint, &mut |done, all| on_stage("packing", done, all))?
    } else {
        None
    };
    let stored = Stored { checkpoint, packed: packed.as_ref() };
    let on_progress = &mut |done, all| on_stage("loading", done, all);
    GptOss::load(backend, stored, placement, rank, ranks, &limits, on_progress)
}

/// A [`Runner`], whatever it is made of.
pub trait LoadedRank: Send {
    /// See [`Runner::begin`].
    ///
    /// # Errors
    /// Those of [`Runner::begin`].
    fn begin(&mut self, plan: &StepPlan, watch: &dyn Watch) -> Result<(), StepError>;

    /// See [`Runner::is_done`].
    fn is_done(&mut self) -> bool;

    /// See [`Runner::overlaps`].
    fn overlaps(&self, header: &StepHeader) -> bool;

    /// See [`Runner::finish`].
    ///
    /// # Errors
    /// Those of [`Runner::finish`].
    fn finish(&mut self, fence: Fence) -> Result<StepResult, StepError>;

    /// Begins a step and waits for it.
    ///
    /// # Errors
    /// Those of both.
    fn run(&mut self, plan: &StepPlan, watch: &dyn Watch) -> Result<StepResult, StepError> {
        self.begin(plan, watch)?;
        self.finish(plan.header.fence)
    }

    /// Bytes of weights, KV and buffers held.
    fn allocated(&self) -> u64;
}

impl<B: Backend, C: Collectives<B::Parts>> LoadedRank for Runner<B, C> {
    fn begin(&mut self, plan: &StepPlan, watch: &dyn Watch) -> Result<(), StepError> {
        Self::begin(self, plan, watch)
    }

    fn is_done(&mut self) -> bool {
        Self::is_done(self)
    }

    fn overlaps(&self, header: &StepHeader) -> bool {
        Self::overlaps(self, header)
    }

    fn finish(&mut self, fence: Fence) -> Result<StepResult, StepError> {
        Self::finish(self, fence)
    }

    fn allocated(&self) -> u64 {
        Self::allocated(self)
    }
}
