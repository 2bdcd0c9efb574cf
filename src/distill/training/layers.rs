//! Losses between hidden states of student and teacher: TinyBERT's (Jiao et al., arXiv 1909.10351)
//! and DistilBERT's (Sanh et al., arXiv 1910.01108).

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

use crate::distill::spec::LayerLossSpec;
use crate::encoder::{Encoder, EncoderError, Segment, TaskWeights};
use crate::ops::{self, Activation, Linear};
use crate::text::{PackedBatch, Sequence};

/// Keeps a cosine of nothing from being no number.
const EPSILON: f64 = 1e-6;

/// A teacher whose hidden states are learnt from.
pub struct LayerTeacher {
    encoder: Arc<Encoder>,
    weights: TaskWeights,
    /// The student's layers and the teacher's, counted from 1; 0 is behind the embeddings.
    pairs: Vec<(usize, usize)>,
    hidden: f64,
    cosine: f64,
}

/// A layer that there is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "training.layers.map pairs layer {student} of the student with {teacher} of the teacher, which \
     have {student_layers} and {teacher_layers}"
)]
pub struct NoSuchLayer {
    student: usize,
    teacher: usize,
    student_layers: usize,
    teacher_layers: usize,
}

impl LayerTeacher {
    /// # Errors
    /// A pair names a layer that student or teacher lacks.
    pub fn new(
        spec: &LayerLossSpec,
        encoder: Arc<Encoder>,
        weights: TaskWeights,
        student_layers: usize,
    ) -> std::result::Result<Self, NoSuchLayer> {
        let teacher_layers = encoder.config().num_hidden_layers;
        let pairs = match &spec.map {
            Some(map) => map.clone(),
            None => even_map(student_layers, teacher_layers),
        };
        let beyond = |&&(student, teacher): &&(usize, usize)| {
            student > student_layers || teacher > teacher_layers
        };
        if let Some(&(student, teacher)) = pairs.iter().find(beyond) {
            return Err(NoSuchLayer {
                student,
                teacher,
                student_layers,
                teacher_layers,
            });
        }
        Ok(Self {
            encoder,
            weights,
            pairs,
            hidden: spec.hidden,
            cosine: spec.cosine,
        })
    }

    pub fn hidden_size(&self) -> usize {
        self.encoder.config().hidden_size
    }

    /// The student's layers whose states the loss needs.
    pub(super) fn student_layers(&self) -> Vec<usize> {
        self.pairs.iter().map(|(student, _)| *student).collect()
    }

    /// The loss summed over rows, a scalar. A row's is the mean over its tokens and over the pairs
    /// of layers of `hidden` · mean squared error and `cosine` · (1 − cosine).
    ///
    /// `states` are the student's `[tokens, hidden]` by layer; `sequences` are the same rows as
    /// the teacher reads them, token by token.
    pub(super) fn loss(
        &self,
        states: &BTreeMap<usize, Tensor>,
        sequences: &[&Sequence],
        projection: Option<&Tensor>,
    ) -> std::result::Result<Tensor, EncoderError> {
        let batch = PackedBatch::new(sequences.iter().copied());
        let segment = Segment {
            sequences: 0..batch.sequences(),
            weights: &self.weights,
        };
        let wanted: Vec<usize> = self.pairs.iter().map(|(_, teacher)| *teacher).collect();
        let (_, known) = self
            .encoder
            .forward_with_states(&batch, &[segment], None, &wanted)?;
        let shares = sequences.iter().flat_map(|sequence| {
            let tokens = sequence.ids.len();
            std::iter::repeat_n(1.0 / (tokens * self.pairs.len()) as f32, tokens)
        });
        let shares = Tensor::from_vec(
            shares.collect::<Vec<f32>>(),
            batch.tokens(),
            self.encoder.device(),
        )?;
        let mut total: Option<Tensor> = None;
        for (student, teacher) in &self.pairs {
            let (Some(state), Some(target)) = (states.get(student), known.get(teacher)) else {
                continue;
            };
            let distance = self.distance(state, target, projection)?;
            let term = (distance * &shares)?.sum_all()?;
            total = Some(match total {
                Some(total) => (total + term)?,
                None => term,
            });
        }
        match total {
            Some(total) => Ok(total),
            None => Ok(Tensor::zeros((), shares.dtype(), shares.device())?),
        }
    }

    /// Of each token, `[tokens]`.
    fn distance(
        &self,
        state: &Tensor,
        target: &Tensor,
        projection: Option<&Tensor>,
    ) -> Result<Tensor> {
        // A projection trains, and differences are small: in f32, whatever the encoders are in.
        let (state, target) = (&state.to_dtype(DType::F32)?, &target.to_dtype(DType::F32)?);
        let state = match projection {
            Some(weight) => {
                let linear = Linear {
                    weight: weight.clone(),
                    bias: None,
                };
                ops::linear(state, &linear, Activation::None)?
            }
            None => state.clone(),
        };
        let mut distance = target.zeros_like()?.sum(D::Minus1)?;
        if self.hidden > 0.0 {
            let squares = (&state - target)?.sqr()?.mean(D::Minus1)?;
            distance = (distance + (squares * self.hidden)?)?;
        }
        if self.cosine > 0.0 {
            let product = (&state * target)?.sum(D::Minus1)?;
            let norms = (norms(&state)? * norms(target)?)?;
            let apart = (1.0 - product.div(&(norms + EPSILON)?)?)?;
            distance = (distance + (apart * self.cosine)?)?;
        }
        Ok(distance)
    }
}

fn norms(states: &Tensor) -> Result<Tensor> {
    (states.sqr()?.sum(D::Minus1)? + EPSILON * EPSILON)?.sqrt()
}

/// Each of the student's layers with the teacher's at the same share of the depth.
fn even_map(student: usize, teacher: usize) -> Vec<(usize, usize)> {
    let at = |layer: usize| (layer * teacher + student / 2) / student.max(1);
    (1..=student).map(|layer| (layer, at(layer))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_paired_evenly() {
        assert_eq!(even_map(2, 12), [(1, 6), (2, 12)]);
        assert_eq!(even_map(6, 12).last(), Some(&(6, 12)));
        assert_eq!(even_map(3, 4), [(1, 1), (2, 3), (3, 4)]);
    }
}
