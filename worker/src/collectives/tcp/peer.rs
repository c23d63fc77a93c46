//! The connection to one other rank: at most one frame on its way out and one on its way in.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use phalanx_kernels::HostParts;
use phalanx_proto::Rank;
use rustix::event::PollFlags;

use super::frame::{HEADER_BYTES, Header, Kind};

/// Why a connection is of no more use.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It has ended.
    Gone(String),
    /// What came is not what was sent.
    Corrupt(&'static str),
    /// The peer's exchange failed; it blames this rank.
    Farewell(Rank),
}

/// One other rank, over a socket that never blocks.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) rank: Rank,
    stream: TcpStream,
    out: Outgoing,
    arriving: Incoming,
}

#[derive(Debug)]
struct Outgoing {
    header: [u8; HEADER_BYTES],
    payload: Vec<u8>,
    sent: usize,
    /// Bytes of the frame; 0 where there is none.
    total: usize,
}

#[derive(Debug)]
struct Incoming {
    bytes: [u8; HEADER_BYTES],
    header: Option<Header>,
    payload: Vec<u8>,
    have: usize,
    /// CRC32C of the payload so far.
    crc: u32,
}

impl Incoming {
    fn reset(&mut self) {
        self.header = None;
        self.have = 0;
        self.crc = 0;
    }

    fn complete(&self) -> bool {
        self.header.is_some_and(|header| self.have == HEADER_BYTES + header.len as usize)
    }
}

impl Peer {
    /// A peer over a connected socket that does not block.
    pub(super) fn new(rank: Rank, stream: TcpStream) -> Self {
        let out = Outgoing { header: [0; HEADER_BYTES], payload: Vec::new(), sent: 0, total: 0 };
        let bytes = [0; HEADER_BYTES];
        let arriving = Incoming { bytes, header: None, payload: Vec::new(), have: 0, crc: 0 };
        Self { rank, stream, out, arriving }
    }

    /// What this exchange still needs of the socket.
    pub(super) fn wants(&self) -> PollFlags {
        let mut wants = self.wants_out();
        wants.set(PollFlags::IN, !self.arriving.complete());
        wants
    }

    /// Whether a frame is still on its way out.
    pub(super) fn wants_out(&self) -> PollFlags {
        if self.out.sent < self.out.total { PollFlags::OUT } else { PollFlags::empty() }
    }

    /// Whether the peer's frame of this exchange is still to come.
    pub(super) fn owes(&self) -> bool {
        !self.arriving.complete()
    }

    /// Puts a frame on its way. The part is taken; the memory of the last frame sent comes back for it.
    pub(super) fn enqueue(&mut self, header: &Header, part: &mut Vec<u8>) {
        std::mem::swap(&mut self.out.payload, part);
        part.clear();
        self.out.header = header.encode();
        self.out.total = HEADER_BYTES + self.out.payload.len();
        self.out.sent = 0;
    }

    /// Puts a farewell on its way, behind the frame that is on its way already.
    pub(super) fn enqueue_farewell(&mut self, farewell: &Header) {
        if self.out.sent == self.out.total {
            self.enqueue(farewell, &mut Vec::new());
        } else {
            self.out.payload.extend_from_slice(&farewell.encode());
            self.out.total += HEADER_BYTES;
        }
    }

    /// Reads and writes as much as the socket takes without waiting. Reads no further than the frame of this
    /// exchange: that of the next one, which a fast peer may have sent, waits in the socket.
    pub(super) fn progress(&mut self, payload_max: usize) -> Result<(), Trouble> {
        self.read(payload_max)?;
        self.write(payload_max)
    }

    /// Writes as much as the socket takes without waiting.
    pub(super) fn write(&mut self, payload_max: usize) -> Result<(), Trouble> {
        while self.out.sent < self.out.total {
            let sent = match self.out.sent.checked_sub(HEADER_BYTES) {
                Some(sent) => self.stream.write(&self.out.payload[sent..]),
                None => {
                    let header = IoSlice::new(&self.out.header[self.out.sent..]);
                    self.stream.write_vectored(&[header, IoSlice::new(&self.out.payload)])
                }
            };
            match outcome(sent) {
                Ok(Some(n)) => self.out.sent += n,
                Ok(None) => return Ok(()),
                Err(why) => return Err(self.last_words(payload_max).unwrap_or(Trouble::Gone(why))),
            }
        }
        Ok(())
    }

    fn read(&mut self, payload_max: usize) -> Result<(), Trouble> {
        let Self { stream, arriving, .. } = self;
        while !arriving.complete() {
            let at = arriving.have;
            let got = match arriving.header {
                None => stream.read(&mut arriving.bytes[at..]),
                Some(header) => stream.read(&mut arriving.payload[at - HEADER_BYTES..header.len as usize]),
            };
            let Some(n) = outcome(got).map_err(Trouble::Gone)? else { return Ok(()) };
            arriving.have += n;
            if arriving.header.is_some() {
                let begin = at - HEADER_BYTES;
                arriving.crc = crc32c::crc32c_append(arriving.crc, &arriving.payload[begin..begin + n]);
            } else if arriving.have == HEADER_BYTES {
                let header = Header::decode(&arriving.bytes).map_err(Trouble::Corrupt)?;
                if header.from != self.rank {
                    return Err(Trouble::Corrupt("it names another sender"));
                }
                if let Kind::Farewell(blamed) = header.kind {
                    return Err(Trouble::Farewell(blamed));
                }
                let len = header.len as usize;
                if len > payload_max {
                    return Err(Trouble::Corrupt("it is longer than this epoch allows"));
                }
                if arriving.payload.len() < len {
                    arriving.payload.resize(len, 0);
                }
                arriving.header = Some(header);
            }
        }
        match arriving.header {
            Some(header) if header.crc != arriving.crc => Err(Trouble::Corrupt("the checksum of its payload differs")),
            _ => Ok(()),
        }
    }

    /// Looks behind what came for a farewell: a peer that gave up has said whom it blames before its socket failed.
    fn last_words(&mut self, payload_max: usize) -> Option<Trouble> {
        // The frame of this exchange, that of the next, the farewell.
        for _ in 0..3 {
            match self.read(payload_max) {
                Err(farewell @ Trouble::Farewell(_)) => return Some(farewell),
                Ok(()) if self.arriving.complete() => self.arriving.reset(),
                _ => return None,
            }
        }
        None
    }

    /// The frame of this exchange, if it is there.
    pub(super) fn arrived(&self) -> Option<Header> {
        self.arriving.header.filter(|_| self.arriving.complete())
    }

    /// Hands over the frame's payload and makes ready for the next frame. Returns the payload's length.
    pub(super) fn deliver(&mut self, received: &mut HostParts) -> usize {
        let part = &mut received.by_rank[self.rank.index()];
        let len = self.arriving.have.saturating_sub(HEADER_BYTES);
        std::mem::swap(&mut self.arriving.payload, part);
        part.truncate(len);
        self.arriving.reset();
        len
    }

    /// Ends this rank's half of the connection.
    pub(super) fn end(&mut self) {
        self.out.total = self.out.sent;
        // A socket that is gone needs no ending.
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Bytes moved; none if the socket would block or was interrupted; or why it is gone.
fn outcome(moved: io::Result<usize>) -> Result<Option<usize>, String> {
    match moved {
        Ok(0) => Err("it closed the connection".to_owned()),
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use phalanx_model::{Exchange, ExchangeKind};
    use phalanx_proto::{Fence, LayerIdx};

    use super::*;

    /// What a peer says of these bytes, and the memory it took to say so.
    fn hear(bytes: &[u8], payload_max: usize) -> (Result<(), Trouble>, usize) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        far.write_all(bytes).unwrap();
        far.shutdown(Shutdown::Write).unwrap();
        let mut peer = Peer::new(Rank(1), listener.accept().unwrap().0);
        (peer.progress(payload_max), peer.arriving.payload.capacity())
    }

    fn header(payload: &[u8]) -> Header {
        let exchange = Exchange { layer: LayerIdx(0), kind: ExchangeKind::Dispatch, row_bytes: 1 };
        Header::rows(exchange, Fence::default(), Rank(1), payload)
    }

    #[test]
    fn a_frame_is_read() {
        let bytes = [&header(b"rows").encode(), b"rows".as_slice()].concat();
        assert!(matches!(hear(&bytes, 4), (Ok(()), 4..)));
    }

    #[test]
    fn a_frame_too_long_is_refused_before_it_takes_memory() {
        for len in [5, u32::MAX] {
            let heard = hear(&Header { len, ..header(b"rows") }.encode(), 4);
            assert!(matches!(heard, (Err(Trouble::Corrupt(_)), 0)), "{heard:?}");
        }
    }

    #[test]
    fn another_rank_s_frame_is_refused() {
        let heard = hear(&Header { from: Rank(2), ..header(b"") }.encode(), 4);
        assert!(matches!(heard, (Err(Trouble::Corrupt(_)), 0)), "{heard:?}");
    }

    #[test]
    fn a_payload_cut_short_is_a_lost_rank() {
        let heard = hear(&header(b"rows").encode(), 4).0;
        assert!(matches!(heard, Err(Trouble::Gone(_))), "{heard:?}");
    }

    #[test]
    fn last_words_are_found_behind_rows() {
        let farewell = Header::farewell(Rank(7), Fence::default(), Rank(1)).encode();
        let rows = [&header(b"rows").encode(), b"rows".as_slice()].concat();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        far.write_all(&[rows.clone(), rows, farewell.to_vec()].concat()).unwrap();
        let mut peer = Peer::new(Rank(1), listener.accept().unwrap().0);
        assert!(matches!(peer.last_words(4), Some(Trouble::Farewell(Rank(7)))));
    }
}
