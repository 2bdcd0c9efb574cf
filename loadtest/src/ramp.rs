//! `loadtest ramp`: the highest rate that holds its bounds.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::args::RampArgs;
use crate::error::Failure;
use crate::open_loop::{Measured, measure};
use crate::report::{Load, Report, Stage, progress};
use crate::session::Session;
use crate::units::{Phase, Time};
use crate::watch::Watch;

/// What a ramp has found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) p99_bound_ms: f64,
    pub(crate) success_bound: f64,
    pub(crate) highest_rate: Option<f64>,
    pub(crate) end: End,
}

/// Why the search ended where it did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    /// A rate not much higher does not hold.
    Fails { rate: f64 },
    /// The highest rate to be tried held.
    MaxRate,
    /// By hand.
    Interrupted,
}

pub(crate) async fn run(args: &RampArgs) -> Result<Report, Failure> {
    if args.min_rate > args.max_rate {
        return Err(Failure::Usage("--min-rate is above --max-rate".into()));
    }
    if args.factor <= 1.0 || args.precision == 0.0 {
        return Err(Failure::Usage(
            "--factor must be above 1 and --precision above 0: the search would not end".into(),
        ));
    }
    let session = Arc::new(Session::prepare(&args.offer).await?);
    let watch = Watch::start(&session);
    let mut report = Report::new("ramp", &args.offer, args, &session)?;
    let mut stages: Vec<Stage> = Vec::new();
    let search = Search {
        start: args.start.clamp(args.min_rate, args.max_rate),
        factor: args.factor,
        precision: args.precision,
        min_rate: args.min_rate,
        max_rate: args.max_rate,
        tries: args.tries,
    };
    let (highest_rate, end) = search
        .find(async |rate| {
            let seed = session.seed.wrapping_add(stages.len() as u64);
            let Measured {
                stages: measured,
                interrupted,
                ..
            } = measure(&session, &[step(args, rate)], args.settle.0, seed).await;
            match measured.into_iter().next() {
                Some(mut stage) if !interrupted => {
                    let held = holds(&stage, args);
                    stage.held = Some(held);
                    progress(&stage);
                    stages.push(stage);
                    ControlFlow::Continue(held)
                }
                _ => ControlFlow::Break(()),
            }
        })
        .await;
    // Tries of one rate stay in their order.
    stages.sort_by(|a, b| rate_of(a).total_cmp(&rate_of(b)));
    report.watch = watch.stop().await;
    report.ramp = Some(Found {
        p99_bound_ms: args.p99.0.as_secs_f64() * 1000.0,
        success_bound: args.success,
        highest_rate,
        end: end.clone(),
    });
    report.add(Measured {
        stages,
        timeline: Vec::new(),
        connections_opened: session.pool.opened(),
        interrupted: end == End::Interrupted,
    });
    Ok(report)
}

/// A slow rate is measured longer.
fn step(args: &RampArgs, rate: f64) -> Phase {
    let enough = Duration::from_secs_f64(args.min_requests as f64 / rate);
    Phase {
        rate,
        time: Time(args.step.0.max(enough)),
    }
}

fn rate_of(stage: &Stage) -> f64 {
    match stage.load {
        Load::Rate { rate } => rate,
        Load::Clients { .. } => 0.0,
    }
}

fn holds(stage: &Stage, args: &RampArgs) -> bool {
    let bound = args.p99.0.as_secs_f64() * 1000.0;
    stage.latency.count > 0 && stage.latency.p99_ms <= bound && stage.success_share >= args.success
}

/// How rates are tried.
#[derive(Clone, Copy, Debug)]
struct Search {
    start: f64,
    factor: f64,
    precision: f64,
    min_rate: f64,
    max_rate: f64,
    /// A rate that does not hold is tried this often.
    tries: u32,
}

impl Search {
    /// The highest rate that holds. In steps of `factor` up (or down, if the first fails) until
    /// one rate holds and a higher one fails; then by halves, on a logarithmic scale, until the
    /// two are within `precision`.
    async fn find(
        &self,
        mut holds: impl AsyncFnMut(f64) -> ControlFlow<(), bool>,
    ) -> (Option<f64>, End) {
        let (mut held, mut failed) = (None::<f64>, None::<f64>);
        loop {
            let rate = match (held, failed) {
                (None, None) => self.start,
                (Some(held), None) if held >= self.max_rate => return (Some(held), End::MaxRate),
                (Some(held), None) => (held * self.factor).min(self.max_rate),
                (None, Some(failed)) if failed <= self.min_rate => {
                    return (None, End::Fails { rate: failed });
                }
                (None, Some(failed)) => (failed / self.factor).max(self.min_rate),
                (Some(held), Some(failed)) if failed <= held * (1.0 + self.precision) => {
                    return (Some(held), End::Fails { rate: failed });
                }
                (Some(held), Some(failed)) => (held * failed).sqrt(),
            };
            let mut good = false;
            for _ in 0..self.tries {
                match holds(rate).await {
                    ControlFlow::Break(()) => return (held, End::Interrupted),
                    ControlFlow::Continue(holds) => good = holds,
                }
                if good {
                    break;
                }
            }
            if good {
                held = Some(rate);
            } else {
                failed = Some(rate);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEARCH: Search = Search {
        start: 10.0,
        factor: 1.6,
        precision: 0.04,
        min_rate: 0.5,
        max_rate: 1e5,
        tries: 1,
    };

    /// p99 in seconds of a queue with one server and exponential times: ln 100 / (capacity − rate).
    fn p99(capacity: f64, rate: f64) -> f64 {
        if rate < capacity {
            100_f64.ln() / (capacity - rate)
        } else {
            f64::INFINITY
        }
    }

    async fn search(search: Search, capacity: f64, bound: f64) -> (Option<f64>, End, usize) {
        let mut steps = 0;
        let (rate, end) = search
            .find(async |rate| {
                steps += 1;
                ControlFlow::Continue(p99(capacity, rate) <= bound)
            })
            .await;
        (rate, end, steps)
    }

    #[tokio::test]
    async fn the_rate_found_holds_and_one_a_little_higher_does_not() {
        for capacity in [120.0, 33.0, 5_000.0] {
            let (rate, end, steps) = search(SEARCH, capacity, 0.2).await;
            let rate = rate.expect("a rate");
            assert!(p99(capacity, rate) <= 0.2, "{rate}");
            let End::Fails { rate: fails } = end else {
                panic!("{end:?}")
            };
            assert!(p99(capacity, fails) > 0.2);
            assert!(fails <= rate * 1.04, "{rate} to {fails}");
            assert!(steps < 25, "{steps} steps");
        }
    }

    #[tokio::test]
    async fn a_first_rate_that_is_too_high_is_lowered() {
        // ln 100 / 1.5 below the capacity.
        let best = 25.0 - 3.07;
        for start in [30.0, 4_000.0] {
            let search_down = Search { start, ..SEARCH };
            let (rate, _, _) = search(search_down, 25.0, 1.5).await;
            assert!(rate.is_some_and(|rate| rate <= best && rate > best / 1.04));
        }
    }

    #[tokio::test]
    async fn the_search_ends_at_both_ends() {
        let (rate, end, _) = search(SEARCH, 1.0, 0.001).await;
        assert_eq!(rate, None);
        assert_eq!(end, End::Fails { rate: 0.5 });
        let low = Search {
            max_rate: 50.0,
            ..SEARCH
        };
        let (rate, end, _) = search(low, 1e6, 0.2).await;
        assert_eq!((rate, end), (Some(50.0), End::MaxRate));
    }

    #[tokio::test]
    async fn one_stall_does_not_end_the_ramp_where_a_rate_is_tried_twice() {
        let twice = Search { tries: 2, ..SEARCH };
        let mut steps = 0;
        let (rate, _) = twice
            .find(async |rate| {
                steps += 1;
                ControlFlow::Continue(steps != 3 && p99(120.0, rate) <= 0.2)
            })
            .await;
        let (undisturbed, _, _) = search(SEARCH, 120.0, 0.2).await;
        assert_eq!(rate, undisturbed);
    }

    #[tokio::test]
    async fn an_interrupted_search_says_what_it_knows() {
        let mut left = 3;
        let found = SEARCH
            .find(async |_| {
                left -= 1;
                match left {
                    0 => ControlFlow::Break(()),
                    _ => ControlFlow::Continue(true),
                }
            })
            .await;
        assert_eq!(found, (Some(16.0), End::Interrupted));
    }
}
