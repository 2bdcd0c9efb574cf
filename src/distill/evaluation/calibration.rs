//! Whether a model is as sure as it is right.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::answers::{Answers, class_of, set_of};
use super::likeness::{log_sigmoid, log_softmax};
use super::{EvaluationError, Labelled, check_logits, labelled};
use crate::adapter::ProblemType;
use crate::distill::dataset::Label;

/// Bins of equal width that confidence is sorted into (Guo et al., "On calibration of modern
/// neural networks", ICML 2017).
const BINS: usize = 15;
/// Range that a temperature is looked for in, as natural logarithms: 0.25 to 20. A model that is
/// right about every validation row would be made ever surer: four times is enough.
const LN_TEMPERATURES: (f64, f64) = (-2.0 * std::f64::consts::LN_2, 3.0);
/// Halvings (by the golden ratio) of that range: to 4.4 · 0.618⁴⁰ < 1e-7.
const SEARCH_STEPS: usize = 40;

/// A temperature that makes the model as sure as it is right, and what it achieves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Calibration {
    /// What logits are divided by when the version is served; fitted on the validation rows.
    pub temperature: f64,
    /// Expected calibration error of the test rows at that temperature.
    pub ece: f64,
}

/// Fits a temperature by maximum likelihood on the validation rows and measures the calibration
/// error with it on the test rows. `None` for a regression, and where either split has no labelled
/// row.
pub fn calibrate(
    problem_type: ProblemType,
    validation: (&[Vec<f32>], &[Option<&Label>]),
    test: (&[Vec<f32>], &[Option<&Label>]),
) -> Result<Option<Calibration>, EvaluationError> {
    let Some(width) = test.0.first().map(Vec::len) else {
        return Ok(None);
    };
    let mut splits = Vec::new();
    for (logits, labels) in [validation, test] {
        check_logits(logits, labels.len(), width)?;
        let rows = labelled(logits, labels);
        match Answers::new(problem_type, width, &rows) {
            Err(EvaluationError::NoLabels) => return Ok(None),
            other => other?,
        };
        splits.push(rows);
    }
    let temperature = fit(problem_type, &splits[0]);
    let ece = expected_error(problem_type, &splits[1], temperature);
    Ok(ece.map(|ece| Calibration { temperature, ece }))
}

/// Σ over bins of |accuracy − mean confidence| · share of the decisions. A decision is the class of
/// a row, or each yes or no of a multi-label task. `None` for a regression.
pub(super) fn expected_error(
    problem_type: ProblemType,
    rows: &[Labelled<'_>],
    temperature: f64,
) -> Option<f64> {
    if problem_type == ProblemType::Regression {
        return None;
    }
    let mut right = [0.0; BINS];
    let mut confidence = [0.0; BINS];
    let mut decisions = 0.0;
    let mut add = |sure: f64, is_right: bool| {
        // Bin i holds i/15 < confidence ≤ (i + 1)/15.
        let bin = ((sure * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        right[bin] += f64::from(u8::from(is_right));
        confidence[bin] += sure;
        decisions += 1.0;
    };
    for (_, logits, label) in rows {
        if problem_type == ProblemType::SingleLabelClassification {
            let answer = super::greatest(logits);
            let sure = log_softmax(logits, temperature)[answer].exp();
            add(sure, answer == class_of(label));
            continue;
        }
        for (i, &logit) in logits.iter().enumerate() {
            let sure = log_sigmoid(f64::from(logit.abs()) / temperature).exp();
            add(sure, (logit > 0.0) == set_of(label).contains(&i));
        }
    }
    let gaps = right.iter().zip(&confidence).map(|(r, c)| (r - c).abs());
    Some(gaps.sum::<f64>() / decisions)
}

/// The temperature of least loss. The loss is convex in 1 / T and so has a single valley in ln T.
fn fit(problem_type: ProblemType, rows: &[Labelled<'_>]) -> f64 {
    let loss = |ln: f64| negative_log_likelihood(problem_type, rows, ln.exp());
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = LN_TEMPERATURES;
    let (mut a, mut b) = (high - golden * (high - low), low + golden * (high - low));
    let (mut loss_a, mut loss_b) = (loss(a), loss(b));
    for _ in 0..SEARCH_STEPS {
        if loss_a < loss_b {
            (high, b, loss_b) = (b, a, loss_a);
            a = high - golden * (high - low);
            loss_a = loss(a);
        } else {
            (low, a, loss_a) = (a, b, loss_b);
            b = low + golden * (high - low);
            loss_b = loss(b);
        }
    }
    ((low + high) / 2.0).exp()
}

fn negative_log_likelihood(
    problem_type: ProblemType,
    rows: &[Labelled<'_>],
    temperature: f64,
) -> f64 {
    let of_row = |(_, logits, label): &Labelled<'_>| match problem_type {
        ProblemType::SingleLabelClassification => {
            -log_softmax(logits, temperature)[class_of(label)]
        }
        _ => logits
            .iter()
            .enumerate()
            .map(|(i, &logit)| {
                let towards = if set_of(label).contains(&i) {
                    1.0
                } else {
                    -1.0
                };
                -log_sigmoid(towards * f64::from(logit) / temperature)
            })
            .sum(),
    };
    rows.iter().map(of_row).sum()
}
