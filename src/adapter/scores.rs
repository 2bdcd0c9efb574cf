//! From logits to what a user reads.

use super::ProblemType;

/// The meaning of one row of logits.
#[derive(Clone, Debug, PartialEq)]
pub enum Scores {
    /// Probability of each class; they sum to 1.
    SingleLabel(Vec<f32>),
    /// Probability of each label by itself.
    MultiLabel(Vec<f32>),
    /// The predicted value.
    Value(f32),
}

impl ProblemType {
    /// Scores of one row of logits, `[labels]`.
    pub fn scores(self, logits: &[f32]) -> Scores {
        match self {
            Self::SingleLabelClassification => Scores::SingleLabel(softmax(logits)),
            Self::MultiLabelClassification => {
                Scores::MultiLabel(logits.iter().copied().map(sigmoid).collect())
            }
            Self::Regression => Scores::Value(logits.first().copied().unwrap_or(f32::NAN)),
        }
    }
}

/// Index of the greatest number, the first of equals; `None` only for an empty slice.
pub fn argmax(values: &[f32]) -> Option<usize> {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best })
}

/// In f64 and shifted by the greatest logit, so that large logits neither overflow nor lose the
/// sum of 1.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = logits
        .iter()
        .map(|logit| (f64::from(*logit) - f64::from(top)).exp())
        .collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.iter().map(|e| (e / sum) as f32).collect()
}

fn sigmoid(logit: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(logit)).exp())) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_sum_to_one_even_for_large_logits() {
        let Scores::SingleLabel(scores) =
            ProblemType::SingleLabelClassification.scores(&[1000.0, 999.0, -1000.0])
        else {
            panic!("not classes");
        };
        assert!((scores[0] - 0.731_058_6).abs() < 1e-6);
        assert!((scores.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn labels_are_independent() {
        let scores = ProblemType::MultiLabelClassification.scores(&[0.0, 100.0, -100.0]);
        let Scores::MultiLabel(scores) = scores else {
            panic!("not labels");
        };
        assert_eq!(scores[..2], [0.5, 1.0]);
        assert!(scores[2] < 1e-30);
    }

    #[test]
    fn a_regression_is_the_logit_itself() {
        assert_eq!(ProblemType::Regression.scores(&[-3.5]), Scores::Value(-3.5));
    }

    #[test]
    fn the_first_of_equals_is_the_greatest() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[]), None);
    }
}
