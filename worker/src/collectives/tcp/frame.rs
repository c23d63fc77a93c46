//! The bytes between two ranks: a header of fixed size, then the payload.

use phalanx_model::{Exchange, ExchangeKind};
use phalanx_proto::{Epoch, Fence, LayerIdx, Rank, StepId, Term};

/// Bytes of a frame's header; the payload follows. Integers are little endian.
///
/// | offset | bytes | field |
/// |-------:|------:|-------|
/// | 0 | 4 | magic, `PHXF` |
/// | 4 | 4 | kind: 1 dispatch, 2 combine, 3 farewell |
/// | 8 | 8 | term |
/// | 16 | 8 | epoch |
/// | 24 | 8 | step |
/// | 32 | 4 | subject: the layer; in a farewell the rank to blame |
/// | 36 | 4 | the sender's rank |
/// | 40 | 4 | length of the payload |
/// | 44 | 4 | CRC32C of the payload |
/// | 48 | 4 | CRC32C of bytes 0 to 47 |
///
/// In each exchange a rank sends one frame to every other rank, also when it has no row for it. A rank whose
/// exchange failed sends a farewell, without payload, and ends its half of the connection.
pub const HEADER_BYTES: usize = 52;

const MAGIC: [u8; 4] = *b"PHXF";

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::collectives) enum Kind {
    /// Rows of an exchange.
    Rows(ExchangeKind, LayerIdx),
    /// The sender's exchange failed, and this rank is to blame.
    Farewell(Rank),
}

/// A frame without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::collectives) struct Header {
    pub(in crate::collectives) kind: Kind,
    pub(in crate::collectives) fence: Fence,
    pub(in crate::collectives) from: Rank,
    pub(in crate::collectives) len: u32,
    pub(in crate::collectives) crc: u32,
}

impl Header {
    /// The header of rows with this payload, whose length the caller has bounded.
    pub(in crate::collectives) fn rows(exchange: Exchange, fence: Fence, from: Rank, payload: &[u8]) -> Self {
        let kind = Kind::Rows(exchange.kind, exchange.layer);
        Self { kind, fence, from, len: payload.len() as u32, crc: crc32c::crc32c(payload) }
    }

    /// The header that blames a rank.
    pub(in crate::collectives) fn farewell(blamed: Rank, fence: Fence, from: Rank) -> Self {
        Self { kind: Kind::Farewell(blamed), fence, from, len: 0, crc: crc32c::crc32c(&[]) }
    }

    pub(in crate::collectives) fn encode(&self) -> [u8; HEADER_BYTES] {
        let (kind, subject) = match self.kind {
            Kind::Rows(ExchangeKind::Dispatch, layer) => (1u32, layer.0),
            Kind::Rows(ExchangeKind::Combine, layer) => (2, layer.0),
            Kind::Farewell(blamed) => (3, blamed.0),
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.fence.term.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.fence.epoch.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.fence.step.0.to_le_bytes());
        bytes[32..36].copy_from_slice(&subject.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.from.0.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.len.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..48]);
        bytes[48..52].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The header in these bytes, or what does not hold of them.
    pub(in crate::collectives) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, &'static str> {
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[..4] != MAGIC {
            return Err("it does not begin like a frame");
        }
        if u32_at(48) != crc32c::crc32c(&bytes[..48]) {
            return Err("the checksum of its header differs");
        }
        let subject = u32_at(32);
        let kind = match u32_at(4) {
            1 => Kind::Rows(ExchangeKind::Dispatch, LayerIdx(subject)),
            2 => Kind::Rows(ExchangeKind::Combine, LayerIdx(subject)),
            3 => Kind::Farewell(Rank(subject)),
            _ => return Err("its kind is unknown"),
        };
        let fence = Fence { term: Term(u64_at(8)), epoch: Epoch(u64_at(16)), step: StepId(u64_at(24)) };
        Ok(Self { kind, fence, from: Rank(u32_at(36)), len: u32_at(40), crc: u32_at(44) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let fence = Fence { term: Term(u64::MAX - 1), epoch: Epoch(1 << 40), step: StepId(77) };
        let exchange = Exchange { layer: LayerIdx(35), kind: ExchangeKind::Combine, row_bytes: 3 };
        Header::rows(exchange, fence, Rank(9), b"abc")
    }

    #[test]
    fn headers_survive_the_wire() {
        let farewell = Header::farewell(Rank(3), header().fence, Rank(2));
        for header in [header(), farewell] {
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_seen() {
        let good = header().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit}");
        }
    }
}
