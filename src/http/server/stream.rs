//! A connection that gives up on a client that does not take its answers.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// A stream whose writes fail with [`ErrorKind::TimedOut`] when the peer takes nothing for
/// `write_timeout`, or has not taken everything that was written within `answer_timeout`.
///
/// Both times run only while the peer is what is waited for. The second one starts when a write
/// first has to wait and ends at the next flush. hyper flushes when its buffer is empty: behind a
/// whole answer, and behind each event of a stream of events, which may go on for ever.
pub(super) struct PatientStream<S> {
    inner: S,
    write_timeout: Duration,
    answer_timeout: Duration,
    /// When the oldest bytes that the peer has not taken were written.
    behind_since: Option<Instant>,
    /// Ends a write that waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> PatientStream<S> {
    pub(super) fn new(inner: S, write_timeout: Duration, answer_timeout: Duration) -> Self {
        Self {
            inner,
            write_timeout,
            answer_timeout,
            behind_since: None,
            deadline: None,
        }
    }

    /// Passes a write's outcome on, unless it has waited for too long.
    fn bounded<T>(
        &mut self,
        outcome: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.deadline = None;
            return outcome;
        }
        let now = Instant::now();
        let behind_since = *self.behind_since.get_or_insert(now);
        let until = (now + self.write_timeout).min(behind_since + self.answer_timeout);
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(sleep_until(until)));
        ready!(deadline.as_mut().poll(context));
        let reason = "the client does not take the answer";
        Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, reason)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PatientStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PatientStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.bounded(outcome, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.bounded(outcome, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_flush(context);
        if outcome.is_ready() {
            self.behind_since = None;
        }
        self.bounded(outcome, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_shutdown(context);
        self.bounded(outcome, context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::sleep;

    use super::*;

    const WRITE: Duration = Duration::from_secs(10);
    const ANSWER: Duration = Duration::from_secs(60);

    /// The two ends of a pipe that holds 100 bytes.
    fn pair() -> (PatientStream<DuplexStream>, DuplexStream) {
        let (server, client) = duplex(100);
        (PatientStream::new(server, WRITE, ANSWER), client)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up_after_the_write_timeout() {
        let (mut server, _client) = pair();
        let start = Instant::now();
        let error = server.write_all(&[0; 101]).await.expect_err("a time-out");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), WRITE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_a_little_at_a_time_has_the_answer_timeout() {
        let (mut server, mut client) = pair();
        tokio::spawn(async move {
            while client.read_u8().await.is_ok() {
                sleep(Duration::from_secs(1)).await;
            }
        });
        let start = Instant::now();
        let error = server.write_all(&[0; 1000]).await.expect_err("a time-out");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!((ANSWER..ANSWER + WRITE).contains(&start.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_answer_after_the_other_may_take_as_long_each() {
        let (mut server, mut client) = pair();
        tokio::spawn(async move {
            let mut chunk = [0; 20];
            while client.read_exact(&mut chunk).await.is_ok() {
                sleep(Duration::from_secs(1)).await;
            }
        });
        let start = Instant::now();
        for _ in 0..4 {
            server.write_all(&[0; 1000]).await.expect("taken in time");
            server.flush().await.expect("taken in time");
        }
        assert!(start.elapsed() > 2 * ANSWER);
    }
}
