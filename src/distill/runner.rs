//! Runs queued jobs, one at a time, each in a process of its own.
//!
//! The process is `PROGRAM ARGUMENTS --spec SPEC --out FOLDER --state-cache FOLDER --resume`. It
//! reports [`Event`]s on standard output and ends when its standard input is closed, so that it
//! does not outlive a server that is killed. If it is killed itself, it is started again and goes
//! on from its last checkpoint, a few times; any other end without a result (an error, a crash)
//! ends the job with a reason, and nothing else.

mod environment;
mod limits;
mod process;

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{Mutex, Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::parse;
use crate::private_folders::PrivateFolders;
use crate::store::{Change, ChangeKind, Job, JobState, MAX_ATTEMPTS, Store, StoreError};
use crate::telemetry::{Metrics, chain};
pub use limits::JobLimits;
use process::{Ending, Supervisor};

/// After a failure of the database.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// After the system had no process, file or space for a job.
const START_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Brings a task, given by name, into service as the store has it by then. Given by the server;
/// called after each promotion, rollback and withdrawal.
#[derive(Clone)]
pub struct LiveHook(Arc<dyn Fn(String) -> HookFuture + Send + Sync>);

type HookFuture = Pin<Box<dyn Future<Output = Result<(), HookError>> + Send>>;

/// Why a version cannot be taken into service.
pub type HookError = Box<dyn Error + Send + Sync>;

impl LiveHook {
    pub fn new<F, Fut>(hook: F) -> Self
    where
        F: Fn(String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), HookError>> + Send + 'static,
    {
        Self(Arc::new(move |task| Box::pin(hook(task))))
    }

    /// Brings the task into service as the store has it.
    pub async fn refresh(&self, task: &str) -> Result<(), HookError> {
        (self.0)(task.to_owned()).await
    }

    /// Takes the task's live version into service. If that fails, the task's row goes back to the
    /// version that it has been answering with all along.
    pub async fn apply(&self, store: &Store, task: &str) -> Result<(), HookError> {
        let Err(error) = self.refresh(task).await else {
            return Ok(());
        };
        let reason = format!("could not be taken into service: {}", chain(&*error));
        if let Err(error) = undo(store, task, &reason).await {
            tracing::error!(task, %error, "could not go back to the version in service");
        }
        Err(error)
    }
}

/// Undoes the task's last change.
async fn undo(store: &Store, task: &str, reason: &str) -> Result<(), StoreError> {
    let history = store.history(task).await?;
    match history.last() {
        Some(Change {
            kind: ChangeKind::Rollback,
            previous: Some(previous),
            ..
        }) => store.promote(task, *previous, "server", reason).await?,
        _ => store.rollback(task, "server", reason).await?,
    };
    Ok(())
}

impl fmt::Debug for LiveHook {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("LiveHook")
    }
}

/// What the processes are started with.
#[derive(Clone)]
pub struct RunnerConfig {
    /// Usually the running program itself.
    pub program: PathBuf,
    /// Before the arguments that name the job: `distill`, and what all jobs share.
    pub arguments: Vec<OsString>,
    /// Variables that the processes get beside those of the server that they need.
    pub environment: Vec<(OsString, OsString)>,
    pub live_hook: LiveHook,
    pub metrics: Arc<Metrics>,
    /// Bounds of every process; a request may ask for tighter ones.
    pub limits: JobLimits,
    /// Folders whose place is left out of the reason why a job failed.
    pub private: PrivateFolders,
}

/// The one who runs jobs. Clones are handles of the same one.
#[derive(Clone)]
pub struct Runner {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    config: RunnerConfig,
    /// A job has been queued.
    wake: Notify,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// Some job is not what it was.
    changes: watch::Sender<()>,
    /// Locked while a job is taken from the queue, so that a cancellation finds every job either
    /// in the queue or here.
    running: Mutex<Option<Running>>,
}

#[derive(Clone, Debug)]
struct Running {
    id: String,
    cancel: CancellationToken,
    /// Cancelled when the process has ended and the database has refused to record how.
    unrecorded: CancellationToken,
    /// Cancelled when the job's row says how it ended.
    ended: CancellationToken,
}

/// What becomes of a job whose process has ended.
enum After {
    IsOver,
    /// In the queue, for its next attempt.
    Waits,
    /// In the queue, until the system has room for its process.
    WaitsForRoom,
}

/// The part of a spec that the runner needs.
#[derive(Deserialize)]
struct Wishes {
    promote: bool,
}

/// The part of a report that the runner needs.
#[derive(Default, Deserialize)]
struct Verdict {
    gate: Option<GateVerdict>,
}

#[derive(Deserialize)]
struct GateVerdict {
    passed: bool,
}

impl Runner {
    /// Starts to run jobs, those first that an earlier server left in the queue. Must be called
    /// within a Tokio runtime.
    pub fn start(store: Store, config: RunnerConfig) -> Self {
        let shared = Arc::new(Shared {
            store,
            config,
            wake: Notify::new(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            changes: watch::Sender::new(()),
            running: Mutex::new(None),
        });
        let worker = Arc::clone(&shared);
        shared.tasks.spawn(async move { worker.work().await });
        Self { shared }
    }

    /// Says that a job has been queued.
    pub fn wake(&self) {
        self.shared.wake.notify_one();
        let shared = Arc::clone(&self.shared);
        self.shared
            .tasks
            .spawn(async move { shared.count_jobs().await });
    }

    /// Cancels a job, queued or running, and returns it as it ended. A job that has ended already
    /// is [`StoreError::JobOver`].
    pub async fn cancel(&self, id: &str) -> Result<Job, StoreError> {
        let store = &self.shared.store;
        loop {
            let running = {
                let running = self.shared.running.lock().await;
                match running.as_ref().filter(|running| running.id == id) {
                    Some(running) => running.clone(),
                    // No process: while the lock is held none is started.
                    None => {
                        let job = store.cancel_job(id).await?;
                        self.shared.clear(id).await;
                        self.shared.count_jobs().await;
                        return Ok(job);
                    }
                }
            };
            running.cancel.cancel();
            tokio::select! {
                () = running.ended.cancelled() => {}
                // The process is gone. The answer must not wait until there is room on the disk.
                () = running.unrecorded.cancelled() => match store.cancel_job(id).await {
                    // Recorded after all.
                    Err(StoreError::JobOver { .. }) => {}
                    cancelled => return cancelled,
                },
            }
            let job = store.job(id).await?;
            match job.state {
                JobState::Cancelled => return Ok(job),
                state if state.is_over() => {
                    return Err(StoreError::JobOver { id: job.id, state });
                }
                // Its process was killed by somebody else first, so it is in the queue again.
                _ => {}
            }
        }
    }

    /// Waits until a job whose row says that it is over is dealt with to the end: who reads of a
    /// promoted version finds it in service.
    pub async fn settle(&self, job: &Job) {
        let running = self.shared.running.lock().await.clone();
        if let Some(running) = running
            && running.id == job.id
            && job.state.is_over()
        {
            running.ended.cancelled().await;
        }
    }

    /// Tells of every change of any job, from here on. Look into the store for what has changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.shared.changes.subscribe()
    }

    /// Completes when the runner has been told to stop.
    pub async fn stopping(&self) {
        self.shared.stop.cancelled().await;
    }

    /// Stops the running process, puts its job back into the queue, and returns when that is
    /// recorded. Queued jobs wait for the next server.
    pub async fn shutdown(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Shared {
    async fn work(&self) {
        self.count_jobs().await;
        while !self.stop.is_cancelled() {
            match self.take().await {
                Ok(Some((job, running))) => {
                    let after = self.run(&job, &running).await;
                    *self.running.lock().await = None;
                    running.ended.cancel();
                    if let Some(After::WaitsForRoom) = after {
                        self.pause(tokio::time::sleep(START_AGAIN_AFTER)).await;
                    }
                }
                Ok(None) => self.pause(self.wake.notified()).await,
                Err(error) => {
                    tracing::error!(%error, "could not take a job from the queue");
                    self.pause(tokio::time::sleep(RETRY_AFTER)).await;
                }
            }
        }
    }

    /// Waits, but not beyond the stop.
    async fn pause(&self, until: impl Future<Output = ()>) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = until => {}
        }
    }

    async fn take(&self) -> Result<Option<(Job, Running)>, StoreError> {
        let mut running = self.running.lock().await;
        let Some(job) = self.store.start_next_job().await? else {
            return Ok(None);
        };
        let entry = Running {
            id: job.id.clone(),
            cancel: CancellationToken::new(),
            unrecorded: CancellationToken::new(),
            ended: CancellationToken::new(),
        };
        *running = Some(entry.clone());
        drop(running);
        self.count_jobs().await;
        Ok(Some((job, entry)))
    }

    /// Brings the metrics up to date, and tells of the change.
    async fn count_jobs(&self) {
        self.changes.send_replace(());
        let counts = match self.store.job_counts().await {
            Ok(counts) => counts,
            Err(error) => return tracing::warn!(%error, "could not count jobs"),
        };
        for state in JobState::ALL {
            let count = counts.iter().find(|(counted, _)| *counted == state);
            let count = count.map_or(0, |(_, count)| *count);
            self.config.metrics.jobs(state.as_str(), count);
        }
    }

    /// Runs a job's process to its end. `None` when that could not be recorded.
    async fn run(&self, job: &Job, running: &Running) -> Option<After> {
        tracing::info!(job = job.id, task = job.task, "job started");
        let supervisor = Supervisor {
            store: &self.store,
            config: &self.config,
            folder: self.store.job_folder(&job.id),
            job,
            cancel: &running.cancel,
            stop: &self.stop,
            changes: &self.changes,
        };
        let ending = supervisor.run().await;
        self.config.metrics.training(None, None);
        self.config.metrics.training_gpu_memory(None);
        let after = loop {
            match self.record(job, &ending).await {
                // Cancelled while the row could not be written.
                Ok(After::IsOver) | Err(StoreError::JobOver { .. }) => {
                    self.clear(&job.id).await;
                    break Some(After::IsOver);
                }
                Ok(waits) => break Some(waits),
                Err(error) => {
                    let error = chain(&error);
                    tracing::error!(job = job.id, error, "could not record how the job ended");
                }
            }
            running.unrecorded.cancel();
            self.pause(tokio::time::sleep(RETRY_AFTER)).await;
            if self.stop.is_cancelled() {
                // The row stays at "running"; the next server puts it back into the queue.
                break None;
            }
        };
        self.count_jobs().await;
        after
    }

    /// Clears the folder of a job whose row says that it is over. What is left because of an error
    /// is removed by the next server.
    async fn clear(&self, id: &str) {
        if let Err(error) = self.store.clear_job_folder(id).await {
            let error = chain(&error);
            tracing::warn!(job = id, error, "could not clear the job's folder");
        }
    }

    /// Writes down how a job ended. After an error nothing has changed, and it can be tried again.
    async fn record(&self, job: &Job, ending: &Ending) -> Result<After, StoreError> {
        match ending {
            Ending::Done { out } => self.keep(job, out).await?,
            Ending::Cancelled => {
                self.store.cancel_job(&job.id).await?;
            }
            Ending::Interrupted => {
                self.store.requeue_job(&job.id, false).await?;
                return Ok(After::Waits);
            }
            Ending::Later(error) => {
                self.store.requeue_job(&job.id, false).await?;
                tracing::warn!(
                    job = job.id,
                    task = job.task,
                    %error,
                    "the job's process could not be started; it is tried again"
                );
                return Ok(After::WaitsForRoom);
            }
            Ending::Killed(reason) if job.attempts < MAX_ATTEMPTS => {
                self.store.requeue_job(&job.id, true).await?;
                tracing::warn!(job = job.id, task = job.task, reason, "job is tried again");
                return Ok(After::Waits);
            }
            Ending::Killed(reason) => {
                let reason = format!("{reason}; it was tried {} times", job.attempts);
                self.fail(job, &reason).await?;
            }
            Ending::Failed(reason) => self.fail(job, reason).await?,
        }
        tracing::info!(job = job.id, task = job.task, "job ended");
        Ok(After::IsOver)
    }

    async fn fail(&self, job: &Job, reason: &str) -> Result<(), StoreError> {
        tracing::warn!(job = job.id, task = job.task, reason, "job failed");
        let reason = self.config.private.hide(reason);
        self.store.fail_job(&job.id, &reason).await?;
        Ok(())
    }

    /// Makes a version of the output, and promotes it if that is wanted and the gate says yes.
    async fn keep(&self, job: &Job, out: &Path) -> Result<(), StoreError> {
        let spec = self.store.job_spec(&job.id).await?;
        let promote = match self.promotion(spec, out).await {
            Ok(promote) => promote,
            Err(error) => {
                let reason = format!("the report of the pass cannot be used: {error}");
                return self.fail(job, &reason).await;
            }
        };
        let finished = self
            .store
            .finish_with_version(&job.id, out, promote.as_deref())
            .await;
        let version = match finished {
            Ok(version) => version,
            Err(error @ StoreError::JobOver { .. }) => return Err(error),
            Err(error) if error.is_temporary() => return Err(error),
            Err(error) => {
                let reason = format!("the version could not be kept: {}", chain(&error));
                return self.fail(job, &reason).await;
            }
        };
        if promote.is_some()
            && let Err(error) = self
                .config
                .live_hook
                .apply(&self.store, &version.task)
                .await
        {
            tracing::error!(job = job.id, task = job.task, %error, "version not in service");
        }
        Ok(())
    }

    /// The reason to promote, if there is one.
    async fn promotion(&self, spec: Value, out: &Path) -> Result<Option<String>, HookError> {
        let wishes: Wishes = parse::value(spec)?;
        let report = tokio::fs::read(out.join("report.json")).await?;
        let verdict: Verdict = parse::json(&report)?;
        let passed = verdict.gate.is_some_and(|gate| gate.passed);
        Ok((wishes.promote && passed).then(|| "passed the gate".to_owned()))
    }
}

#[cfg(test)]
mod tests;
