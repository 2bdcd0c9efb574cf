//! One job's process: started, listened to, and ended.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::limits::Exceeded;
use super::{RunnerConfig, environment};
use crate::distill::progress::{Event, Stage};
use crate::distill::spec::JobSpec;
use crate::parse;
use crate::store::{Job, Progress, Store};

/// Steps are written to the database no more often.
const RECORD_EVERY: Duration = Duration::from_millis(500);

/// Of a crashed process's log, at most this much goes into the job's reason.
const LOG_TAIL_BYTES: u64 = 2_000;
const LOG_TAIL_LINES: usize = 5;

/// How a process came to its end.
pub(super) enum Ending {
    /// The output folder is complete.
    Done {
        out: PathBuf,
    },
    Cancelled,
    /// The server stops; another one may go on.
    Interrupted,
    /// By a signal from elsewhere; the next attempt goes on. With the reason for the user, should
    /// there be none.
    Killed(String),
    /// The system has no process, file or space for it at present; nothing has been started.
    Later(io::Error),
    /// With the reason for the user.
    Failed(String),
}

/// Runs the process of one job.
pub(super) struct Supervisor<'a> {
    pub(super) store: &'a Store,
    pub(super) config: &'a RunnerConfig,
    pub(super) folder: PathBuf,
    pub(super) job: &'a Job,
    pub(super) cancel: &'a CancellationToken,
    pub(super) stop: &'a CancellationToken,
    /// Told of all progress that is recorded.
    pub(super) changes: &'a watch::Sender<()>,
}

/// The part of a spec that bounds the process.
#[derive(Deserialize)]
struct Bounded {
    #[serde(default)]
    job: JobSpec,
}

/// The last word of the process itself.
enum Verdict {
    Done,
    Failed(String),
}

/// What ends a process from outside.
enum Interrupt {
    Cancelled,
    Stopped,
    Exceeded(Exceeded),
}

impl From<Interrupt> for Ending {
    fn from(interrupt: Interrupt) -> Self {
        match interrupt {
            Interrupt::Cancelled => Self::Cancelled,
            Interrupt::Stopped => Self::Interrupted,
            Interrupt::Exceeded(exceeded) => Self::Failed(exceeded.to_string()),
        }
    }
}

impl Supervisor<'_> {
    pub(super) async fn run(&self) -> Ending {
        let (mut child, job) = match self.start().await {
            Ok(started) => started,
            Err(error) if is_shortage(&error) => return Ending::Later(error),
            Err(error) => {
                return Ending::Failed(format!("the process could not be started: {error}"));
            }
        };
        // Held open: the process ends when it is closed.
        let lifeline = child.stdin.take();
        let process = child.id();
        let interrupt = self.interrupt(process, &job);
        let mut interrupt = pin!(interrupt);
        let heard = match child.stdout.take() {
            Some(output) => self.listen(output, interrupt.as_mut()).await,
            None => Ok(None),
        };
        let ending = self.conclude(heard, &mut child, interrupt).await;
        // What the process has started, such as a download, ends with it.
        kill_group(process);
        drop(lifeline);
        ending
    }

    /// Completes when the process is to be ended.
    async fn interrupt(&self, process: Option<u32>, job: &JobSpec) -> Interrupt {
        let limits = self.config.limits.tightened(job);
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Interrupt::Cancelled,
            () = self.stop.cancelled() => Interrupt::Stopped,
            exceeded = limits.exceeded_by(process) => Interrupt::Exceeded(exceeded),
        }
    }

    /// The process, and how it is to be run.
    async fn start(&self) -> io::Result<(Child, JobSpec)> {
        let spec = self.store.job_spec(&self.job.id).await;
        let spec = spec.map_err(io::Error::other)?;
        let Bounded { job } = parse::value(spec.clone())?;
        tokio::fs::create_dir_all(&self.folder).await?;
        let spec_path = self.folder.join("spec.json");
        tokio::fs::write(&spec_path, spec.to_string()).await?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let child = Command::new(&self.config.program)
            .env_clear()
            .envs(environment::for_job(&spec))
            .args(&self.config.arguments)
            .arg("--spec")
            .arg(spec_path)
            .arg("--out")
            .arg(self.out())
            .arg("--state-cache")
            .arg(self.store.cache_folder())
            .arg("--resume")
            .envs(self.config.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            // A group of its own, to be killed with all that it has started. Ctrl-C in the
            // server's terminal is for the server, which then stops the process.
            .process_group(0)
            .spawn()?;
        Ok((child, job))
    }

    /// Follows the events until the process closes its output, and gives its last word, if it had
    /// one. The interrupt is looked at first: a process that talks without pause must not drown it.
    async fn listen(
        &self,
        output: ChildStdout,
        mut interrupt: Pin<&mut impl Future<Output = Interrupt>>,
    ) -> Result<Option<Verdict>, Interrupt> {
        let mut lines = BufReader::new(output).lines();
        let mut record = tokio::time::interval(RECORD_EVERY);
        record.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut progress = Progress::default();
        let mut changed = false;
        let mut verdict = None;
        loop {
            tokio::select! {
                biased;
                interrupt = &mut interrupt => return Err(interrupt),
                _ = record.tick(), if changed => {
                    changed = false;
                    self.record(&progress).await;
                }
                event = next_event(&mut lines) => match event {
                    Some(Event::Stage { stage }) => {
                        progress = Progress { stage: name(stage), ..Progress::default() };
                        changed = false;
                        self.record(&progress).await;
                    }
                    Some(Event::Data { warnings }) => self.record_warnings(&warnings).await,
                    Some(Event::Step(step)) => {
                        progress.step = step.step as u64;
                        progress.steps = step.steps as u64;
                        // Lines without a loss stand between lines with one.
                        progress.loss = step.loss.or(progress.loss);
                        progress.tokens_per_second = Some(step.tokens_per_second);
                        progress.eta_seconds = Some(step.eta_seconds);
                        if step.gpu_peak_bytes.is_some() {
                            self.config.metrics.training_gpu_memory(step.gpu_peak_bytes);
                        }
                        changed = true;
                    }
                    Some(Event::Done) => verdict = Some(Verdict::Done),
                    Some(Event::Failed { error }) => verdict = Some(Verdict::Failed(error)),
                    None => break,
                },
            }
        }
        if changed {
            self.record(&progress).await;
        }
        Ok(verdict)
    }

    /// Progress that cannot be written is no reason to lose the job.
    async fn record(&self, progress: &Progress) {
        let metrics = &self.config.metrics;
        metrics.training(progress.loss, progress.tokens_per_second);
        if let Err(error) = self.store.record_progress(&self.job.id, progress).await {
            tracing::warn!(job = self.job.id, %error, "could not record progress");
        }
        self.changes.send_replace(());
    }

    async fn record_warnings(&self, warnings: &[String]) {
        if let Err(error) = self.store.record_warnings(&self.job.id, warnings).await {
            tracing::warn!(job = self.job.id, %error, "could not record warnings");
        }
        self.changes.send_replace(());
    }

    async fn conclude(
        &self,
        heard: Result<Option<Verdict>, Interrupt>,
        child: &mut Child,
        interrupt: Pin<&mut impl Future<Output = Interrupt>>,
    ) -> Ending {
        let ended = match heard {
            Err(interrupt) => Err(interrupt),
            Ok(verdict) => tokio::select! {
                biased;
                interrupt = interrupt => Err(interrupt),
                status = child.wait() => Ok((status, verdict)),
            },
        };
        let (status, verdict) = match ended {
            Ok(ended) => ended,
            Err(interrupt) => {
                kill(child).await;
                return interrupt.into();
            }
        };
        match (status, verdict) {
            (_, Some(Verdict::Failed(error))) => Ending::Failed(error),
            (Ok(status), Some(Verdict::Done)) if status.success() => {
                Ending::Done { out: self.out() }
            }
            (Ok(status), _) if status.signal().is_some() => {
                Ending::Killed(self.crash(status).await)
            }
            (Ok(status), _) => Ending::Failed(self.crash(status).await),
            (Err(error), _) => Ending::Failed(format!("the process was lost: {error}")),
        }
    }

    /// The reason of a process that ended without a word of its own.
    async fn crash(&self, status: ExitStatus) -> String {
        let what = match (status.signal(), status.code()) {
            (Some(9), _) => "was killed by signal 9 (out of memory?)".to_owned(),
            (Some(signal), _) => format!("was killed by signal {signal}"),
            (None, Some(code)) => format!("ended with status {code} and without a result"),
            (None, None) => "ended without a result".to_owned(),
        };
        let log = self.store.job_log(&self.job.id, LOG_TAIL_BYTES).await;
        let log = log.unwrap_or_default();
        let lines: Vec<_> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        let last = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
        if last.is_empty() {
            return format!("the process {what}");
        }
        format!("the process {what}; its log ends with: {last}")
    }

    fn out(&self) -> PathBuf {
        self.folder.join("out")
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("log.txt")
    }
}

/// Whether the system lacks something that others will give back: processes, files, memory or space.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [
        libc::EAGAIN,
        libc::EDQUOT,
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::ENOSPC,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| shortages.contains(&code))
}

/// The next line that is an event; `None` when the output is closed or unreadable.
async fn next_event(lines: &mut Lines<BufReader<ChildStdout>>) -> Option<Event> {
    loop {
        let line = match lines.next_line().await {
            Ok(line) => line?,
            Err(error) => {
                tracing::warn!(%error, "the output of a job's process cannot be read");
                return None;
            }
        };
        match parse::json(line.as_bytes()) {
            Ok(event) => return Some(event),
            Err(_) => tracing::warn!(line, "a job's process wrote something that is no event"),
        }
    }
}

/// The stage's name as it stands in JSON.
fn name(stage: Stage) -> String {
    match serde_json::to_value(stage) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

async fn kill(child: &mut Child) {
    // The group first, while the process itself is there to keep the group's number taken.
    kill_group(child.id());
    if let Err(error) = child.kill().await {
        tracing::warn!(%error, "could not kill a job's process");
    }
}

/// Kills what is left of the group of a process. The group's number is not given to another one as
/// long as somebody is in it.
fn kill_group(process: Option<u32>) {
    let process = process.and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    match process.map(|process| kill_process_group(process, Signal::KILL)) {
        Some(Err(error)) if error != Errno::SRCH => {
            tracing::warn!(%error, "could not kill what a job's process has started");
        }
        _ => {}
    }
}
