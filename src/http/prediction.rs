//! From a row of logits to what the client reads.

use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use crate::adapter::{ProblemType, Scores, TaskConfig, argmax};

/// The answer for one input; its form follows the task's problem type.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum Prediction {
    /// One of several classes.
    Class {
        /// The class with the highest score.
        label: String,
        /// Its score.
        score: f32,
        /// Scores by label, the highest first.
        #[schema(value_type = std::collections::BTreeMap<String, f32>)]
        scores: ByLabel,
    },
    /// Any number of labels.
    Labels {
        /// Labels with a probability of at least 0.5, the highest first.
        labels: Vec<String>,
        /// Scores by label, the highest first.
        #[schema(value_type = std::collections::BTreeMap<String, f32>)]
        scores: ByLabel,
    },
    /// Regression.
    Value { value: f32 },
}

/// Scores by label, in an order that says something, which a map would lose.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ByLabel(Vec<(String, f32)>);

impl Serialize for ByLabel {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(label, score)| (label, score)))
    }
}

/// A label and its score, as other servers' clients read them.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(super) struct LabelScore {
    #[schema(example = "positive")]
    pub(super) label: String,
    #[schema(example = 0.998)]
    pub(super) score: f32,
}

/// What makes scores of logits. All but `None` divide them by the task's temperature first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Function {
    /// That of the task's problem type: softmax for classes, sigmoid for labels, none for a
    /// regression; at the temperature that the task is served at.
    #[default]
    Own,
    /// The function of transformers' pipeline: [`Self::Own`], except that one label without a declared
    /// problem type gets a sigmoid.
    Pipeline,
    Softmax,
    Sigmoid,
    None,
}

/// Scores of one row of logits, `[labels]`, in the order of the labels.
pub(super) fn scores(task: &TaskConfig, logits: &[f32], function: Function) -> Vec<f32> {
    let scores = match function {
        Function::Pipeline if task.labels.len() == 1 && !task.problem_type_declared => {
            task.scores_as(ProblemType::MultiLabelClassification, logits)
        }
        Function::Own | Function::Pipeline => task.scores(logits),
        Function::Softmax => task.scores_as(ProblemType::SingleLabelClassification, logits),
        Function::Sigmoid => task.scores_as(ProblemType::MultiLabelClassification, logits),
        Function::None => return logits.to_vec(),
    };
    match scores {
        Scores::Value(value) => vec![value],
        Scores::SingleLabel(scores) | Scores::MultiLabel(scores) => scores,
    }
}

/// Labels with their scores, the highest first, at most `top_k`.
pub(super) fn ranked(
    task: &TaskConfig,
    logits: &[f32],
    function: Function,
    top_k: Option<usize>,
) -> Vec<LabelScore> {
    let scores = scores(task, logits, function);
    let mut ranked: Vec<LabelScore> = (task.labels.iter().zip(scores))
        .map(|(label, score)| LabelScore {
            label: label.clone(),
            score,
        })
        .collect();
    ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
    ranked.truncate(top_k.unwrap_or(usize::MAX));
    ranked
}

/// The prediction of one row of logits, `[labels]`. `top_k` bounds the scores that are given; with
/// `raw` these are logits.
pub(super) fn predict(
    task: &TaskConfig,
    logits: &[f32],
    top_k: Option<usize>,
    raw: bool,
) -> Prediction {
    let (probabilities, one_of_several) = match task.scores(logits) {
        Scores::Value(value) => return Prediction::Value { value },
        Scores::SingleLabel(probabilities) => (probabilities, true),
        Scores::MultiLabel(probabilities) => (probabilities, false),
    };
    let shown = if raw { logits } else { &probabilities };
    let mut order: Vec<usize> = (0..task.labels.len().min(shown.len())).collect();
    order.sort_by(|a, b| shown[*b].total_cmp(&shown[*a]));
    let highest = order.iter().take(top_k.unwrap_or(usize::MAX));
    let scores = ByLabel(
        highest
            .map(|i| (task.labels[*i].clone(), shown[*i]))
            .collect(),
    );
    if one_of_several {
        let best = argmax(logits).unwrap_or(0);
        return Prediction::Class {
            label: task.labels[best].clone(),
            score: shown[best],
            scores,
        };
    }
    Prediction::Labels {
        labels: order
            .iter()
            .filter(|i| probabilities[**i] >= 0.5)
            .map(|i| task.labels[*i].clone())
            .collect(),
        scores,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(problem_type: ProblemType, labels: &[&str]) -> TaskConfig {
        TaskConfig {
            labels: labels.iter().map(|label| (*label).to_owned()).collect(),
            problem_type,
            problem_type_declared: true,
            max_length: 128,
            truncation: crate::text::Truncation::LongestFirst,
            temperature: 1.0,
            base_model: None,
            base_digest: None,
        }
    }

    fn json(prediction: &Prediction) -> String {
        serde_json::to_string(prediction).expect("JSON")
    }

    #[test]
    fn classes_come_with_the_highest_score_first() {
        let task = task(
            ProblemType::SingleLabelClassification,
            &["low", "high", "middle"],
        );
        let prediction = predict(&task, &[-1.0, 2.0, 1.0], Some(2), false);
        let value = serde_json::to_value(&prediction).expect("JSON");
        assert_eq!(value["label"], "high");
        let score = value["score"].as_f64().expect("a number");
        assert!((score - 0.705_384_5).abs() < 1e-6);
        let scores = value["scores"].as_object().expect("an object");
        assert_eq!(scores.keys().collect::<Vec<_>>(), ["high", "middle"]);
        let raw = predict(&task, &[-1.0, 2.0, 1.0], None, true);
        assert_eq!(
            json(&raw),
            r#"{"label":"high","score":2.0,"scores":{"high":2.0,"middle":1.0,"low":-1.0}}"#
        );
    }

    #[test]
    fn raw_scores_know_no_temperature() {
        let mut task = task(ProblemType::SingleLabelClassification, &["no", "yes"]);
        task.temperature = 4.0;
        let value = |raw| {
            let prediction = predict(&task, &[0.0, 4.0], None, raw);
            serde_json::to_value(&prediction).expect("JSON")["score"].as_f64()
        };
        assert_eq!(value(true), Some(4.0));
        let sure = value(false).expect("a number");
        assert!((sure - 0.731_058_6).abs() < 1e-6, "{sure}");
        // Clients of other servers read the same probabilities.
        let theirs = |function| f64::from(ranked(&task, &[0.0, 4.0], function, None)[0].score);
        assert_eq!(theirs(Function::Own), sure);
        assert_eq!(theirs(Function::None), 4.0);
        assert_eq!(theirs(Function::Pipeline), sure);
        assert_eq!(theirs(Function::Softmax), sure);
        // The sigmoid of 4 / 4.
        assert!((theirs(Function::Sigmoid) - 0.731_058_6).abs() < 1e-6);
    }

    #[test]
    fn labels_are_those_at_least_as_likely_as_not() {
        let task = task(ProblemType::MultiLabelClassification, &["a", "b", "c"]);
        let prediction = predict(&task, &[0.0, -4.0, 9.0], None, true);
        assert_eq!(
            json(&prediction),
            r#"{"labels":["c","a"],"scores":{"c":9.0,"a":0.0,"b":-4.0}}"#
        );
    }

    #[test]
    fn labels_are_ranked_by_the_function_that_is_asked_for() {
        let task = task(ProblemType::SingleLabelClassification, &["low", "high"]);
        let scores = |function| {
            let ranked = ranked(&task, &[0.0, 2.0], function, None);
            assert_eq!(ranked[0].label, "high");
            (ranked[0].score, ranked[1].score)
        };
        let close = |(a, b): (f32, f32), (c, d): (f32, f32)| {
            assert!((a - c).abs() < 1e-6 && (b - d).abs() < 1e-6, "{a} {b}");
        };
        close(scores(Function::None), (2.0, 0.0));
        close(scores(Function::Sigmoid), (0.880_797, 0.5));
        close(scores(Function::Softmax), (0.880_797, 0.119_203));
        close(scores(Function::Own), (0.880_797, 0.119_203));
        let one = ranked(&task, &[0.0, 2.0], Function::Own, Some(1));
        assert_eq!(one.len(), 1);
        let value = self::task(ProblemType::Regression, &["valence"]);
        assert_eq!(scores_of_value(&value), [-3.5]);
    }

    #[test]
    fn one_label_of_an_open_problem_type_is_a_probability_in_a_pipeline() {
        let mut task = task(ProblemType::Regression, &["score"]);
        let score = |task: &TaskConfig, function| scores(task, &[2.0], function)[0];
        assert_eq!(score(&task, Function::Pipeline), 2.0);
        task.problem_type_declared = false;
        assert_eq!(score(&task, Function::Own), 2.0);
        assert!((score(&task, Function::Pipeline) - 0.880_797).abs() < 1e-6);
    }

    fn scores_of_value(task: &TaskConfig) -> Vec<f32> {
        scores(task, &[-3.5], Function::Own)
    }

    #[test]
    fn a_regression_gives_its_value() {
        let task = task(ProblemType::Regression, &["valence"]);
        assert_eq!(
            json(&predict(&task, &[-0.1], Some(1), false)),
            r#"{"value":-0.1}"#
        );
    }
}
