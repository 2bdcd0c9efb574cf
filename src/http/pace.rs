//! Bodies of requests that come too slowly.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};
use tower::util::MapRequestLayer;

/// Bytes a second that a body must bring on the whole; a modem is faster. `read_timeout` comes on
/// top once, for whatever is sent in pieces.
pub(super) const LEAST_RATE: f64 = 8.0 * 1024.0;

/// The client has sent nothing for too long, or too little on the whole.
#[derive(Debug, thiserror::Error)]
#[error("the body did not come in time")]
pub(super) struct SlowBody;

/// Lets a body fail with [`SlowBody`] when nothing of it comes for `read_timeout`, or when the
/// waits for it add up to more than `read_timeout` and the time that [`LEAST_RATE`] gives it.
pub(super) fn layer(
    read_timeout: Duration,
) -> MapRequestLayer<impl Fn(Request) -> Request + Clone + Send + Sync + 'static> {
    MapRequestLayer::new(move |request: Request| {
        request.map(|body| {
            Body::new(PacedBody {
                inner: body,
                read_timeout,
                received: 0,
                waited: Duration::ZERO,
                wait: None,
            })
        })
    })
}

struct PacedBody {
    inner: Body,
    read_timeout: Duration,
    /// Bytes so far.
    received: u64,
    /// The waits that are over. Time in which nobody asks for more is not the client's.
    waited: Duration,
    /// The present wait, and what ends it.
    wait: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl PacedBody {
    /// The longest that the next wait may be.
    fn patience(&self) -> Duration {
        let earned = Duration::from_secs_f64(self.received as f64 / LEAST_RATE);
        let left = (self.read_timeout + earned).saturating_sub(self.waited);
        left.min(self.read_timeout)
    }
}

impl HttpBody for PacedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) {
            if let Some((since, _)) = self.wait.take() {
                self.waited += since.elapsed();
            }
            if let Some(Ok(frame)) = &frame {
                self.received += frame.data_ref().map_or(0, |data| data.len() as u64);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let patience = self.patience();
        let (_, deadline) = self
            .wait
            .get_or_insert_with(|| (Instant::now(), Box::pin(sleep(patience))));
        match deadline.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Some(Err(SlowBody.into()))),
            Poll::Pending => Poll::Pending,
        }
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
    use tower::{Layer, ServiceExt, service_fn};

    use super::*;

    const READ_TIMEOUT: Duration = Duration::from_secs(30);

    /// How long a body of `pieces` of `size` bytes, one each `pause`, is read, and whether whole.
    async fn read(pieces: usize, size: usize, pause: Duration) -> (Duration, bool) {
        let body = stream::unfold(0, move |sent| async move {
            if sent == pieces {
                return None;
            }
            sleep(pause).await;
            Some((Ok::<_, BoxError>(Bytes::from(vec![b'x'; size])), sent + 1))
        });
        let read = service_fn(|request: Request| async {
            let body = to_bytes(request.into_body(), usize::MAX).await;
            Ok::<_, BoxError>(body.is_ok_and(|body| !body.is_empty()))
        });
        let start = Instant::now();
        let request = Request::new(Body::from_stream(body));
        let whole = layer(READ_TIMEOUT).layer(read).oneshot(request).await;
        (start.elapsed(), whole.expect("no error"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_is_given_up_and_a_slow_one_is_not() {
        let second = Duration::from_secs(1);
        let (time, whole) = read(1000, 1, second).await;
        assert!(!whole && time < READ_TIMEOUT + 2 * second, "{time:?}");
        let (time, whole) = read(2, 1, READ_TIMEOUT + second).await;
        assert!(!whole && time == READ_TIMEOUT, "{time:?}");
        let (time, whole) = read(1000, 16 * 1024, second).await;
        assert!(whole && time == 1000 * second, "{time:?}");
    }
}
