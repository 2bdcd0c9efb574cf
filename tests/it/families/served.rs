//! The same logits over HTTP, from texts that spell the golden token ids.

use kdlora::adapter::{AdapterFolder, TaskConfig};
use serde_json::{Value, json};

use crate::common::{Install, Server};
use crate::families::cases::{Case, GoldenSequence, assert_close};

/// Adapters with biases of norms.
const MORE_THAN_LINEARS: [&str; 2] = ["roberta-classes-bias", "mpnet-classes-dora"];

pub(crate) async fn http_answers_are_the_golden_ones(model_type: &str) {
    let cases = Case::of(model_type);
    let mut compared = 0;
    for model in cases.iter().filter(|case| case.adapter.is_none()) {
        let of_model = |case: &&Case| case.model == model.name && case.adapter.is_some();
        let adapters: Vec<&Case> = cases.iter().filter(of_model).collect();
        if adapters.is_empty() {
            continue;
        }
        let install = Install::of(&model.name);
        for case in &adapters {
            install.ship(&case.name, &case.name);
        }
        for merged in ["", "*"] {
            let mut command = install.command();
            let server = Server::start(command.args(["--merged-tasks", merged]));
            for case in &adapters {
                compare(&install, &server, case, merged == "*").await;
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "no golden adapters of {model_type}");
}

async fn compare(install: &Install, server: &Server, case: &Case, merged: bool) {
    let (_, details) = server.get(&format!("/v1/tasks/{}", case.name)).await;
    let only_merged = case.name.ends_with("-saved") || MORE_THAN_LINEARS.contains(&&*case.name);
    let mode = if merged || only_merged {
        "merged"
    } else {
        "hot"
    };
    assert_eq!(details["mode"], mode, "{details}");
    let task = AdapterFolder::read(&install.adapter(&case.name))
        .unwrap()
        .task;
    let spelt: Vec<(Value, &GoldenSequence)> = case
        .sequences
        .iter()
        .filter_map(|golden| Some((spell(install, golden)?, golden)))
        .collect();
    assert!(spelt.len() > 3, "{}", case.name);
    let inputs: Vec<&Value> = spelt.iter().map(|(input, _)| input).collect();
    let route = format!("/v1/classify/{}", case.name);
    let body = json!({"inputs": inputs, "raw_scores": true, "truncate": false});
    let (status, answer) = server.post(&route, &body).await;
    assert_eq!(status, 200, "{answer}");
    let predictions = answer["predictions"].as_array().unwrap();
    assert_eq!(predictions.len(), spelt.len());
    for (prediction, (input, golden)) in predictions.iter().zip(&spelt) {
        let what = format!("{}, {input}", case.name);
        assert_close(&logits(prediction, &task), &golden.logits, 1e-4, &what);
    }
}

fn logits(prediction: &Value, task: &TaskConfig) -> Vec<f32> {
    let number = |value: &Value| value.as_f64().expect("a number") as f32;
    if let Some(value) = prediction.get("value") {
        return vec![number(value)];
    }
    let score = |label: &String| number(&prediction["scores"][label]);
    task.labels.iter().map(score).collect()
}

/// The text (or pair) of a sequence that begins and ends as the tokenizer makes it; `None` for an
/// empty one and for those that no text gives.
fn spell(install: &Install, golden: &GoldenSequence) -> Option<Value> {
    let tokens = install.tokens();
    let (first, last) = install.special_tokens();
    let [begin, inner @ .., end] = golden.ids.as_slice() else {
        return None;
    };
    if (*begin, *end) != (first, last) || inner.is_empty() {
        return None;
    }
    let text = |ids: &[u32]| {
        let words: Vec<&str> = ids.iter().map(|id| tokens[*id as usize].as_str()).collect();
        words.join(" ")
    };
    match golden.type_ids.iter().position(|segment| *segment == 1) {
        // The first text ends with a token of its own.
        Some(second) if golden.ids[second - 1] != last => None,
        Some(second) => Some(json!({
            "text": text(&golden.ids[1..second - 1]),
            "text_pair": text(&golden.ids[second..golden.ids.len() - 1]),
        })),
        None => Some(json!(text(inner))),
    }
}
