//! PEFT folders in and out, and classifiers made of them.

mod problem;

pub use problem::ProblemType;
