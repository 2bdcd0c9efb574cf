//! Students made of some of the layers of another encoder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::{Install, Server, is_over, job, letters_or_digits, queue};
use candle_core::{Device, Tensor};
use kdlora::adapter::AdapterFolder;
use kdlora::encoder::{Encoder, EncoderConfig, Segment, TaskWeights, Weights};
use kdlora::hub;
use kdlora::text::{PackedBatch, Sequence};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A golden classifier of each kind and layers to take of it.
const MODELS: [(&str, &[usize]); 8] = [
    ("bert-labels", &[2, 0]),
    ("bert-half", &[1]),
    ("mpnet-value", &[0, 2]),
    ("roberta-classes", &[1, 0]),
    ("distilbert-classes", &[1]),
    ("deberta-classes", &[1]),
    ("deberta-conv", &[0]),
    ("deberta-value", &[1, 0]),
];

fn named(folder: &Path, layers: &[usize]) -> String {
    let layers: Vec<_> = layers.iter().map(usize::to_string).collect();
    format!("{}@{}", folder.display(), layers.join(","))
}

/// Logits of an encoder with a head.
fn logits(encoder: &Encoder, head: BTreeMap<String, Tensor>) -> Vec<Vec<f32>> {
    let weights = TaskWeights::new(encoder, Vec::new(), head).expect("a head");
    let sequences: Vec<_> = [vec![2, 7, 9, 11, 30, 3], vec![2, 40, 3]]
        .into_iter()
        .map(|ids| Sequence {
            type_ids: vec![0; ids.len()],
            ids,
            truncated: false,
        })
        .collect();
    let segment = Segment {
        sequences: 0..sequences.len(),
        weights: &weights,
    };
    encoder
        .logits(&PackedBatch::new(&sequences), &[segment])
        .expect("logits")
}

/// The source's weights with its layers renamed, as someone would by hand.
fn by_hand(weights: &Weights, layers: &[usize]) -> Weights {
    let mut made = Vec::new();
    for (name, tensor) in weights.iter() {
        let parts: Vec<&str> = name.splitn(4, '.').collect();
        match parts.as_slice() {
            [stack, "layer", number, rest] => {
                for (place, layer) in layers.iter().enumerate() {
                    if *number == layer.to_string() {
                        made.push((format!("{stack}.layer.{place}.{rest}"), tensor.clone()));
                    }
                }
            }
            _ => made.push((name.clone(), tensor.clone())),
        }
    }
    made.into_iter().collect()
}

#[test]
fn a_made_encoder_answers_as_its_source_with_these_layers() {
    let cache = tempfile::tempdir().expect("a folder");
    for (model, layers) in MODELS {
        let install = Install::of(model);
        let source = install.student();
        let mut config = EncoderConfig::read(&source).expect("a config");
        let weights = Weights::read(&source, config.family, &Device::Cpu).expect("weights");
        let head = weights.head(config.family);
        let whole = Encoder::load(&source, &Device::Cpu).expect("the source");
        let whole = logits(&whole, head.clone());
        config.num_hidden_layers = layers.len();
        let expected = Encoder::new(config, &by_hand(&weights, layers)).expect("by hand");
        let expected = logits(&expected, head.clone());
        assert_ne!(expected, whole, "{model}: the layers make no difference");

        let folder = hub::pull(&named(&source, layers), cache.path(), false).expect("a pull");
        let made = Encoder::load(&folder, &Device::Cpu).expect("what was made");
        assert_eq!(logits(&made, head), expected, "{model}");
        let text = fs::read(folder.join("config.json")).expect("a file");
        let text = String::from_utf8(text).expect("UTF-8");
        assert!(!text.contains("ForSequenceClassification") && !text.contains("id2label"));
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let (from, to) = (source.join(name), folder.join(name));
            assert_eq!(from.is_file(), to.is_file(), "{model}: {name}");
            if from.is_file() {
                assert_eq!(
                    fs::read(from).expect("a file"),
                    fs::read(to).expect("a file")
                );
            }
        }
    }
}

fn kdlora(cache: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kdlora"));
    command.env("KDLORA_CACHE", cache.path());
    command
}

fn pull(cache: &TempDir, name: &str) -> Output {
    let mut command = kdlora(cache);
    command.args(["pull", name]).output().expect("the program")
}

/// The folder that a pull prints.
fn pulled(cache: &TempDir, name: &str) -> PathBuf {
    let output = pull(cache, name);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    PathBuf::from(text.trim())
}

fn modified(folder: &Path) -> std::time::SystemTime {
    let file = fs::metadata(folder.join("model.safetensors")).expect("weights");
    file.modified().expect("a time")
}

#[test]
fn it_is_made_once_and_again_when_its_source_has_changed() {
    let cache = tempfile::tempdir().expect("a folder");
    let install = Install::of("bert-pairs");
    let name = named(&install.student(), &[1]);
    let first = pulled(&cache, &name);
    assert!(first.starts_with(cache.path()));
    let (when, weights) = (modified(&first), fs::read(first.join("model.safetensors")));
    assert_eq!(pulled(&cache, &name), first);
    assert_eq!(modified(&first), when);

    // The same length and the same time: only the bytes tell.
    let path = install.student().join("model.safetensors");
    let time = modified(&install.student());
    let mut bytes = fs::read(&path).expect("weights");
    let middle = bytes.len() / 2;
    bytes[middle..].iter_mut().for_each(|byte| *byte = 0);
    fs::write(&path, bytes).expect("write");
    let file = fs::File::options().write(true).open(&path).expect("open");
    file.set_modified(time).expect("a time");
    assert_eq!(pulled(&cache, &name), first);
    let changed = fs::read(first.join("model.safetensors")).expect("weights");
    assert_ne!(changed, weights.expect("weights"));
}

#[test]
fn layers_that_are_not_there_are_refused_with_the_reason() {
    let cache = tempfile::tempdir().expect("a folder");
    let install = Install::of("bert-pairs");
    let folder = install.student();
    let folder = folder.display();
    for (name, reason) in [
        (
            format!("{folder}@0,2"),
            "has 2 layers, counted from 0: there is no layer 2",
        ),
        (format!("{folder}@0,0"), "layer 0 is named twice"),
        (format!("{folder}@"), "name at least one"),
        (format!("{folder}@0-1"), "\"0-1\" are not layers"),
        (
            "nothing@0".to_owned(),
            "'nothing@0' is neither a folder nor",
        ),
    ] {
        let output = pull(&cache, &name);
        assert!(!output.status.success(), "{name}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(reason), "{name}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
    let made = cache.path().join("encoders");
    assert!(!made.exists(), "a refused encoder leaves nothing behind");
}

#[test]
fn the_catalog_shows_its_encoders_of_another_s_layers() {
    let cache = tempfile::tempdir().expect("a folder");
    let list = kdlora(&cache).args(["pull", "--list"]).output();
    let list = String::from_utf8(list.expect("the program").stdout).expect("UTF-8");
    assert!(list.contains("mpnet-base-l3"), "{list}");
}

fn spec() -> Value {
    json!({
        "task": "kind",
        "data": {"train": {"rows": letters_or_digits(120)}},
        "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
    })
}

#[test]
fn a_pass_by_hand_takes_the_student_of_its_request() {
    let cache = tempfile::tempdir().expect("a folder");
    let install = Install::of("bert-labels");
    let mut wanted = spec();
    wanted["student"] = json!({"model": install.student(), "layers": [2, 0]});
    let file = cache.path().join("pass.json");
    fs::write(&file, wanted.to_string()).expect("write");
    let out = cache.path().join("version");
    let output = kdlora(&cache)
        .args([
            "distill",
            "--student",
            "minilm-l6",
            "--threads",
            "1",
            "--spec",
        ])
        .arg(&file)
        .arg("--out")
        .arg(&out)
        .output()
        .expect("the program");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let adapter = AdapterFolder::read(&out).expect("an adapter");
    let has = |layer: &str| adapter.tensors.keys().any(|name| name.contains(layer));
    assert!(has("encoder.layer.1.") && !has("encoder.layer.2."));
    let report: Value =
        serde_json::from_slice(&fs::read(out.join("report.json")).expect("a file")).expect("JSON");
    let named = report["spec"]["student"].to_string();
    assert!(named.contains("[2,0]"), "{named}");
}

#[tokio::test]
async fn a_server_distils_for_the_layers_that_it_serves_and_for_no_others() {
    let cache = tempfile::tempdir().expect("a folder");
    let install = Install::of("bert-labels");
    let student = named(&install.student(), &[2, 0]);
    let mut command = install.command_for(&student);
    command.env("KDLORA_CACHE", cache.path());
    let server = Server::start(&mut command);

    let folder = install.student();
    for other in [
        json!({"model": folder}),
        json!({"model": folder, "layers": [0, 2]}),
        json!({"model": "mpnet-base-l3"}),
        json!({"model": "nothing", "layers": [2, 0]}),
    ] {
        let mut wanted = spec();
        wanted["student"] = other;
        let (status, body) = server.post("/admin/distill", &wanted).await;
        assert_eq!(status, 422, "{body}");
        let detail = body["detail"].as_str().expect("a sentence");
        assert!(
            detail.contains("start a server with `--student"),
            "{detail}"
        );
    }

    let mut wanted = spec();
    wanted["student"] = json!({"model": folder, "layers": [2, 0]});
    let path = queue(&server, &wanted).await;
    let job = job(&server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    let promote = json!({"version": 1});
    let (status, body) = server.post("/admin/tasks/kind/promote", &promote).await;
    assert_eq!(status, 200, "{body}");
    let question = json!({"inputs": ["c a b", "3 1 2"]});
    let (status, body) = server.post("/v1/classify/kind", &question).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["predictions"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_teacher_below_the_data_root_may_be_some_layers_too() {
    let cache = tempfile::tempdir().expect("a folder");
    let (install, teacher) = (Install::of("bert-pairs"), Install::of("bert-labels"));
    let root = teacher.student();
    let root = root.parent().expect("a folder");
    let mut command = install.command_for(install.student());
    command.env("KDLORA_CACHE", cache.path());
    command.arg("--data-root").arg(root);
    let server = Server::start(&mut command);
    let mut wanted = spec();
    let tuned = json!({"mode": "lora", "epochs": 1});
    wanted["teacher"] = json!({"model": "student@0,7", "finetune": tuned});
    let (status, body) = server.post("/admin/distill", &wanted).await;
    assert_eq!(status, 422, "{body}");
    assert!(body.to_string().contains("there is no layer 7"), "{body}");
    wanted["teacher"]["model"] = json!("student@0,1");
    let path = queue(&server, &wanted).await;
    let job = job(&server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
}
