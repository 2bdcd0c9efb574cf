//! Latency of teacher and student, measured in turns so that both meet the same machine.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Quantiles of the time of one call, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quantiles {
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
}

/// Latency at one batch size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencyAt {
    /// Inputs of one call.
    pub batch: usize,
    /// Measured calls of each model.
    pub rounds: usize,
    pub student: Quantiles,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<Quantiles>,
    /// The teacher's median divided by the student's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed_up: Option<f64>,
}

/// A model to measure: answers a batch and waits until the answer is there.
pub type Call<'a, T, E> = &'a mut dyn FnMut(&[&T]) -> Result<(), E>;

/// Calls teacher and student in turns on the same batches of `batch` inputs, which go round
/// through `inputs`. Which of the two comes first changes from round to round. The first `warm_up`
/// rounds are not counted.
///
/// Stops at the first error of either model. `None` if `inputs` is empty, or `batch` or `rounds`
/// is 0.
pub fn measure_interleaved<'a, T, E>(
    teacher: Option<Call<'a, T, E>>,
    student: Call<'a, T, E>,
    inputs: &[T],
    batch: usize,
    warm_up: usize,
    rounds: usize,
) -> Result<Option<LatencyAt>, E> {
    if inputs.is_empty() || batch == 0 || rounds == 0 {
        return Ok(None);
    }
    let mut models: Vec<Call<'a, T, E>> = teacher.into_iter().chain([student]).collect();
    let mut times = measure_in_turns(&mut models, inputs, batch, warm_up, rounds, &mut || {})?;
    let mut last = || times.pop().map(|mut times| quantiles(&mut times));
    let Some(student) = last() else {
        return Ok(None);
    };
    let teacher = last();
    Ok(Some(LatencyAt {
        batch,
        rounds,
        student,
        teacher,
        speed_up: teacher
            .map(|teacher| teacher.p50_ms / student.p50_ms)
            .filter(|speed_up| speed_up.is_finite()),
    }))
}

/// Calls models in turns on the same batches of `batch` inputs, which go round through `inputs`.
/// Who comes first changes from round to round. Gives the times of each model's calls without those
/// of the first `warm_up` rounds; `done` hears of the end of every round.
///
/// Stops at the first error of a model.
pub fn measure_in_turns<T, E>(
    models: &mut [Call<'_, T, E>],
    inputs: &[T],
    batch: usize,
    warm_up: usize,
    rounds: usize,
    done: &mut dyn FnMut(),
) -> Result<Vec<Vec<Duration>>, E> {
    let mut next = inputs.iter().cycle();
    let mut times = vec![Vec::with_capacity(rounds); models.len()];
    for round in 0..warm_up + rounds {
        let items: Vec<&T> = next.by_ref().take(batch).collect();
        for turn in 0..models.len() {
            let model = (round + turn) % models.len();
            let start = Instant::now();
            models[model](&items)?;
            if round >= warm_up {
                times[model].push(start.elapsed());
            }
        }
        done();
    }
    Ok(times)
}

/// Nearest-rank quantiles of at least one time.
pub fn quantiles(times: &mut [Duration]) -> Quantiles {
    times.sort_unstable();
    let at = |share: f64| {
        let rank = (share * times.len() as f64).ceil() as usize;
        times[rank.clamp(1, times.len()) - 1].as_secs_f64() * 1e3
    };
    Quantiles {
        p50_ms: at(0.50),
        p90_ms: at(0.90),
        p99_ms: at(0.99),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn both_models_meet_the_same_batches_and_take_turns_in_going_first() {
        let log = RefCell::new(Vec::new());
        let mut teacher = |items: &[&u32]| {
            log.borrow_mut()
                .push(('t', items.iter().map(|&&i| i).collect::<Vec<_>>()));
            Ok::<_, Infallible>(())
        };
        let mut student = |items: &[&u32]| {
            log.borrow_mut()
                .push(('s', items.iter().map(|&&i| i).collect::<Vec<_>>()));
            Ok(())
        };
        let latency = measure_interleaved(Some(&mut teacher), &mut student, &[1, 2, 3], 2, 1, 2)
            .unwrap()
            .unwrap();
        assert_eq!((latency.batch, latency.rounds), (2, 2));
        assert!(latency.teacher.is_some());
        assert_eq!(
            log.into_inner(),
            [
                ('t', vec![1, 2]),
                ('s', vec![1, 2]),
                ('s', vec![3, 1]),
                ('t', vec![3, 1]),
                ('t', vec![2, 3]),
                ('s', vec![2, 3]),
            ]
        );
    }

    #[test]
    fn an_error_ends_the_measurement_with_its_cause() {
        let mut calls = 0;
        let mut student = |_: &[&u32]| {
            calls += 1;
            if calls == 2 { Err("broken") } else { Ok(()) }
        };
        let result = measure_interleaved(None, &mut student, &[1], 1, 0, 5);
        assert_eq!(result, Err("broken"));
        assert_eq!(calls, 2);
    }

    #[test]
    fn nothing_to_measure_gives_no_figures() {
        let mut student = |_: &[&u32]| Ok::<_, Infallible>(());
        assert_eq!(
            measure_interleaved(None, &mut student, &[], 1, 0, 5),
            Ok(None)
        );
        assert_eq!(
            measure_interleaved(None, &mut student, &[1], 1, 0, 0),
            Ok(None)
        );
    }

    #[test]
    fn quantiles_are_nearest_ranks_in_milliseconds() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        let quantiles = quantiles(&mut times);
        assert_eq!(quantiles.p50_ms, 50.0);
        assert_eq!(quantiles.p90_ms, 90.0);
        assert_eq!(quantiles.p99_ms, 99.0);
    }
}
