//! `loadtest closed`: clients that ask as soon as they have their answer. How many answers a second
//! they get together is the capacity; their latency says little, since a slow server is asked less.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::args::ClosedArgs;
use crate::arrivals::Asker;
use crate::error::Failure;
use crate::exchange::exchange;
use crate::open_loop::{Mark, Measured};
use crate::record::Recorder;
use crate::report::{Load, Report, Stage, progress};
use crate::session::Session;
use crate::watch::Watch;

pub(crate) async fn run(args: &ClosedArgs) -> Result<Report, Failure> {
    let session = Arc::new(Session::prepare(&args.offer).await?);
    let watch = Watch::start(&session);
    let mut report = Report::new("closed", &args.offer, args, &session)?;
    let mut stages = Vec::new();
    for clients in &args.clients {
        let stage = measure(&session, *clients, args.warm_up.0, args.duration.0).await;
        progress(&stage);
        stages.push(stage);
    }
    report.watch = watch.stop().await;
    report.add(Measured {
        stages,
        timeline: Vec::new(),
        connections_opened: session.pool.opened(),
        interrupted: false,
    });
    Ok(report)
}

/// The stage after the warm-up.
const COUNTED: usize = 1;

/// Counts what ends within `time` after the warm-up.
async fn measure(session: &Arc<Session>, clients: u32, warm_up: Duration, time: Duration) -> Stage {
    let recorder = Arc::new(Recorder::new([warm_up, time], session.tasks.len()));
    let start = Instant::now();
    let mut asking = JoinSet::new();
    for client in 0..clients {
        let asker = session.asker(u64::from(client) + 1);
        let (session, recorder) = (Arc::clone(session), Arc::clone(&recorder));
        asking.spawn(ask_on(session, asker, start, recorder));
    }
    sleep_until(start + warm_up).await;
    let mark = Mark::here(COUNTED, session);
    sleep_until(start + warm_up + time).await;
    let cpu = mark.shares(&Mark::here(COUNTED, session));
    asking.join_all().await;
    recorder.stage(
        COUNTED,
        Load::Clients { clients },
        time,
        &session.tasks,
        cpu,
    )
}

async fn ask_on(session: Arc<Session>, mut asker: Asker, start: Instant, recorder: Arc<Recorder>) {
    // Asks until the last stage is over; a request belongs to the stage in which it ends.
    loop {
        let (ask, asked) = (asker.ask(), Instant::now());
        let sample = exchange(&session, &ask, asked).await;
        let Some(stage) = recorder.stage_at(start.elapsed()) else {
            return;
        };
        recorder.add(stage, ask.task, asked - start, &sample);
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use hyper::Response;
    use tokio::time::sleep;

    use super::*;
    use crate::session::fixture;

    /// Two of three clients wait for a connection, so that the server always has one request of
    /// 10 ms.
    #[tokio::test(start_paused = true)]
    async fn throughput_is_what_ends_within_the_time() {
        let session = Arc::new(fixture::session(1, |_| async {
            sleep(Duration::from_millis(10)).await;
            Response::new(Full::from(fixture::ANSWER))
        }));
        let warm_up = Duration::from_millis(500);
        let stage = measure(&session, 3, warm_up, Duration::from_secs(5)).await;
        assert!((stage.goodput_per_second - 100.0).abs() < 1.0, "{stage:?}");
        assert!((stage.latency.p50_ms - 30.0).abs() < 0.5, "{stage:?}");
    }
}
