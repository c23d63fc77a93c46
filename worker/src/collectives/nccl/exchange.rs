//! The exchanges of a step over NCCL.
//!
//! The ranks of an epoch are joined twice: over TCP, which is the control connection, and over NCCL, which carries the
//! rows. The control connections bring NCCL's id from rank 0 to all; then, in each exchange, the fence and the sizes of
//! the parts, without which NCCL must not be called at all; and all the time the news that a rank is gone, which NCCL
//! itself never gives. So fences, checks and blame are those of [`super::super::tcp`], and only bytes of known size go
//! over NCCL.
//!
//! NCCL moves bytes only while sender and receiver both have called it, in one group, else large parts block each
//! other. So rows move when all ranks finish the exchange, and none finishes it before all are there.

use std::time::{Duration, Instant};

use phalanx_kernels::HostParts;
use phalanx_model::{CollectiveError, Collectives, Exchange, ExchangeKind};
use phalanx_proto::{ExchangeCounters, Fence, LayerIdx, Rank};

use super::communicator::{Communicator, NcclError};
use super::device::{ALIGN, Device};
use super::schedule::{all_to_all, starts};
use super::table::{Api, Code, UniqueId};
use crate::collectives::step::Step;
use crate::collectives::tcp::{HEADER_BYTES, Tcp};

/// Bytes on the control connection for each part: a frame with the part's size.
pub const CONTROL_BYTES: usize = HEADER_BYTES + SIZE_BYTES;
const SIZE_BYTES: usize = 8;
/// How long bytes of a rank that is gone may still be on their way, and how long a failure may wait for its culprit.
const GRACE: Duration = Duration::from_millis(100);
/// Looks at the stream without a pause before the thread sleeps between them.
const SPINS: u32 = 200;
/// Sleep between two looks.
const POLL: Duration = Duration::from_micros(20);

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
    /// Rank 0 sent no id.
    #[error("rank 0 sent no NCCL id; all ranks must run the same build on the same kind of device")]
    NoId,
}

/// One rank's ends of the connections to all others of an epoch, on a GPU. Dropping it makes the exchanges of the
/// others fail.
pub struct Nccl<D: Device> {
    control: Tcp,
    communicator: Communicator,
    device: D,
    /// What is on its way out.
    outgoing: D::Parts,
    /// Bytes of it for each rank.
    sent: Vec<usize>,
    /// Sizes on their way.
    sizes_out: HostParts,
    sizes_in: HostParts,
    payload_max: usize,
    step: Step,
}

impl<D: Device> Nccl<D> {
    /// Joins the ranks that `control` has joined. `outgoing` are empty parts like those that will be exchanged.
    ///
    /// # Errors
    /// NCCL or a rank failed, or the deadline passed.
    pub fn join(
        api: Api,
        mut control: Tcp,
        device: D,
        outgoing: D::Parts,
        options: JoinOptions,
    ) -> Result<Self, JoinError> {
        let id = agree(api, &mut control, options.fence, options.deadline)?;
        let ranks = control.size() as usize;
        // Told before it ends, so that all name the rank that was lost first.
        let communicator = gather(api, id, &mut control, &options).map_err(|error| tell(&mut control, error))?;
        Ok(Self {
            control,
            communicator,
            device,
            outgoing,
            sent: Vec::new(),
            sizes_out: HostParts::new(ranks),
            sizes_in: HostParts::new(ranks),
            payload_max: options.payload_max as usize,
            step: Step::new(),
        })
    }

    /// NCCL's communicator.
    #[must_use]
    pub const fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    #[cfg(test)]
    pub(super) const fn device(&self) -> &D {
        &self.device
    }

    fn lost(&self, exchange: Exchange, why: &dyn std::error::Error) -> CollectiveError {
        let Exchange { layer, kind, .. } = exchange;
        CollectiveError::Lost { rank: self.control.rank(), layer, kind, why: why.to_string() }
    }

    /// Puts the sizes of the parts on their way.
    fn announce(&mut self, exchange: Exchange) -> Result<(), CollectiveError> {
        let sizes = self.device.sizes(&self.outgoing, self.step.deadline);
        self.sent = sizes.map_err(|fault| self.failed(self.lost(exchange, &fault)))?;
        assert_eq!(self.sent.len(), self.sizes_out.by_rank.len(), "a part for each rank");
        let me = self.control.rank().index();
        for (rank, (part, &bytes)) in self.sizes_out.by_rank.iter_mut().zip(&self.sent).enumerate() {
            part.clear();
            part.extend_from_slice(&(bytes as u64).to_le_bytes());
            if rank != me {
                self.step.count_sent(exchange, bytes, CONTROL_BYTES);
            }
        }
        if self.sent.iter().any(|&bytes| bytes > self.payload_max) {
            let what = "it would be longer than this epoch allows";
            return Err(self.failed(CollectiveError::Corrupt { rank: Rank(me as u32), what }));
        }
        let sent = self.control.start(of_sizes(exchange), &mut self.sizes_out);
        sent.map_err(|error| self.broken(error))
    }

    /// The sizes of the parts that come from each rank, `[ranks]`.
    fn announced(&mut self, exchange: Exchange) -> Result<Vec<usize>, CollectiveError> {
        let came = self.control.finish(of_sizes(exchange), &mut self.sizes_in);
        came.map_err(|error| self.broken(error))?;
        let read = |(rank, part): (usize, &Vec<u8>)| {
            let corrupt = |what| CollectiveError::Corrupt { rank: Rank(rank as u32), what };
            let size = part.as_slice().try_into().map_err(|_| corrupt("it does not say how much it sends"))?;
            let size = usize::try_from(u64::from_le_bytes(size)).unwrap_or(usize::MAX);
            if size > self.payload_max {
                Err(corrupt("it is longer than this epoch allows"))
            } else if !size.is_multiple_of(exchange.row_bytes.max(1)) {
                Err(corrupt("its payload is not a whole number of rows"))
            } else {
                Ok(size)
            }
        };
        let sizes: Result<Vec<usize>, CollectiveError> = self.sizes_in.by_rank.iter().enumerate().map(read).collect();
        sizes.map_err(|error| self.failed(error))
    }

    /// Moves the parts, whose sizes all ranks know.
    fn transfer(
        &mut self,
        exchange: Exchange,
        received: &mut D::Parts,
        sizes: &[usize],
    ) -> Result<(), CollectiveError> {
        let me = self.control.rank().index();
        let into = self.device.room(received, sizes).map_err(|fault| self.lost(exchange, &fault))?;
        let source = self.device.source(&self.outgoing);
        let transfers = all_to_all(me, &self.sent, sizes, ALIGN);
        // SAFETY: the device vouches for both addresses, which have room for the parts as the schedule lays them out.
        let enqueued = unsafe { self.communicator.enqueue(&transfers, source, into, self.device.stream()) };
        match enqueued {
            Ok(()) => {}
            Err(error) if is_remote(&error) => return self.wait(exchange, Some(error)),
            Err(error) => return Err(self.lost(exchange, &error)),
        }
        let (from, to) = (starts(&self.sent, ALIGN)[me], starts(sizes, ALIGN)[me]);
        // SAFETY: this rank's own part, as both sides lay it out; source and room are different parts.
        let kept = unsafe { self.device.copy(source.byte_add(from), into.byte_add(to), sizes[me]) };
        kept.map_err(|fault| self.lost(exchange, &fault))?;
        self.wait(exchange, None)
    }

    /// Waits for the stream, and looks at the communicator and at the other ranks meanwhile; or waits until one of
    /// them says what has failed there.
    fn wait(&mut self, exchange: Exchange, failed: Option<NcclError>) -> Result<(), CollectiveError> {
        let Exchange { layer, kind, .. } = exchange;
        let me = self.control.rank();
        // A rank that is gone, and until when its bytes may still arrive. Farewells are said once.
        let mut gone: Option<(Instant, CollectiveError)> = None;
        // Until when another rank may still say who is to blame for what failed here.
        let mut fault = failed.map(|error| (Instant::now() + GRACE, error));
        for look in 0_u32.. {
            if fault.is_none() {
                match self.communicator.poll() {
                    Ok(settled) => {
                        let idle = self.device.is_idle().map_err(|fault| self.lost(exchange, &fault))?;
                        if settled && idle {
                            return Ok(());
                        }
                    }
                    Err(error) if is_remote(&error) => fault = Some((Instant::now() + GRACE, error)),
                    Err(error) => return Err(self.lost(exchange, &error)),
                }
            }
            let now = Instant::now();
            if gone.is_none() {
                gone = self.control.listen(exchange).err().map(|named| (now + GRACE, named));
            }
            if let Some((_, named)) = gone.take_if(|(until, _)| fault.is_some() || *until <= now) {
                return Err(named);
            }
            match &fault {
                Some((until, error)) if *until <= now => return Err(self.lost(exchange, error)),
                None if self.step.deadline <= now => {
                    let others = (0..self.control.size()).map(Rank).filter(|rank| *rank != me);
                    return Err(CollectiveError::Deadline { layer, kind, waiting_for: others.collect() });
                }
                _ => {}
            }
            if look < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(POLL);
            }
        }
        Err(CollectiveError::Broken)
    }

    /// Tells the others whom this rank gave up on, and ends the exchange.
    fn failed(&mut self, error: CollectiveError) -> CollectiveError {
        let error = self.control.fail(error);
        self.broken(error)
    }

    /// The control connections have failed and said so: nothing is exchanged from here on.
    fn broken(&mut self, error: CollectiveError) -> CollectiveError {
        self.communicator.abort();
        self.step.fail();
        error
    }
}

/// Joins the ranks that have the id over NCCL, as long as all of them are there.
fn gather(api: Api, id: UniqueId, control: &mut Tcp, options: &JoinOptions) -> Result<Communicator, JoinError> {
    let (rank, ranks) = (control.rank().index(), control.size() as usize);
    let mut communicator = Communicator::join(api, id, rank, ranks, options.channels_max)?;
    communicator.settle("while ranks joined", options.deadline, || control.listen(JOINING).map_err(JoinError::from))?;
    Ok(communicator)
}

/// Tells the others why this rank does not join: another is to blame, or itself.
fn tell(control: &mut Tcp, error: JoinError) -> JoinError {
    let Exchange { layer, kind, .. } = JOINING;
    let lost = |why: String| CollectiveError::Lost { rank: control.rank(), layer, kind, why };
    let told = match &error {
        JoinError::Control(error) => error.clone(),
        JoinError::Nccl(_) | JoinError::NoId => lost(error.to_string()),
    };
    control.fail(told);
    error
}

/// The exchange of the id, before any step.
const JOINING: Exchange =
    Exchange { layer: LayerIdx(u32::MAX), kind: ExchangeKind::Dispatch, row_bytes: UniqueId::BYTES };

/// Whether another rank has failed, or the way to it.
const fn is_remote(error: &NcclError) -> bool {
    matches!(error, NcclError::Failed { code: Code::REMOTE_ERROR })
}

/// The exchange of sizes that goes before that of the rows.
const fn of_sizes(exchange: Exchange) -> Exchange {
    Exchange { row_bytes: SIZE_BYTES, ..exchange }
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

impl<D: Device> Collectives<D::Parts> for Nccl<D> {
    fn rank(&self) -> Rank {
        self.control.rank()
    }

    fn size(&self) -> u32 {
        self.control.size()
    }

    fn begin(&mut self, fence: Fence, deadline: Instant) {
        self.step.begin(fence, deadline);
        self.control.begin(fence, deadline);
    }

    fn start(&mut self, exchange: Exchange, send: &mut D::Parts) -> Result<(), CollectiveError> {
        self.step.open(exchange)?;
        std::mem::swap(&mut self.outgoing, send);
        self.device.clear(send);
        self.announce(exchange)
    }

    fn finish(&mut self, exchange: Exchange, received: &mut D::Parts) -> Result<(), CollectiveError> {
        self.step.close(exchange)?;
        let sizes = self.announced(exchange)?;
        self.transfer(exchange, received, &sizes).map_err(|error| self.failed(error))?;
        let me = self.control.rank().index();
        let others = sizes.iter().enumerate().filter(|(rank, _)| *rank != me);
        others.for_each(|(_, &bytes)| self.step.count_received(bytes, CONTROL_BYTES));
        Ok(())
    }

    fn counters(&self) -> ExchangeCounters {
        self.step.counters
    }
}
