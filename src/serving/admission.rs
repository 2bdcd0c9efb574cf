//! Who may come in: bounded by sequences, by the wait ahead, and by each task's share of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::fair::QUANTUM;
use super::rate::ServiceRate;

/// What a client is told to wait before anything has been measured.
const UNKNOWN_WAIT: Duration = Duration::from_secs(1);

/// How much the engine takes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Most sequences inside, all tasks together.
    pub(super) sequences: usize,
    /// Longest wait for a request that comes, at the measured speed.
    pub(super) wait: Duration,
}

/// Counts what is inside. A request is let in whole or not at all, and at once: a client that is
/// turned away without waiting can go elsewhere.
///
/// A request is let in if the work that will be done before it takes no longer than the longest
/// wait. That is its own task's, and of each other task no more than comes to turn meanwhile (see
/// [`FairQueue`](super::fair::FairQueue)): one that is flooded is turned away, the others are not.
pub(super) struct Admission {
    bounds: Bounds,
    rate: Arc<ServiceRate>,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    all: Amount,
    /// Only tasks that have something inside.
    tasks: HashMap<String, Amount>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Amount {
    sequences: usize,
    tokens: usize,
}

/// A request's place. It is free again when this is dropped.
pub(super) struct Permit {
    admission: Arc<Admission>,
    task: String,
    amount: Amount,
}

impl Admission {
    pub(super) fn new(bounds: Bounds, rate: Arc<ServiceRate>) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            rate,
            inside: Mutex::default(),
        })
    }

    /// A place for all sequences of a request; `tokens` may be an estimate.
    ///
    /// # Errors
    /// There is none; the time after which there should be one.
    pub(super) fn enter(
        self: &Arc<Self>,
        task: &str,
        sequences: usize,
        tokens: usize,
    ) -> Result<Permit, Duration> {
        let mut inside = self.lock();
        let amount = Amount { sequences, tokens };
        self.check(&inside, task, amount)?;
        inside.add(task, amount);
        Ok(Permit {
            admission: Arc::clone(self),
            task: task.to_owned(),
            amount,
        })
    }

    fn check(&self, inside: &Inside, task: &str, amount: Amount) -> Result<(), Duration> {
        let wait = self.rate.wait(inside.all.tokens);
        if inside.all.sequences + amount.sequences > self.bounds.sequences {
            return Err(wait.unwrap_or(UNKNOWN_WAIT));
        }
        let is_long = |wait: &Duration| *wait > self.bounds.wait;
        if !wait.as_ref().is_some_and(is_long) {
            return Ok(());
        }
        let ahead = inside.ahead(task, amount.tokens);
        match self.rate.wait(ahead).filter(is_long) {
            Some(wait) => Err(wait),
            None => Ok(()),
        }
    }

    /// Sequences inside.
    #[cfg(test)]
    pub(super) fn sequences(&self) -> usize {
        self.lock().all.sequences
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    fn add(&mut self, task: &str, amount: Amount) {
        let own = self.tasks.entry(task.to_owned()).or_default();
        for sum in [&mut self.all, own] {
            sum.sequences += amount.sequences;
            sum.tokens += amount.tokens;
        }
    }

    /// Tokens that are computed before the last of `tokens` more of the task.
    fn ahead(&self, task: &str, tokens: usize) -> usize {
        let own = self.tasks.get(task).map_or(0, |own| own.tokens);
        let turns = (own + tokens).div_ceil(QUANTUM);
        self.tasks
            .iter()
            .map(|(name, amount)| match name == task {
                true => own,
                false => amount.tokens.min(turns * QUANTUM),
            })
            .sum()
    }

    fn remove(&mut self, task: &str, amount: Amount) {
        let Some(own) = self.tasks.get_mut(task) else {
            return;
        };
        for sum in [&mut self.all, &mut *own] {
            sum.sequences -= amount.sequences;
            sum.tokens -= amount.tokens;
        }
        if *own == Amount::default() {
            self.tasks.remove(task);
        }
    }
}

impl Permit {
    /// The number of tokens has become known.
    pub(super) fn settle(&mut self, tokens: usize) {
        let mut inside = self.admission.lock();
        inside.remove(&self.task, self.amount);
        self.amount.tokens = tokens;
        inside.add(&self.task, self.amount);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.lock().remove(&self.task, self.amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker that takes a millisecond for a token.
    fn admission(sequences: usize, wait: Duration) -> Arc<Admission> {
        let rate = ServiceRate::new(1);
        rate.batch(1, Duration::from_millis(1));
        Admission::new(Bounds { sequences, wait }, Arc::new(rate))
    }

    #[test]
    fn sequences_are_let_in_whole_or_not_at_all() {
        let admission = admission(3, Duration::MAX);
        let two = admission.enter("mood", 2, 20).expect("room");
        assert_eq!(
            admission.enter("mood", 2, 20).err(),
            Some(Duration::from_millis(20))
        );
        let one = admission.enter("topic", 1, 1).expect("room");
        drop((two, one));
        let three = admission.enter("mood", 3, 3).expect("room again");
        drop(three);
        let inside = admission.lock();
        assert_eq!((inside.all, inside.tasks.len()), (Amount::default(), 0));
    }

    #[test]
    fn one_task_alone_fills_the_longest_wait() {
        let admission = admission(1000, Duration::from_millis(100));
        let inside: Vec<_> = (0..30)
            .map_while(|_| admission.enter("mood", 1, 10).ok())
            .collect();
        assert_eq!(inside.len(), 11);
    }

    #[test]
    fn a_flood_leaves_the_others_their_places() {
        let admission = admission(10_000, Duration::from_millis(1000));
        let flood = |most| -> Vec<_> {
            let enter = |_| admission.enter("flood", 1, 10).ok();
            (0..most).map_while(enter).collect()
        };
        let inside = flood(200);
        assert_eq!(inside.len(), 101);
        // Of the flood no more than a turn comes before each of them.
        let others: Vec<_> = (0..20)
            .map(|i| admission.enter(&format!("task {}", i % 4), 1, 10))
            .collect();
        assert!(others.iter().all(Result::is_ok));
        drop(inside);
        // They come before the flood's, which has the rest and no more.
        assert_eq!(flood(200).len(), 81);
    }

    #[test]
    fn many_tasks_together_fill_the_longest_wait() {
        let admission = admission(10_000, Duration::from_millis(1000));
        let inside: Vec<_> = (0..500)
            .map_while(|i| admission.enter(&format!("task {i}"), 1, 10).ok())
            .collect();
        assert_eq!(inside.len(), 101);
    }

    #[test]
    fn an_idle_engine_takes_a_request_of_any_length() {
        let admission = admission(1000, Duration::from_millis(100));
        let mut long = admission.enter("mood", 200, 5000).expect("room");
        assert!(admission.enter("mood", 1, 1).is_err());
        long.settle(10);
        assert!(admission.enter("mood", 1, 1).is_ok());
    }
}
