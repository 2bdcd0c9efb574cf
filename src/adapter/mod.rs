//! PEFT folders in and out, and classifiers made of them.
//!
//! An adapter is read and checked here ([`AdapterFolder`]); what its outputs mean stands in
//! [`TaskConfig`], and [`ProblemType::scores`] turns logits into what a user reads. Bound to an
//! encoder it is a [`Classifier`]; so is a fully fine-tuned folder of `transformers`.

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
mod targets;
mod task;
mod tensor_names;

pub use classifier::{Classifier, write_classifier};
pub use config::{AdapterConfig, Bias};
pub use error::AdapterError;
pub use files::write_folder;
pub use folder::{AdapterFolder, REPORT};
pub use mode::Mode;
pub use problem::ProblemType;
pub use scores::{Scores, argmax};
pub use summary::Summary;
pub use targets::{ALL_LINEAR, TargetModules};
pub use task::{DEFAULT_MAX_LENGTH, TaskConfig};
