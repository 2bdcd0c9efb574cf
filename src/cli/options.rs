//! Options that several commands have.

use std::path::{Path, PathBuf};

use super::CommandError;
use crate::adapter::{EncoderIdentity, KnownEncoder, KnownEncoders};
use crate::config::{Bytes, Compute, DeviceChoice, Dtype};
use crate::distill::models::{GpuLimits, Places};
use crate::distill::teacher_http::TeacherOrigin;
use crate::encoder::{EncoderId, cached_encoder_digest};
use crate::hub::{self, HubError};

/// The student where nobody names one.
pub(super) const DEFAULT_STUDENT: &str = "minilm-l6";

/// Reads which encoder the one in a folder is. Blocks.
pub(super) fn identity(
    name: &str,
    folder: &Path,
    cache: &Path,
) -> Result<EncoderIdentity, CommandError> {
    let id = EncoderId {
        name: name.to_owned(),
        digest: cached_encoder_digest(folder, cache)?,
    };
    Ok(EncoderIdentity {
        id,
        known: known_encoders(),
    })
}

/// The encoders of the catalog.
pub(super) fn known_encoders() -> KnownEncoders {
    let known = |entry: &hub::Entry| KnownEncoder {
        names: entry.names(),
        digest: entry.encoder_digest.clone(),
    };
    KnownEncoders::new(hub::entries().iter().map(known))
}

/// The encoder that carries adapters.
#[derive(Debug, clap::Args)]
pub(super) struct StudentArgs {
    /// Encoder that carries the adapter: a catalog name or a folder, or some of its layers, counted
    /// from 0, as in mpnet-base@0,4,8.
    #[arg(
        long,
        env = "KDLORA_STUDENT",
        default_value = DEFAULT_STUDENT,
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
    /// Where models compute: auto, cpu, cuda, cuda:N.
    #[arg(
        long,
        env = "KDLORA_DEVICE",
        default_value = "auto",
        value_name = "DEVICE"
    )]
    device: DeviceChoice,
    /// Number format of what is frozen while adapters train: on a GPU bf16, f16 or f32 [default:
    /// bf16], on a CPU f32 or, where it has AVX512_BF16, bf16 [default: f32]. Adapters and full
    /// fine-tuning are in f32.
    #[arg(long, env = "KDLORA_TRAINING_DTYPE", value_name = "FORMAT")]
    dtype: Option<Dtype>,
    /// Most memory of a GPU; a training that would need more is refused.
    #[arg(long, env = "KDLORA_GPU_MEMORY_LIMIT", value_name = "BYTES")]
    gpu_memory_limit: Option<Bytes>,
    /// Most of a GPU's time, above 0 and at most 1: a training pauses after each step.
    #[arg(
        long,
        env = "KDLORA_GPU_SHARE",
        default_value_t = 1.0,
        value_name = "SHARE"
    )]
    gpu_share: f64,
    /// Origins of teachers over HTTP that get the token in KDLORA_TEACHER_TOKEN, comma-separated:
    /// https://teacher.example.org; http only on a loopback address.
    #[arg(
        long,
        env = "KDLORA_TEACHER_ORIGIN",
        value_name = "ORIGINS",
        value_delimiter = ','
    )]
    teacher_origin: Vec<TeacherOrigin>,
}

impl PlacesArgs {
    /// Without a cache of teachers' answers, checkpoints and limits.
    pub(super) fn places(self) -> Result<Places, CommandError> {
        let threads = match self.threads {
            Some(threads) => threads.max(1),
            None => std::thread::available_parallelism()?.get(),
        };
        let compute = Compute {
            device: self.device,
            dtype: self.dtype,
        };
        if self.dtype == Some(Dtype::Int8) {
            return Err(CommandError::from("int8 can't be trained on"));
        }
        if !(self.gpu_share > 0.0 && self.gpu_share <= 1.0) {
            return Err(CommandError::from(
                "--gpu-share must be above 0 and at most 1",
            ));
        }
        Ok(Places {
            placement: compute.open()?,
            gpu: GpuLimits {
                memory: self.gpu_memory_limit.map(|Bytes(bytes)| bytes),
                share: self.gpu_share,
            },
            cache: self.student.cache.folder()?,
            student: self.student.student,
            adapters: self.adapters,
            known: known_encoders(),
            teacher_cache: None,
            threads,
            memory_limit: None,
            checkpoints: None,
            teacher_origins: self.teacher_origin,
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
