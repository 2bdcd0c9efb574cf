//! Options that several commands have.

use std::path::PathBuf;

use crate::hub::{self, HubError};

/// The encoder that carries adapters.
#[derive(Debug, clap::Args)]
pub(super) struct StudentArgs {
    /// Encoder that carries the adapter: a catalog name or a folder, or some of its layers, counted
    /// from 0, as in mpnet-base@0,4,8.
    #[arg(
        long,
        env = "KDLORA_STUDENT",
        default_value = "minilm-l6",
        value_name = "NAME|DIR"
    )]
    pub(super) student: String,
    #[command(flatten)]
    pub(super) cache: CacheArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct CacheArgs {
    /// Folder of fetched encoders [default: ~/.cache/kdlora].
    #[arg(long, env = "KDLORA_CACHE", value_name = "DIR")]
    cache: Option<PathBuf>,
}

impl CacheArgs {
    pub(super) fn folder(&self) -> Result<PathBuf, HubError> {
        match &self.cache {
            Some(cache) => Ok(cache.clone()),
            None => hub::cache_dir(),
        }
    }
}
