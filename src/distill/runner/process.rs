//! One job's process: started, listened to, and ended.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::RunnerConfig;
use crate::distill::progress::{Event, Stage};
use crate::store::{Job, Progress, Store};

/// Steps are written to the database no more often.
const RECORD_EVERY: Duration = Duration::from_millis(500);

/// Of a crashed process's log, at most this much goes into the job's reason.
const LOG_TAIL_BYTES: u64 = 2_000;
const LOG_TAIL_LINES: usize = 5;

const SERVER_STOPPED: &str = "the server stopped while the job was running";

/// How a process came to its end.
pub(super) enum Ending {
    /// The output folder is complete.
    Done {
        out: PathBuf,
    },
    Cancelled,
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
}

/// The last word of the process itself.
enum Verdict {
    Done,
    Failed(String),
}

/// Why listening ended.
enum Heard {
    /// Standard output was closed, perhaps after a last word.
    End(Option<Verdict>),
    Cancelled,
    Stopped,
}

impl Supervisor<'_> {
    pub(super) async fn run(&self) -> Ending {
        let mut child = match self.start().await {
            Ok(child) => child,
            Err(error) => {
                return Ending::Failed(format!("the process could not be started: {error}"));
            }
        };
        // Held open: the process ends when it is closed.
        let lifeline = child.stdin.take();
        let heard = match child.stdout.take() {
            Some(output) => self.listen(output).await,
            None => Heard::End(None),
        };
        let ending = self.conclude(heard, &mut child).await;
        drop(lifeline);
        ending
    }

    async fn start(&self) -> io::Result<Child> {
        let spec = self.store.job_spec(&self.job.id).await;
        let spec = spec.map_err(io::Error::other)?;
        tokio::fs::create_dir_all(&self.folder).await?;
        let spec_path = self.folder.join("spec.json");
        tokio::fs::write(&spec_path, spec.to_string()).await?;
        let log = File::create(self.log_path())?;
        Command::new(&self.config.program)
            .args(&self.config.arguments)
            .arg("--spec")
            .arg(spec_path)
            .arg("--out")
            .arg(self.out())
            .arg("--state-cache")
            .arg(self.store.cache_folder())
            .envs(self.config.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            // Ctrl-C in the server's terminal is for the server, which then stops the process.
            .process_group(0)
            .spawn()
    }

    /// Follows the events until the process closes its output. Cancellation and stop are looked
    /// at first: a process that talks without pause must not drown them.
    async fn listen(&self, output: ChildStdout) -> Heard {
        let mut lines = BufReader::new(output).lines();
        let mut record = tokio::time::interval(RECORD_EVERY);
        record.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut progress = Progress::default();
        let mut changed = false;
        let mut verdict = None;
        loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Heard::Cancelled,
                () = self.stop.cancelled() => return Heard::Stopped,
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
                    Some(Event::Step(step)) => {
                        progress.step = step.step as u64;
                        progress.steps = step.steps as u64;
                        // Lines without a loss stand between lines with one.
                        progress.loss = step.loss.or(progress.loss);
                        progress.tokens_per_second = Some(step.tokens_per_second);
                        progress.eta_seconds = Some(step.eta_seconds);
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
        Heard::End(verdict)
    }

    /// Progress that cannot be written is no reason to lose the job.
    async fn record(&self, progress: &Progress) {
        let metrics = &self.config.metrics;
        metrics.training(progress.loss, progress.tokens_per_second);
        if let Err(error) = self.store.record_progress(&self.job.id, progress).await {
            tracing::warn!(job = self.job.id, %error, "could not record progress");
        }
    }

    async fn conclude(&self, heard: Heard, child: &mut Child) -> Ending {
        let (status, verdict) = match heard {
            Heard::Cancelled => {
                kill(child).await;
                return Ending::Cancelled;
            }
            Heard::Stopped => {
                kill(child).await;
                return Ending::Failed(SERVER_STOPPED.to_owned());
            }
            Heard::End(verdict) => tokio::select! {
                biased;
                () = self.cancel.cancelled() => {
                    kill(child).await;
                    return Ending::Cancelled;
                }
                () = self.stop.cancelled() => {
                    kill(child).await;
                    return Ending::Failed(SERVER_STOPPED.to_owned());
                }
                status = child.wait() => (status, verdict),
            },
        };
        match (status, verdict) {
            (_, Some(Verdict::Failed(error))) => Ending::Failed(error),
            (Ok(status), Some(Verdict::Done)) if status.success() => {
                Ending::Done { out: self.out() }
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
        let path = self.log_path();
        let tail = tokio::task::spawn_blocking(move || tail(&path)).await;
        match tail {
            Ok(Ok(tail)) if !tail.is_empty() => {
                format!("the process {what}; its log ends with: {tail}")
            }
            _ => format!("the process {what}"),
        }
    }

    fn out(&self) -> PathBuf {
        self.folder.join("out")
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("log.txt")
    }
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
        match serde_json::from_str(&line) {
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
    if let Err(error) = child.kill().await {
        tracing::warn!(%error, "could not kill a job's process");
    }
}

fn tail(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    Ok(lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n"))
}
