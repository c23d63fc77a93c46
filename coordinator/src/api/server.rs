//! Connections: accepted up to a bound, served with limits on what hyper reads, and drained at the end.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::{Router, middleware};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::body::read_rest;
use super::{ApiLimits, App, health, router};

/// Wait after a failure to accept, for instance because all file descriptors are in use.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves `app` on `listener` until `shutdown`, then closes it and waits for the answers under way. Dropping the future cuts
/// them off.
pub async fn serve(listener: TcpListener, app: App, shutdown: impl Future<Output = ()>) {
    let limits = app.config().limits.clone();
    accept_until(listener, router(app), &limits, shutdown).await.finish().await;
}

/// Serves in place of an [`App`] that cannot be yet: says that the process lives, and what it waits for, until the sender
/// of `waits_for` is gone.
pub async fn serve_loading(listener: TcpListener, waits_for: watch::Receiver<String>, limits: ApiLimits) {
    let mut ended = waits_for.clone();
    let until = async move { while ended.changed().await.is_ok() {} };
    let connections = accept_until(listener, health::loading(waits_for), &limits, until).await;
    // The app that follows does not wait for whoever is slow to ask.
    tokio::spawn(connections.finish());
}

/// What was accepted and has not ended; dropping it cuts everything off.
struct Connections {
    graceful: GracefulShutdown,
    tasks: JoinSet<()>,
}

impl Connections {
    /// Closes what is idle and waits for the rest.
    async fn finish(self) {
        self.graceful.shutdown().await;
        self.tasks.join_all().await;
    }
}

async fn accept_until(
    listener: TcpListener,
    routes: Router,
    limits: &ApiLimits,
    shutdown: impl Future<Output = ()>,
) -> Connections {
    let service = TowerToHyperService::new(routes.layer(middleware::map_request_with_state(limits.clone(), read_rest)));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_wait)
        .max_headers(limits.headers_max)
        .max_header_size(limits.header_bytes_max);
    let room = Arc::new(Semaphore::new(limits.connections_max));
    let mut connections = Connections { graceful: GracefulShutdown::new(), tasks: JoinSet::new() };
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, permit) = tokio::select! {
            accepted = accept(&listener, &room, limits.write_wait) => accepted,
            () = &mut shutdown => return connections,
        };
        let connection = http.serve_connection(TokioIo::new(stream), service.clone());
        let connection = connections.graceful.watch(connection);
        connections.tasks.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection broke");
            }
            drop(permit);
        });
        while connections.tasks.try_join_next().is_some() {}
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
    write_wait: Duration,
) -> (TcpStream, OwnedSemaphorePermit) {
    let write_wait = u32::try_from(write_wait.as_millis()).unwrap_or(u32::MAX);
    let permit = Arc::clone(room).acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Tokens are small and must leave at once.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "no TCP_NODELAY");
                }
                // Who neither reads nor leaves must not keep the connection.
                if let Err(error) = sockopt::set_tcp_user_timeout(&stream, write_wait) {
                    tracing::debug!(%error, "no TCP_USER_TIMEOUT");
                }
                return (stream, permit);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
