//! The texts that student and teacher see most differently.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::likeness::{kl_of_sigmoids, kl_of_softmax, log_sigmoid, log_softmax};
use super::{given, greatest};
use crate::adapter::ProblemType;
use crate::distill::dataset::{Label, Row};

/// Texts that a report shows.
pub const MAX_DIFFERENCES: usize = 20;
/// Characters that are shown of a text.
pub const MAX_SHOWN_CHARS: usize = 300;

/// One text that student and teacher answer differently, or with different certainty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    /// Cut to [`MAX_SHOWN_CHARS`] characters, as is the second one.
    pub text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_pair: Option<String>,
    /// What is right, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    pub student: Opinion,
    pub teacher: Opinion,
    /// KL(teacher ‖ student) in nats; the distance of the values for a regression.
    pub divergence: f64,
}

/// A model's answer in words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Opinion {
    /// The class, the labels with commas between them, or the value.
    pub answer: String,
    /// Probability of the class or of the least certain yes or no; absent for a regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certainty: Option<f64>,
}

/// The rows of greatest divergence, that first, at most [`MAX_DIFFERENCES`]; rows that both see
/// alike (less than 0.001) are left out. Logits are `[rows][labels]`.
pub fn greatest_differences(
    problem_type: ProblemType,
    label_names: &[String],
    rows: &[Row],
    student: &[Vec<f32>],
    teacher: &[Vec<f32>],
) -> Vec<Difference> {
    let divergence = |student: &[f32], teacher: &[f32]| match problem_type {
        ProblemType::SingleLabelClassification => kl_of_softmax(student, teacher),
        ProblemType::MultiLabelClassification => kl_of_sigmoids(student, teacher),
        ProblemType::Regression => {
            let value = |logits: &[f32]| f64::from(logits.first().copied().unwrap_or_default());
            (value(student) - value(teacher)).abs()
        }
    };
    let mut ranked: Vec<(f64, usize)> = student
        .iter()
        .zip(teacher)
        .take(rows.len())
        .enumerate()
        .map(|(row, (student, teacher))| (divergence(student, teacher), row))
        .filter(|(divergence, _)| *divergence >= 1e-3)
        .collect();
    // Equal ones in the order of the rows, so that a report is the same each time.
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    ranked.truncate(MAX_DIFFERENCES);
    let opinion = |logits: &[f32]| Opinion::of(problem_type, label_names, logits);
    ranked
        .into_iter()
        .map(|(divergence, row)| Difference {
            text: shown(&rows[row].input.text),
            text_pair: rows[row].input.text_pair.as_deref().map(shown),
            label: rows[row]
                .label
                .as_ref()
                .map(|label| in_words(label, label_names)),
            student: opinion(&student[row]),
            teacher: opinion(&teacher[row]),
            divergence,
        })
        .collect()
}

impl Opinion {
    fn of(problem_type: ProblemType, names: &[String], logits: &[f32]) -> Self {
        let (label, certainty) = match problem_type {
            ProblemType::SingleLabelClassification => {
                let class = greatest(logits);
                let certainty = log_softmax(logits, 1.0)[class].exp();
                (Label::Class(class), Some(certainty))
            }
            ProblemType::MultiLabelClassification => {
                let least = logits.iter().map(|logit| f64::from(logit.abs()));
                let least = least.fold(f64::INFINITY, f64::min);
                (Label::Labels(given(logits)), Some(log_sigmoid(least).exp()))
            }
            ProblemType::Regression => {
                let value = logits.first().copied().unwrap_or_default();
                (Label::Value(value), None)
            }
        };
        Self {
            answer: in_words(&label, names),
            certainty,
        }
    }
}

fn in_words(label: &Label, names: &[String]) -> String {
    let name = |label: &usize| names.get(*label).map_or("?", String::as_str);
    match label {
        Label::Class(class) => name(class).to_owned(),
        Label::Labels(labels) => labels.iter().map(name).collect::<Vec<_>>().join(", "),
        Label::Value(value) => value.to_string(),
    }
}

fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Input;

    fn row(text: &str) -> Row {
        Row {
            id: 0,
            input: Input {
                text: text.into(),
                text_pair: None,
            },
            label: Some(Label::Class(0)),
            teacher_logits: None,
        }
    }

    fn names() -> Vec<String> {
        vec!["no".into(), "yes".into()]
    }

    #[test]
    fn the_most_different_comes_first_and_likes_are_left_out() {
        let rows: Vec<Row> = ["alike", "a bit", "opposite"].map(row).into();
        let student = [vec![1.0, 0.0], vec![1.0, 0.0], vec![3.0, 0.0]];
        let teacher = [vec![2.0, 1.0], vec![1.5, 0.0], vec![0.0, 3.0]];
        let kind = ProblemType::SingleLabelClassification;
        let found = greatest_differences(kind, &names(), &rows, &student, &teacher);
        let texts: Vec<_> = found.iter().map(|d| d.text.as_str()).collect();
        assert_eq!(texts, ["opposite", "a bit"]);
        assert_eq!(
            (&*found[0].student.answer, &*found[0].teacher.answer),
            ("no", "yes")
        );
        assert_eq!(found[0].label.as_deref(), Some("no"));
        // KL between (0.0474, 0.9526) and its mirror image: 3 · (0.9526 − 0.0474).
        assert!((found[0].divergence - 3.0 * 0.905_148).abs() < 1e-4);
    }

    #[test]
    fn a_report_shows_few_rows_and_little_of_each() {
        let rows: Vec<Row> = (0..50).map(|_| row(&"é".repeat(1_000))).collect();
        let student = vec![vec![0.5]; 50];
        let teacher: Vec<Vec<f32>> = (0..50).map(|i| vec![i as f32]).collect();
        let kind = ProblemType::Regression;
        let found = greatest_differences(kind, &["v".into()], &rows, &student, &teacher);
        assert_eq!(found.len(), MAX_DIFFERENCES);
        assert_eq!(found[0].text.chars().count(), MAX_SHOWN_CHARS + 1);
        assert_eq!(
            (found[0].divergence, found[0].student.certainty),
            (48.5, None)
        );
    }
}
