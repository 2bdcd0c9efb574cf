//! PEFT folders in and out, and classifiers made of them.
//!
//! An adapter is read and checked here ([`AdapterFolder`]); what its outputs mean stands in
//! [`TaskConfig`], and [`ProblemType::scores`] turns logits into what a user reads. Bound to an
//! encoder it is a [`Classifier`]; so is a fully fine-tuned folder of `transformers`.

mod base;
mod bind;
mod classifier;
mod config;
mod error;
mod files;
mod folder;
mod merge;
mod mode;
mod problem;
mod scores;
mod summary;
mod sums;
mod targets;
mod task;
mod tensor_names;

pub use base::{AdapterBase, EncoderIdentity, Fit, KnownEncoder, KnownEncoders, Mismatch};
pub use classifier::{Classifier, write_classifier};
pub use config::{AdapterConfig, Bias};
pub use error::AdapterError;
pub use files::{read_report, write_folder};
pub use folder::AdapterFolder;
pub use mode::Mode;
pub use problem::ProblemType;
pub use scores::{Scores, argmax};
pub use summary::Summary;
pub use sums::{FileSums, sha256};
pub use targets::{ALL_LINEAR, Pattern, TargetModules};
pub use task::{DEFAULT_MAX_LENGTH, TaskConfig};
