//! Weights in shards, and weights that cannot be used, with the real processes.

use std::fs;
use std::path::Path;
use std::process::{Output, Stdio};

use kdlora::encoder::{StoredTensors, WEIGHTS, WEIGHTS_INDEX};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use crate::common::{Install, Server, is_over, job, letters_or_digits, queue, teacher};

const SHARDS: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

/// Stores the weights of a folder in two shards, after `change` has been at the bytes of each
/// tensor.
fn rewrite(folder: &Path, change: impl Fn(&str, &mut Vec<u8>)) {
    let stored = StoredTensors::open(folder).expect("weights");
    let mut index = Map::new();
    for (number, shard) in SHARDS.iter().enumerate() {
        let names = stored.names().skip(number).step_by(2);
        let tensors: Vec<_> = names
            .map(|name| {
                let mut tensor = stored.raw(name).expect(name);
                change(name, &mut tensor.bytes);
                index.insert(name.to_owned(), json!(shard));
                (name, tensor)
            })
            .collect();
        let views = tensors.iter().map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (*name, view.expect("a tensor"))
        });
        safetensors::serialize_to_file(views, None, &folder.join(shard)).expect("a shard");
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": index});
    fs::write(folder.join(WEIGHTS_INDEX), index.to_string()).expect("write");
    fs::remove_file(folder.join(WEIGHTS)).expect("the one file");
}

fn start(install: &Install, root: &tempfile::TempDir) -> Server {
    Server::start(install.command().arg("--data-root").arg(root.path()))
}

fn spec(teacher: &str) -> Value {
    let rows: Vec<Value> = letters_or_digits(60)
        .iter()
        .map(|row| json!({"text": row["text"]}))
        .collect();
    json!({
        "task": "kind",
        "data": {"train": {"rows": rows}},
        "teacher": {"model": teacher},
        "training": {"epochs": 1, "max_length": 16},
        "gate": {"keep": 0.0},
    })
}

async fn scores(server: &Server) -> Value {
    let body = json!({"inputs": ["a b 1", "film", {"text": "a", "text_pair": "2"}]});
    let (status, answer) = server.post("/v1/classify/pairs", &body).await;
    assert_eq!(status, 200, "{answer}");
    answer["predictions"].clone()
}

#[tokio::test]
async fn a_student_and_a_teacher_in_shards_are_as_good_as_whole_ones() {
    let install = Install::new();
    let root = teacher(&install);
    let whole = start(&install, &root);
    let expected = scores(&whole).await;
    drop(whole);
    rewrite(&install.student(), |_, _| {});
    rewrite(&root.path().join("teacher"), |_, _| {});
    let server = start(&install, &root);
    assert_eq!(scores(&server).await, expected);
    for teacher in ["teacher", "teacher@1,0"] {
        let mut spec = spec(teacher);
        if teacher.contains('@') {
            // Layers have no head.
            spec["teacher"]["finetune"] = json!({"mode": "full", "epochs": 1});
            spec["data"]["train"]["rows"] = letters_or_digits(60).into();
        }
        let path = queue(&server, &spec).await;
        let job = job(&server, &path, is_over).await;
        assert_eq!(job["state"], "succeeded", "{job}");
    }
}

fn refused_at_start(install: &Install) -> String {
    let output: Output = install
        .command()
        .stderr(Stdio::piped())
        .output()
        .expect("the program starts");
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_student_without_one_of_its_shards_is_refused_by_name() {
    let install = Install::new();
    rewrite(&install.student(), |_, _| {});
    fs::remove_file(install.student().join(SHARDS[1])).expect("a shard");
    let error = refused_at_start(&install);
    assert!(error.contains(SHARDS[1]), "{error}");
}

#[tokio::test]
async fn a_teacher_that_cannot_be_used_is_told_without_the_servers_folders() {
    let install = Install::new();
    let root = teacher(&install);
    let folder = root.path().join("teacher");
    let server = start(&install, &root);
    let is_private = |text: &str| {
        [root.path(), &install.state()]
            .iter()
            .any(|folder| text.contains(folder.to_str().expect("UTF-8")))
    };

    // Only the job reads the weights.
    rewrite(&folder, |name, bytes| {
        if name.contains("output.dense.bias") {
            bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
    });
    let path = queue(&server, &spec("teacher")).await;
    let ended = job(&server, &path, is_over).await;
    let error = ended["error"].as_str().expect("a reason");
    assert!(
        error.contains("output.dense.bias") && error.contains("not finite"),
        "{error}"
    );
    assert!(!is_private(error), "{error}");

    fs::remove_file(folder.join(WEIGHTS_INDEX)).expect("the index");
    fs::write(folder.join("pytorch_model.bin"), "pickled").expect("write");
    for name in ["teacher", "teacher@1"] {
        let (status, problem) = server.post("/admin/distill", &spec(name)).await;
        assert_eq!(status, 422, "{problem}");
        let detail = problem["detail"].as_str().expect("a sentence");
        assert!(!is_private(detail), "{detail}");
        assert!(
            detail.contains("AutoModelForSequenceClassification"),
            "{detail}"
        );
    }
}

#[tokio::test]
async fn a_default_task_that_does_not_exist_is_named_as_such() {
    let install = Install::new();
    let server = Server::start(install.command().args(["--default-task", "pair"]));
    let (status, problem) = server.post("/", &json!({"inputs": "a"})).await;
    assert_eq!(status, 404, "{problem}");
    let detail = problem["detail"].as_str().expect("a sentence");
    assert!(
        detail.contains("--default-task names \"pair\"") && detail.contains("pairs, pooler"),
        "{detail}"
    );
}
