//! `kdlora serve`: the HTTP server.

use std::env;
use std::fs;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::options::{DEFAULT_STUDENT, identity};
use super::{CommandError, descriptors};
use crate::adapter::EncoderIdentity;
use crate::config::{Compute, RawServe, ServeConfig};
use crate::distill::ask::{self, TeacherDesk};
use crate::distill::runner::{LiveHook, Runner, RunnerConfig};
use crate::distill::teacher_http::TOKEN_VARIABLE;
use crate::encoder::Placement;
use crate::http::admin::{self, AdapterCheck, AdminConfig};
use crate::http::auth::Access;
use crate::http::health::Readiness;
use crate::http::{self, AppState, Edge, Limits, server};
use crate::hub;
use crate::ops::device;
use crate::private_folders::PrivateFolders;
use crate::serving::{
    Loader, Model, Options, Publisher, Residents, Serving, SharedCores, Student, TaskTable,
};
use crate::store::Store;
use crate::telemetry::{Metrics, chain};
use crate::text::Tokenizer;

const EXAMPLES: &str = "\
Examples:
  kdlora serve
  curl -s localhost:8080/v1/classify/movie-sentiment -H 'content-type: application/json' \\
    -d '{\"inputs\": \"A quiet, wonderful film.\"}'

  For other machines, with a token for the admin routes and files that requests may name:
  openssl rand -hex 32 > token
  kdlora serve --bind 0.0.0.0:8080 --admin-token-file token --data-root /srv/texts

  The page for people is at http://localhost:8080/";

/// Start the server. Each option can also be given as the variable named beside it, or in a TOML
/// file under its long name.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    settings: RawServe,
}

/// Exit status of a process that a second signal ended, as shells have it for SIGINT.
const INTERRUPTED: i32 = 130;

/// How long a teacher stays in memory after it was asked: the time of someone who tries texts.
const TEACHER_IDLE: Duration = Duration::from_secs(300);

/// Clients that may follow jobs by server-sent events, where a quarter of the connections is more.
const MAX_EVENT_STREAMS: usize = 64;

/// Longer batches win nothing on a core and make others wait; a GPU is not busy with shorter ones.
const CPU_BATCH_TOKENS: usize = 128;
const GPU_BATCH_TOKENS: usize = 16_384;

/// Runs the server until SIGTERM or SIGINT; a second signal ends the process at once.
///
/// # Errors
/// It can't start, or requests were still in flight when `--shutdown-timeout` was over.
pub fn run(args: Args) -> Result<(), CommandError> {
    let mut config = ServeConfig::load(args.settings)?;
    let connections = &mut config.edge.connections.connections;
    *connections = descriptors::fit(*connections);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let mut stop = StopSignal::listen()?;
        let listener = bind(config.bind, "bind").await?;
        let health = match config.edge.health_bind {
            Some(address) => Some(bind(address, "health-bind").await?),
            None => None,
        };
        let shutdown = async move {
            stop.received().await;
            tracing::info!("stopping; a second signal ends the process at once");
            tokio::spawn(async move {
                stop.received().await;
                process::exit(INTERRUPTED);
            });
        };
        serve(listener, health, config, shutdown).await
    });
    // A fetch or a forward pass that is still under way must not keep the process.
    runtime.shutdown_background();
    outcome
}

async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, CommandError> {
    TcpListener::bind(address).await.map_err(|error| {
        let text = format!("can't listen on {address}: {error}; choose another with --{flag}");
        CommandError::from(text)
    })
}

struct StopSignal {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignal {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Serves on `listener` until `shutdown` completes, then finishes what is in flight. `health` is a
/// listener for health and metrics alone.
///
/// Liveness, readiness and metrics answer from the beginning, the rest when the student and the
/// tasks are loaded; then one line with the address goes to standard output.
pub async fn serve(
    listener: TcpListener,
    health: Option<TcpListener>,
    config: ServeConfig,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), CommandError> {
    let address = listener.local_addr()?;
    let (shutdown_delay, shutdown_timeout) = (config.shutdown_delay, config.shutdown_timeout);
    let metrics = Arc::new(Metrics::new()?);
    let readiness = Readiness::default();
    let private = private_folders(&config)?;
    let stop = CancellationToken::new();
    let edge_at = |address: SocketAddr| Edge {
        private: private.clone(),
        access: Access::new(config.edge.access(address.ip().is_loopback())),
        cors_origins: config.edge.cors_origins.clone(),
        read_timeout: config.edge.connections.read_timeout,
        stop: stop.clone(),
    };
    let edge = edge_at(address);
    let starting = http::starting(readiness.clone(), Arc::clone(&metrics), &edge);
    let current = Arc::new(ArcSwap::from_pointee(starting));
    let router = http::switchable(Arc::clone(&current));
    let connections = config.edge.connections;
    let server = server::serve(listener, router, connections, stop.clone());
    let server = tokio::spawn(server);
    // Whatever the way out, the listeners close. The one for health does so last.
    let _stop = stop.clone().drop_guard();
    let stop_health = CancellationToken::new();
    let _stop_health = stop_health.clone().drop_guard();
    if let Some(listener) = health {
        let address = listener.local_addr()?;
        let edge = edge_at(address);
        let router = http::health_only(readiness.clone(), Arc::clone(&metrics), &edge);
        let limits = connections.for_health();
        tokio::spawn(server::serve(listener, router, limits, stop_health));
        tracing::info!("health and metrics are also on http://{address}");
    }

    let mut shutdown = pin!(shutdown);
    let app = tokio::select! {
        app = App::start(config, readiness, metrics) => app?,
        () = &mut shutdown => return Ok(()),
    };
    current.store(Arc::new(app.router(&edge)));
    app.state.readiness.set_ready();
    println!("kdlora listens on http://{address}");

    shutdown.await;
    app.state.readiness.set_stopping();
    sleep(shutdown_delay).await;
    // The listener closes; connections end with the request that they are in.
    stop.cancel();
    let ended = timeout(shutdown_timeout, server);
    let ((), ended) = tokio::join!(app.admin.runner.shutdown(), ended);
    app.store.close().await;
    match ended {
        Ok(_) => Ok(()),
        Err(_) => Err(CommandError::from(format!(
            "requests were still in flight after --shutdown-timeout, {shutdown_timeout:?}"
        ))),
    }
}

/// The parts of a running server.
struct App {
    state: AppState,
    store: Store,
    admin: AdminConfig,
}

impl App {
    async fn start(
        config: ServeConfig,
        readiness: Readiness,
        metrics: Arc<Metrics>,
    ) -> Result<Self, CommandError> {
        let store = Store::open(&config.state).await?;
        let failed = Arc::clone(&metrics);
        store.on_failed_write(move || failed.store_failed());
        let (student, identity, placement) = load_student(&config, &store).await?;
        let identity = Arc::new(identity);
        store.settle_versions(&identity.known).await?;
        let gpu = placement.device().clone();
        metrics.student_on_gpu(move || device::memory(&gpu));
        if let Some(folder) = &config.adapters {
            add_shipped(&store, folder).await?;
        }
        let loader = Loader::new(student.clone(), config.adapter_host_memory);
        let residents = Residents::new(
            Arc::new(loader),
            config.adapter_memory,
            Arc::clone(&metrics),
        );
        let tasks = Arc::new(TaskTable::default());
        let publisher = Publisher::new(
            store.clone(),
            Arc::clone(&tasks),
            Arc::clone(&residents),
            config.wishes.clone(),
            Arc::clone(&identity),
            Arc::clone(&metrics),
        );
        publisher.start().await?;
        if let Some(name) = &config.default_task
            && tasks.get(name).is_none()
        {
            // It may be made later.
            tracing::warn!(task = name, "--default-task names no task that there is");
        }
        let tried_on = student.clone();
        let check_adapter: AdapterCheck = Arc::new(move |folder: &Path| tried_on.check(folder));
        let device = placement.device_name();
        let parts = JobParts {
            device,
            publisher,
            check_adapter,
            student: identity,
        };
        let admin = start_jobs(&config, parts, &store, &metrics)?;

        let gpu = placement.is_gpu();
        let options = Options {
            // One prepares a batch while the GPU computes the other's.
            workers: if gpu { 2 } else { config.threads },
            // Tokenising a text takes a few percent of its forward pass on a core; a GPU waits for
            // tokens.
            tokenizer_threads: match gpu {
                true => config.threads,
                false => config.threads.div_ceil(4),
            },
            max_batch_tokens: config.max_batch_tokens.unwrap_or(match gpu {
                true => GPU_BATCH_TOKENS,
                false => CPU_BATCH_TOKENS,
            }),
            max_queue: config.max_queue,
            max_wait: config.max_queue_wait,
            max_length: student
                .tokenizer
                .max_length(student.encoder.config().max_sequence_length()),
        };
        let first = tasks.all().values().find_map(|entry| entry.resident());
        if let Some(task) = first {
            let warm = student.clone();
            spawn_blocking(move || warm.warm_up(&task, options.max_batch_tokens)).await??;
        }
        let Student { encoder, tokenizer } = student;
        let model: Arc<dyn Model> = match gpu {
            true => encoder,
            false => Arc::new(SharedCores::new(encoder, config.threads)?),
        };
        let serving = Serving::start(
            model,
            Arc::new(tokenizer),
            residents,
            options,
            Arc::clone(&metrics),
        )?;
        let state = AppState {
            tasks,
            serving: Arc::new(serving),
            metrics,
            readiness,
            limits: limits(&config),
            request_timeout: config.request_timeout,
            default_task: config.default_task.as_deref().map(Into::into),
            engine: options,
            dtype: placement.dtype_name(),
        };
        Ok(Self {
            state,
            store,
            admin,
        })
    }

    fn router(&self, edge: &Edge) -> Router {
        let admin = admin::routes(self.admin.clone());
        let versions = http::versions::routes(self.store.clone());
        http::router(self.state.clone(), edge, admin, versions)
    }
}

/// What distillation jobs and the admin routes take from the serving part.
struct JobParts {
    /// Where the student computes, as `--device` has it.
    device: String,
    publisher: Publisher,
    check_adapter: AdapterCheck,
    student: Arc<EncoderIdentity>,
}

/// Starts the runner of distillation jobs, and what the admin routes need with it.
fn start_jobs(
    config: &ServeConfig,
    parts: JobParts,
    store: &Store,
    metrics: &Arc<Metrics>,
) -> Result<AdminConfig, CommandError> {
    let JobParts {
        device,
        publisher,
        check_adapter,
        student,
    } = parts;
    let live_hook = LiveHook::new(move |task| {
        let publisher = publisher.clone();
        async move { Ok(publisher.refresh(&task).await?) }
    });
    let cache = cache_folder(config)?;
    let mut environment = vec![
        ("KDLORA_STUDENT".into(), student.id.name.clone().into()),
        ("KDLORA_CACHE".into(), cache.clone().into()),
        (
            "KDLORA_THREADS".into(),
            config.job_threads.to_string().into(),
        ),
        ("KDLORA_DEVICE".into(), device.into()),
        (
            "KDLORA_GPU_SHARE".into(),
            config.job_gpu.share.to_string().into(),
        ),
    ];
    if let Some(bytes) = config.job_gpu.memory {
        let variable = "KDLORA_GPU_MEMORY_LIMIT".into();
        environment.push((variable, bytes.to_string().into()));
    }
    if !config.teacher_origins.is_empty() {
        let origins: Vec<_> = config
            .teacher_origins
            .iter()
            .map(ToString::to_string)
            .collect();
        environment.push(("KDLORA_TEACHER_ORIGIN".into(), origins.join(",").into()));
    } else if env::var_os(TOKEN_VARIABLE).is_some() {
        tracing::warn!("{TOKEN_VARIABLE} is set, but --teacher-origin names nobody to send it to");
    }
    if let Some(adapters) = &config.adapters {
        environment.push(("KDLORA_ADAPTERS".into(), adapters.into()));
    }
    let runner = RunnerConfig {
        program: env::current_exe()?,
        arguments: vec!["distill".into(), "--job".into()],
        // A job distils for the student that serves, whether a flag named it or the file.
        environment,
        live_hook: live_hook.clone(),
        metrics: Arc::clone(metrics),
        limits: config.job_limits,
        private: private_folders(config)?,
    };
    Ok(AdminConfig {
        store: store.clone(),
        runner: Runner::start(store.clone(), runner),
        live_hook,
        check_adapter,
        data_root: config.data_root.clone(),
        adapters: config.adapters.clone(),
        teachers: TeacherDesk::start(ask::Settings {
            cache: cache.clone(),
            memory: config.teacher_memory,
            idle: TEACHER_IDLE,
            known: student.known.clone(),
        })?,
        student,
        cache,
        limits: limits(config),
        max_upload_bytes: config.max_upload_bytes,
        max_event_streams: (config.edge.connections.connections / 4).clamp(1, MAX_EVENT_STREAMS),
    })
}

fn limits(config: &ServeConfig) -> Limits {
    Limits {
        body_bytes: config.max_body_bytes,
        inputs: config.max_inputs,
        text_chars: config.max_text_chars,
    }
}

/// The folders of the server itself, and those below which clients name files.
fn private_folders(config: &ServeConfig) -> Result<PrivateFolders, CommandError> {
    let cache = cache_folder(config)?;
    let named = [&config.adapters, &config.data_root].into_iter().flatten();
    let folders = [&config.state, &cache].into_iter().chain(named);
    Ok(PrivateFolders::new(folders.map(PathBuf::as_path)))
}

fn cache_folder(config: &ServeConfig) -> Result<PathBuf, CommandError> {
    match &config.cache {
        Some(cache) => Ok(cache.clone()),
        None => Ok(hub::cache_dir()?),
    }
}

/// Loads the student, fetching it if it is missing: the one of the settings, or else the one that
/// the state folder was served with before. The state folder remembers it from then on.
async fn load_student(
    config: &ServeConfig,
    store: &Store,
) -> Result<(Student, EncoderIdentity, Placement), CommandError> {
    let remembered = store.student().await?;
    let named = config.student.clone().or_else(|| remembered.clone());
    let name = named.unwrap_or_else(|| DEFAULT_STUDENT.to_owned());
    let lasting = hub::Choice::parse(&name)?.absolute().to_string();
    if let Some(before) = remembered.filter(|before| *before != lasting) {
        tracing::warn!(
            before,
            now = lasting,
            "the state folder was served with another student before; its versions do not answer \
             with this one"
        );
    }
    let (cache, compute) = (cache_folder(config)?, config.compute);
    let load = move || load_student_from(name, &cache, compute);
    let loaded = spawn_blocking(load).await??;
    store.set_student(&lasting).await?;
    Ok(loaded)
}

fn load_student_from(
    name: String,
    cache: &Path,
    compute: Compute,
) -> Result<(Student, EncoderIdentity, Placement), CommandError> {
    let folder = hub::pull(&name, cache, true)?;
    let placement = compute.open()?;
    let encoder = placement.load_for_inference(&folder)?;
    let tokenizer = Tokenizer::load(&folder)?;
    let (words, known) = (tokenizer.vocabulary(), encoder.config().vocab_size);
    if words > known {
        return Err(CommandError::from(format!(
            "the tokenizer of {name} has {words} tokens, but its encoder knows only {known}; \
             they don't belong together"
        )));
    }
    let identity = identity(&name, &folder, cache)?;
    tracing::info!(
        student = name,
        digest = identity.id.digest,
        parameters = encoder.parameters(),
        device = placement.device_name(),
        dtype = placement.dtype_name(),
        "student loaded"
    );
    let student = Student {
        encoder: Arc::new(encoder),
        tokenizer,
    };
    Ok((student, identity, placement))
}

/// Adds the ready-made adapters, `{folder}/{task}/student`. One that can't be added is logged: the
/// tasks of the store answer without it.
async fn add_shipped(store: &Store, folder: &Path) -> Result<(), CommandError> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let adapter = entry.path().join("student");
        let Ok(task) = entry.file_name().into_string() else {
            continue;
        };
        if !adapter.is_dir() {
            continue;
        }
        if let Err(error) = store.ensure_shipped(&task, &adapter).await {
            tracing::error!(
                task,
                error = chain(&error),
                "a ready-made adapter can't be added"
            );
        }
    }
    Ok(())
}
