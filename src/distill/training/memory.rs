//! What a training needs of memory: reckoned before it starts, then measured by one step that
//! changes nothing.

use std::fmt;

use super::trainee::Trainee;
use super::trainer::{Learning, TrainError};
use crate::distill::peak;
use crate::encoder::{Encoder, EncoderConfig};

const FLOAT: u64 = 4;

/// The program itself, its tokenizer and threads, measured with a small encoder.
const PROCESS: u64 = 48 << 20;

/// Bytes that a training needs, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryNeed {
    /// The program and what is frozen of the model.
    pub model: u64,
    /// The variables, their best values, moments and gradients.
    pub optimizer: u64,
    /// What the backward pass needs of the heaviest batch.
    pub activations: u64,
}

impl MemoryNeed {
    /// The need of training `trainee` on batches of at most `tokens` tokens.
    ///
    /// A model of the network, by what a layer keeps of each token.
    pub fn estimate(
        encoder: &Encoder,
        trainee: &Trainee,
        learning: &Learning<'_>,
        tokens: usize,
    ) -> Self {
        let optimized = trainee.optimized() as u64;
        let frozen = match trainee.is_full() {
            true => 0,
            false => encoder.parameters() as u64,
        };
        let threads = match trainee.device().is_cpu() {
            true => learning.threads as u64,
            false => 1,
        };
        let layers = encoder.config().num_hidden_layers as u64;
        let layer = floats_of_layer(encoder.config(), trainee.layers_are_one_op())
            + trainee.floats_of_adapters() / layers.max(1);
        let hidden = encoder.config().hidden_size as u64;
        let kept = match learning.spec.gradient_checkpointing {
            // The inputs of all layers, and one layer whole.
            true => layers * hidden + layer,
            false => layers * layer,
        };
        let value = match trainee.is_full() {
            true => FLOAT,
            false => encoder.dtype().size_in_bytes() as u64,
        };
        // The gradients on their way down take about as much as a layer.
        let floats = kept + layer;
        let (process, frozen_value) = match trainee.device().is_cpu() {
            true => (PROCESS, FLOAT),
            false => (0, encoder.dtype().size_in_bytes() as u64),
        };
        Self {
            model: process + frozen_value * frozen + encoder.bf16_bytes() as u64,
            // Values, best values, two moments; of gradients one a share twice (as tensors and
            // added up), and their sum.
            optimizer: FLOAT * optimized * (4 + 2 * threads + 1),
            activations: value * floats * tokens as u64,
        }
    }

    pub fn total(&self) -> u64 {
        self.model + self.optimizer + self.activations
    }
}

/// Numbers a token that one layer keeps for its backward pass, adapters not counted.
fn floats_of_layer(config: &EncoderConfig, one_op: bool) -> u64 {
    let (hidden, wide) = (config.hidden_size as u64, config.intermediate_size as u64);
    match one_op {
        // The input; Q, K and V; the inputs of both norms and of the activation.
        true => hidden + 3 * hidden + 2 * hidden + wide,
        // Q, K and V; context; the output's linear, sum and norm, twice; both sides of the
        // activation.
        false => 3 * hidden + hidden + 4 * hidden + 2 * wide,
    }
}

/// Where a figure of memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Estimate,
    /// Of a step on the heaviest batch.
    Probe,
    /// Of the training under way.
    Peak,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Estimate => "by estimate",
            Self::Probe => "by a trial step",
            Self::Peak => "as measured",
        })
    }
}

/// Tokens of the heaviest batch that chance may put together.
pub(super) fn heaviest_batch(lengths: &mut [usize], batch_size: usize) -> usize {
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    lengths.iter().take(batch_size).sum()
}

/// Refuses what is over the limit.
pub(super) fn check(needed: u64, limit: Option<u64>, source: Source) -> Result<(), TrainError> {
    match limit {
        Some(limit) if needed > limit => Err(TrainError::Memory {
            needed: Mebibytes(needed),
            limit: Mebibytes(limit),
            source_of_figure: source,
        }),
        _ => Ok(()),
    }
}

/// Runs a step that changes nothing, and says what the process needs with the optimizer's moments
/// and the best weights, which come later. `None` where the system does not say.
pub(super) fn probe(
    trainee: &Trainee,
    step: impl FnOnce() -> Result<(), TrainError>,
) -> Result<Option<u64>, TrainError> {
    let later = 3 * FLOAT * trainee.optimized() as u64;
    let device = trainee.device();
    peak::begin(device);
    step()?;
    Ok(peak::end(device).map(|peak| peak + later))
}

/// A number of bytes to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mebibytes(pub u64);

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0.div_ceil(1 << 20))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heaviest_batch_holds_the_longest_rows() {
        assert_eq!(heaviest_batch(&mut [3, 9, 1, 7], 2), 16);
        assert_eq!(heaviest_batch(&mut [3], 2), 3);
    }

    #[test]
    fn a_need_over_the_limit_is_refused_with_both_figures() {
        assert!(check(100, None, Source::Estimate).is_ok());
        assert!(check(100, Some(100), Source::Estimate).is_ok());
        let error = check(300 << 20, Some(100 << 20), Source::Probe).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("300 MiB") && text.contains("100 MiB"),
            "{text}"
        );
        assert!(text.contains("trial step"), "{text}");
    }
}
