//! One request of the load, from its intended start to its outcome.

use std::time::Duration;

use hyper::{Request, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout, timeout_at};

use crate::arrivals::{Ask, Conduct};
use crate::http::{Body, Broken, Reply, Slot};
use crate::session::Session;
use crate::target::Timings;
use crate::texts::Input;
use crate::versions::Verdict;

macro_rules! outcomes {
    ($( $(#[doc = $doc:literal])+ $name:ident = $slug:literal; )+) => {
        /// How a request ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub(crate) enum Outcome {
            $( $(#[doc = $doc])+ $name, )+
        }

        impl Outcome {
            pub(crate) const ALL: &[Self] = &[$( Self::$name, )+];

            /// As tables have it.
            pub(crate) fn label(self) -> &'static str {
                match self { $( Self::$name => $slug, )+ }
            }
        }
    };
}

outcomes! {
    /// 200, and the answer is right as far as it was checked.
    Answered = "answered";
    /// 429.
    Refused = "429";
    /// 503.
    Unavailable = "503";
    /// 504.
    Deadline = "504";
    /// Any other status.
    OtherStatus = "other status";
    /// The client's own limit passed.
    TimedOut = "timed out";
    /// No connection.
    NoConnection = "no connection";
    /// The connection ended before the answer did.
    Broken = "broken off";
    /// 200, but not with an answer to what was asked.
    Malformed = "malformed";
    /// From a version that was not live at any time during the request.
    WrongVersion = "wrong version";
    /// Not the labels and scores that the version gives.
    WrongLabels = "wrong labels";
    /// The client went away, as it was meant to.
    Cancelled = "cancelled";
    /// The client went away with half of its request sent, as it was meant to.
    Disconnected = "disconnected";
    /// A text that is too long was refused, as it should be.
    OversizeRefused = "oversize refused";
    /// A text that is too long was answered.
    OversizeAnswered = "oversize answered";
}

impl Outcome {
    /// The client behaved; only these count when success is a share of something.
    pub(crate) fn is_plain(self) -> bool {
        !matches!(
            self,
            Self::Cancelled | Self::Disconnected | Self::OversizeRefused | Self::OversizeAnswered
        )
    }

    pub(crate) fn is_wrong(self) -> bool {
        matches!(
            self,
            Self::Malformed | Self::WrongVersion | Self::WrongLabels
        )
    }

    fn of_status(status: StatusCode) -> Self {
        match status {
            StatusCode::TOO_MANY_REQUESTS => Self::Refused,
            StatusCode::SERVICE_UNAVAILABLE => Self::Unavailable,
            StatusCode::GATEWAY_TIMEOUT => Self::Deadline,
            _ => Self::OtherStatus,
        }
    }
}

/// What is known of a request when it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) outcome: Outcome,
    /// From the intended start to the end of the answer.
    pub(crate) latency: Duration,
    /// From the intended start to when this program got round to it.
    pub(crate) lag: Duration,
    /// All connections were taken.
    pub(crate) waited: bool,
    pub(crate) inputs: u64,
    pub(crate) tokens: u64,
    pub(crate) timings: Timings,
}

/// What an answer adds to its outcome.
#[derive(Default)]
struct Figures {
    tokens: u64,
    timings: Timings,
}

/// Sends what is asked and waits for the answer, or for as long as the client's conduct has it.
pub(crate) async fn exchange(session: &Session, ask: &Ask, intended: Instant) -> Sample {
    let lag = intended.elapsed();
    let deadline = intended + session.timeout;
    let free = session.pool.try_slot();
    let waited = free.is_none();
    let work = async {
        let slot = match free {
            Some(slot) => slot,
            None => session.pool.slot().await,
        };
        attempt(session, ask, &slot).await
    };
    let (outcome, figures) = timeout_at(deadline, work)
        .await
        .unwrap_or((Outcome::TimedOut, Figures::default()));
    Sample {
        outcome,
        latency: intended.elapsed(),
        lag,
        waited,
        inputs: session.batch as u64,
        tokens: figures.tokens,
        timings: figures.timings,
    }
}

async fn attempt(session: &Session, ask: &Ask, slot: &Slot<'_>) -> (Outcome, Figures) {
    let request = request(session, ask);
    let sent = Instant::now();
    let reply = match ask.conduct {
        Conduct::Cancel(patience) => {
            return match timeout(patience, slot.send(request)).await {
                Ok(Err(error)) => (broken(&error), Figures::default()),
                Ok(Ok(_)) | Err(_) => (Outcome::Cancelled, Figures::default()),
            };
        }
        Conduct::Disconnect => {
            return match slot.send_half(request).await {
                Ok(()) => (Outcome::Disconnected, Figures::default()),
                Err(error) => (broken(&error), Figures::default()),
            };
        }
        Conduct::Plain | Conduct::Oversize => slot.send(request).await,
    };
    match reply {
        Err(error) => (broken(&error), Figures::default()),
        Ok(reply) if ask.conduct == Conduct::Oversize => {
            let outcome = match reply.status {
                StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
                    Outcome::OversizeRefused
                }
                StatusCode::OK => Outcome::OversizeAnswered,
                status => Outcome::of_status(status),
            };
            (outcome, Figures::default())
        }
        Ok(reply) => judge(session, ask, &reply, sent),
    }
}

fn request(session: &Session, ask: &Ask) -> Request<Body> {
    let path = &session.tasks[ask.task].path;
    if ask.conduct == Conduct::Oversize {
        let input = Input {
            text: session.oversize.as_str().into(),
            text_pair: None,
        };
        return session.target.classify(path, &[input]);
    }
    let inputs = session.texts.inputs(ask.first, session.batch, ask.texts);
    session.target.classify(path, &inputs)
}

fn judge(session: &Session, ask: &Ask, reply: &Reply, sent: Instant) -> (Outcome, Figures) {
    if reply.status != StatusCode::OK {
        return (Outcome::of_status(reply.status), Figures::default());
    }
    let done = Instant::now();
    let task = &session.tasks[ask.task].name;
    let Some(answer) = session.target.read(reply, task, session.batch) else {
        return (Outcome::Malformed, Figures::default());
    };
    let verdict = session.check.as_ref().map_or(Verdict::Right, |check| {
        check.judge(ask, &answer, sent..=done)
    });
    let outcome = match verdict {
        Verdict::Right => Outcome::Answered,
        Verdict::WrongVersion => Outcome::WrongVersion,
        Verdict::WrongLabels => Outcome::WrongLabels,
    };
    let figures = Figures {
        tokens: answer.tokens,
        timings: session.target.timings(&reply.headers),
    };
    (outcome, figures)
}

fn broken(error: &Broken) -> Outcome {
    match error {
        Broken::Connect(_) => Outcome::NoConnection,
        Broken::Exchange(_) | Broken::Write(_) => Outcome::Broken,
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full};
    use hyper::Response;
    use tokio::time::sleep;

    use super::*;
    use crate::session::fixture;

    fn plain(conduct: Conduct) -> Ask {
        Ask {
            task: 0,
            first: 0,
            texts: 1,
            conduct,
        }
    }

    async fn outcome(status: u16, body: &'static str, conduct: Conduct) -> Outcome {
        let session = fixture::session(1, move |_| async move {
            sleep(Duration::from_millis(20)).await;
            let mut response = Response::new(Full::from(body));
            *response.status_mut() = StatusCode::from_u16(status).expect("a status");
            response
        });
        let sample = exchange(&session, &plain(conduct), Instant::now()).await;
        sample.outcome
    }

    #[tokio::test(start_paused = true)]
    async fn outcomes_follow_the_status_and_the_body() {
        for (status, body, expected) in [
            (200, fixture::ANSWER, Outcome::Answered),
            (200, "{}", Outcome::Malformed),
            (429, "", Outcome::Refused),
            (503, "", Outcome::Unavailable),
            (504, "", Outcome::Deadline),
            (500, "", Outcome::OtherStatus),
        ] {
            assert_eq!(outcome(status, body, Conduct::Plain).await, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn misconduct_is_not_counted_as_a_failure() {
        let leave = Conduct::Cancel(Duration::from_millis(5));
        assert_eq!(
            outcome(200, fixture::ANSWER, leave).await,
            Outcome::Cancelled
        );
        assert_eq!(
            outcome(200, "", Conduct::Disconnect).await,
            Outcome::Disconnected
        );
        for (status, expected) in [
            (413, Outcome::OversizeRefused),
            (200, Outcome::OversizeAnswered),
            (500, Outcome::OtherStatus),
        ] {
            assert_eq!(outcome(status, "", Conduct::Oversize).await, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_oversize_text_has_the_asked_for_length() {
        let (sender, mut bodies) = tokio::sync::mpsc::unbounded_channel();
        let session = fixture::session(1, move |request: Request<hyper::body::Incoming>| {
            let sender = sender.clone();
            async move {
                let body = request.into_body().collect().await.expect("a body");
                sender.send(body.to_bytes()).expect("the test listens");
                Response::new(Full::default())
            }
        });
        exchange(&session, &plain(Conduct::Oversize), Instant::now()).await;
        let body = bodies.recv().await.expect("a request");
        assert!(body.len() > session.oversize.len());
    }

    #[tokio::test(start_paused = true)]
    async fn the_client_gives_up_after_its_timeout_from_the_intended_start() {
        let session = fixture::session(1, |_| std::future::pending());
        let intended = Instant::now();
        sleep(Duration::from_millis(300)).await;
        let sample = exchange(&session, &plain(Conduct::Plain), intended).await;
        assert_eq!(sample.outcome, Outcome::TimedOut);
        assert_eq!(sample.lag, Duration::from_millis(300));
        assert_eq!(intended.elapsed(), session.timeout);
    }
}
