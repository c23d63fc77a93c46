//! The fence within the bytes: for exchanges that a captured graph holds.
//!
//! In a captured graph the host takes no part: every rank sends every other one slot of the bucket's worst case, and
//! how much of it counts is the device's to know. So each slot begins with a tag, written by the host before the graph
//! is launched, and the host looks at all tags after the step, before anything of the step is used.

use phalanx_model::{CollectiveError, Exchange};
use phalanx_proto::{Fence, Rank};

use crate::collectives::tcp::HEADER_BYTES;
use crate::collectives::tcp::frame::{Header, Kind};

/// Bytes of a tag, the slot's payload follows: a frame's header as TCP has it, and zeros up to a border of 64 bytes.
pub const TAG_BYTES: usize = 64;
const _: () = assert!(HEADER_BYTES <= TAG_BYTES);

/// The tag of the slots that rank `from` sends.
#[must_use]
pub fn tag(exchange: Exchange, fence: Fence, from: Rank) -> [u8; TAG_BYTES] {
    let mut bytes = [0; TAG_BYTES];
    bytes[..HEADER_BYTES].copy_from_slice(&Header::rows(exchange, fence, from, &[]).encode());
    bytes
}

/// Checks the tag of a slot that came from rank `from`.
///
/// # Errors
/// It is of another moment, exchange or rank, or damaged.
pub fn check_tag(bytes: &[u8; TAG_BYTES], exchange: Exchange, fence: Fence, from: Rank) -> Result<(), CollectiveError> {
    let corrupt = |what| CollectiveError::Corrupt { rank: from, what };
    let (mut header, padding) = ([0; HEADER_BYTES], &bytes[HEADER_BYTES..]);
    header.copy_from_slice(&bytes[..HEADER_BYTES]);
    let header = Header::decode(&header).map_err(corrupt)?;
    if header.from != from || padding.iter().any(|&byte| byte != 0) {
        Err(corrupt("it names another sender"))
    } else if header.fence != fence {
        Err(CollectiveError::Fence { rank: from, theirs: header.fence, ours: fence })
    } else if header.kind != Kind::Rows(exchange.kind, exchange.layer) {
        Err(corrupt("it belongs to another exchange of the step"))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use phalanx_model::ExchangeKind;
    use phalanx_proto::{Epoch, LayerIdx, StepId, Term};

    use super::*;

    const EXCHANGE: Exchange = Exchange { layer: LayerIdx(3), kind: ExchangeKind::Combine, row_bytes: 8 };

    fn fence(step: u64) -> Fence {
        Fence { term: Term(1), epoch: Epoch(2), step: StepId(step) }
    }

    #[test]
    fn a_tag_passes_only_where_it_belongs() {
        let bytes = tag(EXCHANGE, fence(9), Rank(1));
        assert_eq!(check_tag(&bytes, EXCHANGE, fence(9), Rank(1)), Ok(()));
        // What the step before left in the buffer.
        let stale = check_tag(&tag(EXCHANGE, fence(8), Rank(1)), EXCHANGE, fence(9), Rank(1));
        assert_eq!(stale, Err(CollectiveError::Fence { rank: Rank(1), theirs: fence(8), ours: fence(9) }));
        for other in [
            check_tag(&bytes, EXCHANGE, fence(9), Rank(0)),
            check_tag(&bytes, Exchange { layer: LayerIdx(2), ..EXCHANGE }, fence(9), Rank(1)),
            check_tag(&bytes, Exchange { kind: ExchangeKind::Dispatch, ..EXCHANGE }, fence(9), Rank(1)),
            check_tag(&[0; TAG_BYTES], EXCHANGE, fence(9), Rank(1)),
        ] {
            assert!(matches!(other, Err(CollectiveError::Corrupt { .. })), "{other:?}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_tag_is_seen() {
        let good = tag(EXCHANGE, fence(9), Rank(1));
        for bit in 0..TAG_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(check_tag(&bad, EXCHANGE, fence(9), Rank(1)).is_err(), "bit {bit}");
        }
    }
}
