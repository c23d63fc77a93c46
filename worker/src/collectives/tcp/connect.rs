//! Joins the ranks of an epoch: a rank dials every lower rank and is dialed by every higher one.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_proto::Rank;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::handshake::{Handshake, Identity, Nonce, Outcome, Refusal};
use super::peer::Peer;
use super::{Tcp, wait};
use crate::collectives::GroupId;
use crate::tenure::Tenure;

/// How long a caller may take to say who it is.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
/// How long to wait before calling again.
const REDIAL: Duration = Duration::from_millis(50);
/// Callers that may be in a handshake at once, apart from the ranks of the group. The oldest makes way.
const STRANGERS_MAX: usize = 64;

/// Where a worker is called by higher ranks, for all epochs of its life.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    token: Token,
}

/// The cluster token, empty if there is none.
struct Token(Arc<[u8]>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "no token" } else { "a token" })
    }
}

impl Listener {
    /// Listens at `addr`. With a token only callers that know it are let in, and only such peers are called.
    ///
    /// # Errors
    /// The address is taken or not of this host, or it is beyond loopback and there is no token.
    pub fn bind(addr: SocketAddr, token: Option<Arc<[u8]>>) -> io::Result<Self> {
        let token = Token(token.unwrap_or_else(|| Arc::from([])));
        if token.0.is_empty() && !addr.ip().is_loopback() {
            let why = "ranks that listen beyond loopback need a cluster token; set one for every process";
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        let socket = TcpListener::bind(addr)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, token })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

/// Why the ranks of an epoch could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The list of peers has no place for this rank.
    #[error("rank {rank} is not one of {size} ranks")]
    NoSuchRank {
        /// This rank.
        rank: Rank,
        /// Addresses given.
        size: usize,
    },
    /// A rank will not speak to this one.
    #[error("rank {rank} and this rank cannot join: {why}")]
    Refused {
        /// The rank called.
        rank: Rank,
        /// Why not.
        why: Refusal,
    },
    /// Ranks did not join in time.
    #[error("deadline passed before these ranks joined {group}: {waiting_for:?}; last seen: {last}")]
    Deadline {
        /// What was to be joined.
        group: GroupId,
        /// Who did not.
        waiting_for: Vec<Rank>,
        /// The last connection that failed, and why.
        last: String,
    },
    /// Nobody wants them to join any more.
    #[error("this worker was released, taken over or given up before these ranks joined {group}: {waiting_for:?}")]
    Over {
        /// What was to be joined.
        group: GroupId,
        /// Who had not.
        waiting_for: Vec<Rank>,
    },
    /// The system refused something.
    #[error("{what}")]
    Io {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Joins this rank with all others of `group`. `peers` holds every rank's listening address, this one's too;
/// frames carry at most `payload_max` bytes, the same on every rank. The end of `tenure` ends the wait, and that of every
/// exchange afterwards.
///
/// A caller of an older epoch, a stranger, a silent one or one without the token is turned away, and the wait for the
/// right one goes on. A peer that cannot be reached yet, or is still in an older epoch, is called again.
///
/// # Errors
/// A peer refused this rank for good, or did not join before `deadline` or the end of `tenure`.
pub fn connect(
    listener: &Listener,
    group: GroupId,
    rank: Rank,
    peers: &[SocketAddr],
    payload_max: u32,
    deadline: Instant,
    tenure: &Tenure,
) -> Result<Tcp, ConnectError> {
    if rank.index() >= peers.len() {
        return Err(ConnectError::NoSuchRank { rank, size: peers.len() });
    }
    let me = Identity { group, rank, size: peers.len() as u32, token: &listener.token.0 };
    let redial = (0..rank.0).map(|r| (Rank(r), Instant::now())).collect();
    let joined = peers.iter().map(|_| None).collect();
    let mut gathering =
        Gathering { me, listener, peers, deadline, tenure, redial, talks: Vec::new(), joined, last: None };
    while !gathering.complete() {
        gathering.dial()?;
        gathering.accept()?;
        gathering.advance()?;
        if !gathering.complete() {
            gathering.poll()?;
        }
    }
    let others = gathering.joined.into_iter().flatten().collect();
    Ok(Tcp::new(rank, others, payload_max, tenure.clone()))
}

/// The ranks on their way to each other.
struct Gathering<'a> {
    me: Identity<'a>,
    listener: &'a Listener,
    peers: &'a [SocketAddr],
    deadline: Instant,
    tenure: &'a Tenure,
    /// Ranks to call, and when.
    redial: Vec<(Rank, Instant)>,
    talks: Vec<Handshake>,
    joined: Vec<Option<Peer>>,
    /// The last connection that failed.
    last: Option<String>,
}

impl Gathering<'_> {
    fn missing(&self) -> impl Iterator<Item = Rank> {
        let me = self.me.rank;
        let ranks = (0u32..).map(Rank).zip(&self.joined);
        ranks.filter(move |(rank, peer)| *rank != me && peer.is_none()).map(|(rank, _)| rank)
    }

    fn complete(&self) -> bool {
        self.missing().next().is_none()
    }

    /// Calls the ranks whose time has come.
    fn dial(&mut self) -> Result<(), ConnectError> {
        let now = Instant::now();
        for (rank, _) in self.redial.extract_if(.., |(_, at)| *at <= now).collect::<Vec<_>>() {
            match open(self.peers[rank.index()]) {
                Ok(stream) => self.talks.push(Handshake::dial(stream, self.me, rank, nonce()?, self.deadline)),
                Err(e) => self.call_again(rank, &e),
            }
        }
        Ok(())
    }

    fn call_again(&mut self, rank: Rank, why: &dyn fmt::Display) {
        self.last = Some(format!("rank {rank} at {}: {why}", self.peers[rank.index()]));
        self.redial.push((rank, Instant::now() + REDIAL));
    }

    /// Lets in whoever calls.
    fn accept(&mut self) -> Result<(), ConnectError> {
        let callers_max = STRANGERS_MAX + self.peers.len();
        for _ in 0..callers_max {
            let stream = match self.listener.socket.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
                Err(source) => return Err(ConnectError::Io { what: "no connection can be accepted", source }),
            };
            if prepare(&stream).is_err() {
                continue;
            }
            let is_caller = |talk: &Handshake| talk.dialed.is_none();
            if self.talks.iter().filter(|talk| is_caller(talk)).count() == callers_max
                && let Some(oldest) = self.talks.iter().position(is_caller)
            {
                self.talks.remove(oldest);
            }
            self.talks.push(Handshake::accept(stream, nonce()?, Instant::now() + HANDSHAKE_MAX));
        }
        Ok(())
    }

    /// Takes every handshake as far as it goes.
    fn advance(&mut self) -> Result<(), ConnectError> {
        let now = Instant::now();
        for mut talk in std::mem::take(&mut self.talks) {
            let outcome = talk.advance(self.me);
            match (outcome, talk.dialed) {
                (Ok(Outcome::Pending), None) if talk.expires <= now => {
                    self.last = Some("a caller did not say who it is".to_owned());
                }
                (Ok(Outcome::Pending), _) => self.talks.push(talk),
                (Ok(Outcome::Joined(rank)), _) => self.joined[rank.index()] = Some(Peer::new(rank, talk.stream)),
                (Ok(Outcome::Refused(why @ Refusal::Early)), Some(rank)) => self.call_again(rank, &why),
                (Ok(Outcome::Refused(why)), Some(rank)) => return Err(ConnectError::Refused { rank, why }),
                (Ok(Outcome::Refused(why)), None) => self.last = Some(format!("a caller was refused: {why:?}")),
                (Ok(Outcome::Stranger), Some(rank)) => self.call_again(rank, &"it does not answer like a rank"),
                (Ok(Outcome::Stranger), None) => self.last = Some("a caller did not speak like a rank".to_owned()),
                (Err(e), Some(rank)) => self.call_again(rank, &e),
                (Err(e), None) => self.last = Some(format!("a caller left: {e}")),
            }
        }
        Ok(())
    }

    /// Waits until something can go on.
    fn poll(&mut self) -> Result<(), ConnectError> {
        if self.tenure.is_over() {
            return Err(ConnectError::Over { group: self.me.group, waiting_for: self.missing().collect() });
        }
        let now = Instant::now();
        if self.deadline <= now {
            return Err(ConnectError::Deadline {
                group: self.me.group,
                waiting_for: self.missing().collect(),
                last: self.last.take().unwrap_or_else(|| "nobody called".to_owned()),
            });
        }
        let alarms = self.redial.iter().map(|(_, at)| *at).chain(self.talks.iter().map(|talk| talk.expires));
        let until = self.tenure.next_look(alarms.fold(self.deadline, Instant::min));
        let mut polled = vec![PollFd::from_borrowed_fd(self.listener.socket.as_fd(), PollFlags::IN)];
        polled.extend(self.talks.iter().map(|talk| PollFd::from_borrowed_fd(talk.as_fd(), talk.wants())));
        match wait(&mut polled, until) {
            Ok(_) => Ok(()),
            Err(source) => Err(ConnectError::Io { what: "poll failed", source }),
        }
    }
}

/// Begins to connect. The socket can be written once it is connected, and fails if it cannot be.
fn open(addr: SocketAddr) -> io::Result<TcpStream> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let stream = TcpStream::from(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?);
    prepare(&stream)?;
    match rustix::net::connect(&stream, &addr) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(stream),
        Err(e) => Err(e.into()),
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)
}

fn nonce() -> Result<Nonce, ConnectError> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|e| ConnectError::Io {
        what: "the system has no randomness",
        source: io::Error::other(e.to_string()),
    })?;
    Ok(nonce)
}
