//! Flags, variables and the TOML file of `kdlora serve`, unchecked.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use super::units::{Bytes, DeviceChoice, Dtype, Seconds};
use crate::distill::teacher_http::TeacherOrigin;
use crate::http::auth::Rate;

/// One source of settings; what it does not set is `None`. The keys of the TOML file are the long
/// names of the flags: `max-queue = 512`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct RawServe {
    /// TOML file with settings; flags and variables win over it.
    #[arg(long, env = "KDLORA_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Address to listen on [default: 127.0.0.1:8080].
    #[arg(long, env = "KDLORA_BIND", value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,

    /// Folder of jobs, versions and their history [default: ~/.local/state/kdlora].
    #[arg(long, env = "KDLORA_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// Folder of fetched encoders [default: ~/.cache/kdlora].
    #[arg(long, env = "KDLORA_CACHE", value_name = "DIR")]
    pub cache: Option<PathBuf>,

    /// Folder of ready-made adapters, one task each [default: models/adapters of the install].
    #[arg(long, env = "KDLORA_ADAPTERS", value_name = "DIR")]
    pub adapters: Option<PathBuf>,

    /// The encoder that answers: a catalog name, or a folder in the Hugging Face layout; or some of
    /// its layers, counted from 0, as in mpnet-base@0,4,8 [default: the one that the state folder
    /// was served with before, or minilm-l6].
    #[arg(long, env = "KDLORA_STUDENT", value_name = "NAME|DIR")]
    pub student: Option<String>,

    /// Folder below which requests may name data, teachers and adapters by path; none may where
    /// this is not set.
    #[arg(long, env = "KDLORA_DATA_ROOT", value_name = "DIR")]
    pub data_root: Option<PathBuf>,

    /// Where the encoder computes: auto, cpu, cuda, cuda:N [default: auto].
    #[arg(long, env = "KDLORA_DEVICE", value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,

    /// Number format of the encoder: f32, int8 or, where it has AVX512_BF16, bf16 on a CPU, bf16,
    /// f16 or f32 on a GPU [default: f32 on a CPU, bf16 on a GPU].
    #[arg(long, env = "KDLORA_DTYPE", value_name = "FORMAT")]
    pub dtype: Option<Dtype>,

    /// Threads that compute, each a whole batch of its own [default: one per core].
    #[arg(long, env = "KDLORA_THREADS", value_name = "N")]
    pub threads: Option<usize>,

    /// Most tokens in one batch; longer batches win nothing on a CPU and make others wait
    /// [default: 128, on a GPU 16384].
    #[arg(long, env = "KDLORA_MAX_BATCH_TOKENS", value_name = "N")]
    pub max_batch_tokens: Option<usize>,

    /// Most inputs in the server at a time; a request that does not fit gets status 429
    /// [default: 2048].
    #[arg(long, env = "KDLORA_MAX_QUEUE", value_name = "N")]
    pub max_queue: Option<usize>,

    /// Longest wait for a request that comes, at the speed measured by then: the work of its task
    /// that is in the server, and of each other task no more than comes to turn before it. One that
    /// would wait longer gets status 429 at once [default: 500ms].
    #[arg(long, env = "KDLORA_MAX_QUEUE_WAIT", value_name = "TIME")]
    pub max_queue_wait: Option<Seconds>,

    /// Most inputs in one request [default: 256].
    #[arg(long, env = "KDLORA_MAX_INPUTS", value_name = "N")]
    pub max_inputs: Option<usize>,

    /// Largest body of a classification request [default: 2MiB].
    #[arg(long, env = "KDLORA_MAX_BODY", value_name = "BYTES")]
    pub max_body: Option<Bytes>,

    /// Most characters of one text [default: 100000].
    #[arg(long, env = "KDLORA_MAX_TEXT_CHARS", value_name = "N")]
    pub max_text_chars: Option<usize>,

    /// Largest upload to an admin route [default: 256MiB].
    #[arg(long, env = "KDLORA_MAX_UPLOAD", value_name = "BYTES")]
    pub max_upload: Option<Bytes>,

    /// Longest time for one classification; a request may ask for less [default: 30s].
    #[arg(long, env = "KDLORA_REQUEST_TIMEOUT", value_name = "TIME")]
    pub request_timeout: Option<Seconds>,

    /// How long a stopping server goes on to take requests while /readyz says 503, for load
    /// balancers to notice [default: 0s].
    #[arg(long, env = "KDLORA_SHUTDOWN_DELAY", value_name = "TIME")]
    pub shutdown_delay: Option<Seconds>,

    /// How long a stopping server finishes what is in flight [default: 30s].
    #[arg(long, env = "KDLORA_SHUTDOWN_TIMEOUT", value_name = "TIME")]
    pub shutdown_timeout: Option<Seconds>,

    /// Most memory of the device for adapters. Tasks are loaded when they are first used; when the
    /// memory is full, the least recently used leaves [default: no limit].
    #[arg(long, env = "KDLORA_ADAPTER_MEMORY", value_name = "BYTES")]
    pub adapter_memory: Option<Bytes>,

    /// Most host memory for adapters as they were read, so that those that have left the device's
    /// memory, and earlier versions, come back without the disk. On a CPU an adapter that is also
    /// in use is in memory only once [default: 64MiB].
    #[arg(long, env = "KDLORA_ADAPTER_HOST_MEMORY", value_name = "BYTES")]
    pub adapter_host_memory: Option<Bytes>,

    /// Tasks whose adapter stays in memory, comma-separated, or `*` for all; they are loaded before
    /// the server is ready.
    #[arg(
        long,
        env = "KDLORA_PINNED_TASKS",
        value_name = "TASKS",
        value_delimiter = ','
    )]
    pub pinned_tasks: Option<Vec<String>>,

    /// Tasks that are loaded before the server is ready, beside the pinned ones, in the order of
    /// their names; the others are loaded when they are first used [default: 16].
    #[arg(long, env = "KDLORA_PRELOAD_TASKS", value_name = "N")]
    pub preload_tasks: Option<usize>,

    /// Largest teacher that is loaded to be asked about a text, by its weights in memory; 0 for none
    /// [default: 1GiB].
    #[arg(long, env = "KDLORA_TEACHER_MEMORY", value_name = "BYTES")]
    pub teacher_memory: Option<Bytes>,

    /// Tasks whose adapter is folded into an encoder of its own, comma-separated, or `*` for all:
    /// less work for a text, more memory for a task [default: those whose adapter changes more
    /// than linears].
    #[arg(
        long,
        env = "KDLORA_MERGED_TASKS",
        value_name = "TASKS",
        value_delimiter = ','
    )]
    pub merged_tasks: Option<Vec<String>>,

    /// Threads of a distillation job; more let it finish sooner and disturb what is served
    /// [default: half of the cores].
    #[arg(long, env = "KDLORA_JOB_THREADS", value_name = "N")]
    pub job_threads: Option<usize>,

    /// Longest time of a distillation job; a request may ask for less [default: no limit].
    #[arg(long, env = "KDLORA_JOB_TIME_LIMIT", value_name = "TIME")]
    pub job_time_limit: Option<Seconds>,

    /// Most memory of a distillation job; a request may ask for less [default: no limit].
    #[arg(long, env = "KDLORA_JOB_MEMORY", value_name = "BYTES")]
    pub job_memory: Option<Bytes>,

    /// Most memory of the GPU for a distillation job that computes on it; one that would need more
    /// is refused [default: no limit].
    #[arg(long, env = "KDLORA_JOB_GPU_MEMORY", value_name = "BYTES")]
    pub job_gpu_memory: Option<Bytes>,

    /// Most of the GPU's time for a distillation job that computes on it, above 0 and at most 1; the
    /// rest is free for what is served [default: 0.5].
    #[arg(long, env = "KDLORA_JOB_GPU_SHARE", value_name = "SHARE")]
    pub job_gpu_share: Option<f64>,

    /// Task of the routes whose path names none: /, /predict and /info [default: the only task, if
    /// there is one only].
    #[arg(long, env = "KDLORA_DEFAULT_TASK", value_name = "TASK")]
    pub default_task: Option<String>,

    /// File with the tokens of admins, one a line: TOKEN or NAME:TOKEN, or sha256:HEX in the place
    /// of TOKEN. It is read again when it changes. Without one, and without KDLORA_ADMIN_TOKENS
    /// (the same lines), admin routes answer only when the server listens on a loopback address.
    #[arg(long, env = "KDLORA_ADMIN_TOKEN_FILE", value_name = "FILE")]
    pub admin_token_file: Option<PathBuf>,

    /// File with the tokens of those who may classify, as for admins, who may too. Without one,
    /// and without KDLORA_API_TOKENS (the same lines), everybody may.
    #[arg(long, env = "KDLORA_API_TOKEN_FILE", value_name = "FILE")]
    pub api_token_file: Option<PathBuf>,

    /// Most requests of a token, or of an address without one: 50/s, 600/m, 1000/h. A token's line
    /// may say another (rate=50/s) [default: no limit].
    #[arg(long, env = "KDLORA_RATE_LIMIT", value_name = "RATE")]
    pub rate_limit: Option<Rate>,

    /// Origins whose pages may use the API from a browser, comma-separated, or `*` for all
    /// [default: none].
    #[arg(
        long,
        env = "KDLORA_CORS_ORIGIN",
        value_name = "ORIGINS",
        value_delimiter = ','
    )]
    pub cors_origin: Option<Vec<String>>,

    /// Most connections at a time. Up to 16 more are accepted for health and metrics, and answer
    /// anything else with status 503; the rest wait. Lowered where the process may not open enough
    /// files [default: 1024].
    #[arg(long, env = "KDLORA_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,

    /// How long a connection may keep the server waiting for a whole head, or for more of a body; a
    /// body must also bring 8 KiB a second on the whole [default: 30s].
    #[arg(long, env = "KDLORA_READ_TIMEOUT", value_name = "TIME")]
    pub read_timeout: Option<Seconds>,

    /// Close a connection whose client takes nothing of an answer for this long [default: 30s].
    #[arg(long, env = "KDLORA_WRITE_TIMEOUT", value_name = "TIME")]
    pub write_timeout: Option<Seconds>,

    /// Close a connection whose client has not taken a whole answer after this long. Streams of
    /// events have no such end [default: 2m].
    #[arg(long, env = "KDLORA_ANSWER_TIMEOUT", value_name = "TIME")]
    pub answer_timeout: Option<Seconds>,

    /// Address of a second listener that answers only health checks and /metrics, so that no
    /// number of other connections can keep them out [default: none].
    #[arg(long, env = "KDLORA_HEALTH_BIND", value_name = "ADDRESS:PORT")]
    pub health_bind: Option<SocketAddr>,

    /// Host names, beside those of this machine, under which a server on a loopback address is
    /// asked without a token for readers, as by a proxy that keeps the client's Host header;
    /// comma-separated [default: none].
    #[arg(
        long,
        env = "KDLORA_ALLOWED_HOSTS",
        value_name = "NAMES",
        value_delimiter = ','
    )]
    pub allowed_hosts: Option<Vec<String>>,

    /// Origins of teachers over HTTP that get the token in KDLORA_TEACHER_TOKEN, comma-separated:
    /// https://teacher.example.org; http only on a loopback address [default: none].
    #[arg(
        long,
        env = "KDLORA_TEACHER_ORIGIN",
        value_name = "ORIGINS",
        value_delimiter = ','
    )]
    pub teacher_origin: Option<Vec<TeacherOrigin>>,
}

impl RawServe {
    /// Fills what is not set from `other`.
    pub fn or(self, other: Self) -> Self {
        Self {
            config: self.config.or(other.config),
            bind: self.bind.or(other.bind),
            state: self.state.or(other.state),
            cache: self.cache.or(other.cache),
            adapters: self.adapters.or(other.adapters),
            student: self.student.or(other.student),
            data_root: self.data_root.or(other.data_root),
            device: self.device.or(other.device),
            dtype: self.dtype.or(other.dtype),
            threads: self.threads.or(other.threads),
            max_batch_tokens: self.max_batch_tokens.or(other.max_batch_tokens),
            max_queue: self.max_queue.or(other.max_queue),
            max_queue_wait: self.max_queue_wait.or(other.max_queue_wait),
            max_inputs: self.max_inputs.or(other.max_inputs),
            max_body: self.max_body.or(other.max_body),
            max_text_chars: self.max_text_chars.or(other.max_text_chars),
            max_upload: self.max_upload.or(other.max_upload),
            request_timeout: self.request_timeout.or(other.request_timeout),
            shutdown_delay: self.shutdown_delay.or(other.shutdown_delay),
            shutdown_timeout: self.shutdown_timeout.or(other.shutdown_timeout),
            adapter_memory: self.adapter_memory.or(other.adapter_memory),
            adapter_host_memory: self.adapter_host_memory.or(other.adapter_host_memory),
            pinned_tasks: self.pinned_tasks.or(other.pinned_tasks),
            preload_tasks: self.preload_tasks.or(other.preload_tasks),
            teacher_memory: self.teacher_memory.or(other.teacher_memory),
            merged_tasks: self.merged_tasks.or(other.merged_tasks),
            job_threads: self.job_threads.or(other.job_threads),
            job_time_limit: self.job_time_limit.or(other.job_time_limit),
            job_memory: self.job_memory.or(other.job_memory),
            job_gpu_memory: self.job_gpu_memory.or(other.job_gpu_memory),
            job_gpu_share: self.job_gpu_share.or(other.job_gpu_share),
            default_task: self.default_task.or(other.default_task),
            admin_token_file: self.admin_token_file.or(other.admin_token_file),
            api_token_file: self.api_token_file.or(other.api_token_file),
            rate_limit: self.rate_limit.or(other.rate_limit),
            cors_origin: self.cors_origin.or(other.cors_origin),
            max_connections: self.max_connections.or(other.max_connections),
            read_timeout: self.read_timeout.or(other.read_timeout),
            write_timeout: self.write_timeout.or(other.write_timeout),
            answer_timeout: self.answer_timeout.or(other.answer_timeout),
            health_bind: self.health_bind.or(other.health_bind),
            allowed_hosts: self.allowed_hosts.or(other.allowed_hosts),
            teacher_origin: self.teacher_origin.or(other.teacher_origin),
        }
    }
}
