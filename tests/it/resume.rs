//! A pass that is killed again and again ends with the bits of one that is left alone.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::{Install, letters_or_digits};
use serde_json::{Value, json};

/// Events of the process after which it is killed; more than its trainings have, so that some of
/// them are never reached and the last attempt ends by itself.
const KILLS: [usize; 9] = [2, 9, 4, 17, 6, 3, 11, 5, 8];

struct Place {
    install: Install,
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            install: Install::of("bert-pairs"),
            folder: tempfile::tempdir().expect("a temporary folder"),
        };
        let spec = json!({
            "task": "kind",
            "data": {"train": {"rows": letters_or_digits(400)}},
            "teacher": {
                "model": place.install.student(),
                "finetune": {"mode": "lora", "epochs": 2, "learning_rate": 0.01},
            },
            "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
            "training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
        });
        fs::write(place.path("spec.json"), spec.to_string()).expect("write");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The pass as a job's process that writes to `out`.
    fn start(&self, out: &str, options: &[&str]) -> Child {
        self.start_with("2", out, options)
    }

    fn start_with(&self, threads: &str, out: &str, options: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_kdlora"))
            .args(["--log", "warn", "distill", "--job", "--threads", threads])
            .args(["--checkpoint-every", "0"])
            .args(options)
            .arg("--spec")
            .arg(self.path("spec.json"))
            .arg("--student")
            .arg(self.install.student())
            .arg("--out")
            .arg(self.path(out))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts")
    }

    fn adapter(&self, out: &str) -> Vec<u8> {
        fs::read(self.path(out).join("adapter_model.safetensors")).expect("an adapter")
    }
}

/// Kills the process after some steps; its last event if it ended before that.
fn kill_after(child: Child, steps: usize) -> Option<Value> {
    follow(child, steps).1
}

/// The same, with the step that it began its first training with.
fn follow(mut child: Child, steps: usize) -> (Option<u64>, Option<Value>) {
    let output = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut last = Value::Null;
    let mut first = None;
    let mut seen = 0;
    for line in output.lines() {
        last = serde_json::from_str(&line.expect("a line")).expect("an event");
        if last["loss"].is_number() {
            seen += 1;
            first = first.or(last["step"].as_u64());
        }
        if seen == steps {
            child.kill().expect("it runs");
            child.wait().expect("a child");
            return (first, None);
        }
    }
    child.wait().expect("a child");
    (first, Some(last))
}

fn left(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let names = entries.map(|entry| entry.expect("a file").file_name());
    let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into()).collect();
    names.sort();
    names
}

#[test]
fn kills_at_any_step_change_no_bit() {
    let place = Place::new();
    let alone = kill_after(place.start("alone", &[]), usize::MAX).expect("an end");
    assert_eq!(alone["event"], "done", "{alone}");
    let mut kills = 0;
    let mut resumed = 0;
    let mut ending = None;
    for steps in KILLS.into_iter().chain([usize::MAX]) {
        let (first, end) = follow(place.start("killed", &["--resume"]), steps);
        // Steps are reported every five: a training from its start reports the fifth first.
        resumed += usize::from(first.is_some_and(|first| first > 5));
        ending = end;
        if ending.is_some() {
            break;
        }
        kills += 1;
    }
    assert_eq!(ending.expect("an end")["event"], "done");
    assert!(
        kills >= 3 && resumed >= 2,
        "{kills} kills, {resumed} resumed"
    );
    assert!(place.adapter("alone") == place.adapter("killed"));
    assert_eq!(left(place.folder.path()), ["alone", "killed", "spec.json"]);
}

#[test]
fn a_resumed_training_keeps_its_number_of_shares() {
    let place = Place::new();
    kill_after(place.start("alone", &[]), usize::MAX).expect("an end");
    assert!(kill_after(place.start("killed", &[]), 20).is_none());
    let resumed = place.start_with("1", "killed", &["--resume"]);
    let ending = kill_after(resumed, usize::MAX).expect("an end");
    assert_eq!(ending["event"], "done");
    assert!(place.adapter("alone") == place.adapter("killed"));
}

#[test]
fn without_resume_a_pass_begins_anew() {
    let place = Place::new();
    assert!(kill_after(place.start("out", &[]), 3).is_none());
    let checkpoint = place.path("out.checkpoint/teacher.safetensors");
    assert!(checkpoint.is_file());
    let ending = kill_after(place.start("out", &[]), usize::MAX).expect("an end");
    assert_eq!(ending["event"], "done");
    assert!(!checkpoint.exists());
}
