//! Counts and histograms of a load while it goes on.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::exchange::{Outcome, Sample};
use crate::report::{Client, Group, Load, Second, Stage, TaskFigures};
use crate::session::Task;
use crate::times::Times;

/// Most rows of a timeline; a longer load has longer rows.
const MOST_ROWS: usize = 600;

/// Requests of one task in one stage.
struct Tally {
    /// Of requests that were meant to start in the stage.
    outcomes: BTreeMap<Outcome, u64>,
    /// Of the answered of these.
    latency: Times,
    delivered: Delivered,
}

/// Answers that came during the stage, whenever their requests started: what a server that has
/// more to do than it can delivers later is not its throughput of the moment.
#[derive(Clone, Copy, Default)]
struct Delivered {
    answers: u64,
    inputs: u64,
    tokens: u64,
}

impl Tally {
    fn new() -> Self {
        Self {
            outcomes: BTreeMap::new(),
            latency: Times::new(),
            delivered: Delivered::default(),
        }
    }

    fn add(&mut self, sample: &Sample) {
        *self.outcomes.entry(sample.outcome).or_default() += 1;
        if sample.outcome == Outcome::Answered {
            self.latency.add(sample.latency);
        }
    }

    fn deliver(&mut self, sample: &Sample) {
        self.delivered.answers += 1;
        self.delivered.inputs += sample.inputs;
        self.delivered.tokens += sample.tokens;
    }

    fn merge(&mut self, other: &Self) {
        for (outcome, count) in &other.outcomes {
            *self.outcomes.entry(*outcome).or_default() += count;
        }
        self.latency.merge(&other.latency);
        self.delivered.answers += other.delivered.answers;
        self.delivered.inputs += other.delivered.inputs;
        self.delivered.tokens += other.delivered.tokens;
    }

    fn requests(&self) -> u64 {
        self.outcomes.values().sum()
    }

    fn answered(&self) -> u64 {
        self.outcomes.get(&Outcome::Answered).copied().unwrap_or(0)
    }

    /// The answered of the plain ones; 1 where there are none.
    fn success_share(&self) -> f64 {
        let plain = self
            .outcomes
            .iter()
            .filter(|(outcome, _)| outcome.is_plain());
        match plain.map(|(_, count)| count).sum::<u64>() {
            0 => 1.0,
            plain => self.answered() as f64 / plain as f64,
        }
    }
}

/// One stage of a load.
struct StageTally {
    /// `None`: not asked yet.
    tasks: Vec<Option<Tally>>,
    tokenize: Times,
    queue: Times,
    compute: Times,
    lag: Times,
    waited: u64,
}

impl StageTally {
    fn new(tasks: usize) -> Self {
        Self {
            tasks: (0..tasks).map(|_| None).collect(),
            tokenize: Times::new(),
            queue: Times::new(),
            compute: Times::new(),
            lag: Times::new(),
            waited: 0,
        }
    }

    fn task(&mut self, task: usize) -> &mut Tally {
        self.tasks[task].get_or_insert_with(Tally::new)
    }

    fn add(&mut self, task: usize, sample: &Sample) {
        self.task(task).add(sample);
        self.lag.add(sample.lag);
        self.waited += u64::from(sample.waited);
        let timings = sample.timings;
        for (times, time) in [
            (&mut self.tokenize, timings.tokenize),
            (&mut self.queue, timings.queue),
            (&mut self.compute, timings.compute),
        ] {
            if let Some(time) = time {
                times.add(time);
            }
        }
    }
}

/// What became of the requests of one second.
#[derive(Default)]
struct SecondTally {
    requests: u64,
    /// Answers that came in this second.
    delivered: u64,
    refused: u64,
    failed: u64,
    /// Of the answered, in microseconds.
    latencies: Vec<u32>,
}

struct Tallies {
    stages: Vec<StageTally>,
    seconds: Vec<SecondTally>,
}

impl Tallies {
    fn second(&mut self, time: Duration) -> &mut SecondTally {
        let second = usize::try_from(time.as_secs()).unwrap_or(usize::MAX);
        if self.seconds.len() <= second {
            self.seconds.resize_with(second + 1, Default::default);
        }
        &mut self.seconds[second]
    }
}

/// Collects the samples of a load.
pub(crate) struct Recorder {
    /// Of each stage, since the start of the load.
    ends: Vec<Duration>,
    tasks: usize,
    tallies: Mutex<Tallies>,
}

/// CPU seconds of both sides during a stage, as shares of one core.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct CpuShares {
    pub(crate) client: f64,
    pub(crate) server: Option<f64>,
}

impl Recorder {
    /// For stages that take these times, one after the other.
    pub(crate) fn new(times: impl IntoIterator<Item = Duration>, tasks: usize) -> Self {
        let mut end = Duration::ZERO;
        let ends: Vec<Duration> = times
            .into_iter()
            .map(|time| {
                end += time;
                end
            })
            .collect();
        let stages = ends.iter().map(|_| StageTally::new(tasks)).collect();
        Self {
            ends,
            tasks,
            tallies: Mutex::new(Tallies {
                stages,
                seconds: Vec::new(),
            }),
        }
    }

    fn tallies(&self) -> MutexGuard<'_, Tallies> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stage of a time since the start of the load; `None` after the last.
    pub(crate) fn stage_at(&self, time: Duration) -> Option<usize> {
        let stage = self.ends.partition_point(|end| *end <= time);
        (stage < self.ends.len()).then_some(stage)
    }

    /// A request of `task` that was meant to start `at` after the start of the load. Its outcome
    /// and its latency belong to `stage`, its answer to the stage and the second that it came in.
    pub(crate) fn add(&self, stage: usize, task: usize, at: Duration, sample: &Sample) {
        let mut tallies = self.tallies();
        tallies.stages[stage].add(task, sample);
        let came = at + sample.latency;
        if sample.outcome == Outcome::Answered {
            if let Some(stage) = self.stage_at(came) {
                tallies.stages[stage].task(task).deliver(sample);
            }
            tallies.second(came).delivered += 1;
        }
        let tally = tallies.second(at);
        tally.requests += 1;
        match sample.outcome {
            Outcome::Answered => {
                let micros = u32::try_from(sample.latency.as_micros()).unwrap_or(u32::MAX);
                tally.latencies.push(micros);
            }
            Outcome::Refused => tally.refused += 1,
            outcome if outcome.is_plain() => tally.failed += 1,
            _ => {}
        }
    }

    /// The figures of a stage that took `time`.
    pub(crate) fn stage(
        &self,
        stage: usize,
        load: Load,
        time: Duration,
        tasks: &[Task],
        cpu: CpuShares,
    ) -> Stage {
        debug_assert_eq!(tasks.len(), self.tasks);
        let tallies = self.tallies();
        let tally = &tallies.stages[stage];
        let asked: Vec<(&Task, &Tally)> = tasks
            .iter()
            .zip(&tally.tasks)
            .filter_map(|(task, tally)| Some((task, tally.as_ref()?)))
            .collect();
        let mut all = Tally::new();
        for (_, tally) in &asked {
            all.merge(tally);
        }
        let per_second = |count: u64| count as f64 / time.as_secs_f64();
        Stage {
            load,
            seconds: time.as_secs_f64(),
            requests: all.requests(),
            offered_per_second: per_second(all.requests()),
            success_share: all.success_share(),
            goodput_per_second: per_second(all.delivered.answers),
            inputs_per_second: per_second(all.delivered.inputs),
            tokens_per_second: per_second(all.delivered.tokens),
            latency: all.latency.quantiles(),
            outcomes: all.outcomes,
            tokenize: tally.tokenize.if_any(),
            queue: tally.queue.if_any(),
            compute: tally.compute.if_any(),
            client: Client {
                lag: tally.lag.quantiles(),
                waited_for_connection: tally.waited,
                cpu_share: cpu.client,
            },
            server_cpu_share: cpu.server,
            groups: groups(&asked, time),
            tasks: asked
                .iter()
                .map(|(task, tally)| figures(task, tally))
                .collect(),
            held: None,
        }
    }

    /// What happened when, in rows of a second or more.
    pub(crate) fn timeline(&self) -> Vec<Second> {
        let tallies = self.tallies();
        let width = tallies.seconds.len().div_ceil(MOST_ROWS).max(1);
        let rows = tallies.seconds.chunks(width).enumerate();
        rows.map(|(i, seconds)| {
            let mut latencies: Vec<u32> =
                seconds.iter().flat_map(|s| &s.latencies).copied().collect();
            latencies.sort_unstable();
            let at = |q: f64| {
                let last = latencies.len().checked_sub(1)?;
                let place = (q * latencies.len() as f64).ceil() as usize;
                Some(f64::from(latencies[place.saturating_sub(1).min(last)]) / 1000.0)
            };
            Second {
                second: i * width,
                seconds: width,
                requests: seconds.iter().map(|s| s.requests).sum(),
                delivered: seconds.iter().map(|s| s.delivered).sum(),
                answered: latencies.len() as u64,
                refused: seconds.iter().map(|s| s.refused).sum(),
                failed: seconds.iter().map(|s| s.failed).sum(),
                p50_ms: at(0.5),
                p99_ms: at(0.99),
            }
        })
        .collect()
    }
}

fn figures(task: &Task, tally: &Tally) -> TaskFigures {
    TaskFigures {
        task: task.name.clone(),
        weight: task.weight,
        requests: tally.requests(),
        success_share: tally.success_share(),
        outcomes: tally.outcomes.clone(),
        latency: tally.latency.quantiles(),
    }
}

/// Tasks that are asked equally often, taken together: a flooded one stands beside all others.
fn groups(asked: &[(&Task, &Tally)], time: Duration) -> Vec<Group> {
    let mut weights: Vec<f64> = asked.iter().map(|(task, _)| task.weight).collect();
    weights.sort_by(f64::total_cmp);
    weights.dedup();
    weights
        .into_iter()
        .map(|weight| {
            let mut together = Tally::new();
            let mut tasks = 0;
            for (_, tally) in asked.iter().filter(|(task, _)| task.weight == weight) {
                together.merge(tally);
                tasks += 1;
            }
            Group {
                weight,
                tasks,
                requests: together.requests(),
                success_share: together.success_share(),
                goodput_per_second: together.delivered.answers as f64 / time.as_secs_f64(),
                latency: together.latency.quantiles(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::{Timings, uri};

    fn sample(outcome: Outcome, ms: u64) -> Sample {
        Sample {
            outcome,
            latency: Duration::from_millis(ms),
            lag: Duration::from_micros(50),
            waited: false,
            inputs: 2,
            tokens: 30,
            timings: Timings {
                queue: Some(Duration::from_millis(ms / 2)),
                ..Timings::default()
            },
        }
    }

    fn task(name: &str, weight: f64) -> Task {
        Task {
            name: name.to_owned(),
            weight,
            path: uri("/").expect("a path"),
        }
    }

    fn stage(recorder: &Recorder, tasks: &[Task]) -> Stage {
        let load = Load::Rate { rate: 10.0 };
        let time = Duration::from_secs(10);
        recorder.stage(0, load, time, tasks, CpuShares::default())
    }

    #[test]
    fn latency_is_of_the_answered_and_success_of_the_plain() {
        let recorder = Recorder::new([Duration::from_secs(10)], 1);
        for ms in 1..=97 {
            recorder.add(0, 0, Duration::ZERO, &sample(Outcome::Answered, ms));
        }
        recorder.add(0, 0, Duration::ZERO, &sample(Outcome::Refused, 9_000));
        recorder.add(0, 0, Duration::ZERO, &sample(Outcome::TimedOut, 9_000));
        recorder.add(0, 0, Duration::ZERO, &sample(Outcome::Cancelled, 9_000));
        let stage = stage(&recorder, &[task("a", 1.0)]);
        assert_eq!(stage.requests, 100);
        assert!((stage.success_share - 97.0 / 99.0).abs() < 1e-12);
        assert!((stage.goodput_per_second - 9.7).abs() < 1e-12);
        assert!((stage.inputs_per_second - 19.4).abs() < 1e-12);
        assert!((stage.tokens_per_second - 291.0).abs() < 1e-9);
        assert_eq!(stage.latency.count, 97);
        assert!((stage.latency.max_ms - 97.0).abs() < 0.1);
        assert!((stage.latency.p50_ms - 49.0).abs() < 0.1);
        assert_eq!(stage.compute, None);
    }

    #[test]
    fn answers_count_for_the_stage_they_come_in_and_latency_for_the_one_they_were_asked_in() {
        let seconds = Duration::from_secs;
        let recorder = Recorder::new([seconds(10), seconds(10)], 1);
        for (stage, at, ms) in [(0, 9, 500), (0, 9, 2_000), (1, 19, 500), (1, 19, 2_000)] {
            recorder.add(stage, 0, seconds(at), &sample(Outcome::Answered, ms));
        }
        let tasks = [task("a", 1.0)];
        let stages = [0, 1].map(|i| {
            let load = Load::Rate { rate: 10.0 };
            recorder.stage(i, load, seconds(10), &tasks, CpuShares::default())
        });
        for stage in &stages {
            assert_eq!(stage.requests, 2);
            assert!((stage.latency.max_ms - 2_000.0).abs() < 2.0);
        }
        let delivered = stages.map(|stage| stage.goodput_per_second);
        assert_eq!(delivered, [0.1, 0.2], "the last one came after the end");
        let timeline = recorder.timeline();
        assert_eq!((timeline[9].answered, timeline[9].delivered), (2, 1));
        assert_eq!((timeline[11].answered, timeline[11].delivered), (0, 1));
    }

    #[test]
    fn a_flooded_task_stands_beside_all_others_together() {
        let recorder = Recorder::new([Duration::from_secs(10)], 3);
        for (task, ms) in [(0, 500), (1, 10), (2, 20)] {
            recorder.add(0, task, Duration::ZERO, &sample(Outcome::Answered, ms));
        }
        let tasks = [task("flood", 10.0), task("a", 1.0), task("b", 1.0)];
        let groups = stage(&recorder, &tasks).groups;
        let shape: Vec<_> = groups.iter().map(|g| (g.weight, g.tasks)).collect();
        assert_eq!(shape, [(1.0, 2), (10.0, 1)]);
        assert!((groups[0].latency.max_ms - 20.0).abs() < 0.1);
        assert!((groups[1].latency.max_ms - 500.0).abs() < 1.0);
    }

    #[test]
    fn a_long_timeline_has_longer_rows() {
        let recorder = Recorder::new([Duration::from_secs(10)], 1);
        for (second, outcome) in [
            (0, Outcome::Answered),
            (1, Outcome::Refused),
            (1_100, Outcome::Broken),
        ] {
            let at = Duration::from_secs(second);
            recorder.add(0, 0, at, &sample(outcome, 5));
        }
        let rows = recorder.timeline();
        assert_eq!(rows.len(), 551);
        let first = &rows[0];
        assert_eq!((first.seconds, first.requests), (2, 2));
        assert_eq!((first.answered, first.refused), (1, 1));
        assert_eq!(first.p99_ms, Some(5.0));
        let last = &rows[550];
        assert_eq!((last.second, last.failed, last.p50_ms), (1_100, 1, None));
    }
}
