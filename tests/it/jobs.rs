//! `POST /admin/distill` to a version that answers, with the real processes.

use crate::common::Server;
use crate::common::{Install, eventually, is_over, job, job_processes, letters_or_digits, queue};
use rustix::process::Signal;
use serde_json::{Value, json};

fn spec(rows: Vec<Value>, epochs: usize) -> Value {
    json!({
        "task": "kind",
        "data": {"train": {"rows": rows}},
        "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
        "training": {"epochs": epochs, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
    })
}

fn is_training(job: &Value) -> bool {
    job["stage"] == "student_training"
}

#[tokio::test]
async fn a_job_ends_in_a_version_that_answers_without_a_restart() {
    let install = Install::new();
    let server = install.start();
    let (status, _) = server.get("/v1/tasks/kind").await;
    assert_eq!(status, 404);
    let path = queue(&server, &spec(letters_or_digits(300), 4)).await;
    let job = job(&server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!(job["version"], 1);

    let (_, versions) = server.get("/admin/tasks/kind/versions").await;
    let gate = &versions["versions"][0]["report"]["gate"];
    assert_eq!(gate["passed"], true, "{gate}");
    let body = json!({"inputs": ["c a b", "3 1 2"]});
    let (status, answer) = server.post("/v1/classify/kind", &body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["version"], 1);
    assert_eq!(answer["predictions"][0]["label"], "letters", "{answer}");
    assert_eq!(answer["predictions"][1]["label"], "digits", "{answer}");
}

#[tokio::test]
async fn a_server_that_is_killed_takes_its_job_along_and_the_next_one_goes_on_with_it() {
    let install = Install::new();
    let server = install.start();
    let long = spec(letters_or_digits(1000), 8);
    let running = queue(&server, &long).await;
    let queued = queue(&server, &spec(letters_or_digits(300), 1)).await;
    job(&server, &running, is_training).await;
    assert_eq!(job_processes(&install).len(), 1);
    server.signal(Signal::KILL);
    server.ended();

    let server = install.start();
    let job_of_dead_server = job(&server, &running, is_over).await;
    assert_eq!(job_of_dead_server["state"], "succeeded");
    assert_eq!(job_of_dead_server["attempts"], 2);
    assert_eq!(job_of_dead_server["version"], 1);
    // The queue has survived.
    let next = job(&server, &queued, is_over).await;
    assert_eq!(next["state"], "succeeded", "{next}");
    assert_eq!(next["version"], 2);
    eventually("a process has outlived its server", || {
        job_processes(&install).is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_job_is_cancelled_and_the_server_answers_on() {
    let install = Install::new();
    let server = install.start();
    let path = queue(&server, &spec(letters_or_digits(2000), 100)).await;
    job(&server, &path, is_training).await;
    let url = format!("{}{path}", server.url);
    let answer = server.client.delete(url).send().await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 200);
    assert!(job_processes(&install).is_empty());
    let (_, cancelled) = server.get(&path).await;
    assert_eq!(cancelled["state"], "cancelled");
    let body = json!({"inputs": "a"});
    assert_eq!(server.post("/v1/classify/pairs", &body).await.0, 200);
}

#[tokio::test]
async fn a_pass_and_the_task_that_it_makes_cut_alike() {
    let install = Install::new();
    let server = install.start();
    let long = "a b c ".repeat(20);
    let pairs = |mut rows: Vec<Value>| -> Vec<Value> {
        for row in &mut rows {
            row["text_pair"] = json!(long);
        }
        rows
    };
    let mut wanted = spec(pairs(letters_or_digits(60)), 1);
    wanted["training"]["truncation"] = json!("only_second");
    wanted["gate"] = json!({"keep": 0.0});
    let path = queue(&server, &wanted).await;
    let made = job(&server, &path, is_over).await;
    assert_eq!(made["state"], "succeeded", "{made}");
    let promote = json!({"version": 1});
    let (status, body) = server.post("/admin/tasks/kind/promote", &promote).await;
    assert_eq!(status, 200, "{body}");
    let question = json!({"inputs": {"text": "a b", "text_pair": long}});
    let (status, body) = server.post("/v1/classify/kind", &question).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["usage"]["tokens"], 16);
    let question = json!({"inputs": {"text": long, "text_pair": "a b"}});
    let (status, body) = server.post("/v1/classify/kind", &question).await;
    assert_eq!(status, 422, "{body}");

    wanted["data"]["train"]["rows"][7]["text"] = json!(format!("odd {long}"));
    let path = queue(&server, &wanted).await;
    let failed = job(&server, &path, is_over).await;
    assert_eq!(failed["state"], "failed", "{failed}");
    let error = failed["error"].as_str().expect("a reason");
    assert!(error.contains("begins \"odd a b"), "{error}");
    assert!(error.contains("only the second text"), "{error}");
}

#[tokio::test]
async fn tokens_of_the_server_do_not_reach_its_jobs() {
    let install = Install::new();
    let mut command = install.command();
    for variable in [
        "KDLORA_API_TOKENS",
        "HF_TOKEN",
        "KDLORA_TEACHER_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
    ] {
        command.env(variable, "s3cret-s3cret-s3cret");
    }
    let server = Server::start(&mut command);
    queue(&server, &spec(letters_or_digits(1000), 100)).await;
    eventually("no process", || !job_processes(&install).is_empty()).await;
    for process in job_processes(&install) {
        let path = format!("/proc/{}/environ", process.as_raw_pid());
        let variables = std::fs::read(path).expect("the variables");
        let variables = String::from_utf8_lossy(&variables);
        assert!(!variables.contains("s3cret"), "{variables}");
        assert!(variables.contains("PATH=") && variables.contains("KDLORA_STUDENT="));
    }
}
