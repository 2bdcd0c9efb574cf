//! Options that several commands have.

use std::path::PathBuf;

use super::CommandError;
use crate::distill::models::Places;
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

/// Where a pass finds models, and the cores that it takes.
#[derive(Debug, clap::Args)]
pub(super) struct PlacesArgs {
    #[command(flatten)]
    student: StudentArgs,
    /// Folder of the ready-made adapters, among them the teachers'.
    #[arg(
        long,
        env = "KDLORA_ADAPTERS",
        default_value = "models/adapters",
        value_name = "DIR"
    )]
    adapters: PathBuf,
    /// Cores to use [default: all].
    #[arg(long, env = "KDLORA_THREADS", value_name = "N")]
    threads: Option<usize>,
}

impl PlacesArgs {
    /// Without a cache of teachers' answers, checkpoints and limits.
    pub(super) fn places(self) -> Result<Places, CommandError> {
        let threads = match self.threads {
            Some(threads) => threads.max(1),
            None => std::thread::available_parallelism()?.get(),
        };
        Ok(Places {
            cache: self.student.cache.folder()?,
            student: self.student.student,
            adapters: self.adapters,
            teacher_cache: None,
            threads,
            memory_limit: None,
            checkpoints: None,
        })
    }
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
