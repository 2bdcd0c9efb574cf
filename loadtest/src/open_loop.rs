//! `loadtest run`: requests start at their times, whatever has become of those before.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::ctrl_c;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::args::RunArgs;
use crate::arrivals::{Arrival, Arrivals, Stage, on_time};
use crate::error::Failure;
use crate::exchange::exchange;
use crate::machine::{cpu_time, own_cpu_time};
use crate::record::{CpuShares, Recorder};
use crate::report::{self, Load, Report, Second};
use crate::session::Session;
use crate::units::Phase;
use crate::watch::Watch;

pub(crate) async fn run(args: &RunArgs) -> Result<Report, Failure> {
    let session = Arc::new(Session::prepare(&args.offer).await?);
    let watch = Watch::start(&session);
    let mut report = Report::new("run", &args.offer, args, &session)?;
    let measured = measure(&session, &args.phases(), args.warm_up.0, session.seed).await;
    report.watch = watch.stop().await;
    report.add(measured);
    Ok(report)
}

/// What a load has shown.
pub(crate) struct Measured {
    pub(crate) stages: Vec<report::Stage>,
    pub(crate) timeline: Vec<Second>,
    pub(crate) connections_opened: u64,
    /// Ended by hand.
    pub(crate) interrupted: bool,
}

/// Offers the phases one after the other, without a pause; before them `warm_up` at the first
/// rate, which is not counted.
pub(crate) async fn measure(
    session: &Arc<Session>,
    phases: &[Phase],
    warm_up: Duration,
    seed: u64,
) -> Measured {
    let first = phases.first().map_or(0.0, |phase| phase.rate);
    let mut stages = vec![Stage {
        rate: first,
        time: warm_up,
    }];
    stages.extend(phases.iter().map(|phase| Stage {
        rate: phase.rate,
        time: phase.time.0,
    }));
    let times = stages.iter().map(|stage| stage.time);
    let recorder = Arc::new(Recorder::new(times, session.tasks.len()));
    let arrivals = Arrivals::new(stages.clone(), session.questions(), seed);
    let start = Instant::now();
    let given = on_time(arrivals, start);
    let offered = offer(session, given, start, &recorder).await;

    let counted = stages.iter().enumerate().skip(1);
    // Of an interrupted load the stages that have begun; the last of them is cut short.
    let begun = counted.filter(|(i, _)| !offered.interrupted || offered.began(*i));
    let stages = begun
        .map(|(i, stage)| {
            let load = Load::Rate { rate: stage.rate };
            let time = match offered.stopped_in(i) {
                Some(time) => time,
                None => stage.time,
            };
            recorder.stage(i, load, time, &session.tasks, offered.cpu_shares(i))
        })
        .collect();
    Measured {
        stages,
        timeline: recorder.timeline(),
        connections_opened: session.pool.opened(),
        interrupted: offered.interrupted,
    }
}

/// CPU time used so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    stage: usize,
    at: Instant,
    client: Duration,
    server: Option<Duration>,
}

impl Mark {
    pub(crate) fn here(stage: usize, session: &Session) -> Self {
        Self {
            stage,
            at: Instant::now(),
            client: own_cpu_time(),
            server: session.watch_pid.and_then(cpu_time),
        }
    }

    /// Shares of one core between two marks.
    pub(crate) fn shares(&self, end: &Self) -> CpuShares {
        let wall = (end.at - self.at).as_secs_f64();
        if wall == 0.0 {
            return CpuShares::default();
        }
        let share = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() / wall;
        CpuShares {
            client: share(self.client, end.client),
            server: self
                .server
                .zip(end.server)
                .map(|(from, to)| share(from, to)),
        }
    }
}

/// How the offering went.
struct Offered {
    /// One at the first arrival of each stage that has any, and one at the end.
    marks: Vec<Mark>,
    interrupted: bool,
}

impl Offered {
    fn began(&self, stage: usize) -> bool {
        self.marks.iter().any(|mark| mark.stage == stage)
    }

    fn span(&self, stage: usize) -> Option<(&Mark, &Mark)> {
        let place = self.marks.iter().position(|mark| mark.stage == stage)?;
        Some((&self.marks[place], self.marks.get(place + 1)?))
    }

    fn cpu_shares(&self, stage: usize) -> CpuShares {
        self.span(stage)
            .map_or_else(CpuShares::default, |(from, to)| from.shares(to))
    }

    /// How long the stage lasted that was going on when the load was interrupted.
    fn stopped_in(&self, stage: usize) -> Option<Duration> {
        let (from, to) = self.span(stage)?;
        let last = self.marks.len().checked_sub(2)?;
        let cut = self.interrupted && self.marks[last].stage == stage;
        cut.then(|| (to.at - from.at).max(Duration::from_millis(1)))
    }
}

/// Starts each request as it is given, and waits for the last to end.
async fn offer(
    session: &Arc<Session>,
    mut given: UnboundedReceiver<Arrival>,
    start: Instant,
    recorder: &Arc<Recorder>,
) -> Offered {
    let requests = TaskTracker::new();
    let mut marks: Vec<Mark> = Vec::new();
    let mut interrupted = false;
    let mut interrupt = pin!(ctrl_c());
    loop {
        let arrival = tokio::select! {
            arrival = given.recv() => arrival,
            _ = &mut interrupt => {
                interrupted = true;
                None
            }
        };
        let Some(Arrival { at, stage, ask }) = arrival else {
            break;
        };
        if marks.last().is_none_or(|mark| mark.stage != stage) {
            marks.push(Mark::here(stage, session));
        }
        let (session, recorder) = (Arc::clone(session), Arc::clone(recorder));
        requests.spawn(async move {
            let sample = exchange(&session, &ask, start + at).await;
            recorder.add(stage, ask.task, at, &sample);
        });
    }
    marks.push(Mark::here(usize::MAX, session));
    requests.close();
    requests.wait().await;
    Offered { marks, interrupted }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use hyper::Response;
    use tokio::sync::mpsc;
    use tokio::time::{sleep, sleep_until};

    use super::*;
    use crate::arrivals::{Ask, Conduct};
    use crate::exchange::Outcome;
    use crate::session::fixture;

    /// Arrivals every `gap`, given out on the runtime's (paused) clock.
    fn evenly(count: u32, gap: Duration, start: Instant) -> UnboundedReceiver<Arrival> {
        let (sender, given) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            for i in 0..count {
                let at = gap * i;
                sleep_until(start + at).await;
                let ask = Ask {
                    task: 0,
                    first: 0,
                    texts: 1,
                    conduct: Conduct::Plain,
                };
                let arrival = Arrival { at, stage: 0, ask };
                sender.send(arrival).expect("the load goes on");
            }
        });
        given
    }

    async fn load(connections: usize, count: u32, gap: Duration, work: Duration) -> report::Stage {
        let session = Arc::new(fixture::session(connections, move |_| async move {
            sleep(work).await;
            Response::new(Full::from(fixture::ANSWER))
        }));
        let recorder = Arc::new(Recorder::new([gap * count], 1));
        let start = Instant::now();
        let given = evenly(count, gap, start);
        offer(&session, given, start, &recorder).await;
        let load = Load::Rate { rate: 0.0 };
        let time = gap * count;
        recorder.stage(0, load, time, &session.tasks, CpuShares::default())
    }

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn a_server_that_keeps_up_is_timed_as_it_is() {
        let stage = load(4, 100, 10 * MS, 7 * MS).await;
        assert_eq!(stage.outcomes.get(&Outcome::Answered), Some(&100));
        assert!((stage.latency.p50_ms - 7.0).abs() < 0.01);
        assert!((stage.latency.max_ms - 7.0).abs() < 0.01);
        assert_eq!(stage.client.waited_for_connection, 0);
    }

    /// One connection, 10 ms a request, one every 4 ms: the wait grows by 6 ms with each, although
    /// each exchange by itself takes 10 ms.
    #[tokio::test(start_paused = true)]
    async fn latency_counts_from_the_intended_start_when_the_server_lags_behind() {
        let stage = load(1, 100, 4 * MS, 10 * MS).await;
        assert_eq!(stage.latency.count, 100);
        let last = 100.0 * 10.0 - 99.0 * 4.0;
        assert!((stage.latency.max_ms - last).abs() < 1.0, "{stage:?}");
        let middle = 50.0 * 10.0 - 49.0 * 4.0;
        assert!((stage.latency.p50_ms - middle).abs() < 1.0, "{stage:?}");
        assert_eq!(stage.client.waited_for_connection, 99);
    }

    /// Nothing is answered in the first second, yet all requests start at their times.
    #[tokio::test(start_paused = true)]
    async fn a_stalled_server_does_not_slow_the_arrivals() {
        let stage = load(1_000, 100, 10 * MS, 1_000 * MS).await;
        assert!(stage.client.lag.max_ms < 0.01, "{stage:?}");
        assert!((stage.latency.max_ms - 1_000.0).abs() < 1.0);
    }
}
