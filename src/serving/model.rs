//! What the workers run: the student with the adapters of a batch.

use std::ops::Range;

use super::LiveTask;
use crate::encoder::{Encoder, Segment};
use crate::text::PackedBatch;

/// Sequences of a batch that belong to one version of one task.
#[derive(Clone)]
pub struct TaskSegment<'a> {
    pub sequences: Range<usize>,
    pub task: &'a LiveTask,
}

/// A forward pass that failed.
#[derive(Debug, thiserror::Error)]
#[error("the forward pass failed")]
pub struct ModelError(#[from] Box<dyn std::error::Error + Send + Sync>);

/// Computes batches; called by several workers at once, each call on one thread.
pub trait Model: Send + Sync + 'static {
    /// One row of logits, `[labels]`, for each sequence, in order. `segments` cover all sequences
    /// in order.
    fn logits(
        &self,
        batch: &PackedBatch,
        segments: &[TaskSegment<'_>],
    ) -> Result<Vec<Vec<f32>>, ModelError>;
}

impl Model for Encoder {
    fn logits(
        &self,
        batch: &PackedBatch,
        segments: &[TaskSegment<'_>],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let segments: Vec<Segment<'_>> = segments
            .iter()
            .map(|segment| Segment {
                sequences: segment.sequences.clone(),
                weights: &segment.task.weights,
            })
            .collect();
        self.logits(batch, &segments)
            .map_err(|error| ModelError(error.into()))
    }
}
