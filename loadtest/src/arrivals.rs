//! When requests start and what each asks. Both are drawn from the seed alone: how the server
//! answers can't change the questions, nor when they come.

use std::thread;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::mix::Mix;

/// Longest a client waits before it goes away.
const LONGEST_PATIENCE: Duration = Duration::from_millis(50);

/// A stretch of time with one rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stage {
    /// Requests a second; 0 is silence.
    pub(crate) rate: f64,
    pub(crate) time: Duration,
}

/// A request that is to start at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Arrival {
    /// Since the start of the first stage.
    pub(crate) at: Duration,
    /// Index of the stage.
    pub(crate) stage: usize,
    pub(crate) ask: Ask,
}

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ask {
    pub(crate) task: usize,
    /// Row of the first text.
    pub(crate) first: usize,
    /// Texts in one input.
    pub(crate) texts: usize,
    pub(crate) conduct: Conduct,
}

/// How a client behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Conduct {
    /// Waits for its answer.
    Plain,
    /// Goes away this long after its request was sent.
    Cancel(Duration),
    /// Goes away with half of its request sent.
    Disconnect,
    /// Sends a text that is over the server's limit.
    Oversize,
}

/// Shares of clients that don't behave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Misconduct {
    pub(crate) cancel: f64,
    pub(crate) disconnect: f64,
    pub(crate) oversize: f64,
}

/// What requests are drawn from.
#[derive(Clone, Debug)]
pub(crate) struct Questions {
    pub(crate) tasks: Mix,
    /// Rows of texts.
    pub(crate) rows: usize,
    pub(crate) lengths: Mix,
    /// Texts in an input, for each choice of `lengths`.
    pub(crate) texts: Vec<usize>,
    pub(crate) misconduct: Misconduct,
}

/// Draws what requests ask.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    questions: Questions,
    random: ChaCha8Rng,
}

impl Asker {
    /// Different streams of one seed ask different things.
    pub(crate) fn new(questions: Questions, seed: u64, stream: u64) -> Self {
        Self {
            questions,
            random: generator(seed, stream),
        }
    }

    pub(crate) fn ask(&mut self) -> Ask {
        let Self { questions, random } = self;
        Ask {
            task: questions.tasks.choose(random),
            first: random.random_range(0..questions.rows),
            texts: questions.texts[questions.lengths.choose(random)],
            conduct: questions.misconduct.draw(random),
        }
    }
}

impl Misconduct {
    fn draw(&self, random: &mut impl Rng) -> Conduct {
        let (point, patience) = (random.random::<f64>(), random.random::<f64>());
        let cancel = self.cancel;
        let disconnect = cancel + self.disconnect;
        let oversize = disconnect + self.oversize;
        if point < cancel {
            Conduct::Cancel(LONGEST_PATIENCE.mul_f64(patience))
        } else if point < disconnect {
            Conduct::Disconnect
        } else if point < oversize {
            Conduct::Oversize
        } else {
            Conduct::Plain
        }
    }
}

fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    random
}

/// The arrivals of a Poisson process whose rate changes from stage to stage.
pub(crate) struct Arrivals {
    stages: Vec<Stage>,
    stage: usize,
    /// Seconds from the start to the last arrival, or to the start of the stage.
    now: f64,
    /// Seconds from the start to the end of the stage.
    end: f64,
    gaps: ChaCha8Rng,
    asker: Asker,
}

impl Arrivals {
    pub(crate) fn new(stages: Vec<Stage>, questions: Questions, seed: u64) -> Self {
        let end = stages.first().map_or(0.0, |stage| stage.time.as_secs_f64());
        Self {
            stages,
            stage: 0,
            now: 0.0,
            end,
            // Two streams: another mix of tasks leaves the times as they are.
            gaps: generator(seed, 0),
            asker: Asker::new(questions, seed, 1),
        }
    }
}

impl Iterator for Arrivals {
    type Item = Arrival;

    fn next(&mut self) -> Option<Arrival> {
        loop {
            let stage = self.stages.get(self.stage)?;
            // At a rate of 0 the gap is infinite, and the stage passes.
            let uniform: f64 = self.gaps.random();
            let at = self.now - (1.0 - uniform).ln() / stage.rate;
            if at < self.end {
                self.now = at;
                return Some(Arrival {
                    at: Duration::from_secs_f64(at),
                    stage: self.stage,
                    ask: self.asker.ask(),
                });
            }
            // The process has no memory: it may be drawn afresh from the border on.
            self.now = self.end;
            self.stage += 1;
            let next = self.stages.get(self.stage)?;
            self.end += next.time.as_secs_f64();
        }
    }
}

/// Gives each arrival out when its time has come, from a thread of its own: a runtime's timer is a
/// millisecond coarse, which is as long as some answers take.
pub(crate) fn on_time(arrivals: Arrivals, start: Instant) -> mpsc::UnboundedReceiver<Arrival> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        for arrival in arrivals {
            let due = start.into_std() + arrival.at;
            thread::sleep(due.saturating_duration_since(std::time::Instant::now()));
            if sender.send(arrival).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn questions() -> Questions {
        Questions {
            tasks: Mix::new([1.0, 3.0]),
            rows: 100,
            lengths: Mix::new([1.0]),
            texts: vec![1],
            misconduct: Misconduct::default(),
        }
    }

    fn arrivals(stages: &[(f64, u64)], seed: u64) -> Vec<Arrival> {
        let stages = stages.iter().map(|(rate, seconds)| Stage {
            rate: *rate,
            time: Duration::from_secs(*seconds),
        });
        Arrivals::new(stages.collect(), questions(), seed).collect()
    }

    #[test]
    fn gaps_are_exponential_with_the_mean_of_the_rate() {
        let arrivals = arrivals(&[(200.0, 500)], 7);
        let mut gaps: Vec<f64> = arrivals
            .windows(2)
            .map(|pair| (pair[1].at - pair[0].at).as_secs_f64())
            .collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        // 100,000 gaps: the standard error of the mean is a third of a percent.
        assert!((mean * 200.0 - 1.0).abs() < 0.015, "mean {mean}");
        gaps.sort_by(f64::total_cmp);
        let quantile = |q: f64| gaps[(q * gaps.len() as f64) as usize] / mean;
        // Of an exponential distribution: ln 2 and ln 100 times the mean.
        assert!((quantile(0.5) - 0.693).abs() < 0.02);
        assert!((quantile(0.99) - 4.605).abs() < 0.2);
    }

    #[test]
    fn the_same_seed_gives_the_same_load_and_another_does_not() {
        let stages = [(50.0, 20), (80.0, 5)];
        assert_eq!(arrivals(&stages, 3), arrivals(&stages, 3));
        assert_ne!(arrivals(&stages, 3), arrivals(&stages, 4));
    }

    #[test]
    fn the_mix_of_tasks_leaves_the_times_alone() {
        let times = |weights: [f64; 2]| {
            let questions = Questions {
                tasks: Mix::new(weights),
                ..questions()
            };
            let stage = Stage {
                rate: 50.0,
                time: Duration::from_secs(5),
            };
            let arrivals = Arrivals::new(vec![stage], questions, 1);
            arrivals.map(|arrival| arrival.at).collect::<Vec<_>>()
        };
        assert_eq!(times([1.0, 1.0]), times([1.0, 9.0]));
    }

    #[test]
    fn each_stage_has_its_rate_and_keeps_to_its_time() {
        let arrivals = arrivals(&[(100.0, 100), (0.0, 10), (400.0, 100)], 11);
        let of = |stage: usize| arrivals.iter().filter(move |a| a.stage == stage);
        assert_eq!(of(1).count(), 0);
        for (stage, from, to, expected) in [(0, 0, 100, 10_000), (2, 110, 210, 40_000)] {
            let count = of(stage).count();
            // Five standard deviations of a Poisson count.
            let spread = 5.0 * f64::from(expected).sqrt();
            assert!(
                (count as f64 - f64::from(expected)).abs() < spread,
                "{count}"
            );
            let (from, to) = (Duration::from_secs(from), Duration::from_secs(to));
            assert!(of(stage).all(|a| a.at >= from && a.at < to));
        }
        assert!(arrivals.is_sorted_by_key(|arrival| arrival.at));
    }

    #[test]
    fn misconduct_comes_in_the_asked_for_shares() {
        let mut asker = Asker::new(
            Questions {
                misconduct: Misconduct {
                    cancel: 0.1,
                    disconnect: 0.2,
                    oversize: 0.3,
                },
                ..questions()
            },
            1,
            1,
        );
        let mut counts = [0_u32; 4];
        for _ in 0..100_000 {
            counts[match asker.ask().conduct {
                Conduct::Cancel(patience) => {
                    assert!(patience <= LONGEST_PATIENCE);
                    0
                }
                Conduct::Disconnect => 1,
                Conduct::Oversize => 2,
                Conduct::Plain => 3,
            }] += 1;
        }
        for (count, expected) in counts.into_iter().zip([10_000, 20_000, 30_000, 40_000]) {
            assert!(count.abs_diff(expected) < 700, "{counts:?}");
        }
    }

    #[tokio::test]
    async fn arrivals_come_in_order_and_never_early() {
        let stage = Stage {
            rate: 2000.0,
            time: Duration::from_millis(50),
        };
        let expected: Vec<_> = Arrivals::new(vec![stage], questions(), 1).collect();
        let start = Instant::now();
        let mut given = on_time(Arrivals::new(vec![stage], questions(), 1), start);
        for arrival in expected {
            assert_eq!(given.recv().await, Some(arrival));
            assert!(start.elapsed() >= arrival.at);
        }
        assert_eq!(given.recv().await, None);
    }
}
