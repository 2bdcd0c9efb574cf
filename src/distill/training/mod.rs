//! Training of LoRA adapters and of whole encoders: what trains, the loss, the optimizer, the loop.

mod loss;
mod optimizer;
mod predict;
mod schedule;
mod trainee;
mod trainer;

pub use loss::{LossWeights, distillation_loss};
pub use optimizer::{AdamW, clip_scale};
pub use predict::{predict, share_out};
pub use schedule::learning_rate;
pub use trainee::Trainee;
pub use trainer::{Example, Learning, TrainError, train};

#[cfg(test)]
mod tests;
