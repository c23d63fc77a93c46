//! A rank, whatever it computes on: loaded, joined with the others, run.

use phalanx_kernels::Backend;
use phalanx_kernels::HostParts;
use phalanx_kernels::cpu::Cpu;
use phalanx_kernels::cuda::Cuda;
use phalanx_model::packed::Stored;
use phalanx_model::{Checkpoint, Collectives, GptOss, LoadError, Watch};
use phalanx_proto::{Fence, Limits, Placement, Rank, StepPlan, StepResult};

use crate::collectives::staged::Staged;
use crate::device::{Device, Processor};
use crate::runner::{Runner, StepError};
use crate::weight_cache;

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
                let backend = device.cuda(&mut |done, all| on_stage("compiling", done, all))?;
                Ok(Self::Cuda(Box::new(load(backend, device.weight_cache, share, on_stage)?)))
            }
        }
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
    /// See [`Runner::run`].
    ///
    /// # Errors
    /// Those of [`Runner::run`].
    fn run(&mut self, plan: &StepPlan, watch: &dyn Watch) -> Result<StepResult, StepError>;

    /// Bytes of weights, KV and buffers held.
    fn allocated(&self) -> u64;
}

impl<B: Backend, C: Collectives<B::Parts>> LoadedRank for Runner<B, C> {
    fn run(&mut self, plan: &StepPlan, watch: &dyn Watch) -> Result<StepResult, StepError> {
        Self::run(self, plan, watch)
    }

    fn allocated(&self) -> u64 {
        Self::allocated(self)
    }
}
