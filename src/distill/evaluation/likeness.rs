//! How alike two models answer.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::correlation::{Ranked, pearson};
use super::{EvaluationError, check_logits, given, greatest};
use crate::adapter::ProblemType;
use crate::distill::dataset::Label;

/// How alike student and teacher answer, over all rows, labelled or not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Likeness {
    /// Share of rows with the same class, or the same set of labels; Pearson's correlation of the
    /// values for a regression.
    pub agreement: f64,
    /// Mean KL(teacher ‖ student) at temperature 1, in nats, summed over the labels of a
    /// multi-label task; absent for a regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_kl: Option<f64>,
}

/// Compares the logits (`[rows][labels]`) of student and teacher for the same rows.
pub fn likeness(
    problem_type: ProblemType,
    student: &[Vec<f32>],
    teacher: &[Vec<f32>],
) -> Result<Likeness, EvaluationError> {
    let width = teacher.first().ok_or(EvaluationError::NoLabels)?.len();
    check_logits(teacher, teacher.len(), width)?;
    check_logits(student, teacher.len(), width)?;
    let rows = student.iter().zip(teacher);
    let same = |answer: fn(&[f32], &[f32]) -> bool| {
        let same = rows.clone().filter(|(s, t)| answer(s, t)).count();
        same as f64 / teacher.len() as f64
    };
    let mean = |divergence: fn(&[f32], &[f32]) -> f64| {
        let sum: f64 = rows.clone().map(|(s, t)| divergence(s, t)).sum();
        Some(sum / teacher.len() as f64)
    };
    Ok(match problem_type {
        ProblemType::SingleLabelClassification => Likeness {
            agreement: same(|s, t| greatest(s) == greatest(t)),
            mean_kl: mean(kl_of_softmax),
        },
        ProblemType::MultiLabelClassification => Likeness {
            agreement: same(|s, t| given(s) == given(t)),
            mean_kl: mean(kl_of_sigmoids),
        },
        ProblemType::Regression => Likeness {
            agreement: correlation(student, teacher),
            mean_kl: None,
        },
    })
}

fn correlation(student: &[Vec<f32>], teacher: &[Vec<f32>]) -> f64 {
    let first = |rows: &[Vec<f32>]| -> Vec<f64> {
        rows.iter()
            .flat_map(|row| row.first())
            .map(|&x| x.into())
            .collect()
    };
    let weights = Ranked::unit_weights(teacher.len());
    pearson(&first(student), &first(teacher), &weights)
}

/// The teacher's answers as labels, to score a student against where no row has a label.
pub fn teacher_answers(problem_type: ProblemType, logits: &[Vec<f32>]) -> Vec<Label> {
    logits
        .iter()
        .map(|logits| match problem_type {
            ProblemType::SingleLabelClassification => Label::Class(greatest(logits)),
            ProblemType::MultiLabelClassification => Label::Labels(given(logits)),
            ProblemType::Regression => Label::Value(logits.first().copied().unwrap_or_default()),
        })
        .collect()
}

/// KL(teacher ‖ student) in nats.
pub(super) fn kl_of_softmax(student: &[f32], teacher: &[f32]) -> f64 {
    let (student, teacher) = (log_softmax(student, 1.0), log_softmax(teacher, 1.0));
    let terms = teacher.iter().zip(&student).map(|(t, s)| t.exp() * (t - s));
    terms.sum()
}

/// Σ over the labels of KL between their two outcomes, in nats.
pub(super) fn kl_of_sigmoids(student: &[f32], teacher: &[f32]) -> f64 {
    let term = |s: f64, t: f64| log_sigmoid(t).exp() * (log_sigmoid(t) - log_sigmoid(s));
    let pairs = student.iter().zip(teacher);
    pairs
        .map(|(&s, &t)| (f64::from(s), f64::from(t)))
        .map(|(s, t)| term(s, t) + term(-s, -t))
        .sum()
}

/// ln softmax(logits / temperature).
pub(super) fn log_softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let scaled: Vec<f64> = logits.iter().map(|&x| f64::from(x) / temperature).collect();
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scaled.iter().map(|x| (x - max).exp()).sum();
    scaled.iter().map(|x| x - max - sum.ln()).collect()
}

/// ln(1 / (1 + e⁻ˣ)) without overflow.
pub(super) fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}
