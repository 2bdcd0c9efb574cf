//! What the workers run: the student with the adapters of a batch.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::LiveTask;
use crate::encoder::{Encoder, EncoderError, Segment};
use crate::ops::Crew;
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
        forward(self, batch, segments).map_err(|error| ModelError(error.into()))
    }
}

/// An encoder for several workers. While fewer of them compute than there are cores, the others'
/// cores help: a request that comes alone is answered by all of them.
pub struct SharedCores {
    encoder: Arc<Encoder>,
    crew: Crew,
}

impl SharedCores {
    /// For `cores` workers.
    ///
    /// # Errors
    /// The threads that help can't be started.
    pub fn new(encoder: Arc<Encoder>, cores: usize) -> io::Result<Self> {
        let crew = Crew::start(cores)?;
        Ok(Self { encoder, crew })
    }
}

impl Model for SharedCores {
    fn logits(
        &self,
        batch: &PackedBatch,
        segments: &[TaskSegment<'_>],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        self.crew
            .lead(|| Model::logits(&*self.encoder, batch, segments))
    }
}

/// The hot tasks of the batch in one pass of the shared encoder, each merged one in a pass of its
/// own.
fn forward(
    shared: &Encoder,
    batch: &PackedBatch,
    segments: &[TaskSegment<'_>],
) -> Result<Vec<Vec<f32>>, EncoderError> {
    let (hot, merged): (Vec<_>, Vec<_>) = segments
        .iter()
        .partition(|segment| segment.task.merged.is_none());
    if merged.is_empty() {
        return pass(shared, batch, &hot);
    }
    let mut rows = vec![Vec::new(); batch.sequences()];
    let mut fill = |encoder: &Encoder, segments: &[&TaskSegment<'_>]| {
        let ranges = || segments.iter().map(|segment| segment.sequences.clone());
        let found = pass(encoder, &batch.select(ranges()), segments)?;
        for (i, row) in ranges().flatten().zip(found) {
            rows[i] = row;
        }
        Ok::<_, EncoderError>(())
    };
    fill(shared, &hot)?;
    for segment in merged {
        let own = segment.task.merged.as_deref().unwrap_or(shared);
        fill(own, &[segment])?;
    }
    Ok(rows)
}

/// The segments' sequences, which are all of the batch, in one pass.
fn pass(
    encoder: &Encoder,
    batch: &PackedBatch,
    segments: &[&TaskSegment<'_>],
) -> Result<Vec<Vec<f32>>, EncoderError> {
    let mut start = 0;
    let segments: Vec<Segment<'_>> = segments
        .iter()
        .map(|segment| {
            let sequences = start..start + segment.sequences.len();
            start = sequences.end;
            Segment {
                sequences,
                weights: &segment.task.weights,
            }
        })
        .collect();
    encoder.logits(batch, &segments)
}
