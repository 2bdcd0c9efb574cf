//! Loss and gradients of one batch, shared out over the cores.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::loss::{LossWeights, distillation_loss};
use super::predict::{in_parallel, share_out};
use super::trainer::{Example, Run, TrainError};
use crate::distill::dataset::Label;
use crate::distill::rng::CounterRng;
use crate::encoder::{Segment, ShareDropout};
use crate::ops::device::Download;
use crate::text::{PackedBatch, Sequence};

/// Stream of random numbers that seeds the dropout of each step.
const DROPOUT: u64 = u64::MAX;

/// Loss sum and gradients by variable of a batch, or of a share of it.
pub(super) struct Share {
    pub(super) loss: f64,
    /// By variable, in its shape.
    pub(super) gradients: BTreeMap<String, Tensor>,
}

impl Run<'_> {
    /// Loss and gradients of a batch, summed over its rows, each core with a share of it. They are
    /// added up in the shares' order.
    pub(super) fn gradients(&self, batch: &[&Example]) -> Result<Share, TrainError> {
        let seed = self.learning.spec.seed;
        let lengths: Vec<usize> = batch.iter().map(|e| e.sequence.ids.len()).collect();
        let shares = share_out(&lengths, self.at.threads);
        let results = in_parallel(shares.len(), |i| {
            let first = shares[i].start;
            let dropout = ShareDropout {
                rate: self.learning.dropout,
                seed: CounterRng::new(seed, DROPOUT).u64_at(self.at.step as u64),
                first_token: lengths[..first].iter().sum(),
                first_sequence: first,
            };
            self.share(&batch[shares[i].clone()], dropout)
        })?;
        let mut sum = Share {
            loss: 0.0,
            gradients: BTreeMap::new(),
        };
        for share in results {
            sum.loss += share.loss;
            for (name, gradient) in share.gradients {
                add(&mut sum.gradients, name, gradient)?;
            }
        }
        Ok(sum)
    }

    /// Forward and backward of some examples.
    fn share(&self, examples: &[&Example], dropout: ShareDropout) -> Result<Share, TrainError> {
        let batch = PackedBatch::new(examples.iter().map(|example| &example.sequence));
        let (encoder, weights) = self.trainee.network()?;
        let segment = Segment {
            sequences: 0..batch.sequences(),
            weights: &weights,
        };
        let loss = |logits: &Tensor| self.loss(examples, logits);
        let dropout = Some(dropout);
        let (loss, stores) = if let Some(teacher) = self.learning.layer_teacher {
            let wanted = teacher.student_layers();
            let (logits, states) =
                encoder.forward_with_states(&batch, &[segment], dropout, &wanted)?;
            let read = examples.iter().filter_map(|e| e.teacher_sequence.as_ref());
            let read: Vec<&Sequence> = read.collect();
            let between = teacher.loss(&states, &read, self.trainee.projection())?;
            let loss = (loss(&logits[0])? + between)?;
            let value = Download::begin(&loss)?;
            (value, vec![loss.backward()?])
        } else if self.learning.spec.gradient_checkpointing {
            encoder.backward_by_layer(&batch, segment, dropout, loss)?
        } else {
            let logits = encoder.forward(&batch, &[segment], dropout)?;
            let loss = loss(&logits[0])?;
            let value = Download::begin(&loss)?;
            (value, vec![loss.backward()?])
        };
        let mut gradients = BTreeMap::new();
        for (name, variable) in self.trainee.variables() {
            for store in &stores {
                if let Some(gradient) = store.get(variable.as_tensor()) {
                    add(&mut gradients, name.clone(), gradient.contiguous()?)?;
                }
            }
        }
        Ok(Share {
            loss: loss.wait()?.into_iter().map(f64::from).sum(),
            gradients,
        })
    }

    /// The loss of the examples' logits, summed over them.
    fn loss(&self, examples: &[&Example], logits: &Tensor) -> candle_core::Result<Tensor> {
        let labels: Vec<Option<&Label>> = examples.iter().map(|e| e.label.as_ref()).collect();
        let teacher: Vec<Option<&[f32]>> = examples.iter().map(|e| e.teacher.as_deref()).collect();
        let weights = LossWeights {
            temperature: self.learning.spec.temperature,
            alpha: self.learning.spec.alpha,
            labels: self.learning.class_weights,
        };
        distillation_loss(
            self.learning.problem_type,
            logits,
            &labels,
            &teacher,
            weights,
        )
    }
}

/// Adds to the gradient of a variable.
fn add(
    sums: &mut BTreeMap<String, Tensor>,
    name: String,
    gradient: Tensor,
) -> candle_core::Result<()> {
    let sum = match sums.remove(&name) {
        Some(sum) => (sum + gradient)?,
        None => gradient,
    };
    sums.insert(name, sum);
    Ok(())
}
