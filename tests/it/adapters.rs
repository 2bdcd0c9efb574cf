//! Adapters of PEFT from the command line and over HTTP, into real servers.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::common::{Install, Server, golden, kdlora_adapter, printed, refused};
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

const DORA: &str = "adapters/bert-pairs-dora";

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

async fn answer(server: &Server, task: &str) -> Value {
    let body = json!({"inputs": "7 h o", "raw_scores": true});
    let (status, answer) = server.post(&format!("/v1/classify/{task}"), &body).await;
    assert_eq!(status, 200, "{answer}");
    answer["predictions"].clone()
}

#[test]
fn an_adapter_is_described() {
    let install = Install::of("bert-pairs");
    let (adapter, student) = (golden(DORA), install.student());
    let arguments = ["inspect", text(&adapter), "--student", text(&student)];
    let shown = printed(&kdlora_adapter(&arguments));
    for part in [
        "DoRA, rsLoRA",
        "8 linears: dense, query, value",
        "f32",
        "hot",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let arguments = [&arguments[..], &["--json"]].concat();
    let json: Value = serde_json::from_str(&printed(&kdlora_adapter(&arguments))).expect("JSON");
    assert_eq!(json["ranks"], json!([3]));
    assert_eq!(json["labels"], json!(["label 0", "label 1"]));
    assert_eq!(json["student"]["mode"], "hot");

    let half = golden("adapters/bert-pairs-half");
    assert!(printed(&kdlora_adapter(&["inspect", text(&half)])).contains("f16"));
    let other = golden("adapters/mpnet-classes-qv");
    let error = refused(&kdlora_adapter(&[
        "inspect",
        text(&other),
        "--student",
        text(&student),
    ]));
    assert!(error.contains("not a part of a bert model"), "{error}");
}

#[tokio::test]
async fn what_is_imported_is_served_and_exported_as_it_was() {
    let install = Install::of("bert-pairs");
    let (adapter, student, state) = (golden(DORA), install.student(), install.state());
    let import = ["import", text(&adapter), "--student", text(&student)];
    let into = ["--task", "mood", "--state", text(&state), "--promote"];
    let line = printed(&kdlora_adapter(&[&import[..], &into[..]].concat()));
    assert_eq!(line, "version 1 of mood (hot, live)");

    install.ship("shipped", "bert-pairs-dora");
    let server = install.start();
    assert_eq!(
        answer(&server, "mood").await,
        answer(&server, "shipped").await
    );
    let error = refused(&kdlora_adapter(&[&import[..], &into[..]].concat()));
    assert!(error.contains("in use by another server"), "{error}");
    drop(server);

    let out = state.with_extension("out");
    let export = [
        "export",
        "mood@1",
        "--state",
        text(&state),
        "--out",
        text(&out),
    ];
    printed(&kdlora_adapter(&export));
    let bytes = |folder: &Path| fs::read(folder.join("config.json")).expect("the file");
    let config: Value = serde_json::from_slice(&bytes(&out)).expect("JSON");
    assert_eq!(config["id2label"]["1"], "label 1");
    let error = refused(&kdlora_adapter(&export));
    assert!(error.contains("exists already"), "{error}");
    let none = ["export", "nothing", "--state", text(&state), "--out", "x"];
    assert!(refused(&kdlora_adapter(&none)).contains("no task 'nothing'"));
}

#[test]
fn labels_that_pefts_files_lack_are_given_by_hand() {
    let install = Install::of("bert-pairs");
    let bare = install.state().with_extension("bare");
    fs::create_dir(&bare).expect("a folder");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden(DORA).join(file), bare.join(file)).expect("a copy");
    }
    let (student, state) = (install.student(), install.state());
    let import = ["import", text(&bare), "--student", text(&student)];
    let into = ["--task", "mood", "--state", text(&state)];
    let error = refused(&kdlora_adapter(&[&import[..], &into[..]].concat()));
    assert!(error.contains("config.json is missing"), "{error}");
    let labels = ["--labels", "bad,good"];
    let line = printed(&kdlora_adapter(
        &[&import[..], &into[..], &labels[..]].concat(),
    ));
    assert_eq!(line, "version 1 of mood (hot)");
    let labels = ["--labels", "bad,fair,good"];
    let error = refused(&kdlora_adapter(
        &[&import[..], &into[..], &labels[..]].concat(),
    ));
    assert!(error.contains("2 outputs"), "{error}");
}

async fn import(server: &Server, form: Form) -> (u16, Value) {
    let request = server.client.post(format!("{}/admin/adapters", server.url));
    let response = request.multipart(form).send().await.expect("an answer");
    let status = response.status().as_u16();
    (status, response.json().await.expect("JSON"))
}

/// The files of a golden adapter, those that `keep` lets through.
fn files(adapter: &str, spec: &Value, keep: impl Fn(&str) -> bool) -> Form {
    let mut form = Form::new().text("spec", spec.to_string());
    for entry in fs::read_dir(golden(adapter)).expect("the golden files") {
        let entry = entry.expect("a file");
        let name = entry.file_name().into_string().expect("UTF-8");
        if keep(&name) {
            let bytes = fs::read(entry.path()).expect("the file");
            form = form.part(name.clone(), Part::bytes(bytes).file_name(name));
        }
    }
    form
}

#[tokio::test]
async fn a_running_server_takes_adapters_in() {
    let install = Install::of("bert-pairs");
    install.ship("shipped", "bert-pairs-dora");
    let root = golden("adapters");
    let server = Server::start(install.command().arg("--data-root").arg(&root));
    let expected = answer(&server, "shipped").await;

    let spec = json!({"task": "sent", "promote": true});
    let (status, version) = import(&server, files(DORA, &spec, |_| true)).await;
    assert_eq!(status, 201, "{version}");
    assert_eq!(version["version"], 1);
    assert_eq!(version["origin"], "imported");
    assert_eq!(answer(&server, "sent").await, expected);

    let named = json!({"task": "named", "path": "bert-pairs-dora", "promote": true});
    let (status, version) = server.post("/admin/adapters", &named).await;
    assert_eq!((status, &version["live"]), (201, &json!(true)), "{version}");
    assert_eq!(answer(&server, "named").await, expected);

    let waiting = json!({"task": "named", "path": "bert-pairs-qv"});
    let (status, version) = server.post("/admin/adapters", &waiting).await;
    assert_eq!((status, &version["version"]), (201, &json!(2)), "{version}");
    assert_eq!(answer(&server, "named").await, expected);
}

#[tokio::test]
async fn an_adapter_that_cannot_be_used_is_refused_and_leaves_nothing() {
    let install = Install::of("bert-pairs");
    let root = golden("adapters");
    let server = Server::start(install.command().arg("--data-root").arg(&root));
    let spec = json!({"task": "mood"});
    let whole = |_: &str| true;
    for (form, reason) in [
        (
            files(DORA, &spec, |name| name != "config.json"),
            "config.json",
        ),
        (
            files(DORA, &spec, |name| name != "adapter_model.safetensors"),
            "adapter_model.safetensors",
        ),
        (
            files("adapters/mpnet-classes-qv", &spec, whole),
            "bert model",
        ),
        (files(DORA, &json!({"task": "No Name"}), whole), "No Name"),
        (files(DORA, &json!({"tusk": "mood"}), whole), "tusk"),
        (files(DORA, &spec, whole).text("extra", "y"), "part `extra`"),
        (Form::new().text("spec", spec.to_string()), "missing"),
    ] {
        let (status, problem) = import(&server, form).await;
        let detail = problem["detail"].as_str().expect("a sentence");
        assert_eq!(status, 422, "{problem}");
        assert!(detail.contains(reason), "{reason} in {detail}");
        let state = install.state();
        assert!(!detail.contains(text(&state)), "{detail}");
    }
    for (path, reason) in [
        ("../../../etc", "data root"),
        ("nowhere", "nowhere"),
        ("mpnet-classes-qv", "bert model"),
        ("bert-pairs-dora/config.json", "not a folder"),
    ] {
        let body = json!({"task": "mood", "path": path});
        let (status, problem) = server.post("/admin/adapters", &body).await;
        assert_eq!(status, 422, "{problem}");
        let detail = problem["detail"].as_str().expect("a sentence");
        assert!(detail.contains(reason), "{reason} in {detail}");
    }
    let (status, _) = server.get("/admin/tasks/mood/versions").await;
    assert_eq!(status, 404);
    let jobs = fs::read_dir(install.state().join("jobs")).expect("the folder");
    assert_eq!(jobs.count(), 0);
}

#[tokio::test]
async fn a_task_changes_its_mode_at_once_and_keeps_it() {
    let install = Install::of("bert-pairs");
    install.ship("mood", "bert-pairs-dora");
    let server = install.start();
    let mode = async |server: &Server| server.get("/v1/tasks/mood").await.1["mode"].clone();
    let hot = answer(&server, "mood").await;
    assert_eq!(mode(&server).await, "hot");

    let route = "/admin/tasks/mood/mode";
    let (status, set) = server.post(route, &json!({"mode": "merged"})).await;
    assert_eq!((status, &set["mode"]), (200, &json!("merged")), "{set}");
    assert_eq!(mode(&server).await, "merged");
    let merged = answer(&server, "mood").await;
    for label in ["label 0", "label 1"] {
        let score = |answer: &Value| answer[0]["scores"][label].as_f64().expect("a score");
        assert!(
            (score(&hot) - score(&merged)).abs() < 1e-4,
            "{hot} {merged}"
        );
    }
    let (status, _) = server.post(route, &json!({"mode": "cold"})).await;
    assert_eq!(status, 422);
    let other = "/admin/tasks/nothing/mode";
    let (status, _) = server.post(other, &json!({"mode": "hot"})).await;
    assert_eq!(status, 404);
    drop(server);

    let server = install.start();
    assert_eq!(mode(&server).await, "merged");
    server.post(route, &json!({"mode": "hot"})).await;
    assert_eq!(mode(&server).await, "hot");
    assert_eq!(answer(&server, "mood").await, hot);
}

#[test]
fn a_merge_keeps_the_problem_type_of_its_source() {
    let install = Install::of("bert-pairs");
    let student = install.student();
    for given in [Value::Null, json!("multi_label_classification")] {
        let folder = tempfile::tempdir().expect("a folder");
        let (adapter, out) = (folder.path().join("adapter"), folder.path().join("out"));
        fs::create_dir(&adapter).expect("a folder");
        for file in fs::read_dir(golden(DORA)).expect("files") {
            let file = file.expect("a file");
            fs::copy(file.path(), adapter.join(file.file_name())).expect("a copy");
        }
        let config = adapter.join("config.json");
        let before = fs::read(&config).expect("a file");
        let mut fields: Value = serde_json::from_slice(&before).expect("JSON");
        fields["problem_type"] = given.clone();
        fs::write(&config, fields.to_string()).expect("a file");
        let places = ["--student", text(&student), "--out", text(&out)];
        printed(&kdlora_adapter(
            &[&["merge", text(&adapter)], &places[..]].concat(),
        ));
        let after = fs::read(out.join("config.json")).expect("a file");
        let merged: Value = serde_json::from_slice(&after).expect("JSON");
        assert_eq!(merged["problem_type"], given, "{merged}");
    }
}

/// A folder below the data root with an adapter of which one file is another one.
fn odd(root: &Path, name: &str, file: &str, make: impl Fn(&Path)) {
    let folder = root.join(name);
    fs::create_dir_all(&folder).expect("a folder");
    for entry in fs::read_dir(golden(DORA)).expect("the golden files") {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), folder.join(entry.file_name())).expect("a copy");
    }
    let path = folder.join(file);
    // The golden folder need not have it.
    let _ = fs::remove_file(&path);
    make(&path);
}

#[tokio::test]
async fn pipes_devices_and_endless_files_are_refused_at_once() {
    let install = Install::new();
    let root = install.state().with_extension("data");
    let files = [
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.json",
    ];
    let pipe = |path: &Path| {
        let made = Command::new("mkfifo").arg(path).status();
        assert!(made.expect("mkfifo").success());
    };
    let sparse = |path: &Path| {
        let file = fs::File::create(path).expect("a file");
        file.set_len(1 << 40).expect("a length");
    };
    for file in files {
        odd(&root, &format!("pipe-{file}"), file, pipe);
        odd(&root, &format!("sparse-{file}"), file, sparse);
    }
    let mut command = install.command();
    let server = Server::start(command.arg("--data-root").arg(&root));
    let answer = async |route: &str, body: Value| {
        let request = server.client.post(format!("{}{route}", server.url));
        let request = request.json(&body).timeout(Duration::from_secs(20));
        let response = request.send().await.expect("an answer in time");
        let status = response.status().as_u16();
        (status, response.text().await.expect("a body"))
    };
    for file in files {
        for kind in ["pipe", "sparse"] {
            let path = format!("{kind}-{file}");
            let import = json!({"task": "odd", "path": path});
            let (status, body) = answer("/admin/adapters", import).await;
            assert_eq!(status, 422, "{path}: {body}");
            assert!(body.contains(file), "{path}: {body}");
            if file == "report.json" {
                continue;
            }
            // As a teacher's adapter, and its encoder.
            for teacher in [
                json!({"model": "mpnet-base", "adapter": path}),
                json!({"model": path}),
                json!({"model": format!("{path}@0")}),
            ] {
                let rows = json!([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]);
                let data = json!({"train": {"rows": rows}});
                let spec = json!({"task": "odd", "data": data, "teacher": teacher});
                let (status, body) = answer("/admin/distill", spec).await;
                assert_eq!(status, 422, "{teacher}: {body}");
            }
        }
    }
}

#[tokio::test]
async fn an_adapter_of_more_labels_than_a_task_may_have_is_refused() {
    let install = Install::new();
    let root = install.state().with_extension("data");
    let labels = |count: usize, bytes: usize| {
        move |path: &Path| {
            let name = |id: usize| (id.to_string(), json!(format!("{id:0>bytes$}")));
            let names: serde_json::Map<_, _> = (0..count).map(name).collect();
            fs::write(path, json!({"id2label": names}).to_string()).expect("a file");
        }
    };
    odd(&root, "many", "config.json", labels(1_001, 4));
    odd(&root, "long", "config.json", labels(2, 201));
    let mut command = install.command();
    let server = Server::start(command.arg("--data-root").arg(&root));
    for (path, sentence) in [("many", "1001 labels"), ("long", "201 bytes")] {
        let import = json!({"task": "odd", "path": path});
        let (status, body) = server.post("/admin/adapters", &import).await;
        let detail = body["detail"].as_str().unwrap_or_default();
        assert!(status == 422 && detail.contains(sentence), "{body}");
    }
}
