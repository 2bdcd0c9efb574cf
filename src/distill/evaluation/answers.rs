//! What a model answered beside what is right, for the rows that have a label.

use super::bootstrap;
use super::correlation::{Ranked, pearson, spearman};
use super::counts::{Counts, ratio};
use super::{Evaluation, EvaluationError, Labelled, MAX_CONFUSION, Metric, Score, given, greatest};
use crate::adapter::ProblemType;
use crate::distill::dataset::Label;

/// Pairs of truth and answer, in the form that the kind of task has.
pub(super) enum Answers {
    Classes {
        pairs: Vec<(usize, usize)>,
        classes: usize,
    },
    Sets {
        pairs: Vec<(Vec<usize>, Vec<usize>)>,
        labels: usize,
    },
    Values {
        truth: Ranked,
        answer: Ranked,
    },
}

impl Answers {
    pub(super) fn new(
        problem_type: ProblemType,
        labels: usize,
        rows: &[Labelled<'_>],
    ) -> Result<Self, EvaluationError> {
        if rows.is_empty() {
            return Err(EvaluationError::NoLabels);
        }
        for &(row, _, label) in rows {
            let fits = match (problem_type, label) {
                (ProblemType::SingleLabelClassification, Label::Class(class)) => *class < labels,
                (ProblemType::MultiLabelClassification, Label::Labels(set)) => {
                    set.iter().all(|&label| label < labels)
                }
                (ProblemType::Regression, Label::Value(value)) => value.is_finite() && labels == 1,
                _ => false,
            };
            if !fits {
                return Err(EvaluationError::Label {
                    row,
                    problem_type,
                    labels,
                });
            }
        }
        Ok(match problem_type {
            ProblemType::SingleLabelClassification => Self::Classes {
                pairs: rows
                    .iter()
                    .map(|(_, logits, label)| (class_of(label), greatest(logits)))
                    .collect(),
                classes: labels,
            },
            ProblemType::MultiLabelClassification => Self::Sets {
                pairs: rows
                    .iter()
                    .map(|(_, logits, label)| (set_of(label).to_vec(), given(logits)))
                    .collect(),
                labels,
            },
            ProblemType::Regression => Self::Values {
                truth: Ranked::new(rows.iter().map(|(_, _, label)| value_of(label)).collect()),
                answer: Ranked::new(
                    rows.iter()
                        .map(|(_, logits, _)| f64::from(logits[0]))
                        .collect(),
                ),
            },
        })
    }

    fn rows(&self) -> usize {
        match self {
            Self::Classes { pairs, .. } => pairs.len(),
            Self::Sets { pairs, .. } => pairs.len(),
            Self::Values { truth, .. } => truth.values.len(),
        }
    }

    pub(super) fn evaluation(&self, metric: Metric, names: &[String], seed: u64) -> Evaluation {
        let ones = Ranked::unit_weights(self.rows());
        let (low, high) = bootstrap::interval(self.rows(), seed, |drawn| self.score(metric, drawn));
        let mut evaluation = Evaluation {
            rows: self.rows(),
            score: Score {
                metric,
                value: self.score(metric, &ones),
                low,
                high,
            },
            accuracy: None,
            macro_f1: None,
            f1: None,
            micro_f1: None,
            mcc: None,
            pearson: None,
            spearman: None,
            mean_absolute_error: None,
            ece: None,
            calibration: None,
            classes: Vec::new(),
            confusion: None,
        };
        match self {
            Self::Classes { pairs, classes } => {
                let counts = self.counts(&ones);
                let right = pairs.iter().filter(|(truth, answer)| truth == answer);
                evaluation.accuracy = Some(ratio(right.count(), pairs.len()));
                evaluation.macro_f1 = Some(counts.macro_f1());
                evaluation.f1 = (*classes == 2).then(|| counts.f1(1));
                evaluation.mcc = Some(counts.mcc());
                evaluation.classes = counts.scores(names);
                evaluation.confusion =
                    (*classes <= MAX_CONFUSION).then(|| confusion(pairs, *classes));
            }
            Self::Sets { pairs, .. } => {
                let counts = self.counts(&ones);
                let right = pairs.iter().filter(|(truth, answer)| truth == answer);
                evaluation.accuracy = Some(ratio(right.count(), pairs.len()));
                evaluation.macro_f1 = Some(counts.macro_f1());
                evaluation.micro_f1 = Some(counts.micro_f1());
                evaluation.classes = counts.scores(names);
            }
            Self::Values { truth, answer } => {
                evaluation.pearson = Some(pearson(&truth.values, &answer.values, &ones));
                evaluation.spearman = Some(spearman(truth, answer, &ones));
                let errors = truth.values.iter().zip(&answer.values);
                let sum: f64 = errors.map(|(truth, answer)| (truth - answer).abs()).sum();
                evaluation.mean_absolute_error = Some(sum / truth.values.len() as f64);
            }
        }
        evaluation
    }

    /// The main score where row i occurs `drawn[i]` times. A metric that does not suit the kind of
    /// task counts as 0.
    pub(super) fn score(&self, metric: Metric, drawn: &[u32]) -> f64 {
        match (metric, self) {
            (Metric::Accuracy, Self::Classes { pairs, .. }) => share_right(pairs, drawn),
            (Metric::Accuracy, Self::Sets { pairs, .. }) => share_right(pairs, drawn),
            (Metric::PearsonSpearman, Self::Values { truth, answer }) => {
                let pearson = pearson(&truth.values, &answer.values, drawn);
                (pearson + spearman(truth, answer, drawn)) / 2.0
            }
            (Metric::MacroF1, Self::Classes { .. } | Self::Sets { .. }) => {
                self.counts(drawn).macro_f1()
            }
            (Metric::F1, Self::Classes { classes: 2, .. }) => self.counts(drawn).f1(1),
            (Metric::Mcc, Self::Classes { .. }) => self.counts(drawn).mcc(),
            _ => 0.0,
        }
    }

    fn counts(&self, drawn: &[u32]) -> Counts {
        match self {
            Self::Classes { pairs, classes } => {
                let mut counts = Counts::new(*classes);
                for (&(truth, answer), &times) in pairs.iter().zip(drawn) {
                    counts.support[truth] += times as usize;
                    counts.predicted[answer] += times as usize;
                    if truth == answer {
                        counts.hits[truth] += times as usize;
                    }
                }
                counts
            }
            Self::Sets { pairs, labels } => {
                let mut counts = Counts::new(*labels);
                for ((truth, answer), &times) in pairs.iter().zip(drawn) {
                    let times = times as usize;
                    truth.iter().for_each(|&i| counts.support[i] += times);
                    answer.iter().for_each(|&i| counts.predicted[i] += times);
                    let hits = answer.iter().filter(|label| truth.contains(label));
                    hits.for_each(|&i| counts.hits[i] += times);
                }
                counts
            }
            Self::Values { .. } => Counts::new(0),
        }
    }
}

/// Share of the drawn rows whose answer is the truth.
fn share_right<T: PartialEq>(pairs: &[(T, T)], drawn: &[u32]) -> f64 {
    let right: u32 = pairs
        .iter()
        .zip(drawn)
        .filter(|((truth, answer), _)| truth == answer)
        .map(|(_, times)| times)
        .sum();
    ratio(right as usize, pairs.len())
}

/// `[truth][answer]`.
fn confusion(pairs: &[(usize, usize)], classes: usize) -> Vec<Vec<usize>> {
    let mut matrix = vec![vec![0; classes]; classes];
    for &(truth, answer) in pairs {
        matrix[truth][answer] += 1;
    }
    matrix
}

/// Logits that give the most common answer of `train`; labels that do not fit are passed over.
pub(super) fn constant_logits(
    problem_type: ProblemType,
    labels: usize,
    train: &[&Label],
) -> Vec<f32> {
    if problem_type == ProblemType::Regression {
        let sum: f64 = train.iter().map(|label| value_of(label)).sum();
        return vec![(sum / train.len() as f64) as f32; labels];
    }
    let mut rows = vec![0usize; labels];
    for label in train {
        let set: &[usize] = match label {
            Label::Class(class) => std::slice::from_ref(class),
            label => set_of(label),
        };
        for &label in set.iter().filter(|&&label| label < labels) {
            rows[label] += 1;
        }
    }
    match problem_type {
        ProblemType::SingleLabelClassification => rows.iter().map(|&n| n as f32).collect(),
        _ => rows
            .iter()
            .map(|&n| if 2 * n > train.len() { 1.0 } else { -1.0 })
            .collect(),
    }
}

// `Answers::new` has checked that the labels are of the kind that these ask for.

pub(super) fn class_of(label: &Label) -> usize {
    match label {
        Label::Class(class) => *class,
        _ => 0,
    }
}

pub(super) fn set_of(label: &Label) -> &[usize] {
    match label {
        Label::Labels(set) => set,
        _ => &[],
    }
}

fn value_of(label: &Label) -> f64 {
    match label {
        Label::Value(value) => f64::from(*value),
        _ => 0.0,
    }
}
