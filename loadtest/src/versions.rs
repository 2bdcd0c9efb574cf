//! Which version may answer when, and what it must answer.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use tokio::time::Instant;

use crate::arrivals::Ask;
use crate::target::Answer;

/// What is to be said of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Right,
    /// From a version that was not live at any time between the request's start and end.
    WrongVersion,
    /// Not what the version answers to the text.
    WrongLabels,
}

/// Knows the versions of the tasks that are promoted. Answers for other tasks are all right.
pub(crate) struct Check {
    /// How far a score may be from the learnt one.
    tolerance: f64,
    /// By index of the task.
    tasks: HashMap<usize, TaskCheck>,
}

#[derive(Default)]
struct TaskCheck {
    lives: Mutex<Vec<Life>>,
    /// By version; by row of the texts, from the first on.
    known: BTreeMap<u64, Vec<Prediction>>,
}

/// A time in which a version was live. From the moment that its promotion was asked for it may be;
/// from the moment that the next one was answered it can't be.
#[derive(Clone, Copy, Debug)]
struct Life {
    version: u64,
    asked: Instant,
    /// Absent: the promotion was not answered, or not well, and the version before may still be
    /// the live one.
    acknowledged: Option<Instant>,
}

/// A prediction of a kdlora server; its form follows the task's problem type.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Prediction {
    /// Regression.
    #[serde(default)]
    value: Option<f64>,
    /// One of several classes.
    #[serde(default)]
    label: Option<String>,
    /// Any number of labels.
    #[serde(default)]
    labels: Option<Vec<String>>,
    #[serde(default)]
    scores: BTreeMap<String, f64>,
}

impl Check {
    pub(crate) fn new(tolerance: f64) -> Self {
        Self {
            tolerance,
            tasks: HashMap::new(),
        }
    }

    /// What `version` answers to the first rows of the texts.
    pub(crate) fn learn(&mut self, task: usize, version: u64, answers: Vec<Prediction>) {
        let task = self.tasks.entry(task).or_default();
        task.known.insert(version, answers);
    }

    /// Answers that have been learnt.
    pub(crate) fn learnt(&self) -> usize {
        let known = self.tasks.values().flat_map(|task| task.known.values());
        known.map(Vec::len).sum()
    }

    /// A promotion that is asked for at this moment.
    pub(crate) fn asked(&self, task: usize, version: u64) {
        if let Some(task) = self.tasks.get(&task) {
            task.lives().push(Life {
                version,
                asked: Instant::now(),
                acknowledged: None,
            });
        }
    }

    /// The promotion that was asked for last has been carried out by now.
    pub(crate) fn acknowledged(&self, task: usize) {
        if let Some(task) = self.tasks.get(&task)
            && let Some(life) = task.lives().last_mut()
        {
            life.acknowledged = Some(Instant::now());
        }
    }

    /// Judges the answer to a request that was under way in `span`.
    pub(crate) fn judge(
        &self,
        ask: &Ask,
        answer: &Answer,
        span: RangeInclusive<Instant>,
    ) -> Verdict {
        let Some(task) = self.tasks.get(&ask.task) else {
            return Verdict::Right;
        };
        let Some(version) = answer.version else {
            return Verdict::WrongVersion;
        };
        if !task.may_answer(version, &span) {
            return Verdict::WrongVersion;
        }
        let known = task.known.get(&version).map_or(&[][..], Vec::as_slice);
        // A joined text was not learnt.
        if ask.texts != 1 {
            return Verdict::Right;
        }
        let rows = known.iter().skip(ask.first);
        let right = rows.zip(&answer.predictions).all(|(known, given)| {
            serde_json::from_str(given).is_ok_and(|given| known.agrees(&given, self.tolerance))
        });
        if right {
            Verdict::Right
        } else {
            Verdict::WrongLabels
        }
    }
}

impl TaskCheck {
    fn lives(&self) -> MutexGuard<'_, Vec<Life>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the version was live at any time in `span`, as far as a client can know.
    fn may_answer(&self, version: u64, span: &RangeInclusive<Instant>) -> bool {
        let lives = self.lives();
        // The moment from which the lives before this one were over.
        let mut over: Option<Instant> = None;
        for life in lives.iter().rev() {
            if over.is_some_and(|over| over < *span.start()) {
                return false;
            }
            if life.version == version && life.asked <= *span.end() {
                return true;
            }
            over = life.acknowledged.or(over);
        }
        false
    }
}

impl Prediction {
    /// Whether `given` is the same but for rounding: texts are computed in batches of changing
    /// shape. Where two labels are as good as each other, either may be given.
    fn agrees(&self, given: &Self, tolerance: f64) -> bool {
        let near = |a: f64, b: f64| (a - b).abs() <= tolerance;
        let values = match (self.value, given.value) {
            (Some(a), Some(b)) => (a - b).abs() <= tolerance * a.abs().max(1.0),
            (a, b) => a.is_none() && b.is_none(),
        };
        let scores = self.scores.len() == given.scores.len()
            && self.scores.iter().all(|(label, score)| {
                given
                    .scores
                    .get(label)
                    .is_some_and(|other| near(*score, *other))
            });
        let best = self.scores.values().copied().fold(f64::MIN, f64::max);
        let label = match (&self.label, &given.label) {
            (Some(_), Some(label)) => {
                let score = self.scores.get(label);
                score.is_some_and(|score| *score >= best - 2.0 * tolerance)
            }
            (a, b) => a.is_none() && b.is_none(),
        };
        let labels = match (&self.labels, &given.labels) {
            (Some(_), Some(labels)) => self.scores.iter().all(|(label, score)| {
                near(*score, 0.5) || labels.contains(label) == (*score >= 0.5)
            }),
            (a, b) => a.is_none() && b.is_none(),
        };
        values && scores && label && labels
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;
    use crate::arrivals::Conduct;

    const TASK: usize = 3;

    fn ask(first: usize) -> Ask {
        Ask {
            task: TASK,
            first,
            texts: 1,
            conduct: Conduct::Plain,
        }
    }

    fn answer(version: u64, predictions: &[&str]) -> Answer {
        Answer {
            version: Some(version),
            tokens: 5,
            predictions: predictions.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    async fn tick() -> Instant {
        advance(Duration::from_millis(10)).await;
        Instant::now()
    }

    #[tokio::test(start_paused = true)]
    async fn only_versions_that_were_live_meanwhile_may_answer() {
        let mut check = Check::new(0.01);
        check.learn(TASK, 1, Vec::new());
        let verdict = |check: &Check, version, from, to| {
            check.judge(&ask(0), &answer(version, &[]), from..=to)
        };
        check.asked(TASK, 1);
        check.acknowledged(TASK);
        let before = tick().await;
        check.asked(TASK, 2);
        let during = tick().await;
        check.acknowledged(TASK);
        let after = tick().await;
        let later = tick().await;
        for (version, from, to, expected) in [
            (1, before, before, Verdict::Right),
            (1, during, after, Verdict::Right),
            // Asked for at `before`, so it may be live from then on.
            (2, before, before, Verdict::Right),
            (2, after, later, Verdict::Right),
            (1, after, later, Verdict::WrongVersion),
            (3, before, later, Verdict::WrongVersion),
        ] {
            let given = verdict(&check, version, from, to);
            assert_eq!(given, expected, "{version} from {from:?} to {to:?}");
        }
        // A promotion that was not answered leaves both open.
        check.asked(TASK, 1);
        let open = tick().await;
        assert_eq!(verdict(&check, 1, open, open), Verdict::Right);
        assert_eq!(verdict(&check, 2, open, open), Verdict::Right);
    }

    #[tokio::test(start_paused = true)]
    async fn a_version_that_was_asked_for_too_late_cannot_have_answered() {
        let mut check = Check::new(0.01);
        check.learn(TASK, 1, Vec::new());
        check.asked(TASK, 1);
        check.acknowledged(TASK);
        let (from, to) = (tick().await, tick().await);
        tick().await;
        check.asked(TASK, 2);
        let verdict = check.judge(&ask(0), &answer(2, &[]), from..=to);
        assert_eq!(verdict, Verdict::WrongVersion);
    }

    fn prediction(text: &str) -> Prediction {
        serde_json::from_str(text).expect("a prediction")
    }

    #[tokio::test(start_paused = true)]
    async fn labels_and_scores_must_be_those_of_the_version() {
        let up = r#"{"label":"up","score":0.9,"scores":{"up":0.9,"down":0.1}}"#;
        let down = r#"{"label":"down","score":0.9,"scores":{"down":0.9,"up":0.1}}"#;
        let mut check = Check::new(0.01);
        check.learn(TASK, 1, vec![prediction(up), prediction(down)]);
        check.learn(TASK, 2, vec![prediction(down), prediction(up)]);
        check.asked(TASK, 1);
        check.acknowledged(TASK);
        check.asked(TASK, 2);
        let now = Instant::now();
        let verdict = |first, version, given: &[&str]| {
            check.judge(&ask(first), &answer(version, given), now..=now)
        };
        assert_eq!(verdict(0, 1, &[up]), Verdict::Right);
        assert_eq!(verdict(0, 2, &[down, up]), Verdict::Right);
        assert_eq!(
            verdict(0, 2, &[up]),
            Verdict::WrongLabels,
            "labels of version 1"
        );
        assert_eq!(verdict(0, 2, &[down, down]), Verdict::WrongLabels);
        assert_eq!(verdict(1, 1, &["{}"]), Verdict::WrongLabels);
        assert_eq!(
            verdict(9, 1, &[up]),
            Verdict::Right,
            "a row that was not learnt"
        );
        let other = Ask {
            task: TASK + 1,
            ..ask(0)
        };
        let foreign = check.judge(&other, &answer(9, &[down]), now..=now);
        assert_eq!(foreign, Verdict::Right, "a task that is not promoted");
    }

    #[test]
    fn rounding_is_forgiven_and_nothing_else() {
        let agree = |known: &str, given: &str| prediction(known).agrees(&prediction(given), 0.01);
        let tie = r#"{"label":"a","scores":{"a":0.501,"b":0.499}}"#;
        assert!(agree(
            tie,
            r#"{"label":"b","scores":{"b":0.501,"a":0.499}}"#
        ));
        let clear = r#"{"label":"a","scores":{"a":0.9,"b":0.1}}"#;
        assert!(agree(
            clear,
            r#"{"label":"a","scores":{"a":0.895,"b":0.105}}"#
        ));
        assert!(!agree(clear, r#"{"label":"b","scores":{"a":0.9,"b":0.1}}"#));
        assert!(!agree(clear, r#"{"label":"a","scores":{"a":0.8,"b":0.2}}"#));
        assert!(agree(r#"{"value":2.5}"#, r#"{"value":2.51}"#));
        assert!(!agree(r#"{"value":2.5}"#, r#"{"value":2.6}"#));
        assert!(!agree(r#"{"value":2.5}"#, clear));
        let several = r#"{"labels":["a"],"scores":{"a":0.9,"b":0.495}}"#;
        assert!(agree(
            several,
            r#"{"labels":["a","b"],"scores":{"a":0.9,"b":0.5}}"#
        ));
        assert!(!agree(
            several,
            r#"{"labels":["b"],"scores":{"a":0.9,"b":0.5}}"#
        ));
    }
}
