//! Training of LoRA adapters and of whole encoders: what trains, the loss, the optimizer, the loop.

mod checkpoint;
mod layers;
mod loss;
mod memory;
mod optimizer;
mod predict;
mod schedule;
mod step;
mod trainee;
mod trainer;

pub use checkpoint::{Checkpoint, Checkpoints};
pub use layers::{LayerTeacher, NoSuchLayer};
pub use loss::{LossWeights, distillation_loss};
pub use memory::{Mebibytes, MemoryNeed, Source};
pub use optimizer::{AdamW, clip_scale};
pub use predict::{predict, share_out};
pub use schedule::learning_rate;
pub use trainee::Trainee;
pub use trainer::{Example, Learning, TrainError, train};

#[cfg(test)]
mod tests;
