//! A disk that takes nothing more for a while: what could not be written is not acknowledged, and
//! everything works again as soon as there is room, without a restart.
//!
//! The disk is full for the server alone: its limit for the size of files is set to nothing.

use std::process::{Command, Stdio};

use crate::common::{
    Install, Server, eventually, is_over, job, job_processes, letters_or_digits, queue,
};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

fn start(install: &Install) -> Server {
    let serve = install.command();
    let mut command = Command::new("/bin/sh");
    command
        // A write beyond the limit is to fail, as on a full disk, and not to end the process.
        .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
        .arg(serve.get_program())
        .args(serve.get_args())
        .stdout(Stdio::piped());
    Server::start(&mut command)
}

fn set_full(server: &Server, is_full: bool) {
    let id = i32::try_from(server.id()).expect("a process id");
    let maximum = getrlimit(Resource::Fsize).maximum;
    let current = if is_full { Some(0) } else { maximum };
    let limit = Rlimit { current, maximum };
    prlimit(Pid::from_raw(id), Resource::Fsize, limit).expect("the limit is set");
}

async fn delete(server: &Server, path: &str) -> (u16, Value) {
    let url = format!("{}{path}", server.url);
    let response = server.client.delete(url).send().await.expect("an answer");
    let status = response.status().as_u16();
    (status, response.json().await.unwrap_or_default())
}

async fn failed_writes(server: &Server) -> u64 {
    let (_, text) = server.get("/metrics").await;
    let text = text.as_str().expect("a text");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("kdlora_store_errors_total "));
    value.and_then(|n| n.parse().ok()).expect("the metric")
}

fn spec(epochs: u32) -> Value {
    json!({
        "task": "kind",
        "data": {"train": {"rows": letters_or_digits(1000)}},
        "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
        "training": {
            "epochs": epochs, "batch_size": 8, "learning_rate": 0.01, "max_length": 16
        },
        "gate": {"keep": 0.0},
    })
}

#[tokio::test]
async fn writes_work_again_as_soon_as_there_is_room() {
    let install = Install::new();
    let server = start(&install);
    let mode = "/admin/tasks/pairs/mode";
    let rows = letters_or_digits(40);
    for round in 1..=2 {
        set_full(&server, true);
        let before = failed_writes(&server).await;
        for _ in 0..6 {
            let (status, body) = server.post(mode, &json!({"mode": "hot"})).await;
            assert_eq!(status, 500, "{body}");
        }
        let new = json!({"task": "kind", "data": {"train": {"rows": rows}}});
        let (status, body) = server.post("/admin/distill", &new).await;
        assert_eq!(status, 500, "{body}");
        assert!(failed_writes(&server).await >= before + 6);
        // What needs no disk goes on.
        let (status, body) = server
            .post("/v1/classify/pairs", &json!({"inputs": "7 h o"}))
            .await;
        assert_eq!(status, 200, "{body}");
        let (status, body) = server.get("/admin/tasks/pairs/versions").await;
        assert_eq!((status, &body["live"]), (200, &json!(1)), "{body}");

        set_full(&server, false);
        for wanted in ["merged", "hot"] {
            let (status, body) = server.post(mode, &json!({"mode": wanted})).await;
            assert_eq!((status, &body["mode"]), (200, &json!(wanted)), "{round}");
        }
    }
    // All connections to the database are as good as new.
    let hot = json!({"mode": "hot"});
    let many = (0..16).map(|_| server.post(mode, &hot));
    for (status, body) in futures_util::future::join_all(many).await {
        assert_eq!(status, 200, "{body}");
    }
}

#[tokio::test]
async fn a_cancellation_that_is_not_written_is_not_acknowledged() {
    let install = Install::new();
    let server = start(&install);
    let running = queue(&server, &spec(100)).await;
    job(&server, &running, |job| job["state"] == "running").await;
    eventually("no process", || !job_processes(&install).is_empty()).await;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(queue(&server, &spec(1)).await);
    }
    set_full(&server, true);
    for path in waiting.iter().chain([&running]) {
        let (status, body) = delete(&server, path).await;
        assert_eq!(status, 500, "{body}");
    }
    for path in &waiting {
        let (_, body) = server.get(path).await;
        assert_eq!(body["state"], "queued", "{body}");
        let id = path.rsplit('/').next().expect("an id");
        let rows = install.state().join("jobs").join(id).join("data");
        assert!(rows.join("train.jsonl").is_file(), "its rows are needed");
    }
    // The running one has been stopped all the same.
    eventually("the process goes on", || job_processes(&install).is_empty()).await;

    set_full(&server, false);
    for path in &waiting {
        let (status, body) = delete(&server, path).await;
        assert_eq!((status, &body["state"]), (200, &json!("cancelled")));
    }
    let body = job(&server, &running, is_over).await;
    assert_eq!(body["state"], "cancelled", "{body}");
    let id = running.rsplit('/').next().expect("an id");
    let folder = install.state().join("jobs").join(id);
    eventually("the folder is not cleared", || {
        !folder.join("data").exists()
    })
    .await;
}

#[tokio::test]
async fn a_job_that_is_cancelled_after_its_end_could_not_be_written_is_cancelled() {
    let install = Install::new();
    let server = start(&install);
    let path = queue(&server, &spec(100)).await;
    eventually("no process", || !job_processes(&install).is_empty()).await;
    set_full(&server, true);
    for process in job_processes(&install) {
        // It may be a child that has ended meanwhile.
        let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
    }
    eventually("the process goes on", || job_processes(&install).is_empty()).await;
    let (status, body) = delete(&server, &path).await;
    assert_eq!(status, 500, "{body}");
    set_full(&server, false);
    // It may still stand as running, be in the queue, or be in its next attempt.
    let (status, body) = delete(&server, &path).await;
    assert_eq!(
        (status, &body["state"]),
        (200, &json!("cancelled")),
        "{body}"
    );
    eventually("it was started again", || {
        job_processes(&install).is_empty()
    })
    .await;
}

#[tokio::test]
async fn the_result_of_a_pass_waits_until_there_is_room() {
    let install = Install::new();
    let server = start(&install);
    let path = queue(&server, &spec(20)).await;
    eventually("no process", || !job_processes(&install).is_empty()).await;
    set_full(&server, true);
    eventually("the pass does not end", || {
        job_processes(&install).is_empty()
    })
    .await;
    let (_, body) = server.get(&path).await;
    assert_eq!(body["state"], "running", "{body}");
    set_full(&server, false);
    let body = job(&server, &path, is_over).await;
    assert_eq!(body["state"], "succeeded", "{body}");
    let (status, body) = server
        .post("/v1/classify/kind", &json!({"inputs": "a b c"}))
        .await;
    assert_eq!((status, &body["version"]), (200, &json!(1)), "{body}");
}
