//! From labels with scores to logits in the order of the task's labels.

use serde::Deserialize;
use serde_json::Value;

use super::NameMap;
use crate::adapter::ProblemType;
use crate::distill::dataset::{MAX_LABEL_BYTES, MAX_LABELS};
use crate::distill::spec::{HttpApi, HttpScores, HttpTeacherSpec};
use crate::parse;

/// A probability of 0 would be a logit of −∞: f32 knows no smaller difference from 1.
const LEAST_PROBABILITY: f64 = 1e-7;
/// By how much the probabilities of a text may miss the sum of 1: endpoints round.
const SUM_TOLERANCE: f64 = 0.02;

/// One label of an answer.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct ScoredLabel {
    pub(super) label: String,
    pub(super) score: f64,
}

/// Reads the answer for `inputs` texts: a list for each of them. A list of labels alone is the
/// answer for a single one.
pub(super) fn parse(answer: &[u8], inputs: usize) -> Result<Vec<Vec<ScoredLabel>>, String> {
    let not_it = |what: &str| {
        format!("{what} instead of a list of {{\"label\", \"score\"}} for each of {inputs} texts")
    };
    let answer: Value = parse::json(answer).map_err(|_| not_it("no JSON"))?;
    let of_one = answer
        .as_array()
        .is_some_and(|list| list.first().is_some_and(Value::is_object));
    let answer = if of_one {
        Value::Array(vec![answer])
    } else {
        answer
    };
    let rows: Vec<Vec<ScoredLabel>> = parse::value(answer).map_err(|_| not_it("something else"))?;
    if rows.len() != inputs {
        return Err(not_it(&format!("{} lists", rows.len())));
    }
    Ok(rows)
}

/// Says that an endpoint gives the score of its best label alone, and what to do about it.
pub(super) fn only_label(label: &str) -> String {
    format!(
        "the endpoint gives the score of one label only ({label:?}), and the task has several; it \
         must give the scores of all labels: a pipeline of transformers does so with `top_k=None`"
    )
}

/// The task's labels in their order, and what the endpoint calls them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// The task's.
    ordered: Vec<String>,
    /// The endpoint's, in the same order.
    pub(super) theirs: Vec<String>,
}

impl Names {
    /// Matches the labels of the first answer with `known`, the task's labels where the request
    /// gives them: by the request's map, by name, or, where the endpoint only numbers them
    /// (`LABEL_0`), by number.
    pub(super) fn of(
        answer: &[Vec<ScoredLabel>],
        spec: &HttpTeacherSpec,
        known: Option<Vec<String>>,
    ) -> Result<Self, String> {
        let mut theirs: Vec<String> = Vec::new();
        for ScoredLabel { label, .. } in answer.iter().flatten() {
            if label.is_empty() || label.len() > MAX_LABEL_BYTES || theirs.contains(label) {
                return Err(format!("{label:?} is empty, too long or there twice"));
            }
            theirs.push(label.clone());
        }
        if theirs.is_empty() || theirs.len() > MAX_LABELS {
            return Err(format!("there are {} of them", theirs.len()));
        }
        if let ([only], Some(2..)) = (theirs.as_slice(), known.as_ref().map(Vec::len)) {
            return Err(only_label(only));
        }
        check_map(&spec.labels, &theirs)?;
        let numbered = by_number(&theirs);
        let map = |name: &String| spec.labels.get(name).unwrap_or(name).clone();
        let Some(known) = known else {
            // An order that does not depend on the scores of the first answer.
            let theirs = numbered.unwrap_or_else(|| {
                theirs.sort_by_key(map);
                theirs
            });
            let ordered: Vec<String> = theirs.iter().map(map).collect();
            different(&ordered)?;
            return Ok(Self { ordered, theirs });
        };
        if let Some(numbered) = numbered
            && spec.labels.is_empty()
            && numbered.len() == known.len()
            && !known.iter().any(|name| numbered.contains(name))
        {
            return Ok(Self {
                ordered: known,
                theirs: numbered,
            });
        }
        let mut in_order = Vec::with_capacity(known.len());
        for name in &known {
            match theirs.iter().find(|their| map(their) == *name) {
                Some(their) => in_order.push(their.clone()),
                None => {
                    return Err(format!(
                        "the task has a label {name:?}, the endpoint answers with {theirs:?}; \
                         \"teacher.http.labels\" can say which is which"
                    ));
                }
            }
        }
        if theirs.len() != known.len() {
            return Err(format!(
                "the task has {} labels, the endpoint {}: {theirs:?}",
                known.len(),
                theirs.len()
            ));
        }
        Ok(Self {
            ordered: known,
            theirs: in_order,
        })
    }

    pub(super) fn ordered(&self) -> &[String] {
        &self.ordered
    }
}

fn check_map(map: &NameMap, theirs: &[String]) -> Result<(), String> {
    match map.keys().find(|name| !theirs.contains(name)) {
        Some(name) => Err(format!(
            "\"teacher.http.labels\" names {name:?}, but the endpoint answers with {theirs:?}"
        )),
        None => Ok(()),
    }
}

fn different(names: &[String]) -> Result<(), String> {
    let mut sorted: Vec<_> = names.iter().collect();
    sorted.sort();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two of them are {:?}", pair[0])),
        None => Ok(()),
    }
}

/// `LABEL_0`, `LABEL_1`, … in the order of their numbers, if that is what they are.
fn by_number(names: &[String]) -> Option<Vec<String>> {
    let numbered: Vec<String> = (0..names.len()).map(|i| format!("LABEL_{i}")).collect();
    numbered
        .iter()
        .all(|name| names.contains(name))
        .then_some(numbered)
}

/// What the scores of an endpoint are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scores {
    Logits,
    Probabilities,
}

impl Scores {
    /// What the request says; else what the protocol gives: text-embeddings-inference is asked for
    /// raw scores, and Hugging Face's pipeline gives probabilities, but plain values for a
    /// regression.
    pub(super) fn of(spec: &HttpTeacherSpec, problem_type: ProblemType) -> Self {
        match (spec.scores, spec.api) {
            (Some(HttpScores::Logits), _) => Self::Logits,
            (Some(HttpScores::Probabilities), _) => Self::Probabilities,
            (None, HttpApi::TextEmbeddingsInference) => Self::Logits,
            (None, HttpApi::HuggingFace) if problem_type == ProblemType::Regression => Self::Logits,
            (None, HttpApi::HuggingFace) => Self::Probabilities,
        }
    }
}

/// How answers are read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading<'a> {
    pub(super) names: &'a Names,
    pub(super) scores: Scores,
    pub(super) problem_type: ProblemType,
}

impl Reading<'_> {
    /// Logits of each text in the order of the task's labels, `[texts][labels]`.
    pub(super) fn logits(&self, rows: &[Vec<ScoredLabel>]) -> Result<Vec<Vec<f32>>, String> {
        rows.iter().map(|row| self.row(row)).collect()
    }

    fn row(&self, row: &[ScoredLabel]) -> Result<Vec<f32>, String> {
        let mut scores = Vec::with_capacity(self.names.theirs.len());
        for name in &self.names.theirs {
            match row.iter().find(|scored| scored.label == *name) {
                Some(scored) if scored.score.is_finite() => scores.push(scored.score),
                Some(_) => return Err(format!("the score of {name:?} is not a finite number")),
                None => {
                    return Err(match row {
                        [only] => only_label(&only.label),
                        _ => format!(
                            "it lacks the label {name:?}; an endpoint must give the scores of all"
                        ),
                    });
                }
            }
        }
        if self.scores == Scores::Probabilities {
            self.check_probabilities(&scores)?;
        }
        Ok(scores.into_iter().map(|score| self.logit(score)).collect())
    }

    fn check_probabilities(&self, scores: &[f64]) -> Result<(), String> {
        let one_of_several = self.problem_type == ProblemType::SingleLabelClassification;
        let sum: f64 = scores.iter().sum();
        let fits = scores.iter().all(|score| (0.0..=1.0).contains(score))
            && (!one_of_several || (sum - 1.0).abs() <= SUM_TOLERANCE);
        if fits {
            return Ok(());
        }
        Err(format!(
            "its scores are no probabilities (they sum to {sum:.3}); if they are logits, say so with \
             \"scores\": \"logits\" in \"teacher.http\""
        ))
    }

    /// Of classes, logits are known up to a constant, and the logarithms of the probabilities are
    /// some that give them; of several labels, each has its own.
    fn logit(&self, score: f64) -> f32 {
        if self.scores == Scores::Logits {
            return score as f32;
        }
        let p = score.clamp(LEAST_PROBABILITY, 1.0 - LEAST_PROBABILITY);
        match self.problem_type {
            ProblemType::SingleLabelClassification => p.ln() as f32,
            ProblemType::MultiLabelClassification => (p / (1.0 - p)).ln() as f32,
            ProblemType::Regression => score as f32,
        }
    }
}
