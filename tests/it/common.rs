//! What the black-box tests share: a server made of the golden files, and a way to talk to it.

#![allow(
    unreachable_pub,
    reason = "a module of an executable, written like a library's"
)]

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a test looks whether it has happened.
pub const POLL: Duration = Duration::from_millis(10);

/// Waits until `condition` holds, and panics with `otherwise` if it does not in time.
pub async fn eventually(otherwise: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{otherwise}");
        tokio::time::sleep(POLL).await;
    }
}

/// Words that the tiny encoders have.
const VOCABULARY: u64 = 60;

pub fn golden(path: &str) -> PathBuf {
    // Said again when a test runs: it may have been built elsewhere.
    let root = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let root = root.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    root.join("tests/golden").join(path)
}

/// `kdlora` itself; where a test was built elsewhere, the variable says where it is.
pub fn program() -> OsString {
    env::var_os("CARGO_BIN_EXE_kdlora").unwrap_or_else(|| env!("CARGO_BIN_EXE_kdlora").into())
}

/// Folders of a server: student, ready-made adapters, state.
pub struct Install {
    folder: TempDir,
}

impl Install {
    /// A tiny BERT with the tasks `pairs` and `pooler`.
    pub fn new() -> Self {
        let install = Self::of("bert-pairs");
        for (task, adapter) in [("pairs", "bert-pairs-qv"), ("pooler", "bert-pairs-pooler")] {
            install.ship(task, adapter);
        }
        install
    }

    /// A golden model without tasks.
    pub fn of(model: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let install = Self { folder };
        install.copy(&format!("models/{model}"), &install.student());
        fs::create_dir_all(install.folder.path().join("adapters")).expect("a folder");
        install.write_tokenizer();
        install
    }

    pub fn student(&self) -> PathBuf {
        self.folder.path().join("student")
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn adapter(&self, task: &str) -> PathBuf {
        self.folder
            .path()
            .join("adapters")
            .join(task)
            .join("student")
    }

    /// Makes a golden adapter the ready-made one of a task.
    pub fn ship(&self, task: &str, adapter: &str) {
        self.copy(&format!("adapters/{adapter}"), &self.adapter(task));
    }

    fn copy(&self, from: &str, to: &Path) {
        fs::create_dir_all(to).expect("a folder");
        for entry in fs::read_dir(golden(from)).expect("the golden files") {
            let entry = entry.expect("a file");
            fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
        }
    }

    /// The tokens of the student's tokenizer, by their ids.
    pub fn tokens(&self) -> Vec<String> {
        let tokenizer = read_json(&self.student().join("tokenizer.json"));
        let words = tokenizer["model"]["vocab"].as_object().expect("words");
        let mut tokens = vec![String::new(); words.len()];
        for (word, id) in words {
            let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
            tokens[id.expect("an id")] = word.clone();
        }
        tokens
    }

    /// Ids of the tokens that a sequence begins and ends with.
    pub fn special_tokens(&self) -> (u32, u32) {
        if self.has_fairseq_tokens() {
            (0, 2)
        } else {
            (2, 3)
        }
    }

    fn has_fairseq_tokens(&self) -> bool {
        let config = read_json(&self.student().join("config.json"));
        ["mpnet", "roberta"].contains(&config["model_type"].as_str().expect("a family"))
    }

    /// A golden tokenizer, cut to the words that the tiny encoder has.
    fn write_tokenizer(&self) {
        let kind = if self.has_fairseq_tokens() {
            "mpnet"
        } else {
            "bert"
        };
        let mut tokenizer = read_json(&golden(&format!("tokenizers/{kind}/tokenizer.json")));
        let words = tokenizer["model"]["vocab"].as_object_mut().expect("words");
        words.retain(|_, id| id.as_u64().is_some_and(|id| id < VOCABULARY));
        let path = self.student().join("tokenizer.json");
        fs::write(path, tokenizer.to_string()).expect("write");
    }

    /// `kdlora serve` with these folders, on a port of its own.
    pub fn command(&self) -> Command {
        self.command_for(self.student())
    }

    /// The same with another student.
    pub fn command_for(&self, student: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program());
        command
            .args([
                "--log",
                "warn",
                "serve",
                "--bind",
                "127.0.0.1:0",
                "--threads",
                "2",
            ])
            .arg("--student")
            .arg(student)
            .arg("--adapters")
            .arg(self.folder.path().join("adapters"))
            .arg("--state")
            .arg(self.state())
            // Encoders that are made and digests that are cached are not for the user's own.
            .env("KDLORA_CACHE", self.folder.path().join("cache"))
            .stdout(Stdio::piped());
        command
    }

    pub fn start(&self) -> Server {
        Server::start(&mut self.command())
    }
}

/// Asks for a pass; the path of its job.
pub async fn queue(server: &Server, spec: &Value) -> String {
    let (status, job) = server.post("/admin/distill", spec).await;
    assert_eq!(status, 202, "{job}");
    format!("/admin/jobs/{}", job["id"].as_str().expect("an id"))
}

/// Asks for the job until `wanted` holds.
pub async fn job(server: &Server, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (status, job) = server.get(path).await;
        assert_eq!(status, 200, "{job}");
        if wanted(&job) {
            return job;
        }
        assert!(Instant::now() < deadline, "{job}");
        tokio::time::sleep(POLL).await;
    }
}

pub fn is_over(job: &Value) -> bool {
    !["queued", "running"].contains(&job["state"].as_str().expect("a state"))
}

/// Runs `kdlora adapter` with these arguments.
pub fn kdlora_adapter(arguments: &[&str]) -> Output {
    Command::new(program())
        .args(["--log", "warn", "adapter"])
        .args(arguments)
        .output()
        .expect("the program starts")
}

/// What a command that has to succeed prints.
pub fn printed(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// What a command that has to fail says.
pub fn refused(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A data root with the student as a classifier `teacher`, whose words are the student's.
pub fn teacher(install: &Install) -> TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let folder = root.path().join("teacher");
    fs::create_dir(&folder).expect("a folder");
    for entry in fs::read_dir(install.student()).expect("the student") {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), folder.join(entry.file_name())).expect("a copy");
    }
    root
}

/// Processes of this install's jobs that are running.
pub fn job_processes(install: &Install) -> Vec<Pid> {
    let state = install.state();
    let state = state.to_str().expect("UTF-8");
    let processes = fs::read_dir("/proc").expect("Linux").flatten();
    processes
        .filter_map(|process| {
            let command = fs::read(process.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command);
            // The server itself has `--job-threads`.
            let is_job = command.split('\0').any(|argument| argument == "--job");
            let id: i32 = process.file_name().to_str()?.parse().ok()?;
            Pid::from_raw(id).filter(|_| is_job && command.contains(state))
        })
        .collect()
}

/// Rows of letters or of digits, which a tiny student can tell apart.
pub fn letters_or_digits(count: usize) -> Vec<Value> {
    let text = |index: usize, first: u8, kinds: usize| -> String {
        let words = (0..4).map(|place| {
            let kind = (index / kinds.pow(place)) % kinds;
            char::from(first + u8::try_from(kind).expect("few kinds")).to_string()
        });
        words.collect::<Vec<_>>().join(" ")
    };
    let row = |index: usize| match index % 2 {
        0 => json!({"text": text(index / 2, b'a', 8), "label": "letters"}),
        _ => json!({"text": text(index / 2, b'1', 8), "label": "digits"}),
    };
    (0..count).map(row).collect()
}

fn read_json(path: &Path) -> Value {
    let text = fs::read(path).expect("the file");
    serde_json::from_slice(&text).expect("JSON")
}

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    /// `http://127.0.0.1:PORT`
    pub url: String,
    pub client: reqwest::Client,
}

impl Server {
    /// Starts the process and waits until it says that it is ready.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("the program starts");
        let output = child.stdout.take().expect("a pipe");
        let mut line = String::new();
        BufReader::new(output)
            .read_line(&mut line)
            .expect("a line of text");
        let url = line
            .trim()
            .strip_prefix("kdlora listens on ")
            .unwrap_or_else(|| panic!("not the line of a ready server: {line:?}"));
        Self {
            child,
            url: url.to_owned(),
            client: reqwest::Client::new(),
        }
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let request = self.client.get(format!("{}{path}", self.url));
        answer(request).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.client.post(format!("{}{path}", self.url)).json(body);
        answer(request).await
    }

    /// Of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The greatest resident memory that the process has had, in bytes.
    pub fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kibibytes: u64 = kibibytes
            .and_then(|n| n.trim().parse().ok())
            .expect("a size");
        kibibytes * 1024
    }

    /// Forgets the greatest resident memory so far, and returns the present one.
    pub fn peak_from_now(&self) -> u64 {
        fs::write(format!("/proc/{}/clear_refs", self.id()), "5").expect("Linux");
        self.peak()
    }

    /// What the program logs, if its standard error is piped.
    pub fn take_stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().expect("a pipe")
    }

    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).expect("a process id");
        let process = Pid::from_raw(id).expect("not 0");
        kill_process(process, signal).expect("the process is there");
    }

    /// Waits until the process has ended.
    pub fn ended(mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            thread::sleep(POLL);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    let text = response.text().await.expect("a whole body");
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    (status, body)
}
