//! Two versions of a task side by side.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::Report;
use crate::distill::gate::Condition;

/// What differs between two versions, from the first to the second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Comparison {
    pub task: String,
    /// The numbers of the versions.
    pub versions: [u64; 2],
    /// Whether both were scored by the same metric on the same test rows.
    pub comparable: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the 95 % intervals of the main scores are apart; only where they can be compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub significant: Option<bool>,
    pub figures: Vec<Figure>,
    /// F1 of each class that either version has.
    pub classes: Vec<Figure>,
    /// Fields of the request that differ.
    pub request: Vec<ChangedField>,
    /// The conditions of each version's gate; empty for a version without one.
    pub gates: [Vec<Condition>; 2],
}

/// A figure of both versions; what a version does not have is absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Figure {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<f64>,
    /// `second − first`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<f64>,
}

/// A field of the request, by its JSON pointer; null where it is not given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangedField {
    pub field: String,
    #[schema(value_type = Option<Object>)]
    pub first: Value,
    #[schema(value_type = Option<Object>)]
    pub second: Value,
}

impl Figure {
    fn new(name: impl Into<String>, first: Option<f64>, second: Option<f64>) -> Option<Self> {
        first.or(second)?;
        Some(Self {
            name: name.into(),
            first,
            second,
            difference: first.zip(second).map(|(first, second)| second - first),
        })
    }
}

impl Comparison {
    /// Compares the reports of two versions of `task`.
    pub fn of(task: &str, versions: [u64; 2], first: &Report, second: &Report) -> Self {
        let reason = incomparable(first, second);
        let (a, b) = (first.student.score, second.student.score);
        Self {
            task: task.to_owned(),
            versions,
            comparable: reason.is_none(),
            significant: reason.is_none().then_some(a.high < b.low || b.high < a.low),
            reason,
            figures: figures(first, second),
            classes: classes(first, second),
            request: changed(&first.spec, &second.spec),
            gates: [first, second].map(|report| {
                let gate = report.gate.as_ref();
                gate.map_or_else(Vec::new, |gate| gate.conditions.clone())
            }),
        }
    }

    /// The comparison as Markdown tables.
    pub fn to_markdown(&self) -> String {
        let [first, second] = self.versions;
        let mut text = format!("# {}, versions {first} and {second}\n\n", self.task);
        match (&self.reason, self.significant) {
            (Some(reason), _) => {
                let _ = writeln!(text, "The scores cannot be compared: {reason}.");
            }
            (None, Some(true)) => {
                text.push_str("Same test rows; the 95 % intervals of the scores are apart.\n");
            }
            (None, _) => {
                text.push_str("Same test rows; the 95 % intervals of the scores overlap.\n");
            }
        }
        for (title, figures) in [("", &self.figures), ("F1 of the class", &self.classes)] {
            if figures.is_empty() {
                continue;
            }
            let _ = writeln!(text, "\n| {title} | {first} | {second} | difference |");
            text.push_str("| --- | ---: | ---: | ---: |\n");
            for row in figures {
                // Counts and bytes have no decimals.
                let places = match row.first.or(row.second) {
                    Some(value) if value.abs() >= 1_000.0 => 0,
                    _ => 4,
                };
                let cell = |value: Option<f64>| {
                    value.map_or("–".into(), |value| format!("{value:.places$}"))
                };
                let difference = row
                    .difference
                    .map_or("–".into(), |difference| format!("{difference:+.places$}"));
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {difference} |",
                    super::markdown::cell(&row.name),
                    cell(row.first),
                    cell(row.second)
                );
            }
        }
        if !self.request.is_empty() {
            let _ = writeln!(text, "\n| request | {first} | {second} |");
            text.push_str("| --- | --- | --- |\n");
            for field in &self.request {
                let _ = writeln!(
                    text,
                    "| `{}` | {} | {} |",
                    super::markdown::cell(&field.field),
                    super::markdown::cell(&field.first.to_string()),
                    super::markdown::cell(&field.second.to_string())
                );
            }
        }
        for (version, gate) in self.versions.iter().zip(&self.gates) {
            if !gate.is_empty() {
                let _ = writeln!(text, "\nGate of version {version}:\n");
                super::markdown::write_conditions(&mut text, gate);
            }
        }
        text
    }
}

fn incomparable(first: &Report, second: &Report) -> Option<String> {
    let (a, b) = (first.student.score.metric, second.student.score.metric);
    if a != b {
        return Some(format!("one is {a}, the other {b}"));
    }
    if first.reference != second.reference {
        return Some("one is held against labels, the other against a teacher's answers".into());
    }
    match (&first.data.test_digest, &second.data.test_digest) {
        (Some(a), Some(b)) if a == b => None,
        (Some(_), Some(_)) => Some("the test rows differ".into()),
        _ => Some("a report does not say which test rows it is about".into()),
    }
}

fn figures(first: &Report, second: &Report) -> Vec<Figure> {
    type Get = fn(&Report) -> Option<f64>;
    let getters: [(&str, Get); 20] = [
        ("accuracy", |r| r.student.accuracy),
        ("macro-F1", |r| r.student.macro_f1),
        ("micro-F1", |r| r.student.micro_f1),
        ("F1", |r| r.student.f1),
        ("MCC", |r| r.student.mcc),
        ("Pearson", |r| r.student.pearson),
        ("Spearman", |r| r.student.spearman),
        ("mean absolute error", |r| r.student.mean_absolute_error),
        ("calibration error", |r| r.student.ece),
        ("calibration error as served", |r| {
            r.student.calibration.map(|c| c.ece)
        }),
        ("temperature", |r| {
            r.student.calibration.map(|c| c.temperature)
        }),
        ("teacher's score", |r| {
            r.teacher.as_ref().map(|t| t.score.value)
        }),
        ("share of the teacher's score", |r| r.share_kept),
        ("agreement with the teacher", |r| {
            r.likeness.map(|l| l.agreement)
        }),
        ("parameters", |r| Some(r.student_model.parameters as f64)),
        ("trained parameters", |r| {
            r.student_model.trainable.map(|n| n as f64)
        }),
        ("adapter, bytes", |r| {
            r.student_model.adapter_bytes.map(|n| n as f64)
        }),
        ("p50 of batch 1, ms", |r| {
            r.latency.as_ref().map(|l| l.batch_1.student.p50_ms)
        }),
        ("p99 of batch 1, ms", |r| {
            r.latency.as_ref().map(|l| l.batch_1.student.p99_ms)
        }),
        ("peak memory in training, bytes", |r| {
            r.peak_memory.training_bytes.map(|n| n as f64)
        }),
    ];
    let main = |report: &Report| Some(report.student.score.value);
    let metric = first.student.score.metric;
    let score = Figure::new(format!("score ({metric})"), main(first), main(second));
    let rest = getters
        .into_iter()
        .filter_map(|(name, get)| Figure::new(name, get(first), get(second)));
    score.into_iter().chain(rest).collect()
}

fn classes(first: &Report, second: &Report) -> Vec<Figure> {
    let f1 = |report: &Report, label: &str| {
        let mut classes = report.student.classes.iter();
        classes.find(|class| class.label == label).map(|c| c.f1)
    };
    let mut labels: Vec<&str> = Vec::new();
    for class in first.student.classes.iter().chain(&second.student.classes) {
        if !labels.contains(&class.label.as_str()) {
            labels.push(&class.label);
        }
    }
    let figure = |label: &str| Figure::new(label, f1(first, label), f1(second, label));
    labels.into_iter().filter_map(figure).collect()
}

/// The leaves that differ, by JSON pointer.
fn changed(first: &Value, second: &Value) -> Vec<ChangedField> {
    let mut found = Vec::new();
    collect(String::new(), Some(first), Some(second), &mut found);
    found
}

fn collect(
    field: String,
    first: Option<&Value>,
    second: Option<&Value>,
    found: &mut Vec<ChangedField>,
) {
    if first == second {
        return;
    }
    let objects = [first, second].map(|value| value.and_then(Value::as_object));
    if objects.iter().all(Option::is_none)
        || [first, second]
            .iter()
            .zip(&objects)
            .any(|(value, object)| value.is_some_and(|value| !value.is_null()) && object.is_none())
    {
        found.push(ChangedField {
            field,
            first: first.cloned().unwrap_or_default(),
            second: second.cloned().unwrap_or_default(),
        });
        return;
    }
    let mut keys: Vec<&String> = Vec::new();
    for key in objects.iter().flatten().flat_map(|object| object.keys()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    for key in keys {
        let [a, b] = objects.map(|object| object.and_then(|object| object.get(key)));
        collect(format!("{field}/{key}"), a, b, found);
    }
}
