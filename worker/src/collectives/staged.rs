//! Ranks whose rows are on GPUs, over any collectives between hosts: parts are brought to the host, exchanged there and
//! put back. The bytes are the same as between CPUs.

use std::time::Instant;

use phalanx_kernels::cuda::Parts;
use phalanx_kernels::{HostParts, KernelError};
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::{ExchangeCounters, Fence, Rank};

/// Collectives of hosts that carry the parts of GPUs. Where there is one rank, parts change hands on the device and
/// nothing waits.
pub struct Staged<C> {
    rank: Rank,
    size: u32,
    /// Dropped when this rank's device fails, which the other ranks notice at once.
    hosts: Option<C>,
    received: HostParts,
}

impl<C: Collectives<HostParts>> Staged<C> {
    /// Carries parts over `hosts`.
    #[must_use]
    pub fn new(hosts: C) -> Self {
        let (rank, size) = (hosts.rank(), hosts.size());
        Self { rank, size, hosts: Some(hosts), received: HostParts::new(size as usize) }
    }

    fn hosts(&mut self) -> Result<&mut C, CollectiveError> {
        self.hosts.as_mut().ok_or(CollectiveError::Broken)
    }

    fn failed(&mut self, error: KernelError) -> CollectiveError {
        self.hosts = None;
        CollectiveError::Device { rank: self.rank, error }
    }
}

impl<C: Collectives<HostParts>> Collectives<Parts> for Staged<C> {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn begin(&mut self, fence: Fence, deadline: Instant) {
        if let Some(hosts) = &mut self.hosts {
            hosts.begin(fence, deadline);
        }
    }

    fn start(&mut self, exchange: Exchange, send: &mut Parts) -> Result<(), CollectiveError> {
        self.hosts()?;
        let mut bytes = send.download().map_err(|error| self.failed(error))?;
        self.hosts()?.start(exchange, &mut bytes)
    }

    fn finish(&mut self, exchange: Exchange, received: &mut Parts) -> Result<(), CollectiveError> {
        let mut bytes = std::mem::take(&mut self.received);
        self.hosts()?.finish(exchange, &mut bytes)?;
        let uploaded = received.upload(&bytes);
        self.received = bytes;
        uploaded.map_err(|error| self.failed(error))
    }

    fn exchange(&mut self, exchange: Exchange, send: &mut Parts, received: &mut Parts) -> Result<(), CollectiveError> {
        if self.size == 1 {
            std::mem::swap(send, received);
            return Ok(());
        }
        self.start(exchange, send)?;
        self.finish(exchange, received)
    }

    fn counters(&self) -> ExchangeCounters {
        self.hosts.as_ref().map_or_else(ExchangeCounters::default, Collectives::counters)
    }
}
