//! Which modules PEFT's names and patterns mean.

mod pattern;

use serde_json::{Value, json};

pub use pattern::Pattern;
pub(super) use pattern::{Budget, PatternError};

/// Every linear of the encoder, in PEFT's spelling.
pub const ALL_LINEAR: &str = "all-linear";

/// Modules of a model, as `target_modules` names them.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetModules {
    /// Names, or endings of names from a dot on.
    Named(Vec<String>),
    /// A regular expression (Python's) of whole names.
    Pattern(Pattern),
}

impl TargetModules {
    pub(super) fn fits(&self, module: &str) -> bool {
        match self {
            Self::Named(names) => names.iter().any(|name| ends_with_name(module, name)),
            Self::Pattern(pattern) => pattern.fits(module),
        }
    }

    pub(super) fn json(&self) -> Value {
        match self {
            Self::Named(names) => json!(names),
            Self::Pattern(pattern) => json!(pattern.text()),
        }
    }
}

fn ends_with_name(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}
