//! What users see of a build with CUDA. Without a GPU it serves on the CPU; the other tests need
//! one: `tests/gpu.sh`, or `cargo test --features cuda --test it gpu -- --ignored`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::common::{Install, Server, letters_or_digits, program};
use crate::families::cases::{Case, assert_close, relative_error};
use candle_core::{DType, Device};
use kdlora::adapter::Classifier;
use kdlora::encoder::Placement;
use kdlora::ops::device;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A command to which no GPU is visible.
fn without_gpus(command: &mut Command) -> &mut Command {
    command
        .env("CUDA_VISIBLE_DEVICES", "")
        .stderr(Stdio::piped())
}

#[tokio::test]
async fn without_a_gpu_auto_says_so_and_serves_on_the_cpu() {
    let install = Install::new();
    let mut server = Server::start(without_gpus(&mut install.command()));
    let mut log = server.take_stderr();
    let body = json!({"inputs": install.tokens().join(" ")});
    let (status, answer) = server.post("/v1/classify/pairs", &body).await;
    assert_eq!(status, 200, "{answer}");
    let (_, metrics) = server.get("/metrics").await;
    let metrics = metrics.as_str().expect("text");
    assert!(
        !metrics.contains("kdlora_gpu_memory_kind_bytes{"),
        "{metrics}"
    );
    drop(server);
    let mut text = String::new();
    log.read_to_string(&mut text).expect("a log");
    assert!(text.contains("no GPU; computing on the CPU"), "{text}");
    assert!(text.contains("NVIDIA's driver"), "{text}");
}

/// A folder that stands before the machine's own libraries.
struct Libraries(TempDir);

impl Libraries {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// Puts a file there that is no library, so that the loader finds the name and cannot load it.
    fn broken(self, name: &str) -> Self {
        fs::write(self.0.path().join(name), "").expect("write");
        self
    }

    /// Puts a library there, made of these functions in C.
    fn library(self, name: &str, functions: &str) -> Self {
        let source = self.0.path().join("library.c");
        fs::write(&source, functions).expect("write");
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .arg(self.0.path().join(name))
            .arg(&source)
            .status();
        assert!(made.expect("a C compiler").success());
        self
    }

    /// Puts a driver there, made of these functions in C.
    fn driver(self, functions: &str) -> Self {
        self.library("libcuda.so.1", functions)
    }

    /// What `kdlora serve --device cuda:ORDINAL` ends with.
    fn refusal(&self, ordinal: usize) -> String {
        let install = Install::new();
        let mut command = install.command();
        let output = command
            .args(["--device", &format!("cuda:{ordinal}")])
            .env("LD_LIBRARY_PATH", self.0.path())
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

/// A driver of this version that answers so when it is initialized, and has one device.
fn driver(version: u32, initialized: u32) -> String {
    format!(
        r#"
        int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
        int cuInit(unsigned flags) {{ return {initialized}; }}
        int cuDeviceGetCount(int *count) {{ *count = 1; return 0; }}
        int cuGetErrorString(int error, const char **text) {{
            *text = error == 803 ? "the kernel module is another" : "something else";
            return 0;
        }}
        "#
    )
}

#[test]
fn without_a_driver_the_loader_says_why() {
    let text = Libraries::new().broken("libcuda.so.1").refusal(0);
    assert!(text.contains("NVIDIA's driver is not installed"), "{text}");
    assert!(text.contains("libcuda.so.1: file too short"), "{text}");
}

#[test]
fn an_old_driver_is_named_with_what_is_needed() {
    let text = Libraries::new().driver(&driver(12040, 0)).refusal(0);
    let expected = "driver supports CUDA 12.4, but this build needs CUDA 13.";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn a_driver_that_cannot_start_says_why() {
    let text = Libraries::new().driver(&driver(13000, 803)).refusal(0);
    assert!(text.contains("NVIDIA's driver (CUDA 13.0)"), "{text}");
    assert!(text.contains("the kernel module is another"), "{text}");
}

#[test]
fn a_device_that_there_is_not_is_named() {
    let text = Libraries::new().driver(&driver(13000, 0)).refusal(3);
    let expected = "there is no CUDA device 3; devices on this machine: 1";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn a_library_that_is_missing_is_named() {
    let work = |names: &[&str]| -> String {
        let one = |name: &&str| format!("int {name}(void) {{ return 0; }}\n");
        names.iter().map(one).collect()
    };
    // What is called until the last of the libraries is.
    let driver = driver(13000, 0)
        + &work(&[
            "cuDeviceGet",
            "cuDevicePrimaryCtxRetain",
            "cuDeviceGetAttribute",
            "cuCtxGetCurrent",
            "cuCtxSetCurrent",
            "cuCtxSynchronize",
            "cuStreamCreate",
        ]);
    let libraries = [
        ("libcublasLt.so.13", work(&[])),
        (
            "libcublas.so.13",
            work(&["cublasCreate_v2", "cublasSetStream_v2", "cublasDestroy_v2"]),
        ),
        ("libcurand.so.10", work(&[])),
    ];
    for (missing, (name, _)) in libraries.iter().enumerate() {
        let there = Libraries::new().driver(&driver).broken(name);
        let there = libraries[..missing]
            .iter()
            .fold(there, |there, (name, functions)| {
                there.library(name, functions)
            });
        let text = there.refusal(0);
        assert!(text.contains("a library of CUDA is missing"), "{text}");
        assert!(text.contains(&format!("{name}: file too short")), "{text}");
    }
}

/// The case's classifier on the GPU.
fn classifier(case: &Case, gpu: &Device, dtype: DType) -> Classifier {
    let placement = Placement::gpu(gpu.clone(), dtype);
    let dir = case.model_folder();
    match case.adapter() {
        None => Classifier::load(&dir, &placement).expect("a classifier"),
        Some(adapter) => {
            let encoder = placement.load_for_inference(&dir).expect("an encoder");
            Classifier::from_adapter(Arc::new(encoder), &adapter).expect("it fits")
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn golden_logits_of_all_families_and_adapters() {
    let gpu = device::open_cuda(0).expect("a GPU");
    let mut worst: BTreeMap<&str, f32> = BTreeMap::new();
    for case in Case::all() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let rows = classifier(&case, &gpu, dtype).logits(&case.batch());
            let rows = rows.unwrap_or_else(|error| panic!("{} in {dtype:?}: {error}", case.name));
            if dtype == DType::F32 {
                for (row, golden) in rows.iter().zip(&case.sequences) {
                    assert_close(row, &golden.logits, 1e-3, &case.name);
                }
            }
            let error = relative_error(&rows, &case);
            let entry = worst.entry(dtype.as_str()).or_default();
            *entry = entry.max(error);
            let bound = if dtype == DType::BF16 { 0.1 } else { 0.015 };
            assert!(error < bound, "{} in {dtype:?}: off by {error}", case.name);
        }
    }
    println!("greatest relative error of golden logits: {worst:?}");
}

#[tokio::test]
#[ignore = "needs an NVIDIA GPU"]
async fn a_server_answers_from_the_gpu_and_tells_its_memory() {
    let install = Install::new();
    let mut command = install.command();
    let there = Server::start(command.args(["--device", "cuda:0", "--dtype", "f32"]));
    let other = Install::new();
    let here = Server::start(other.command().args(["--device", "cpu"]));
    let body = json!({"inputs": install.tokens().join(" "), "raw_scores": true});
    for task in ["pairs", "pooler"] {
        let route = format!("/v1/classify/{task}");
        let scores = async |server: &Server| -> Vec<(String, f64)> {
            let (status, answer) = server.post(&route, &body).await;
            assert_eq!(status, 200, "{answer}");
            let all = answer["predictions"][0]["scores"].as_object();
            let all = all.expect("scores of each label").iter();
            let value =
                |(label, score): (&String, &Value)| (label.clone(), score.as_f64().unwrap());
            all.map(value).collect()
        };
        let (there, here) = (scores(&there).await, scores(&here).await);
        assert!(!there.is_empty());
        for ((label, there), (same, here)) in there.iter().zip(&here) {
            assert_eq!(label, same);
            assert!((there - here).abs() < 1e-3, "{there}, on the CPU {here}");
        }
    }
    let (_, metrics) = there.get("/metrics").await;
    let metrics = metrics.as_str().expect("text");
    for kind in ["weights", "adapters", "activations"] {
        let name = format!("kdlora_gpu_memory_kind_bytes{{kind=\"{kind}\"}} ");
        let mut lines = metrics.lines();
        let bytes = lines.find_map(|line| line.strip_prefix(name.as_str()));
        assert!(
            bytes.expect(kind).parse::<u64>().expect("a number") > 0,
            "{kind}"
        );
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_pass_trains_on_the_gpu_like_on_the_cpu() {
    // bf16 is the default of a GPU. DeBERTa's table of positions trains too.
    for (model, dtype, bound) in [
        ("bert-pairs", "f32", 0.02),
        ("bert-pairs", "bf16", 0.2),
        ("deberta-classes", "f32", 0.02),
        ("deberta-classes", "bf16", 0.2),
    ] {
        trains_like_on_the_cpu(model, dtype, bound);
    }
}

/// Holds the losses of a pass on the GPU in this type to those on the CPU in f32.
fn trains_like_on_the_cpu(model: &str, dtype: &str, bound: f64) {
    let install = Install::of(model);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spec = folder.path().join("spec.json");
    let request = json!({
        "task": "kind",
        "data": {"train": {"rows": letters_or_digits(240)}},
        "lora": {"r": 2, "alpha": 4, "targets": ["all-linear"]},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "max_length": 16, "seed": 1},
    });
    fs::write(&spec, request.to_string()).expect("write");
    let report = |device: &str, dtype: &str| -> Value {
        let out = folder.path().join(device.replace(':', "-"));
        let output = Command::new(program())
            .args([
                "--log",
                "warn",
                "distill",
                "--threads",
                "2",
                "--device",
                device,
            ])
            .args(["--dtype", dtype])
            .env("KDLORA_STUDENT", install.student())
            .arg("--spec")
            .arg(&spec)
            .arg("--out")
            .arg(&out)
            .output()
            .expect("the program starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{model} on {device} in {dtype}: {stderr}"
        );
        let text = fs::read(out.join("report.json")).expect("a report");
        serde_json::from_slice(&text).expect("JSON")
    };
    let (here, there) = (report("cpu", "f32"), report("cuda:0", dtype));
    let losses = |report: &Value| -> Vec<f64> {
        let epochs = report["training"]["history"].as_array().expect("epochs");
        epochs
            .iter()
            .map(|epoch| epoch["loss"].as_f64().expect("a loss"))
            .collect()
    };
    for (there, here) in losses(&there).iter().zip(losses(&here)) {
        assert!(
            (there - here).abs() < bound * here.max(0.1),
            "{model} in {dtype}: {there}, on the CPU {here}"
        );
    }
    let training = there["peak_memory"]["training_bytes"]
        .as_u64()
        .expect("a peak");
    let inference = there["peak_memory"]["inference_bytes"]
        .as_u64()
        .expect("a peak");
    assert!(
        training >= inference && inference > 0,
        "{training}, {inference}"
    );
}
