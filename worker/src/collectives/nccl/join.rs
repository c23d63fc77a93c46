//! How the ranks of an epoch, joined by TCP, join over NCCL.

use std::time::Instant;

use phalanx_kernels::cuda::Port;
use phalanx_kernels::cuda::libraries::Missing;
use phalanx_kernels::{HostParts, KernelError};
use phalanx_model::{CollectiveError, Collectives, Exchange, ExchangeKind};
use phalanx_proto::{Fence, LayerIdx, Rank};

use super::LIBRARY_BYTES;
use super::communicator::{Communicator, NcclError};
use super::exchange::Nccl;
use super::offer::{NoCarrier, Offer, carrier, share};
use super::table::{Api, UniqueId};
use super::way::Shape;
use crate::collectives::tcp::Tcp;

/// How the ranks of an epoch join.
#[derive(Clone, Copy, Debug)]
pub struct JoinOptions {
    /// The epoch, at step 0.
    pub fence: Fence,
    /// When joining is given up.
    pub deadline: Instant,
    /// Most bytes from one rank to another in one exchange.
    pub payload_max: u32,
    /// Most multiprocessors that exchanges may take; absent, NCCL decides.
    pub channels_max: Option<u32>,
    /// What decides how rows travel.
    pub shape: Shape,
    /// Whether exchanges in slots become part of graphs; the same on all ranks.
    pub captures: bool,
}

/// Why the ranks of an epoch did not join over NCCL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// NCCL failed.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// A rank is gone, late or of another epoch.
    #[error(transparent)]
    Control(#[from] CollectiveError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// The library that was there is there no more.
    #[error("{0}")]
    Library(String),
    /// The ranks cannot exchange as they are asked to.
    #[error(transparent)]
    Carrier(#[from] NoCarrier),
    /// Rank 0 sent no id.
    #[error("rank 0 sent no NCCL id; all ranks must run the same build on the same kind of device")]
    NoId,
}

/// Joins the ranks over NCCL if all of them can; else gives `control` back, which then carries the rows itself. Says once
/// which of the two, and why.
///
/// # Errors
/// A rank failed, the deadline passed, or the ranks are asked for what they cannot.
pub fn join_if_all_can(
    api: impl FnOnce() -> Result<Api, Missing>,
    mut control: Tcp,
    offer: Offer,
    port: Port,
    options: JoinOptions,
) -> Result<Result<Nccl, Tcp>, JoinError> {
    let offers = share(&mut control, offer, options.fence, options.deadline)?;
    let chosen = carrier(&offers)?;
    if !chosen.nccl {
        tracing::info!("rows travel between GPUs over TCP: {}", chosen.why);
        return Ok(Err(control));
    }
    tracing::info!("rows travel between GPUs over NCCL: {}", chosen.why);
    if chosen.captures && std::env::var("NCCL_GRAPH_REGISTER").as_deref() != Ok("0") {
        tracing::warn!("set NCCL_GRAPH_REGISTER=0: else NCCL may register memory with other ranks as it is captured");
    }
    // Ranks that share a GPU need its multiprocessors for each other's exchanges, too.
    let channels_max = if chosen.shared { Some(1) } else { options.channels_max };
    let api = api().map_err(|missing| JoinError::Library(missing.to_string()))?;
    let free = port.free_memory();
    let joined = Nccl::join(api, control, port, JoinOptions { channels_max, captures: chosen.captures, ..options })?;
    if let Some((before, after)) = free.zip(joined.free_memory()) {
        let taken = before.saturating_sub(after);
        tracing::info!(taken, planned = LIBRARY_BYTES, "bytes of the GPU that NCCL took to join");
    }
    Ok(Ok(joined))
}

/// Rank 0 makes an id and sends it to all over their connections, on which each has proven that it may join.
pub(super) fn agree(api: Api, control: &mut Tcp, fence: Fence, deadline: Instant) -> Result<UniqueId, JoinError> {
    let (me, ranks) = (control.rank(), control.size() as usize);
    let mut send = HostParts::new(ranks);
    if me == Rank(0) {
        let made = api.unique_id().map_err(|code| NcclError::Call { name: "ncclGetUniqueId", code });
        let id = made.map_err(|error| tell(control, error.into()))?;
        send.by_rank.iter_mut().for_each(|part| part.extend_from_slice(&id.0));
    }
    let mut received = HostParts::new(ranks);
    control.begin(fence, deadline);
    control.start(JOINING, &mut send)?;
    control.finish(JOINING, &mut received)?;
    let id = received.by_rank.first().and_then(|part| part.as_slice().try_into().ok());
    id.map(UniqueId).ok_or(JoinError::NoId)
}

/// Joins the ranks that have the id over NCCL, as long as all of them are there.
pub(super) fn gather(
    api: Api,
    id: UniqueId,
    control: &mut Tcp,
    options: &JoinOptions,
) -> Result<Communicator, JoinError> {
    let (rank, ranks) = (control.rank().index(), control.size() as usize);
    let mut communicator = Communicator::join(api, id, rank, ranks, options.channels_max)?;
    communicator.settle("while ranks joined", options.deadline, || control.listen(JOINING).map_err(JoinError::from))?;
    Ok(communicator)
}

/// Tells the others why this rank does not join: another is to blame, or itself.
pub(super) fn tell(control: &mut Tcp, error: JoinError) -> JoinError {
    let Exchange { layer, kind, .. } = JOINING;
    let lost = |why: String| CollectiveError::Lost { rank: control.rank(), layer, kind, why };
    let told = match &error {
        JoinError::Control(error) => error.clone(),
        JoinError::Nccl(_) | JoinError::Device(_) | JoinError::Carrier(_) | JoinError::Library(_) | JoinError::NoId => {
            lost(error.to_string())
        }
    };
    control.fail(told);
    error
}

/// The exchange of the id, before any step.
const JOINING: Exchange =
    Exchange { layer: LayerIdx(u32::MAX), kind: ExchangeKind::Dispatch, row_bytes: UniqueId::BYTES };
