//! Why a model does not load or a step does not succeed.

use phalanx_kernels::KernelError;
use phalanx_proto::{ExpertId, LayerIdx};

use crate::checkpoint::CheckpointError;
use crate::collectives::CollectiveError;

/// Why a rank's share of the model does not load.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint is at fault.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The backend cannot be made, or refuses a tensor.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The backend refuses an expert.
    #[error("layer {layer} expert {expert}: {error}")]
    Expert {
        /// The layer.
        layer: LayerIdx,
        /// The expert.
        expert: ExpertId,
        /// What the backend says.
        error: KernelError,
    },
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// An exchange between ranks failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The backend failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}
