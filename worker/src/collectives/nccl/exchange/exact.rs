//! The exact way: the control connections carry fence and sizes, and as many bytes travel as there are.

use std::time::Instant;

use phalanx_kernels::cuda::{Outgoing, PART_ALIGNMENT, Parts};
use phalanx_model::{CollectiveError, Collectives, Exchange};
use phalanx_proto::Rank;

use super::watch::{Goal, pause};
use super::{CONTROL_BYTES, Nccl, SIZE_BYTES, Sent, pointer};
use crate::collectives::nccl::schedule::{all_to_all, starts};

impl Nccl {
    /// Bytes to each rank, once the ops are done that write them.
    fn sizes(&self, exchange: Exchange, send: &Parts) -> Result<Vec<usize>, CollectiveError> {
        let failed = |error| self.device(error);
        for look in 0.. {
            if self.port.is_idle().map_err(failed)? {
                break;
            }
            if Instant::now() >= self.step.deadline {
                let why = "its device did not finish the rows in time".to_owned();
                let Exchange { layer, kind, .. } = exchange;
                return Err(CollectiveError::Lost { rank: self.control.rank(), layer, kind, why });
            }
            pause(look);
        }
        self.port.sizes(send).map_err(failed)
    }

    /// Puts the sizes of the parts on their way.
    pub(super) fn announce(&mut self, exchange: Exchange, send: &Parts) -> Result<(), CollectiveError> {
        let sizes = self.sizes(exchange, send).map_err(|error| self.failed(error))?;
        assert_eq!(sizes.len(), self.sizes_out.by_rank.len(), "a part for each rank");
        let me = self.me();
        for (rank, (part, &bytes)) in self.sizes_out.by_rank.iter_mut().zip(&sizes).enumerate() {
            part.clear();
            part.extend_from_slice(&(bytes as u64).to_le_bytes());
            if rank != me {
                self.step.count_sent(exchange, bytes, CONTROL_BYTES);
            }
        }
        if sizes.iter().any(|&bytes| bytes > self.payload_max) {
            let what = "it would be longer than this epoch allows";
            return Err(self.failed(CollectiveError::Corrupt { rank: Rank(me as u32), what }));
        }
        self.sent = Some(Sent::Parts(self.port.take(send), sizes));
        let told = self.control.start(of_sizes(exchange), &mut self.sizes_out);
        told.map_err(|error| self.broken(error))
    }

    /// The sizes of the parts that come from each rank, `[ranks]`.
    pub(super) fn announced(&mut self, exchange: Exchange) -> Result<Vec<usize>, CollectiveError> {
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

    /// Moves the parts, whose sizes all ranks know, and waits for them.
    pub(super) fn transfer(
        &mut self,
        exchange: Exchange,
        (outgoing, sent): (&Outgoing, &[usize]),
        received: &mut Parts,
        sizes: &[usize],
    ) -> Result<(), CollectiveError> {
        let me = self.me();
        let into = self.port.room(received, sizes).map_err(|error| self.device(error))?;
        let stream = self.port.stream().map_err(|error| self.device(error))?;
        let transfers = all_to_all(me, sent, sizes, PART_ALIGNMENT);
        let source = outgoing.address();
        // SAFETY: both addresses are the port's and have room for the parts as the schedule lays them out; who frees them
        // does so in the order of the stream, and what is sent is kept until the exchange is over.
        let enqueued = unsafe { self.communicator.enqueue(&transfers, pointer(source), pointer(into), stream.cast()) };
        let (from, to) = (starts(sent, PART_ALIGNMENT)[me], starts(sizes, PART_ALIGNMENT)[me]);
        self.enqueued(exchange, enqueued)?;
        // SAFETY: this rank's own part, as both sides lay it out; source and room are different parts.
        let kept = unsafe { self.port.copy(source + from as u64, into + to as u64, sizes[me]) };
        kept.map_err(|error| self.device(error))?;
        self.wait(exchange, None, Goal::Done)
    }
}

/// The exchange of sizes that goes before that of the rows.
const fn of_sizes(exchange: Exchange) -> Exchange {
    Exchange { row_bytes: SIZE_BYTES, ..exchange }
}
