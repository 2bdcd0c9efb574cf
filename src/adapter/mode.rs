//! How an adapter meets its encoder when it is served.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Low-rank terms beside the shared encoder, in batches with other tasks.
    Hot,
    /// Folded into an encoder of its own.
    Merged,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Merged => "merged",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        let modes = [Self::Hot, Self::Merged];
        modes.into_iter().find(|mode| mode.name() == name)
    }
}
