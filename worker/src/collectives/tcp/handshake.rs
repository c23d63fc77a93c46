//! How two ranks come to trust a connection: four messages of one fixed size.
//!
//! | | message | from | what it says |
//! |-|---------|------|--------------|
//! | 1 | hello | dialer | who calls whom, for which group, and a nonce |
//! | 2 | challenge | acceptor | the same from its side, its nonce, its proof, or why not |
//! | 3 | proof | dialer | its proof |
//! | 4 | verdict | acceptor | welcome, or why not |
//!
//! A proof is HMAC-SHA256, keyed with the cluster token, over the message's other fields and both nonces; kind,
//! sender and receiver are among the fields, so that no proof serves twice. Without a token the key is empty. The
//! token never crosses the wire.
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0 | 4 | magic, `PHXH` |
//! | 4 | 2 | kind, 1 to 4 |
//! | 6 | 2 | refusal, 0 for none |
//! | 8 | 4 | cell |
//! | 12 | 4 | sender's rank |
//! | 16 | 4 | receiver's rank |
//! | 20 | 4 | ranks in the group |
//! | 24 | 8 | term |
//! | 32 | 8 | epoch |
//! | 40 | 32 | sender's nonce |
//! | 72 | 32 | proof; zero in a hello |

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use hmac::{Hmac, KeyInit, Mac};
use phalanx_proto::{CellId, Epoch, Rank, Term};
use rustix::event::PollFlags;
use sha2::Sha256;

use crate::collectives::GroupId;

const MESSAGE_BYTES: usize = 104;
/// Where the proof begins; everything before it is proven.
const PROOF_AT: usize = 72;
const MAGIC: [u8; 4] = *b"PHXH";

/// Random bytes that a proof is bound to.
pub(super) type Nonce = [u8; 32];

/// Why a connection between two ranks is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The other side serves another cell.
    #[error("it serves another cell; check its address")]
    Cell,
    /// The other side is in a later epoch: this one is over.
    #[error("it is in a later epoch; this one is over")]
    Stale,
    /// The other side has not entered this epoch yet.
    #[error("it has not entered this epoch yet")]
    Early,
    /// The other side is another rank, or counts other ranks.
    #[error("it is another rank, or its group has another size; check the order of addresses")]
    Rank,
    /// The other side does not know the cluster token.
    #[error("its cluster token differs; give every process of the cluster the same one")]
    Token,
}

impl Refusal {
    const ALL: [Self; 5] = [Self::Cell, Self::Stale, Self::Early, Self::Rank, Self::Token];

    fn encode(refusal: Option<Self>) -> u16 {
        refusal.map_or(0, |refusal| refusal as u16 + 1)
    }

    fn decode(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|&refusal| Self::encode(Some(refusal)) == code)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hello = 1,
    Challenge,
    Proof,
    Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    kind: Kind,
    refusal: Option<Refusal>,
    group: GroupId,
    from: Rank,
    to: Rank,
    size: u32,
    nonce: Nonce,
}

impl Message {
    /// The message without its proof.
    fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[6..8].copy_from_slice(&Refusal::encode(self.refusal).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.group.cell.0.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.from.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.to.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.group.term.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.group.epoch.0.to_le_bytes());
        bytes[40..PROOF_AT].copy_from_slice(&self.nonce);
        bytes
    }

    /// The message in these bytes, if it is of this kind.
    fn decode(bytes: &[u8; MESSAGE_BYTES], kind: Kind) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        (bytes[..4] == MAGIC && u16_at(4) == kind as u16).then(|| Self {
            kind,
            refusal: Refusal::decode(u16_at(6)),
            group: GroupId { cell: CellId(u32_at(8)), term: Term(u64_at(24)), epoch: Epoch(u64_at(32)) },
            from: Rank(u32_at(12)),
            to: Rank(u32_at(16)),
            size: u32_at(20),
            nonce: std::array::from_fn(|i| bytes[40 + i]),
        })
    }
}

fn proof(token: &[u8], message: &[u8; MESSAGE_BYTES], hello: &Nonce, challenge: &Nonce) -> Hmac<Sha256> {
    let mac = Hmac::<Sha256>::new_from_slice(token).expect("HMAC takes keys of every length");
    mac.chain_update(&message[..PROOF_AT]).chain_update(hello).chain_update(challenge)
}

/// Who this side is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity<'a> {
    pub(super) group: GroupId,
    pub(super) rank: Rank,
    pub(super) size: u32,
    pub(super) token: &'a [u8],
}

/// What came of a handshake so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The socket must be waited for.
    Pending,
    /// Both sides agree.
    Joined(Rank),
    /// One side does not.
    Refused(Refusal),
    /// What came is not a handshake.
    Stranger,
}

/// One handshake under way over a socket that never blocks.
#[derive(Debug)]
pub(super) struct Handshake {
    pub(super) stream: TcpStream,
    /// After this it is given up.
    pub(super) expires: Instant,
    /// The rank called; none where the other side called.
    pub(super) dialed: Option<Rank>,
    nonce: Nonce,
    /// The caller's first message, once there.
    hello: Option<Message>,
    inbox: [u8; MESSAGE_BYTES],
    have: usize,
    outbox: [u8; MESSAGE_BYTES],
    sent: usize,
    /// What the outbox announces.
    outcome: Outcome,
}

impl Handshake {
    /// Answers a call.
    pub(super) fn accept(stream: TcpStream, nonce: Nonce, expires: Instant) -> Self {
        Self {
            stream,
            expires,
            dialed: None,
            nonce,
            hello: None,
            inbox: [0; MESSAGE_BYTES],
            have: 0,
            outbox: [0; MESSAGE_BYTES],
            sent: MESSAGE_BYTES,
            outcome: Outcome::Pending,
        }
    }

    /// Calls a rank.
    pub(super) fn dial(stream: TcpStream, me: Identity<'_>, to: Rank, nonce: Nonce, expires: Instant) -> Self {
        let Identity { group, rank: from, size, .. } = me;
        let hello = Message { kind: Kind::Hello, refusal: None, group, from, to, size, nonce };
        let (hello, outbox) = (Some(hello), hello.encode());
        Self { dialed: Some(to), hello, outbox, sent: 0, ..Self::accept(stream, nonce, expires) }
    }

    /// What it waits for.
    pub(super) fn wants(&self) -> PollFlags {
        if self.sent < MESSAGE_BYTES { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Goes as far as the socket allows without waiting.
    pub(super) fn advance(&mut self, me: Identity<'_>) -> io::Result<Outcome> {
        loop {
            while self.sent < MESSAGE_BYTES {
                match moved(self.stream.write(&self.outbox[self.sent..]))? {
                    Some(n) => self.sent += n,
                    None => return Ok(Outcome::Pending),
                }
            }
            if self.outcome != Outcome::Pending {
                return Ok(std::mem::replace(&mut self.outcome, Outcome::Pending));
            }
            while self.have < MESSAGE_BYTES {
                match moved(self.stream.read(&mut self.inbox[self.have..]))? {
                    Some(n) => self.have += n,
                    None => return Ok(Outcome::Pending),
                }
            }
            self.have = 0;
            let answered = match (self.dialed, self.hello) {
                (Some(_), Some(hello)) => self.hear_acceptor(me, hello),
                (_, Some(hello)) => self.hear_proof(me, hello),
                (_, None) => self.hear_hello(me),
            };
            if let Err(outcome) = answered {
                return Ok(outcome);
            }
        }
    }

    fn hear_hello(&mut self, me: Identity<'_>) -> Result<(), Outcome> {
        let hello = Message::decode(&self.inbox, Kind::Hello).ok_or(Outcome::Stranger)?;
        let moment = |group: GroupId| (group.term, group.epoch);
        let refusal = if hello.group.cell != me.group.cell {
            Some(Refusal::Cell)
        } else if moment(hello.group) < moment(me.group) {
            Some(Refusal::Stale)
        } else if moment(hello.group) > moment(me.group) {
            Some(Refusal::Early)
        } else if hello.to != me.rank || hello.size != me.size || hello.from <= me.rank || hello.from.0 >= me.size {
            Some(Refusal::Rank)
        } else {
            None
        };
        self.hello = Some(hello);
        self.say(Kind::Challenge, me, hello, refusal);
        if let Some(refusal) = refusal {
            self.outcome = Outcome::Refused(refusal);
        }
        Ok(())
    }

    fn hear_proof(&mut self, me: Identity<'_>, hello: Message) -> Result<(), Outcome> {
        let message = Message::decode(&self.inbox, Kind::Proof).ok_or(Outcome::Stranger)?;
        let same = Message { kind: Kind::Proof, ..hello } == message;
        if same && self.proven(me, &hello.nonce, &self.nonce) {
            self.say(Kind::Verdict, me, hello, None);
            self.outcome = Outcome::Joined(hello.from);
        } else {
            self.say(Kind::Verdict, me, hello, Some(Refusal::Token));
            self.outcome = Outcome::Refused(Refusal::Token);
        }
        Ok(())
    }

    /// The caller's side: the challenge, then the verdict.
    fn hear_acceptor(&mut self, me: Identity<'_>, hello: Message) -> Result<(), Outcome> {
        if let Some(message) = Message::decode(&self.inbox, Kind::Challenge) {
            if !self.proven(me, &hello.nonce, &message.nonce) {
                return Err(Outcome::Refused(Refusal::Token));
            }
            if let Some(refusal) = message.refusal {
                return Err(Outcome::Refused(refusal));
            }
            let mut answer = Message { kind: Kind::Proof, ..hello }.encode();
            let mac = proof(me.token, &answer, &hello.nonce, &message.nonce);
            answer[PROOF_AT..].copy_from_slice(&mac.finalize().into_bytes());
            self.outbox = answer;
            self.sent = 0;
            self.nonce = message.nonce;
            return Ok(());
        }
        let message = Message::decode(&self.inbox, Kind::Verdict).ok_or(Outcome::Stranger)?;
        if !self.proven(me, &hello.nonce, &self.nonce) {
            return Err(Outcome::Refused(Refusal::Token));
        }
        Err(message.refusal.map_or(Outcome::Joined(hello.to), Outcome::Refused))
    }

    /// The acceptor's side speaks.
    fn say(&mut self, kind: Kind, me: Identity<'_>, hello: Message, refusal: Option<Refusal>) {
        let Identity { group, rank: from, size, .. } = me;
        let message = Message { kind, refusal, group, from, to: hello.from, size, nonce: self.nonce };
        self.outbox = message.encode();
        let mac = proof(me.token, &self.outbox, &hello.nonce, &self.nonce);
        self.outbox[PROOF_AT..].copy_from_slice(&mac.finalize().into_bytes());
        self.sent = 0;
    }

    /// Whether the message in the inbox proves that its sender knows the token. Takes the same time for every proof.
    fn proven(&self, me: Identity<'_>, hello: &Nonce, challenge: &Nonce) -> bool {
        proof(me.token, &self.inbox, hello, challenge).verify_slice(&self.inbox[PROOF_AT..]).is_ok()
    }
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Bytes moved; none if the socket would block.
fn moved(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;

    const TOKEN: &[u8] = b"a token of the cluster";
    const NONCE: Nonce = [7; 32];

    fn me(rank: u32) -> Identity<'static> {
        let group = GroupId { cell: CellId(1), term: Term(2), epoch: Epoch(3) };
        Identity { group, rank: Rank(rank), size: 2, token: TOKEN }
    }

    fn hello() -> Message {
        let Identity { group, rank: from, size, .. } = me(1);
        Message { kind: Kind::Hello, refusal: None, group, from, to: Rank(0), size, nonce: NONCE }
    }

    /// What rank 0 makes of a caller that says hello and then `answer`s the challenge.
    fn judge(answer: impl Fn([u8; MESSAGE_BYTES]) -> [u8; MESSAGE_BYTES]) -> Outcome {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let expires = Instant::now() + Duration::from_secs(60);
        let mut acceptor = Handshake::accept(listener.accept().unwrap().0, [9; 32], expires);
        caller.write_all(&hello().encode()).unwrap();
        let acceptor = std::thread::spawn(move || acceptor.advance(me(0)).unwrap());
        let mut challenge = [0; MESSAGE_BYTES];
        caller.read_exact(&mut challenge).unwrap();
        caller.write_all(&answer(challenge)).unwrap();
        acceptor.join().unwrap()
    }

    fn answer(token: &[u8], message: Message, challenge: &[u8; MESSAGE_BYTES]) -> [u8; MESSAGE_BYTES] {
        let mut bytes = message.encode();
        let theirs = std::array::from_fn(|i| challenge[40 + i]);
        let mac = proof(token, &bytes, &message.nonce, &theirs);
        bytes[PROOF_AT..].copy_from_slice(&mac.finalize().into_bytes());
        bytes
    }

    #[test]
    fn only_a_fresh_proof_with_the_token_lets_a_caller_in() {
        let message = Message { kind: Kind::Proof, ..hello() };
        assert_eq!(judge(|challenge| answer(TOKEN, message, &challenge)), Outcome::Joined(Rank(1)));

        let refused = Outcome::Refused(Refusal::Token);
        assert_eq!(judge(|challenge| answer(b"another", message, &challenge)), refused);
        assert_eq!(judge(|_| message.encode()), refused, "no proof");
        assert_eq!(judge(|_| answer(TOKEN, message, &[0; MESSAGE_BYTES])), refused, "a proof for another challenge");
        let other = Message { nonce: [8; 32], ..message };
        assert_eq!(judge(|challenge| answer(TOKEN, other, &challenge)), refused, "a proof for another hello");
        let reflected = |mut challenge: [u8; MESSAGE_BYTES]| {
            challenge[..PROOF_AT].copy_from_slice(&message.encode()[..PROOF_AT]);
            challenge
        };
        assert_eq!(judge(reflected), refused, "the acceptor's own proof");
        assert_eq!(judge(|challenge| challenge), Outcome::Stranger);
    }
}
