//! Jobs whose process is a shell script.

use std::fs;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;

use super::*;
use crate::store::{Created, NewJob};

/// Until a condition holds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Finds `--out` and fills the folder as a pass does.
const MAKE_OUTPUT: &str = r#"
    while [ "$1" != --out ]; do shift; done
    mkdir -p "$2"
    echo weights > "$2/adapter_model.safetensors"
    echo '{"gate":{"passed":true,"reasons":[]}}' > "$2/report.json"
"#;

struct House {
    _folder: TempDir,
    store: Store,
    runner: Runner,
    /// Tasks that were to be taken into service.
    live: mpsc::UnboundedReceiver<String>,
}

async fn house(script: &str) -> House {
    house_with(script, None).await
}

async fn house_with(script: &str, hook_error: Option<&'static str>) -> House {
    house_within(script, hook_error, JobLimits::default()).await
}

async fn house_within(script: &str, hook_error: Option<&'static str>, limits: JobLimits) -> House {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).await.unwrap();
    let (sender, live) = mpsc::unbounded_channel();
    let live_hook = LiveHook::new(move |task| {
        sender.send(task).unwrap();
        async move { hook_error.map_or(Ok(()), |error| Err(error.into())) }
    });
    let config = RunnerConfig {
        private: Default::default(),
        program: "/bin/sh".into(),
        arguments: ["-c", script, "job"].map(OsString::from).into(),
        environment: vec![("KDLORA_TEST".into(), "given".into())],
        live_hook,
        metrics: Arc::new(Metrics::new().unwrap()),
        limits,
    };
    let runner = Runner::start(store.clone(), config);
    House {
        _folder: folder,
        store,
        runner,
        live,
    }
}

impl House {
    async fn queue(&self, promote: bool) -> String {
        self.queue_with(
            0,
            serde_json::json!({ "task": "topic", "promote": promote }),
        )
        .await
    }

    async fn queue_with(&self, priority: i32, spec: serde_json::Value) -> String {
        let new = NewJob {
            id: NewJob::id(),
            task: "topic".into(),
            priority,
            spec,
            idempotency_key: None,
            request_digest: String::new(),
            warnings: Vec::new(),
        };
        let created = self.store.create_job(new).await.unwrap();
        self.runner.wake();
        match created {
            Created::New(job) | Created::Existing(job) => job.id,
        }
    }

    async fn wait(&self, id: &str, until: impl Fn(&Job) -> bool) -> Job {
        let look = async {
            loop {
                let job = self.store.job(id).await.unwrap();
                if until(&job) {
                    return job;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, look).await.unwrap()
    }

    async fn end_of(&self, id: &str) -> Job {
        self.wait(id, |job| job.state.is_over()).await
    }

    fn files_of(&self, id: &str) -> Vec<String> {
        let entries = fs::read_dir(self.store.job_folder(id)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[tokio::test]
async fn a_pass_that_succeeds_becomes_the_live_version() {
    let script = format!(
        r#"{MAKE_OUTPUT}
        echo '{{"event":"stage","stage":"student_training"}}'
        echo '{{"event":"step","step":7,"steps":9,"loss":0.5,"tokens_per_second":10.0,"eta_seconds":1.0}}'
        echo '{{"event":"done"}}'"#
    );
    let mut house = house(&script).await;
    let id = house.queue(true).await;
    let job = house.end_of(&id).await;
    assert_eq!((job.state, job.version), (JobState::Succeeded, Some(1)));
    assert_eq!(job.stage.as_deref(), Some("student_training"));
    assert_eq!((job.step, job.steps, job.loss), (7, 9, Some(0.5)));
    assert_eq!(house.live.recv().await.unwrap(), "topic");
    let live = house.store.live("topic").await.unwrap().unwrap();
    assert!(live.path.join("adapter_model.safetensors").is_file());
    house.runner.shutdown().await;
    assert_eq!(house.files_of(&id), ["log.txt"]);
}

#[tokio::test]
async fn a_version_is_not_promoted_against_the_gate_or_the_wish() {
    let refused = MAKE_OUTPUT.replace("true", "false");
    for (output, wish) in [(refused.as_str(), true), (MAKE_OUTPUT, false)] {
        let house = house(&format!("{output} echo '{{\"event\":\"done\"}}'")).await;
        let id = house.queue(wish).await;
        let job = house.end_of(&id).await;
        assert_eq!((job.state, job.version), (JobState::Succeeded, Some(1)));
        assert!(house.store.live("topic").await.unwrap().is_none());
    }
}

#[tokio::test]
async fn the_reason_of_a_pass_is_the_reason_of_the_job() {
    let script = r#"echo '{"event":"failed","error":"every label is \"x\""}'; exit 1"#;
    let house = house(script).await;
    let job = house.end_of(&house.queue(true).await).await;
    assert_eq!(job.state, JobState::Failed);
    assert_eq!(job.error.as_deref(), Some("every label is \"x\""));
}

#[tokio::test]
async fn a_crash_is_explained_by_the_end_of_the_log() {
    let house = house("echo boom >&2; exit 101").await;
    let job = house.end_of(&house.queue(true).await).await;
    let error = job.error.unwrap();
    assert!(error.contains("status 101"), "{error}");
    assert!(error.ends_with("its log ends with: boom"), "{error}");
}

#[tokio::test]
async fn a_process_that_is_killed_again_and_again_fails_its_job_and_the_next_one_runs() {
    let house = house("kill -9 $$").await;
    let (first, second) = (house.queue(true).await, house.queue(true).await);
    for id in [first, second] {
        let job = house.end_of(&id).await;
        let error = job.error.unwrap();
        assert!(
            error.contains("killed by signal 9 (out of memory?)") && error.contains("3 times"),
            "{error}"
        );
        assert_eq!(job.attempts, MAX_ATTEMPTS);
    }
}

#[tokio::test]
async fn a_killed_process_is_started_again_and_finds_what_it_left() {
    // The first attempt leaves a file beside its output and is killed, the second finds it.
    let script = format!(
        r#"{MAKE_OUTPUT}
        left="$2.checkpoint"
        if [ ! -e "$left" ]; then touch "$left"; rm -r "$2"; kill -9 $$; fi
        echo '{{"event":"done"}}'"#
    );
    let house = house(&script).await;
    let id = house.queue(false).await;
    let job = house.end_of(&id).await;
    assert_eq!((job.state, job.attempts), (JobState::Succeeded, 2));
    house.runner.shutdown().await;
    assert_eq!(house.files_of(&id), ["log.txt"]);
}

#[tokio::test]
async fn a_job_waits_while_the_system_has_no_room_for_its_process() {
    let script = format!("{MAKE_OUTPUT} echo '{{\"event\":\"done\"}}'");
    let house = house(&script).await;
    let id = NewJob::id();
    // Its spec goes to a full disk.
    let spec = house.store.job_folder(&id).join("spec.json");
    fs::create_dir_all(spec.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &spec).unwrap();
    let new = NewJob {
        id: id.clone(),
        task: "topic".into(),
        priority: 0,
        spec: serde_json::json!({ "task": "topic", "promote": false }),
        idempotency_key: None,
        request_digest: String::new(),
        warnings: Vec::new(),
    };
    house.store.create_job(new).await.unwrap();
    house.runner.wake();
    let waits = |job: &Job| job.state == JobState::Queued && job.started_at.is_some();
    let job = house.wait(&id, waits).await;
    assert_eq!((job.attempts, job.error), (0, None));
    fs::remove_file(&spec).unwrap();
    let job = house.end_of(&id).await;
    assert_eq!((job.state, job.attempts), (JobState::Succeeded, 1));
}

#[tokio::test]
async fn output_without_the_last_word_is_not_kept() {
    let house = house(MAKE_OUTPUT).await;
    let job = house.end_of(&house.queue(true).await).await;
    assert_eq!(job.state, JobState::Failed);
    assert!(house.store.tasks().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_pass_without_a_report_fails() {
    let house = house(r#"echo '{"event":"done"}'"#).await;
    let job = house.end_of(&house.queue(true).await).await;
    let error = job.error.unwrap();
    assert!(error.contains("report"), "{error}");
}

#[tokio::test]
async fn cancelling_kills_the_process_and_spares_the_queue() {
    let script = r#"echo $$ >&2; echo '{"event":"stage","stage":"data"}'; exec sleep 600"#;
    let house = house(script).await;
    let (first, second) = (house.queue(true).await, house.queue(true).await);
    house.wait(&first, |job| job.stage.is_some()).await;
    let log = house.store.job_folder(&first).join("log.txt");
    let job = house.runner.cancel(&first).await.unwrap();
    assert_eq!(job.state, JobState::Cancelled);
    let process = fs::read_to_string(log).unwrap();
    let process = format!("/proc/{}", process.trim());
    assert!(!Path::new(&process).exists(), "still running");
    assert_eq!(house.files_of(&first), ["log.txt"]);
    house.wait(&second, |job| job.stage.is_some()).await;

    let again = house.runner.cancel(&first).await;
    assert!(
        matches!(again, Err(StoreError::JobOver { .. })),
        "{again:?}"
    );
    let unknown = house.runner.cancel("nothing").await;
    assert!(matches!(unknown, Err(StoreError::UnknownJob(_))));
    house.runner.cancel(&second).await.unwrap();
}

#[tokio::test]
async fn a_queued_job_is_cancelled_without_being_started() {
    let house = house("exec sleep 600").await;
    let first = house.queue(true).await;
    house
        .wait(&first, |job| job.state == JobState::Running)
        .await;
    let second = house.queue(true).await;
    let job = house.runner.cancel(&second).await.unwrap();
    assert_eq!((job.state, job.started_at), (JobState::Cancelled, None));
    house.runner.cancel(&first).await.unwrap();
}

#[tokio::test]
async fn a_stop_puts_the_running_job_back_into_the_queue() {
    let house = house("exec sleep 600").await;
    let first = house.queue(true).await;
    house
        .wait(&first, |job| job.state == JobState::Running)
        .await;
    let second = house.queue(true).await;
    house.runner.shutdown().await;
    let job = house.store.job(&first).await.unwrap();
    assert_eq!((job.state, job.attempts), (JobState::Queued, 0));
    assert!(house.files_of(&first).contains(&"spec.json".to_owned()));
    let job = house.store.job(&second).await.unwrap();
    assert_eq!(job.state, JobState::Queued);
}

#[tokio::test]
async fn the_input_of_the_process_stays_open_while_it_runs() {
    // `timeout` ends with 124 if `cat` still waits for input, as it should.
    let script = r#"timeout 0.2 cat; echo "{\"event\":\"failed\",\"error\":\"$?\"}""#;
    let house = house(script).await;
    let job = house.end_of(&house.queue(true).await).await;
    assert_eq!(job.error.as_deref(), Some("124"));
}

#[tokio::test]
async fn the_process_gets_the_variables_of_the_server() {
    let script = r#"echo "{\"event\":\"failed\",\"error\":\"$KDLORA_TEST\"}""#;
    let house = house(script).await;
    let job = house.end_of(&house.queue(true).await).await;
    assert_eq!(job.error.as_deref(), Some("given"));
}

#[tokio::test]
async fn metrics_tell_a_jobs_gpu_memory_while_it_runs() {
    let step = r#"{"event":"step","step":1,"steps":2,"tokens_per_second":1.0,"eta_seconds":1.0,"gpu_peak_bytes":4711}"#;
    let house = house(&format!("echo '{step}'; cat")).await;
    let id = house.queue(false).await;
    let told = || house.runner.shared.config.metrics.render().unwrap();
    let line = r#"kdlora_gpu_memory_kind_bytes{kind="training"} 4711"#;
    let look = async {
        while !told().contains(line) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, look).await.unwrap();
    house.runner.cancel(&id).await.unwrap();
    assert!(!told().contains("kind=\"training\""), "{}", told());
}

#[tokio::test]
async fn metrics_count_jobs_by_state() {
    let house = house("exit 1").await;
    house.end_of(&house.queue(true).await).await;
    house.runner.shutdown().await;
    let metrics = house.runner.shared.config.metrics.render().unwrap();
    assert!(
        metrics.contains(r#"kdlora_jobs{state="failed"} 1"#),
        "{metrics}"
    );
    assert!(
        metrics.contains(r#"kdlora_jobs{state="running"} 0"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_version_that_cannot_be_taken_into_service_is_not_live() {
    let script = format!("{MAKE_OUTPUT} echo '{{\"event\":\"done\"}}'");
    let house = house_with(&script, Some("shapes differ")).await;
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), "first").unwrap();
    house
        .store
        .ensure_shipped("topic", folder.path())
        .await
        .unwrap();
    let id = house.queue(true).await;
    assert_eq!(house.end_of(&id).await.version, Some(2));
    house.runner.shutdown().await;
    assert_eq!(house.store.live("topic").await.unwrap().unwrap().version, 1);
    let history = house.store.history("topic").await.unwrap();
    assert!(history[2].reason.contains("shapes differ"), "{history:?}");
}

#[tokio::test]
async fn a_job_that_takes_too_long_ends_with_the_limit_as_its_reason() {
    let limits = JobLimits {
        time: Some(Duration::from_millis(200)),
        memory: None,
    };
    let house = house_within("echo begun >&2; exec sleep 600", None, limits).await;
    let id = house.queue(true).await;
    let job = house.end_of(&id).await;
    assert_eq!(job.state, JobState::Failed);
    let error = job.error.unwrap();
    assert!(error.contains("time limit of 200ms"), "{error}");
    house.runner.shutdown().await;
    assert_eq!(house.files_of(&id), ["log.txt"]);
    assert_eq!(house.store.job_log(&id, 1_000).await.unwrap(), "begun\n");
}

#[tokio::test]
async fn a_job_that_grows_too_large_ends_with_both_figures_as_its_reason() {
    // The shell holds a text of 64 MiB.
    let script = "x=$(head -c 67108864 /dev/zero | tr '\\0' x); sleep 600";
    let house = house(script).await;
    let spec = serde_json::json!({
        "task": "topic", "promote": true, "job": {"memory_limit_bytes": 32 << 20},
    });
    let id = house.queue_with(0, spec).await;
    let error = house.end_of(&id).await.error.unwrap();
    assert!(error.contains("more than its limit of 32 MiB"), "{error}");
}

#[tokio::test]
async fn jobs_run_one_at_a_time_by_priority_and_then_by_age() {
    let script = r#"
        while [ "$1" != --spec ]; do shift; done
        grep -q hold "$2" && exec sleep 600
        exit 1"#;
    let house = house(script).await;
    let spec = || serde_json::json!({ "task": "topic", "promote": true });
    let hold = serde_json::json!({ "task": "topic", "promote": true, "note": "hold" });
    let first = house.queue_with(0, hold).await;
    house
        .wait(&first, |job| job.state == JobState::Running)
        .await;
    let low = house.queue_with(-5, spec()).await;
    let (high, second_high) = (
        house.queue_with(7, spec()).await,
        house.queue_with(7, spec()).await,
    );
    let usual = house.queue(true).await;
    house.runner.cancel(&first).await.unwrap();
    let mut order = Vec::new();
    for id in [&high, &second_high, &usual, &low] {
        let job = house.end_of(id).await;
        order.push((job.started_at.unwrap(), job.finished_at.unwrap()));
    }
    for pair in order.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "{order:?}");
    }
}

#[tokio::test]
async fn what_a_process_has_started_ends_with_it() {
    let start = r#"sleep 600 & echo $! >&2; echo '{"event":"stage","stage":"data"}';"#;
    // Cancelled, crashed, killed from outside, failed.
    for (end, is_cancelled) in [
        ("wait", true),
        ("exit 1", false),
        ("kill -9 $$", false),
        (r#"echo '{"event":"failed","error":"no"}'; exit 1"#, false),
    ] {
        // The child must not hold the pipe of events.
        let script = format!("{} {end}", start.replace("600 &", "600 >&- &"));
        let house = house(&script).await;
        let id = house.queue(true).await;
        if is_cancelled {
            house.wait(&id, |job| job.stage.is_some()).await;
            house.runner.cancel(&id).await.unwrap();
        } else {
            house.end_of(&id).await;
        }
        house.runner.shutdown().await;
        let log = house.store.job_log(&id, 1_000).await.unwrap();
        let children: Vec<_> = log.split_whitespace().collect();
        assert!(!children.is_empty());
        for child in children {
            // A process that has ended is a zombie until somebody has waited for it.
            let stat = || fs::read_to_string(format!("/proc/{child}/stat"));
            let has_ended = || stat().map_or(true, |stat| stat.contains(") Z "));
            let ended = async {
                while !has_ended() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            let ended = tokio::time::timeout(PATIENCE, ended).await;
            assert!(ended.is_ok(), "{end}: process {child} goes on");
        }
    }
}

#[tokio::test]
async fn a_row_that_is_running_without_a_process_can_be_cancelled() {
    let house = house("exec sleep 600").await;
    let busy = house.queue(false).await;
    house
        .wait(&busy, |job| job.state == JobState::Running)
        .await;
    let id = house.queue(false).await;
    // As after an end that could not be recorded.
    house.store.start_next_job().await.unwrap();
    let folder = house.store.job_folder(&id);
    fs::create_dir_all(folder.join("data")).unwrap();
    let job = house.runner.cancel(&id).await.unwrap();
    assert_eq!(job.state, JobState::Cancelled);
    assert_eq!(house.files_of(&id), [""; 0]);
    house.runner.cancel(&busy).await.unwrap();
}

#[tokio::test]
async fn a_cancelled_job_stays_cancelled_whenever_its_process_is_killed() {
    // Killed at once, again and again, while it is cancelled at any moment.
    let house = house("kill -9 $$").await;
    let mut cancelled = 0;
    for round in 0..30 {
        let id = house.queue(false).await;
        tokio::time::sleep(Duration::from_millis(round % 15)).await;
        match house.runner.cancel(&id).await {
            Ok(job) => {
                assert_eq!(job.state, JobState::Cancelled);
                cancelled += 1;
            }
            Err(StoreError::JobOver { state, .. }) => assert_eq!(state, JobState::Failed),
            Err(error) => panic!("{error}"),
        }
        assert!(house.store.job(&id).await.unwrap().state.is_over());
    }
    assert!(cancelled > 0);
}
