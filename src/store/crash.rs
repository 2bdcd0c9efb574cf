//! Kills a process that adds versions, and looks at what the next one finds.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::testing::adapter;
use super::{Created, JobState, NewJob, Origin, Store};

const STATE: &str = "KDLORA_TEST_STATE";

/// Not a test of its own: the process that gets killed. It adds and promotes versions without
/// end, each within a job, and says each number once it is acknowledged.
#[tokio::test]
#[ignore = "is started, and killed, by the test below"]
async fn adds_versions_until_killed() {
    let state = PathBuf::from(std::env::var_os(STATE).unwrap());
    let store = Store::open(&state).await.unwrap();
    for round in 0.. {
        let scratch = tempfile::tempdir_in(&state).unwrap();
        let new = NewJob {
            id: NewJob::id(),
            task: "topic".into(),
            priority: 0,
            spec: serde_json::json!({}),
            idempotency_key: None,
            request_digest: String::new(),
            warnings: Vec::new(),
        };
        let Created::New(job) = store.create_job(new).await.unwrap() else {
            unreachable!("without a key every job is new")
        };
        while store.start_next_job().await.unwrap().is_some() {}
        let folder = adapter(&scratch, &format!("round{round}"));
        let version = store
            .finish_with_version(&job.id, &folder, Some("test"))
            .await
            .unwrap();
        let mut output = std::io::stdout();
        writeln!(output, "\nadded {}", version.version).unwrap();
        output.flush().unwrap();
    }
}

/// Kills the process when it has acknowledged `additions` versions, somewhere in the next one.
fn kill_after(state: &Path, additions: usize) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture"])
        .arg("store::crash::adds_versions_until_killed")
        .env(STATE, state)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let heard = listen(&mut child, additions);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(heard, additions, "the process ended by itself");
}

fn listen(child: &mut Child, additions: usize) -> usize {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said = lines.map_while(Result::ok);
    said.filter(|line| line.starts_with("added "))
        .take(additions)
        .count()
}

#[tokio::test]
async fn a_kill_loses_no_acknowledged_version_and_leaves_no_half_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    for additions in 1..=4 {
        kill_after(folder.path(), additions);
        acknowledged += additions;
        let store = Store::open(folder.path()).await.unwrap();
        let versions = store.versions("topic").await.unwrap();
        assert!(versions.len() >= acknowledged);
        // The last addition may have been committed before it was said.
        acknowledged = versions.len();
        for (index, version) in versions.iter().enumerate() {
            assert_eq!(version.version, index as u64 + 1);
            let weights = fs::read_to_string(version.path.join("adapter_model.safetensors"));
            let report = version.report.as_ref().unwrap();
            assert_eq!(report["note"], weights.unwrap());
            let Origin::Distilled { job } = &version.origin else {
                panic!("{version:?}")
            };
            let job = store.job(job).await.unwrap();
            assert_eq!(job.version, Some(version.version));
        }
        let live = store.live("topic").await.unwrap().unwrap();
        assert_eq!(
            live.version, acknowledged as u64,
            "promoted with its addition"
        );
        let folders = fs::read_dir(store.root().join("artifacts/topic")).unwrap();
        assert_eq!(folders.count(), acknowledged);
        for job in store.jobs(100).await.unwrap() {
            assert!(job.state.is_over() || job.state == JobState::Queued);
        }
        store.close().await;
    }
}
