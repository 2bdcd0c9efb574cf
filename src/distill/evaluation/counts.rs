//! Counts of right and wrong answers for each label, and the figures made of them.

use super::ClassScore;

/// For each label: rows that have it, rows that were given it, and both.
pub(super) struct Counts {
    pub(super) support: Vec<usize>,
    pub(super) predicted: Vec<usize>,
    pub(super) hits: Vec<usize>,
}

impl Counts {
    pub(super) fn new(labels: usize) -> Self {
        Self {
            support: vec![0; labels],
            predicted: vec![0; labels],
            hits: vec![0; labels],
        }
    }

    pub(super) fn scores(&self, names: &[String]) -> Vec<ClassScore> {
        names
            .iter()
            .enumerate()
            .map(|(i, name)| ClassScore {
                label: name.clone(),
                precision: ratio(self.hits[i], self.predicted[i]),
                recall: ratio(self.hits[i], self.support[i]),
                f1: self.f1(i),
                support: self.support[i],
                predicted: self.predicted[i],
            })
            .collect()
    }

    pub(super) fn f1(&self, label: usize) -> f64 {
        ratio(
            2 * self.hits[label],
            self.support[label] + self.predicted[label],
        )
    }

    /// Mean over the labels that occur in truth or answers.
    pub(super) fn macro_f1(&self) -> f64 {
        let occurs = |&i: &usize| self.support[i] + self.predicted[i] > 0;
        let scores: Vec<f64> = (0..self.hits.len())
            .filter(occurs)
            .map(|i| self.f1(i))
            .collect();
        if scores.is_empty() {
            return 0.0;
        }
        scores.iter().sum::<f64>() / scores.len() as f64
    }

    /// F1 of all decisions together.
    pub(super) fn micro_f1(&self) -> f64 {
        let sum = |counts: &[usize]| counts.iter().sum::<usize>();
        ratio(
            2 * sum(&self.hits),
            sum(&self.support) + sum(&self.predicted),
        )
    }

    /// Matthews correlation of a single-label task, for any number of classes: R_K of Gorodkin,
    /// "Comparing two K-category assignments by a K-category correlation coefficient" (2004).
    pub(super) fn mcc(&self) -> f64 {
        let sum = |counts: &[usize]| counts.iter().sum::<usize>() as f64;
        let dot = |a: &[usize], b: &[usize]| -> f64 {
            a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
        };
        let n = sum(&self.support);
        let covariance = sum(&self.hits) * n - dot(&self.support, &self.predicted);
        let variance = (n * n - dot(&self.support, &self.support))
            * (n * n - dot(&self.predicted, &self.predicted));
        if variance > 0.0 {
            covariance / variance.sqrt()
        } else {
            0.0
        }
    }
}

/// 0 if the whole is 0.
pub(super) fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}
