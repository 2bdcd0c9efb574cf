//! HTTP/1.1 connections, a bounded number of them, kept alive.
//!
//! Hyper without a client on top: what this program does must cost little beside the server on the
//! same machine, and leaving in the middle of a request must close its connection.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::task::AbortOnDropHandle;

pub(crate) type Body = Full<Bytes>;

/// A stream of bytes in both directions.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

type Connecting = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send>>;

/// Opens a stream; tests have one that needs no network.
type Connect = Box<dyn Fn() -> Connecting + Send + Sync>;

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("can't connect")]
    Connect(#[source] io::Error),
    #[error("the connection broke")]
    Exchange(#[from] hyper::Error),
    #[error("the connection broke")]
    Write(#[source] io::Error),
}

pub(crate) struct Pool {
    connect: Connect,
    slots: Semaphore,
    idle: Mutex<Vec<Connection>>,
    opened: AtomicU64,
}

/// Closes when dropped.
struct Connection {
    sender: http1::SendRequest<Body>,
    _driver: AbortOnDropHandle<()>,
}

/// The right to one connection.
pub(crate) struct Slot<'a> {
    pool: &'a Pool,
    _permit: Option<SemaphorePermit<'a>>,
}

impl Pool {
    /// Connections to `authority`, `host:port`; at most `limit` at a time.
    pub(crate) fn new(authority: &str, limit: usize) -> Self {
        let authority: Arc<str> = authority.into();
        let connect = move || -> Connecting {
            let authority = Arc::clone(&authority);
            Box::pin(async move {
                let stream = TcpStream::connect(&*authority).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream) as Box<dyn Stream>)
            })
        };
        Self::over(Box::new(connect), limit)
    }

    pub(crate) fn over(connect: Connect, limit: usize) -> Self {
        Self {
            connect,
            slots: Semaphore::new(limit.clamp(1, Semaphore::MAX_PERMITS)),
            idle: Mutex::default(),
            opened: AtomicU64::new(0),
        }
    }

    /// Connections opened so far.
    pub(crate) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// A slot, if one is free now.
    pub(crate) fn try_slot(&self) -> Option<Slot<'_>> {
        let permit = self.slots.try_acquire().ok()?;
        Some(Slot {
            pool: self,
            _permit: Some(permit),
        })
    }

    /// A slot, in the order of asking.
    pub(crate) async fn slot(&self) -> Slot<'_> {
        Slot {
            pool: self,
            // An error would mean that the semaphore was closed, which nobody does.
            _permit: self.slots.acquire().await.ok(),
        }
    }

    /// One request outside the load.
    pub(crate) async fn fetch(&self, request: Request<Body>) -> Result<Reply, Broken> {
        self.slot().await.send(request).await
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn stream(&self) -> Result<Box<dyn Stream>, Broken> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        (self.connect)().await.map_err(Broken::Connect)
    }

    async fn open(&self) -> Result<Connection, Broken> {
        let io = TokioIo::new(self.stream().await?);
        let (sender, connection) = http1::handshake(io).await?;
        let driver = tokio::spawn(async move {
            // Its error reaches the request that it breaks.
            let _ = connection.await;
        });
        Ok(Connection {
            sender,
            _driver: AbortOnDropHandle::new(driver),
        })
    }

    /// A connection that waits for work, the one used last: few stay busy, the others rest.
    async fn waiting(&self) -> Option<Connection> {
        loop {
            let mut connection = self.idle().pop()?;
            if connection.sender.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }
}

impl Slot<'_> {
    /// Sends a request and reads its whole answer. Dropping the future closes the connection.
    pub(crate) async fn send(&self, mut request: Request<Body>) -> Result<Reply, Broken> {
        loop {
            let (mut connection, reused) = match self.pool.waiting().await {
                Some(connection) => (connection, true),
                None => (self.pool.open().await?, false),
            };
            match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    let (head, body) = response.into_parts();
                    let body = body.collect().await?.to_bytes();
                    self.pool.idle().push(connection);
                    return Ok(Reply {
                        status: head.status,
                        headers: head.headers,
                        body,
                    });
                }
                // The server closed a resting connection, and nothing of the request was sent.
                Err(mut error) => match error.take_message().filter(|_| reused) {
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error().into()),
                },
            }
        }
    }

    /// Sends the head of a request and half of its body, and goes away.
    pub(crate) async fn send_half(&self, request: Request<Body>) -> Result<(), Broken> {
        let (head, body) = request.into_parts();
        let body = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(never) => match never {},
        };
        let mut text = format!("{} {} HTTP/1.1\r\n", head.method, head.uri).into_bytes();
        for (name, value) in &head.headers {
            text.extend_from_slice(name.as_ref());
            text.extend_from_slice(b": ");
            text.extend_from_slice(value.as_bytes());
            text.extend_from_slice(b"\r\n");
        }
        text.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
        text.extend_from_slice(&body[..body.len() / 2]);
        let mut stream = self.pool.stream().await?;
        stream.write_all(&text).await.map_err(Broken::Write)?;
        stream.flush().await.map_err(Broken::Write)
    }
}

#[cfg(test)]
pub(crate) mod mock {
    //! A server in the same runtime, without a network: on paused time everything is exact.

    use std::convert::Infallible;

    use hyper::Response;
    use hyper::body::Incoming;
    use hyper::server::conn::http1 as server;
    use hyper::service::service_fn;
    use tokio::io::duplex;

    use super::*;

    /// A pool of connections to a server that answers with `answer`.
    pub(crate) fn pool<F, A>(limit: usize, answer: F) -> Pool
    where
        F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Response<Body>> + Send + 'static,
    {
        let connect = move || -> Connecting {
            let (ours, theirs) = duplex(64 * 1024);
            let answer = answer.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let io = TokioIo::new(theirs);
                // A client that leaves is part of the tests.
                let _ = server::Builder::new().serve_connection(io, service).await;
            });
            Box::pin(async move { Ok(Box::new(ours) as Box<dyn Stream>) })
        };
        Pool::over(Box::new(connect), limit)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hyper::Response;
    use tokio::sync::mpsc;
    use tokio::time::{sleep, timeout};

    use super::*;

    fn request(body: &str) -> Request<Body> {
        Request::post("/")
            .header("host", "mock")
            .body(Full::from(body.to_owned()))
            .expect("a request")
    }

    #[tokio::test(start_paused = true)]
    async fn connections_are_kept_and_bounded() {
        let pool = mock::pool(2, async |_| {
            sleep(Duration::from_millis(10)).await;
            Response::new(Full::from("yes"))
        });
        for _ in 0..3 {
            let reply = pool.fetch(request("?")).await.expect("an answer");
            assert_eq!((reply.status.as_u16(), &*reply.body), (200, &b"yes"[..]));
        }
        assert_eq!(pool.opened(), 1);
        let (one, two) = (pool.try_slot(), pool.try_slot());
        assert!(one.is_some() && two.is_some() && pool.try_slot().is_none());
        drop(one);
        assert!(pool.try_slot().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_closes_the_connection() {
        struct Gone(mpsc::UnboundedSender<()>);
        impl Drop for Gone {
            fn drop(&mut self) {
                // The test may be over.
                let _ = self.0.send(());
            }
        }
        let (sender, mut gone) = mpsc::unbounded_channel();
        let pool = mock::pool(1, move |_| {
            let gone = Gone(sender.clone());
            async move {
                let _gone = gone;
                std::future::pending().await
            }
        });
        let patience = Duration::from_millis(5);
        let answer = timeout(patience, pool.fetch(request("?"))).await;
        assert!(answer.is_err());
        assert_eq!(gone.recv().await, Some(()));
        assert!(pool.try_slot().is_some(), "the slot is free again");
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_request_reaches_the_server_as_such() {
        let (sender, mut read) = mpsc::unbounded_channel();
        let pool = mock::pool(1, move |request: Request<hyper::body::Incoming>| {
            let sender = sender.clone();
            async move {
                let body = request.into_body().collect().await;
                sender.send(body.is_err()).expect("the test listens");
                Response::new(Full::default())
            }
        });
        let slot = pool.slot().await;
        slot.send_half(request("four")).await.expect("half is sent");
        assert_eq!(read.recv().await, Some(true));
    }
}
