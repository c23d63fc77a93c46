//! Ranks whose rows are on GPUs, over any collectives between hosts: parts are brought to the host, exchanged there and
//! put back. The bytes are the same as between CPUs.

use std::time::{Duration, Instant};

use phalanx_kernels::cuda::Parts;
use phalanx_kernels::{HostParts, KernelError};
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::{ExchangeCounters, Fence, Rank};

/// Looks at a device without a pause in between.
const LOOKS: u32 = 1000;
/// Between later looks.
const LOOK_PAUSE: Duration = Duration::from_micros(50);

/// Collectives of hosts that carry the parts of GPUs. Where there is one rank, parts change hands on the device and
/// nothing waits.
pub struct Staged<C> {
    rank: Rank,
    size: u32,
    /// Dropped when this rank's device fails, which the other ranks notice at once.
    hosts: Option<C>,
    /// Of the step.
    deadline: Instant,
    received: HostParts,
}

impl<C: Collectives<HostParts>> Staged<C> {
    /// Carries parts over `hosts`.
    #[must_use]
    pub fn new(hosts: C) -> Self {
        let (rank, size) = (hosts.rank(), hosts.size());
        Self { rank, size, hosts: Some(hosts), deadline: Instant::now(), received: HostParts::new(size as usize) }
    }

    fn hosts(&mut self) -> Result<&mut C, CollectiveError> {
        self.hosts.as_mut().ok_or(CollectiveError::Broken)
    }

    fn failed(&mut self, error: KernelError) -> CollectiveError {
        self.hosts = None;
        CollectiveError::Device { rank: self.rank, error }
    }
}

/// Waits for the device, which may hang, no longer than until `deadline`.
fn wait_for(send: &Parts, deadline: Instant) -> Result<(), KernelError> {
    let mut looks = 0_u32;
    while !send.is_ready()? {
        if Instant::now() > deadline {
            let why = "the step's time is over and it still computes".to_owned();
            return Err(KernelError::Device { what: "finish", why });
        }
        looks = looks.saturating_add(1);
        // Soon as a rule: a look costs about as much as a short kernel.
        if looks < LOOKS { std::hint::spin_loop() } else { std::thread::sleep(LOOK_PAUSE) }
    }
    Ok(())
}

impl<C: Collectives<HostParts>> Collectives<Parts> for Staged<C> {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn begin(&mut self, fence: Fence, deadline: Instant) {
        self.deadline = deadline;
        if let Some(hosts) = &mut self.hosts {
            hosts.begin(fence, deadline);
        }
    }

    fn start(&mut self, exchange: Exchange, send: &mut Parts) -> Result<(), CollectiveError> {
        self.hosts()?;
        let bytes = wait_for(send, self.deadline).and_then(|()| send.download());
        let mut bytes = bytes.map_err(|error| self.failed(error))?;
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
