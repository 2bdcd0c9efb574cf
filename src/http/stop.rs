//! Bodies of requests that are still coming when the server stops.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tower::util::MapRequestLayer;

/// How long a body may bring nothing after the stop.
const PATIENCE: Duration = Duration::from_secs(1);

/// The server has stopped before the body was there.
#[derive(Debug, thiserror::Error)]
#[error("the server is stopping")]
pub(super) struct Stopped;

/// Lets a body fail with [`Stopped`] when nothing of it comes for a second after `stop`. A client
/// that stalls must not hold up the stop; one that goes on sending is waited for.
pub(super) fn layer(
    stop: CancellationToken,
) -> MapRequestLayer<impl Fn(Request) -> Request + Clone + Send + Sync + 'static> {
    MapRequestLayer::new(move |request: Request| {
        request.map(|body| {
            Body::new(StoppableBody {
                inner: body,
                stop: stop.clone(),
                wait: None,
            })
        })
    })
}

struct StoppableBody {
    inner: Body,
    stop: CancellationToken,
    wait: Option<Wait>,
}

/// What a body is waited for with.
enum Wait {
    UntilStop(Pin<Box<WaitForCancellationFutureOwned>>),
    AfterStop(Pin<Box<Sleep>>),
}

impl StoppableBody {
    /// Ready when the body is to be waited for no longer.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.wait {
                None => {
                    let stop = self.stop.clone().cancelled_owned();
                    self.wait = Some(Wait::UntilStop(Box::pin(stop)));
                }
                Some(Wait::UntilStop(stop)) => {
                    ready!(stop.as_mut().poll(context));
                    self.wait = Some(Wait::AfterStop(Box::pin(sleep(PATIENCE))));
                }
                Some(Wait::AfterStop(end)) => return end.as_mut().poll(context),
            }
        }
    }
}

impl HttpBody for StoppableBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) {
            self.wait = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        ready!(self.poll_end(context));
        Poll::Ready(Some(Err(Stopped.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use futures_util::stream;
    use tokio::time::Instant;
    use tower::{Layer, ServiceExt, service_fn};

    use super::*;

    /// Reads a body of two pieces, each after a pause; the server stops after 10 s. Returns whether
    /// it came whole, and after how many tenths of a second that was known.
    async fn read(pause: Duration) -> (bool, u128) {
        let body = stream::unfold(0, move |sent| async move {
            if sent == 2 {
                return None;
            }
            sleep(pause).await;
            Some((Ok::<_, BoxError>(Bytes::from_static(b"piece")), sent + 1))
        });
        let stop = CancellationToken::new();
        tokio::spawn({
            let stop = stop.clone();
            async move {
                sleep(Duration::from_secs(10)).await;
                stop.cancel();
            }
        });
        let read = service_fn(|request: Request| async {
            let body = to_bytes(request.into_body(), usize::MAX).await;
            Ok::<_, BoxError>(body.is_ok())
        });
        let start = Instant::now();
        let request = Request::new(Body::from_stream(body));
        let whole = layer(stop).layer(read).oneshot(request).await;
        // The clock of tokio has milliseconds.
        let tenths = (start.elapsed().as_millis() + 50) / 100;
        (whole.expect("no error"), tenths)
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_bodies_that_stall_and_no_others() {
        let tenths = |count: u64| Duration::from_millis(100 * count);
        assert_eq!(read(tenths(40)).await, (true, 80));
        assert_eq!(read(tenths(54)).await, (true, 108));
        assert_eq!(read(tenths(99)).await, (false, 110));
        assert_eq!(read(tenths(600)).await, (false, 110));
    }
}
