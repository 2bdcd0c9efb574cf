//! How a model is trained: its LoRA, the loop and the losses.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::text::Truncation;

/// LoRA of the student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSpec {
    pub r: usize,
    pub alpha: f64,
    pub dropout: f64,
    /// Last components of module names (`query`, `value`), or `all-linear`.
    pub targets: Vec<String>,
    /// Scale by α/√r instead of α/r (rsLoRA, arXiv 2312.03732).
    pub use_rslora: bool,
    /// Train a magnitude of each output beside the direction (DoRA, arXiv 2402.09353).
    pub use_dora: bool,
    /// A stays as it was drawn, only B trains (LoRA-FA, arXiv 2308.03303).
    pub freeze_a: bool,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 16.0,
            dropout: 0.1,
            targets: vec!["query".into(), "value".into()],
            use_rslora: false,
            use_dora: false,
            freeze_a: false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingSpec {
    pub epochs: usize,
    pub batch_size: usize,
    pub learning_rate: f64,
    /// Temperature T of the distillation loss.
    pub temperature: f64,
    /// Share α of the distillation loss; 1 − α goes to the task loss.
    pub alpha: f64,
    /// How often an epoch goes over the rows with labels; over those without it goes once. Beside
    /// many texts without labels the few with are soon lost.
    #[serde(skip_serializing_if = "is_one")]
    pub label_repeats: usize,
    /// Tokens a sequence is cut to.
    pub max_length: usize,
    /// Which text of a pair is cut.
    pub truncation: Truncation,
    pub seed: u64,
    /// Share of the steps in which the learning rate rises.
    pub warmup_ratio: f64,
    pub weight_decay: f64,
    /// Greatest global norm of the gradient.
    pub max_grad_norm: f64,
    /// Keep only each layer's input for the backward pass and compute the rest again (Chen et al.,
    /// arXiv 1604.06174): less memory, more time.
    pub gradient_checkpointing: bool,
    /// Losses between the layers of student and teacher, beside the one on the logits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<LayerLossSpec>,
}

impl Default for TrainingSpec {
    fn default() -> Self {
        Self {
            epochs: 4,
            batch_size: 32,
            learning_rate: 1e-3,
            temperature: 2.0,
            alpha: 0.5,
            label_repeats: 1,
            max_length: 128,
            truncation: Truncation::LongestFirst,
            seed: 42,
            warmup_ratio: 0.06,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            gradient_checkpointing: false,
            layers: None,
        }
    }
}

impl TrainingSpec {
    /// The same for a model that learns from the labels alone.
    pub fn without_teacher(self) -> Self {
        Self {
            alpha: 0.0,
            label_repeats: 1,
            layers: None,
            ..self
        }
    }
}

/// Left out of what is written, so that results from before the option are known again.
fn is_one(repeats: &usize) -> bool {
    *repeats == 1
}

/// Losses between hidden states of student and teacher, `[tokens, hidden]` each.
///
/// Their tokenizers must cut every text into the same number of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LayerLossSpec {
    /// Weight of the mean squared error, behind a learned projection to the teacher's size
    /// (TinyBERT, arXiv 1909.10351, equation 8).
    pub hidden: f64,
    /// Weight of 1 − cosine, behind the same projection (DistilBERT, arXiv 1910.01108).
    pub cosine: f64,
    /// Pairs of the student's and the teacher's layer, counted from 1; 0 is the embeddings'
    /// output. Absent: each of the student's layers with the teacher's at the same share of the
    /// depth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<Vec<(usize, usize)>>,
}

impl Default for LayerLossSpec {
    fn default() -> Self {
        Self {
            hidden: 1.0,
            cosine: 0.0,
            map: None,
        }
    }
}
