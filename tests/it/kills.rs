//! SIGKILL at random moments of passes and of the server: whatever was acknowledged is there
//! afterwards, and nothing half done.
//!
//! `KDLORA_KILL_ROUNDS` says how often (a few by default), `KDLORA_KILL_SEED` draws other moments.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{
    Install, Server, eventually, is_over, job, job_processes, letters_or_digits, queue,
};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const DEFAULT_ROUNDS: u64 = 4;
/// Rows of a pass: enough for it to take its time in each stage.
const ROWS: usize = 600;

/// Splitmix64: a test's own dice.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A length of time from 0 up to `longest`.
    fn time(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.next() as f64 / u64::MAX as f64)
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A pass whose rows the teacher has to label: its answers go through the cache.
fn spec() -> Value {
    let rows = letters_or_digits(ROWS).into_iter().map(|mut row| {
        row.as_object_mut().expect("an object").remove("label");
        row
    });
    json!({
        "task": "kind",
        "data": {"train": {"rows": rows.collect::<Value>()}},
        "teacher": {"model": "student", "adapter": "adapters/pairs/student"},
        "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
        "gate": {"keep": 0.0},
    })
}

fn start(install: &Install) -> Server {
    let root = install.student().parent().expect("a folder").to_owned();
    let mut command = install.command();
    // One thread, so that the same pass gives the same bits.
    command
        .arg("--data-root")
        .arg(root)
        .args(["--job-threads", "1"]);
    Server::start(&mut command)
}

fn adapter(install: &Install, version: u64) -> Vec<u8> {
    let folder = install.state().join(format!("artifacts/kind/{version}"));
    let report = fs::read(folder.join("report.json")).expect("a report");
    serde_json::from_slice::<Value>(&report).expect("a whole report");
    fs::read(folder.join("adapter_model.safetensors")).expect("an adapter")
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .collect();
    names.sort();
    names
}

/// Answers by input of all files of the cache; torn lines are passed over, as the reader does.
fn cache(install: &Install) -> HashMap<String, Vec<f64>> {
    let folder = install.state().join("cache");
    let mut answers = HashMap::new();
    for name in names_in(&folder)
        .iter()
        .filter(|name| name.ends_with(".jsonl"))
    {
        let text = fs::read(folder.join(name)).expect("the cache");
        for line in text.split(|byte| *byte == b'\n') {
            if let Ok(line) = serde_json::from_slice::<Value>(line) {
                let logits = line["logits"].as_array().expect("logits");
                let logits = logits.iter().map(|x| x.as_f64().expect("a number"));
                let input = line["input"].as_str().expect("a digest").to_owned();
                answers.insert(input, logits.collect());
            }
        }
    }
    answers
}

/// What an undisturbed pass leaves.
struct Undisturbed {
    adapter: Vec<u8>,
    cache: HashMap<String, Vec<f64>>,
    took: Duration,
}

impl Undisturbed {
    async fn pass() -> Self {
        let install = Install::new();
        let server = start(&install);
        let begin = Instant::now();
        let path = queue(&server, &spec()).await;
        let job = job(&server, &path, is_over).await;
        assert_eq!(job["state"], "succeeded", "{job}");
        Self {
            adapter: adapter(&install, 1),
            cache: cache(&install),
            took: begin.elapsed(),
        }
    }

    /// Looks over everything that a round has left. Gives the number of jobs that failed.
    async fn check(&self, install: &Install, server: &Server, jobs: &[String]) -> usize {
        let mut succeeded = Vec::new();
        let mut failed = 0;
        for path in jobs {
            let job = job(server, path, is_over).await;
            match job["state"].as_str() {
                Some("succeeded") => succeeded.push(job["version"].as_u64().expect("a version")),
                Some("failed") => {
                    let reason = job["error"].as_str().unwrap_or_default();
                    assert!(!reason.is_empty(), "{job}");
                    failed += 1;
                }
                _ => panic!("{job}"),
            }
        }
        for version in &succeeded {
            let adapter = adapter(install, *version);
            assert!(adapter == self.adapter, "version {version} is another one");
        }
        let artifacts = install.state().join("artifacts");
        let folders = names_in(&artifacts.join("kind"));
        let mut expected: Vec<_> = succeeded.iter().map(u64::to_string).collect();
        expected.sort();
        assert_eq!(folders, expected, "folders and succeeded jobs");
        assert!(
            !names_in(&artifacts)
                .iter()
                .any(|name| name.starts_with('.'))
        );
        for folder in names_in(&install.state().join("jobs")) {
            let path = install.state().join("jobs").join(&folder);
            let left = names_in(&path);
            assert!(left.is_empty() || left == ["log.txt"], "{folder}: {left:?}");
        }
        for (input, logits) in cache(install) {
            let right = self.cache.get(&input).expect("an input of the pass");
            let close = logits.iter().zip(right).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(close && logits.len() == right.len(), "{logits:?} {right:?}");
        }
        if !succeeded.is_empty() {
            let body = json!({"inputs": "a b c d"});
            let (status, body) = server.post("/v1/classify/kind", &body).await;
            assert_eq!(status, 200, "{body}");
        }
        failed
    }
}

async fn check_database(install: &Install) {
    let path = install.state().join("kdlora.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let pool = sqlx::SqlitePool::connect_with(options)
        .await
        .expect("it opens");
    let verdict: String = sqlx::query_scalar("PRAGMA integrity_check")
        .fetch_one(&pool)
        .await
        .expect("a verdict");
    assert_eq!(verdict, "ok");
    let dangling: Vec<String> =
        sqlx::query_scalar("SELECT \"table\" FROM pragma_foreign_key_check")
            .fetch_all(&pool)
            .await
            .expect("a list");
    assert_eq!(dangling, Vec::<String>::new());
    pool.close().await;
}

#[tokio::test]
async fn kills_at_random_moments_leave_nothing_half_done() {
    let rounds = from_environment("KDLORA_KILL_ROUNDS").unwrap_or(DEFAULT_ROUNDS);
    let seed = from_environment("KDLORA_KILL_SEED").unwrap_or(1);
    println!("KDLORA_KILL_SEED={seed}");
    let mut dice = Dice(seed);
    let undisturbed = Undisturbed::pass().await;

    let install = Install::new();
    let mut server = start(&install);
    let mut jobs = Vec::new();
    let (mut of_passes, mut of_servers, mut failed) = (0, 0, 0);
    for round in 0..rounds {
        jobs.push(queue(&server, &spec()).await);
        tokio::time::sleep(dice.time(undisturbed.took)).await;
        // Every round kills: the server where no pass is at work.
        let passes = job_processes(&install);
        if dice.next().is_multiple_of(2) && !passes.is_empty() {
            for pass in passes {
                // It may have ended meanwhile.
                of_passes += i32::from(kill_process(pass, Signal::KILL).is_ok());
            }
        } else {
            server.signal(Signal::KILL);
            server.ended();
            of_servers += 1;
            server = start(&install);
        }
        failed = undisturbed.check(&install, &server, &jobs).await;
        println!("round {round}: passes {of_passes}, servers {of_servers}, failed {failed}");
    }
    server.signal(Signal::TERM);
    server.ended();
    eventually("a pass has outlived its server", || {
        job_processes(&install).is_empty()
    })
    .await;
    check_database(&install).await;
    println!(
        "{rounds} kills: {of_passes} of passes, {of_servers} of servers; {} of {} jobs failed",
        failed,
        jobs.len()
    );
}
