//! The settings of the server, checked.

use std::env;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::edge::EdgeConfig;
use super::raw::RawServe;
use super::units::DeviceChoice;
use super::{Compute, ComputeError};
use crate::distill::runner::JobLimits;
use crate::distill::teacher_http::TeacherOrigin;
use crate::http::auth::TokensError;
use crate::parse::{self, ParseError};
use crate::serving::{TaskSet, Wishes};

/// What `kdlora serve` runs with.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    pub bind: SocketAddr,
    pub state: PathBuf,
    /// `None`: the cache folder of the hub.
    pub cache: Option<PathBuf>,
    /// `None`: no ready-made adapters were found or named.
    pub adapters: Option<PathBuf>,
    /// Catalog name or folder. `None`: the one that the state folder was served with before, or
    /// the default one.
    pub student: Option<String>,
    /// Canonical, so that a path below it can be told from one that leads out.
    pub data_root: Option<PathBuf>,
    pub compute: Compute,
    /// Threads that compute.
    pub threads: usize,
    /// `None`: what suits the device.
    pub max_batch_tokens: Option<usize>,
    /// Sequences in the server at a time.
    pub max_queue: usize,
    /// Longest wait that the work in the server may mean for a request that comes.
    pub max_queue_wait: Duration,
    pub max_inputs: usize,
    pub max_body_bytes: usize,
    pub max_text_chars: usize,
    pub max_upload_bytes: usize,
    pub request_timeout: Duration,
    pub shutdown_delay: Duration,
    pub shutdown_timeout: Duration,
    pub adapter_memory: Option<u64>,
    pub adapter_host_memory: u64,
    /// How single tasks are to be served.
    pub wishes: Wishes,
    /// Threads of a distillation job.
    pub job_threads: usize,
    pub job_limits: JobLimits,
    pub job_gpu: JobGpu,
    /// Most bytes of a teacher's weights; 0 for no teacher.
    pub teacher_memory: u64,
    /// Endpoints that get the token for teachers over HTTP.
    pub teacher_origins: Vec<TeacherOrigin>,
    /// Task of the routes whose path names none.
    pub default_task: Option<String>,
    pub edge: EdgeConfig,
}

/// What a distillation job may take of a GPU that serves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct JobGpu {
    /// Most bytes of the GPU's memory.
    pub memory: Option<u64>,
    /// Most of the GPU's time.
    pub share: f64,
}

/// A setting that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("can't read {what} {path:?}")]
    Read {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the settings file {path:?} can't be used")]
    Parse {
        path: PathBuf,
        #[source]
        source: ParseError,
    },
    #[error(transparent)]
    Compute(#[from] ComputeError),
    #[error(transparent)]
    Tokens(#[from] TokensError),
    #[error("{0}")]
    Invalid(String),
}

impl ServeConfig {
    /// Flags and variables are in `typed`; its `config` names the file for the rest.
    pub fn load(typed: RawServe) -> Result<Self, ConfigError> {
        let raw = match &typed.config {
            Some(path) => {
                let file = read_file(path)?;
                typed.or(file)
            }
            None => typed,
        };
        Self::check(raw)
    }

    fn check(raw: RawServe) -> Result<Self, ConfigError> {
        let compute = Compute {
            device: raw.device.unwrap_or(DeviceChoice::Auto),
            dtype: raw.dtype,
        };
        compute.check()?;
        let edge = EdgeConfig::check(&raw)?;
        let threads = positive("threads", raw.threads.unwrap_or_else(cores))?;
        let max_queue = positive("max-queue", raw.max_queue.unwrap_or(2048))?;
        let max_inputs = positive("max-inputs", raw.max_inputs.unwrap_or(256.min(max_queue)))?;
        if max_inputs > max_queue {
            return Err(ConfigError::Invalid(format!(
                "--max-inputs is {max_inputs}, but --max-queue lets only {max_queue} inputs in at \
                 a time; the larger requests could never be served"
            )));
        }
        let request_timeout = raw.request_timeout.map_or(Duration::from_secs(30), |t| t.0);
        if request_timeout.is_zero() {
            return Err(ConfigError::Invalid(
                "--request-timeout must be longer than 0".to_owned(),
            ));
        }
        Ok(Self {
            bind: raw
                .bind
                .unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, 8080))),
            state: match raw.state {
                Some(state) => state,
                None => default_state()?,
            },
            cache: raw.cache,
            adapters: match raw.adapters {
                Some(path) => Some(existing_folder("adapters", path)?),
                None => installed_adapters(),
            },
            student: raw.student,
            data_root: raw
                .data_root
                .map(|path| existing_folder("data-root", path))
                .transpose()?,
            compute,
            threads,
            max_batch_tokens: match raw.max_batch_tokens {
                Some(tokens) => Some(positive("max-batch-tokens", tokens)?),
                None => None,
            },
            max_queue,
            max_queue_wait: raw
                .max_queue_wait
                .map_or(Duration::from_millis(500), |t| t.0),
            max_inputs,
            max_body_bytes: bytes(raw.max_body, 2 << 20),
            max_text_chars: positive("max-text-chars", raw.max_text_chars.unwrap_or(100_000))?,
            max_upload_bytes: bytes(raw.max_upload, 256 << 20),
            request_timeout,
            shutdown_delay: raw.shutdown_delay.map_or(Duration::ZERO, |t| t.0),
            shutdown_timeout: raw
                .shutdown_timeout
                .map_or(Duration::from_secs(30), |t| t.0),
            adapter_memory: raw.adapter_memory.map(|bytes| bytes.0),
            adapter_host_memory: raw.adapter_host_memory.map_or(64 << 20, |bytes| bytes.0),
            wishes: Wishes {
                merged: task_set(raw.merged_tasks),
                pinned: task_set(raw.pinned_tasks),
                preload: raw.preload_tasks.unwrap_or(16),
            },
            job_threads: positive(
                "job-threads",
                raw.job_threads.unwrap_or(cores().div_ceil(2)),
            )?,
            job_limits: JobLimits {
                time: raw.job_time_limit.map(|time| time.0),
                memory: raw.job_memory.map(|bytes| bytes.0),
            },
            job_gpu: JobGpu {
                memory: raw.job_gpu_memory.map(|bytes| bytes.0),
                share: share("job-gpu-share", raw.job_gpu_share.unwrap_or(0.5))?,
            },
            teacher_memory: raw.teacher_memory.map_or(1 << 30, |bytes| bytes.0),
            teacher_origins: raw.teacher_origin.unwrap_or_default(),
            default_task: raw.default_task,
            edge,
        })
    }
}

fn read_file(path: &Path) -> Result<RawServe, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
        what: "the settings file",
        path: path.to_owned(),
        source,
    })?;
    parse::toml(&text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source,
    })
}

fn task_set(names: Option<Vec<String>>) -> TaskSet {
    match names {
        None => TaskSet::None,
        Some(tasks) if tasks.iter().any(|task| task == "*") => TaskSet::All,
        Some(tasks) => TaskSet::Some(tasks.into_iter().collect()),
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn positive(flag: &str, number: usize) -> Result<usize, ConfigError> {
    if number == 0 {
        return Err(ConfigError::Invalid(format!("--{flag} must be at least 1")));
    }
    Ok(number)
}

fn share(flag: &str, share: f64) -> Result<f64, ConfigError> {
    match share > 0.0 && share <= 1.0 {
        true => Ok(share),
        false => Err(ConfigError::Invalid(format!(
            "--{flag} must be above 0 and at most 1"
        ))),
    }
}

fn bytes(given: Option<super::Bytes>, default: u64) -> usize {
    usize::try_from(given.map_or(default, |bytes| bytes.0)).unwrap_or(usize::MAX)
}

fn existing_folder(flag: &str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    let canonical = path.canonicalize().map_err(|source| ConfigError::Read {
        what: "the folder",
        path: path.clone(),
        source,
    })?;
    if !canonical.is_dir() {
        return Err(ConfigError::Invalid(format!(
            "--{flag}: {path:?} is not a folder"
        )));
    }
    Ok(canonical)
}

/// The state folder of the XDG base directory specification.
/// Where the state is kept if nothing else is said.
pub fn default_state() -> Result<PathBuf, ConfigError> {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|base| base.join("kdlora"))
        .ok_or_else(|| {
            ConfigError::Invalid(
                "there is no home folder to keep the state in; name a folder with --state"
                    .to_owned(),
            )
        })
}

/// Ready-made adapters lie beside an installed program, or in the source tree it was built from.
fn installed_adapters() -> Option<PathBuf> {
    let beside = env::current_exe()
        .ok()
        .and_then(|program| Some(program.parent()?.join("models/adapters")));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/adapters");
    beside
        .into_iter()
        .chain([source])
        .find(|path| path.is_dir())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::telemetry::chain;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        raw: RawServe,
    }

    fn typed(flags: &[&str]) -> RawServe {
        let words = ["serve", "--state", "state"].iter().chain(flags);
        Line::try_parse_from(words).expect("the flags parse").raw
    }

    fn refusal(flags: &[&str]) -> String {
        chain(&ServeConfig::load(typed(flags)).expect_err("the settings are refused"))
    }

    fn settings_file(text: &str) -> tempfile::TempPath {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(file.path(), text).expect("write the file");
        file.into_temp_path()
    }

    #[test]
    fn defaults_make_a_whole_config() {
        let config = ServeConfig::load(typed(&[])).expect("defaults are valid");
        assert_eq!(config.bind.to_string(), "127.0.0.1:8080");
        assert_eq!(config.student, None);
        assert!(config.threads >= 1);
        assert!(config.edge.admins.is_none());
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = settings_file(
            "bind = '127.0.0.1:9'\nmax-queue = 7\nmax-body = '1KiB'\nrequest-timeout = '250ms'\n",
        );
        let file = file.to_str().expect("a UTF-8 path");
        let config = ServeConfig::load(typed(&["--config", file, "--bind", "127.0.0.1:10"]))
            .expect("the settings are valid");
        assert_eq!(config.bind.port(), 10);
        assert_eq!((config.max_queue, config.max_inputs), (7, 7));
        assert_eq!(config.max_body_bytes, 1024);
        assert_eq!(config.request_timeout, Duration::from_millis(250));
    }

    #[test]
    fn refuses_unknown_keys_and_wrong_values_of_the_file() {
        for (text, sentence) in [
            ("max-que = 7", "unknown field `max-que`"),
            ("device = 'gpu'", "is not a device"),
            (
                "threads = 'two'",
                "threads: expected a whole number, got \"two\"",
            ),
            ("max-body = -1", "is not a number of bytes"),
        ] {
            let file = settings_file(text);
            let error = refusal(&["--config", file.to_str().expect("a UTF-8 path")]);
            assert!(error.contains(sentence), "{error}");
        }
        assert!(refusal(&["--config", "no/such/file"]).contains("can't read the settings file"));
    }

    #[test]
    fn refuses_what_no_device_does() {
        assert!(refusal(&["--device", "cpu", "--dtype", "f16"]).contains("bf16 or int8"));
    }

    #[test]
    fn refuses_limits_that_no_request_can_meet() {
        assert!(refusal(&["--threads", "0"]).contains("--threads must be at least 1"));
        assert!(refusal(&["--max-queue", "4", "--max-inputs", "5"]).contains("never be served"));
    }

    #[test]
    fn tokens_are_never_empty_and_not_shown() {
        let file = settings_file("  ada:s3cret-s3cret-s3cret\n");
        let path = file.to_str().expect("a UTF-8 path");
        for flag in ["--admin-token-file", "--api-token-file"] {
            let config = ServeConfig::load(typed(&[flag, path])).expect("valid");
            let shown = format!("{config:?}");
            assert!(
                shown.contains("ada") && !shown.contains("s3cret"),
                "{shown}"
            );
        }
        let empty = settings_file("\n");
        let error = refusal(&["--admin-token-file", empty.to_str().expect("a UTF-8 path")]);
        assert!(error.contains("no token in"), "{error}");
    }
}
