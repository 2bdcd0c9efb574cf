//! Connections: accepted, bounded in number and in time, and ended in order.

mod stream;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::error::Problem;
use super::health;
use stream::PatientStream;

/// Bytes of a request's head; a longer one is answered with 431.
const MAX_HEAD: usize = 64 * 1024;

/// Headers of a request; more are answered with 431.
const MAX_HEADERS: usize = 100;

/// Connections beyond the limit, for health and metrics only.
pub const RESERVE: usize = 16;

/// What one client may take of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Connections at a time. Up to [`RESERVE`] more are accepted for health and metrics; the rest
    /// wait.
    pub connections: usize,
    /// A connection on which no whole head comes for so long is closed, whether it is idle or its
    /// client sends byte by byte.
    pub read_timeout: Duration,
    /// A connection whose client takes nothing of an answer for so long is closed.
    pub write_timeout: Duration,
    /// A connection whose client has not taken the whole of an answer after so long is closed.
    pub answer_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(120),
        }
    }
}

impl ConnectionLimits {
    /// Limits for connections that carry a health check or a scrape of metrics: few, and short.
    pub fn for_health(self) -> Self {
        const SHORT: Duration = Duration::from_secs(2);
        Self {
            connections: RESERVE,
            read_timeout: self.read_timeout.min(SHORT),
            write_timeout: self.write_timeout.min(SHORT),
            answer_timeout: self.answer_timeout.min(5 * SHORT),
        }
    }
}

/// Serves until `stop`; then no connection is accepted, those that are open end with the request
/// that they are in, and the function returns when the last one has ended.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ConnectionLimits,
    stop: CancellationToken,
) {
    let places = Places::new(limits.connections);
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, peer, place)) = accepted else {
            continue;
        };
        let connection = connection(stream, peer, router.clone(), limits, &place);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "a connection has ended with an error");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// Places for connections.
struct Places {
    usual: Arc<Semaphore>,
    reserve: Arc<Semaphore>,
}

/// The place that a connection has until it ends.
enum Place {
    Usual { _permit: OwnedSemaphorePermit },
    Reserved(Reserved),
}

/// A place of the reserve, as an extension of the requests on its connection.
#[derive(Clone)]
struct Reserved {
    permit: Arc<Mutex<OwnedSemaphorePermit>>,
    usual: Arc<Semaphore>,
}

impl Places {
    fn new(connections: usize) -> Self {
        Self {
            usual: Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS))),
            reserve: Arc::new(Semaphore::new(RESERVE)),
        }
    }

    /// Waits for a free place. The semaphores are never closed.
    async fn free(&self) -> Option<Place> {
        tokio::select! {
            biased;
            permit = Arc::clone(&self.usual).acquire_owned() => {
                Some(Place::Usual { _permit: permit.ok()? })
            }
            permit = Arc::clone(&self.reserve).acquire_owned() => Some(Place::Reserved(Reserved {
                permit: Arc::new(Mutex::new(permit.ok()?)),
                usual: Arc::clone(&self.usual),
            })),
        }
    }
}

impl Place {
    /// The same place, or a usual one if there is one by now.
    fn improved(self, places: &Places) -> Self {
        match self {
            Self::Usual { .. } => self,
            Self::Reserved(_) => match Arc::clone(&places.usual).try_acquire_owned() {
                Ok(permit) => Self::Usual { _permit: permit },
                Err(_) => self,
            },
        }
    }
}

impl Reserved {
    /// Exchanges the place for a usual one, if there is one by now.
    fn leave(&self) -> bool {
        let Ok(permit) = Arc::clone(&self.usual).try_acquire_owned() else {
            return false;
        };
        *self.permit.lock().unwrap_or_else(PoisonError::into_inner) = permit;
        true
    }
}

/// Middleware that keeps the reserve for health and metrics. Other requests on its connections are
/// answered if a usual place has become free. In either case the connection is closed behind the
/// answer, so that an idle one does not hold a place of the reserve.
pub(super) async fn keep_reserve(request: Request, next: Next) -> Response {
    let Some(reserved) = request.extensions().get::<Reserved>().cloned() else {
        return next.run(request).await;
    };
    let mut response = if health::is_probe(request.uri().path()) || reserved.leave() {
        next.run(request).await
    } else {
        Problem::Unavailable
            .with("the server has as many connections as --max-connections allows; retry later")
            .retry_after(Duration::from_secs(1))
            .into_response()
    };
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

/// Waits for a free place, then for a connection.
async fn accept(listener: &TcpListener, places: &Places) -> Option<(TcpStream, SocketAddr, Place)> {
    let place = places.free().await?;
    match listener.accept().await {
        Ok((stream, peer)) => Some((stream, peer, place.improved(places))),
        Err(error) => {
            // Out of file descriptors, for one: others must end before it is worth another try.
            if !is_of_the_client(&error) {
                tracing::error!(%error, "can't accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            None
        }
    }
}

/// The connection was gone before it was accepted.
fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    [ConnectionAborted, ConnectionRefused, ConnectionReset].contains(&error.kind())
}

fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    limits: ConnectionLimits,
    place: &Place,
) -> impl hyper_util::server::graceful::GracefulConnection<Error: std::fmt::Display> + use<> {
    let (limits, reserved) = match place {
        Place::Usual { .. } => (limits, None),
        Place::Reserved(reserved) => (limits.for_health(), Some(reserved.clone())),
    };
    if let Err(error) = set_options(&stream, limits) {
        tracing::debug!(%peer, %error, "an option of a connection can't be set");
    }
    let service = router.map_request(move |request: axum::http::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        if let Some(reserved) = &reserved {
            request.extensions_mut().insert(reserved.clone());
        }
        request
    });
    let stream = PatientStream::new(stream, limits.write_timeout, limits.answer_timeout);
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.read_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
}

fn set_options(stream: &TcpStream, limits: ConnectionLimits) -> io::Result<()> {
    // Answers are written whole: waiting for more to send costs time and saves nothing.
    stream.set_nodelay(true)?;
    // The kernel goes on sending when the server has closed a connection; this ends that as well.
    #[cfg(target_os = "linux")]
    {
        let millis = u32::try_from(limits.write_timeout.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = limits;
    Ok(())
}
