//! Calls to one worker, each with a deadline, each error with the worker's name.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use phalanx_proto::Rank;
use phalanx_wire::token::SendToken;
use phalanx_wire::v1::worker_client::WorkerClient;
use phalanx_wire::{
    ClusterToken, Description, Health, Join, Prepare, PrepareEvent, Progress, REPLY_BYTES_MAX, REQUEST_BYTES_MAX,
    Release, StepReply, WireError, v1,
};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};

use super::carry::Carrier;
use super::link::RankPort;

/// A connection on which nothing came for this long is asked whether it still lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// It then has this long to answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(1500);
/// Between two attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// Longest wait for a call that a worker answers at once.
pub(super) const CALL_WAIT: Duration = Duration::from_secs(5);
/// Longest message that is repeated from a worker's status, in bytes.
const MESSAGE_BYTES_MAX: usize = 4096;

/// A worker's name in messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// Its rank, once it has one.
    pub rank: Option<Rank>,
    /// Its address.
    pub address: String,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "rank {rank} at {}", self.address),
            None => write!(f, "the worker at {}", self.address),
        }
    }
}

/// Why a call to a worker failed.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It is not an address.
    #[error("`{address}` is no address of a worker: use HOST:PORT")]
    Address {
        /// What was given.
        address: String,
    },
    /// Nobody answers there.
    #[error("cannot reach {who}: {why}; start `phalanx worker` there, or correct the address")]
    Unreachable {
        /// The worker.
        who: Who,
        /// What was seen last.
        why: String,
    },
    /// It does not answer in time.
    #[error("{who} has not answered {call} within {:.1} s", .waited.as_secs_f32())]
    Deadline {
        /// The worker.
        who: Who,
        /// The call.
        call: &'static str,
        /// How long it had.
        waited: Duration,
    },
    /// It answers with an error, or the connection breaks.
    #[error("{who} fails {call}: {why}")]
    Failed {
        /// The worker.
        who: Who,
        /// The call.
        call: &'static str,
        /// The kind of error.
        code: Code,
        /// What it says.
        why: String,
    },
    /// It answers with something else.
    #[error("{who} answers {call} with something else: {why}")]
    Reply {
        /// The worker.
        who: Who,
        /// The call.
        call: &'static str,
        /// What is wrong with it.
        why: WireError,
    },
}

/// One worker. Clones speak over the same connection.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    who: Who,
    client: WorkerClient<InterceptedService<Channel, SendToken>>,
}

impl WorkerHandle {
    /// Connects to the worker at `address` (`HOST:PORT`); tries until `deadline`, so that it may still be starting.
    ///
    /// # Errors
    /// Something that is no address, or nobody answers there in time.
    pub async fn connect(address: &str, token: Option<&ClusterToken>, deadline: Instant) -> Result<Self, WorkerError> {
        let who = Who { rank: None, address: address.to_owned() };
        let no_address = || WorkerError::Address { address: address.to_owned() };
        let (host, port) = address.rsplit_once(':').ok_or_else(no_address)?;
        if host.is_empty() || port.parse::<u16>().is_err() || address.contains('/') {
            return Err(no_address());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| no_address())?;
        let endpoint = endpoint
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let mut why = "nobody answers".to_owned();
        loop {
            match tokio::time::timeout_at(deadline, endpoint.connect()).await {
                Ok(Ok(channel)) => {
                    let client = WorkerClient::with_interceptor(channel, SendToken::new(token))
                        .max_decoding_message_size(REPLY_BYTES_MAX)
                        .max_encoding_message_size(REQUEST_BYTES_MAX);
                    return Ok(Self { who, client });
                }
                Ok(Err(error)) => why = root_cause(&error),
                Err(_) => return Err(WorkerError::Unreachable { who, why }),
            }
            let pause = (Instant::now() + CONNECT_PAUSE).min(deadline);
            tokio::time::sleep_until(pause).await;
        }
    }

    /// The worker's name.
    #[must_use]
    pub const fn who(&self) -> &Who {
        &self.who
    }

    /// The worker's address, as given.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.who.address
    }

    /// The same worker, named by its rank.
    #[must_use]
    pub fn with_rank(mut self, rank: Rank) -> Self {
        self.who.rank = Some(rank);
        self
    }

    /// Takes the worker for this coordinator. In what it says of itself, an unspecified data address is replaced by
    /// the one it was reached by.
    ///
    /// # Errors
    /// It belongs to another coordinator, asks for another token, or does not answer.
    pub async fn join(&self, join: Join) -> Result<Description, WorkerError> {
        let mut client = self.client.clone();
        let reply = self.within(CALL_WAIT, "join", client.join(v1::JoinRequest::from(join))).await?;
        let mut description = Description::try_from(reply).map_err(self.no_reply("join"))?;
        if description.data_address.ip().is_unspecified() {
            let addresses = tokio::net::lookup_host(self.address()).await;
            let mut addresses = addresses.map_err(|e| self.unreachable(e.to_string()))?.map(|address| address.ip());
            let ip = addresses.next().ok_or_else(|| self.unreachable("its host has no address".to_owned()))?;
            description.data_address = SocketAddr::new(ip, description.data_address.port());
        }
        Ok(description)
    }

    /// Has the worker make an epoch ready, and returns the bytes it then holds.
    ///
    /// # Errors
    /// It cannot, or not within `wait`.
    pub async fn prepare(
        &self,
        request: Prepare,
        wait: Duration,
        mut on_progress: impl FnMut(Progress) + Send,
    ) -> Result<u64, WorkerError> {
        const CALL: &str = "prepare";
        let mut client = self.client.clone();
        let events = async {
            let mut events = client.prepare(v1::PrepareRequest::from(request)).await?.into_inner();
            while let Some(event) = events.message().await? {
                match PrepareEvent::try_from(event).map_err(self.no_reply(CALL)) {
                    Ok(PrepareEvent::Progress(progress)) => on_progress(progress),
                    Ok(PrepareEvent::Ready { allocated_bytes }) => return Ok(Response::new(Ok(allocated_bytes))),
                    Err(error) => return Ok(Response::new(Err(error))),
                }
            }
            Err(Status::unavailable("it ended before it was ready"))
        };
        self.within(wait, CALL, events).await?
    }

    /// Joins the worker to a link: a task carries plans to it and replies back, until either end is gone.
    ///
    /// # Errors
    /// The worker has too many streams open, or does not answer.
    pub(super) async fn carry(&self, port: RankPort) -> Result<(), WorkerError> {
        Carrier::start(self.clone(), port).await
    }

    /// Opens a stream of steps: what is sent is done in order, and answered in order.
    pub(super) async fn steps(
        &self,
        plans: mpsc::Receiver<v1::Envelope>,
        wait: Duration,
    ) -> Result<StepReplies, WorkerError> {
        let mut client = self.client.clone();
        let replies = self.within(wait, "steps", client.steps(ReceiverStream::new(plans))).await?;
        Ok(StepReplies { who: self.who.clone(), replies })
    }

    /// Asks how the worker is. It answers even while a step works or hangs.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn health(&self) -> Result<Health, WorkerError> {
        let mut client = self.client.clone();
        let reply = self.within(CALL_WAIT, "health", client.health(v1::HealthRequest {})).await?;
        Health::try_from(reply).map_err(self.no_reply("health"))
    }

    /// Gives the worker back: it drops its epoch and may be joined again. One that belongs to another stays as it is.
    ///
    /// # Errors
    /// It is not done within `wait`.
    pub async fn release(&self, release: Release, wait: Duration) -> Result<(), WorkerError> {
        let mut client = self.client.clone();
        self.within(wait, "release", client.release(v1::ReleaseRequest::from(release))).await.map(drop)
    }

    async fn within<T>(
        &self,
        wait: Duration,
        call: &'static str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, WorkerError> {
        match tokio::time::timeout(wait, answer).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(failed(&self.who, call, &status)),
            Err(_) => Err(WorkerError::Deadline { who: self.who.clone(), call, waited: wait }),
        }
    }

    fn no_reply(&self, call: &'static str) -> impl Fn(WireError) -> WorkerError {
        let who = self.who.clone();
        move |why| WorkerError::Reply { who: who.clone(), call, why }
    }

    fn unreachable(&self, why: String) -> WorkerError {
        WorkerError::Unreachable { who: self.who.clone(), why }
    }
}

/// The replies of a stream of steps.
#[derive(Debug)]
pub(super) struct StepReplies {
    who: Who,
    replies: Streaming<v1::Envelope>,
}

impl StepReplies {
    /// The next reply. May be given up and asked again without losing one.
    ///
    /// # Errors
    /// The stream is over.
    pub(super) async fn next(&mut self) -> Result<StepReply, WorkerError> {
        const CALL: &str = "steps";
        match self.replies.message().await {
            Ok(Some(reply)) => {
                StepReply::try_from(reply).map_err(|why| WorkerError::Reply { who: self.who.clone(), call: CALL, why })
            }
            Ok(None) => Err(failed(&self.who, CALL, &Status::unavailable("it ended its stream of steps"))),
            Err(status) => Err(failed(&self.who, CALL, &status)),
        }
    }
}

fn failed(who: &Who, call: &'static str, status: &Status) -> WorkerError {
    if let Some(cause) = status.source().filter(|&cause| nobody_listens(cause)) {
        return WorkerError::Unreachable { who: who.clone(), why: root_cause(cause) };
    }
    // What a worker says has no source; a source is of this end.
    let broken = |cause| format!("the connection broke: {}", root_cause(cause));
    let mut why = status.source().map_or_else(|| status.message().to_owned(), broken);
    let end = (0..=MESSAGE_BYTES_MAX.min(why.len())).rev().find(|&end| why.is_char_boundary(end));
    why.truncate(end.unwrap_or(0));
    WorkerError::Failed { who: who.clone(), call, code: status.code(), why }
}

/// Whether the error is that a connection was refused.
fn nobody_listens(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |&error| error.source());
    causes.any(|error| error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::ConnectionRefused))
}

/// What an error comes down to, without the layers that passed it on.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    std::iter::successors(Some(error), |&error| error.source()).last().map_or_else(String::new, ToString::to_string)
}
