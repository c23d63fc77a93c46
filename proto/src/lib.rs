//! The words of Phalanx.
//!
//! Coordinator and workers share nothing but these: who is meant ([`ids`]), which moment is meant
//! ([`Fence`]), what to do ([`StepPlan`]), what came of it ([`StepResult`]), the shape of the model
//! ([`ModelConfig`]), who holds what ([`Layout`], [`Placement`]), and how much of everything there may
//! be ([`Limits`], [`MemoryPlan`]). Plain values: no dependency, no clock, no socket.

pub mod config;
pub mod constraint;
pub mod fence;
pub mod ids;
pub mod layout;
pub mod limits;
pub mod memory;
pub mod numerics;
pub mod plan;
pub mod result;

pub use config::{ConfigError, LayerKind, ModelConfig, Rope};
pub use constraint::{ConstraintError, ConstraintStart, ConstraintTable, TableId};
pub use fence::{Epoch, Fence, StepId, Term};
pub use ids::{BlockId, Bytes, CellId, ExpertId, ExpertSlot, LayerIdx, Position, Rank, SeqId, TokenId};
pub use layout::{Layout, LayoutError, Placement};
pub use limits::Limits;
pub use memory::{BackendReport, MemoryPlan, MemoryRefused, Peers, Scratch};
pub use numerics::{DenseType, NumericsId, Precision};
pub use plan::{
    Admission, BlockAddress, BlockGrant, History, KvOp, Outputs, PlanError, Pool, Rows, Sampling, Start, StepHeader,
    StepPlan, Tier, Tokens,
};
pub use result::{ExchangeCounters, Phase, PhaseTimes, RowsResult, StepResult, TokenLogprobs};
