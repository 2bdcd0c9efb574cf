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

use super::CommandError;
use crate::config::{RawServe, ServeConfig};
use crate::distill::ask::{self, TeacherDesk};
use crate::distill::runner::{LiveHook, Runner, RunnerConfig};
use crate::encoder::Placement;
use crate::http::admin::{self, AdapterCheck, AdminConfig};
use crate::http::auth::Access;
use crate::http::health::Readiness;
use crate::http::{self, AppState, Edge, Limits, server};
use crate::hub;
use crate::ops::device;
use crate::serving::{
    Loader, Model, Options, Publisher, Residents, Serving, SharedCores, Student, TaskTable,
};
use crate::store::{Store, StoreError};
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

/// Longer batches win nothing on a core and make others wait; a GPU is not busy with shorter ones.
const CPU_BATCH_TOKENS: usize = 128;
const GPU_BATCH_TOKENS: usize = 16_384;

/// Runs the server until SIGTERM or SIGINT; a second signal ends the process at once.
///
/// # Errors
/// It can't start, or requests were still in flight when `--shutdown-timeout` was over.
pub fn run(args: Args) -> Result<(), CommandError> {
    let config = ServeConfig::load(args.settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let mut stop = StopSignal::listen()?;
        let listener = bind(config.bind).await?;
        let shutdown = async move {
            stop.received().await;
            tracing::info!("stopping; a second signal ends the process at once");
            tokio::spawn(async move {
                stop.received().await;
                process::exit(INTERRUPTED);
            });
        };
        serve(listener, config, shutdown).await
    });
    // A fetch or a forward pass that is still under way must not keep the process.
    runtime.shutdown_background();
    outcome
}

async fn bind(address: SocketAddr) -> Result<TcpListener, CommandError> {
    TcpListener::bind(address).await.map_err(|error| {
        let text = format!("can't listen on {address}: {error}; choose another with --bind");
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

/// Serves on `listener` until `shutdown` completes, then finishes what is in flight.
///
/// Liveness, readiness and metrics answer from the beginning, the rest when the student and the
/// tasks are loaded; then one line with the address goes to standard output.
pub async fn serve(
    listener: TcpListener,
    config: ServeConfig,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), CommandError> {
    let address = listener.local_addr()?;
    let (shutdown_delay, shutdown_timeout) = (config.shutdown_delay, config.shutdown_timeout);
    let metrics = Arc::new(Metrics::new()?);
    let readiness = Readiness::default();
    let edge = Edge {
        access: Access::new(config.edge.access(address.ip().is_loopback())),
        cors_origins: config.edge.cors_origins.clone(),
        read_timeout: config.edge.connections.read_timeout,
    };
    let starting = http::starting(readiness.clone(), Arc::clone(&metrics), &edge);
    let current = Arc::new(ArcSwap::from_pointee(starting));
    let stop = CancellationToken::new();
    let router = http::switchable(Arc::clone(&current));
    let connections = config.edge.connections;
    let server = server::serve(listener, router, connections, stop.clone());
    let server = tokio::spawn(server);
    // Whatever the way out, the listener closes.
    let _stop = stop.clone().drop_guard();

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
        let (student, placement) = load_student(&config).await?;
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
        );
        publisher.start().await?;
        let tried_on = student.clone();
        let check_adapter: AdapterCheck = Arc::new(move |folder: &Path| tried_on.check(folder));
        let device = placement.device_name();
        let admin = start_jobs(&config, device, &store, publisher, check_adapter, &metrics)?;

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
            max_length: student.encoder.config().max_sequence_length(),
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

/// Starts the runner of distillation jobs, and what the admin routes need with it.
fn start_jobs(
    config: &ServeConfig,
    device: String,
    store: &Store,
    publisher: Publisher,
    check_adapter: AdapterCheck,
    metrics: &Arc<Metrics>,
) -> Result<AdminConfig, CommandError> {
    let live_hook = LiveHook::new(move |task| {
        let publisher = publisher.clone();
        async move { Ok(publisher.refresh(&task).await?) }
    });
    let cache = cache_folder(config)?;
    let mut environment = vec![
        ("KDLORA_STUDENT".into(), config.student.clone().into()),
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
    };
    Ok(AdminConfig {
        store: store.clone(),
        runner: Runner::start(store.clone(), runner),
        live_hook,
        check_adapter,
        student: config.student.clone(),
        data_root: config.data_root.clone(),
        adapters: config.adapters.clone(),
        teachers: TeacherDesk::start(ask::Settings {
            cache: cache.clone(),
            memory: config.teacher_memory,
            idle: TEACHER_IDLE,
        })?,
        cache,
        limits: limits(config),
        max_upload_bytes: config.max_upload_bytes,
    })
}

fn limits(config: &ServeConfig) -> Limits {
    Limits {
        body_bytes: config.max_body_bytes,
        inputs: config.max_inputs,
        text_chars: config.max_text_chars,
    }
}

fn cache_folder(config: &ServeConfig) -> Result<PathBuf, CommandError> {
    match &config.cache {
        Some(cache) => Ok(cache.clone()),
        None => Ok(hub::cache_dir()?),
    }
}

/// The student's folder, fetched if it is missing, and what is in it.
async fn load_student(config: &ServeConfig) -> Result<(Student, Placement), CommandError> {
    let cache = cache_folder(config)?;
    let (name, compute) = (config.student.clone(), config.compute);
    spawn_blocking(move || {
        let folder = hub::pull(&name, &cache, true)?;
        let placement = compute.open()?;
        let encoder = placement.load_for_inference(&folder)?;
        tracing::info!(
            student = name,
            parameters = encoder.parameters(),
            device = placement.device_name(),
            dtype = placement.dtype_name(),
            "student loaded"
        );
        let tokenizer = Tokenizer::load(&folder)?;
        let (words, known) = (tokenizer.vocabulary(), encoder.config().vocab_size);
        if words > known {
            return Err(CommandError::from(format!(
                "the tokenizer of {name} has {words} tokens, but its encoder knows only {known}; \
                 they don't belong together"
            )));
        }
        let student = Student {
            encoder: Arc::new(encoder),
            tokenizer,
        };
        Ok((student, placement))
    })
    .await?
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
        match store.ensure_shipped(&task, &adapter).await {
            Ok(_) => {}
            // The state folder itself fails: nothing after this would work either.
            Err(error @ (StoreError::Database(_) | StoreError::Migration(_))) => {
                return Err(error.into());
            }
            Err(error) => tracing::error!(
                task,
                error = chain(&error),
                "a ready-made adapter can't be added"
            ),
        }
    }
    Ok(())
}
