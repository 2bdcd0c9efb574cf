//! How much each label counts in the task loss.

use super::error::DataError;
use super::{Dataset, Label};
use crate::adapter::ProblemType;
use crate::distill::spec::ClassWeights;

/// Greatest weight that "balanced" gives: a label that is rarer than one in a hundred is a few rows,
/// which would drown the others.
const MAX_BALANCED: f32 = 100.0;

/// The weights of the labels, `[labels]`.
///
/// Balanced, a class weighs `rows / (classes · rows of the class)`, so that the mean over rows is 1;
/// one of several labels weighs `rows without it / rows with it` where it is present. A label
/// without rows weighs 1.
pub(super) fn resolve(
    asked: Option<&ClassWeights>,
    dataset: &Dataset,
) -> Result<Option<Vec<f32>>, DataError> {
    let Some(asked) = asked else { return Ok(None) };
    let unusable = |reason: String| DataError::ClassWeights { reason };
    if dataset.task_kind == ProblemType::Regression {
        return Err(unusable("a regression has no classes".into()));
    }
    let names = &dataset.label_names;
    match asked {
        ClassWeights::Balanced(_) => Ok(Some(balanced(dataset))),
        ClassWeights::ByLabel(weights) => {
            if let Some(name) = weights.keys().find(|name| !names.contains(name)) {
                return Err(unusable(format!(
                    "\"{name}\" is no label; the labels are \"{}\"",
                    names
                        .iter()
                        .take(20)
                        .cloned()
                        .collect::<Vec<_>>()
                        .join("\", \"")
                )));
            }
            let of = |name| weights.get(name).map_or(1.0, |weight| *weight as f32);
            Ok(Some(names.iter().map(of).collect()))
        }
    }
}

fn balanced(dataset: &Dataset) -> Vec<f32> {
    let labels = dataset.label_names.len();
    let mut with = vec![0usize; labels];
    let mut rows = 0usize;
    for label in dataset.train.iter().filter_map(|row| row.label.as_ref()) {
        rows += 1;
        match label {
            Label::Class(class) => with[*class] += 1,
            Label::Labels(set) => set.iter().for_each(|&label| with[label] += 1),
            Label::Value(_) => {}
        }
    }
    let weight = |&with: &usize| {
        if with == 0 {
            return 1.0;
        }
        let weight = match dataset.task_kind {
            ProblemType::MultiLabelClassification => (rows - with) as f32 / with as f32,
            _ => rows as f32 / (labels * with) as f32,
        };
        // A label that every row has is not to vanish from the loss.
        weight.clamp(1.0 / MAX_BALANCED, MAX_BALANCED)
    };
    with.iter().map(weight).collect()
}
