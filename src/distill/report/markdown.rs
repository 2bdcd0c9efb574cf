//! The report as a table to read: student, teacher, majority class.

use std::fmt::Write as _;

use super::{ModelSize, Reference, Report};
use crate::distill::dataset::Split;
use crate::distill::evaluation::{Evaluation, LatencyAt, Metric, Quantiles};
use crate::distill::gate::Condition;

/// One row of the table: a title and a cell for each column.
type TableRow = (String, [Option<String>; 4]);

/// With more classes, the table of what was taken for what is in the JSON only.
const MAX_SHOWN_CONFUSION: usize = 12;

const COLUMNS: [&str; 4] = ["student", "without distillation", "teacher", "majority"];

impl Report {
    /// A Markdown table with a column each for the student, the control, the teacher and the
    /// majority class (those that there are), followed by the verdict and the data.
    pub fn to_markdown(&self) -> String {
        let mut text = format!("# {}\n\n", self.task);
        let _ = writeln!(
            text,
            "{} of {} rows, {}, seed {}.",
            capitalised(&self.problem_type.to_string()),
            self.student.rows,
            self.created_at,
            self.seed
        );
        if self.reference == Reference::Teacher {
            text.push_str(
                "No test row has a label: scores are held against the teacher's answers.\n",
            );
        }
        text.push('\n');
        self.write_table(&mut text);
        self.write_gate(&mut text);
        self.write_classes(&mut text);
        self.write_training(&mut text);
        self.write_data(&mut text);
        text
    }

    fn write_table(&self, text: &mut String) {
        let shown: Vec<usize> = [
            true,
            self.control.is_some(),
            self.teacher.is_some() || self.teacher_model.is_some(),
            self.majority.is_some(),
        ]
        .iter()
        .enumerate()
        .filter_map(|(column, shown)| shown.then_some(column))
        .collect();
        text.push_str("| |");
        for &column in &shown {
            let _ = write!(text, " {} |", COLUMNS[column]);
        }
        text.push_str("\n| --- |");
        text.push_str(&" ---: |".repeat(shown.len()));
        text.push('\n');
        let mut rows = self.score_rows();
        rows.extend(self.size_rows());
        rows.extend(self.latency_rows());
        for (title, cells) in rows {
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let _ = write!(text, "| {title} |");
            for &column in &shown {
                let _ = write!(text, " {} |", cells[column].as_deref().unwrap_or("–"));
            }
            text.push('\n');
        }
    }

    fn score_rows(&self) -> Vec<TableRow> {
        let each = |cell: &dyn Fn(&Evaluation) -> Option<String>| {
            [
                Some(&self.student),
                self.control.as_ref(),
                self.teacher.as_ref(),
                self.majority.as_ref(),
            ]
            .map(|evaluation| evaluation.and_then(cell))
        };
        let main = self.student.score.metric;
        let mut rows: Vec<TableRow> = vec![
            (
                format!("**{main}**"),
                each(&|e| Some(figure(e.score.value))),
            ),
            (
                "95 % interval".into(),
                each(&|e| {
                    Some(format!(
                        "{} to {}",
                        figure(e.score.low),
                        figure(e.score.high)
                    ))
                }),
            ),
        ];
        type Figure = fn(&Evaluation) -> Option<f64>;
        let further: [(&str, Option<Metric>, Figure); 10] = [
            ("accuracy", Some(Metric::Accuracy), |e| e.accuracy),
            ("F1", Some(Metric::F1), |e| e.f1),
            ("macro-F1", Some(Metric::MacroF1), |e| e.macro_f1),
            ("micro-F1", None, |e| e.micro_f1),
            ("MCC", Some(Metric::Mcc), |e| e.mcc),
            ("Pearson", None, |e| e.pearson),
            ("Spearman", None, |e| e.spearman),
            ("mean absolute error", None, |e| e.mean_absolute_error),
            ("calibration error", None, |e| e.ece),
            ("calibration error, temperature fitted", None, |e| {
                e.calibration.map(|c| c.ece)
            }),
        ];
        for (title, metric, get) in further {
            if metric != Some(main) {
                rows.push((title.into(), each(&|e| get(e).map(figure))));
            }
        }
        rows.push((
            "share of the teacher's score".into(),
            [self.share_kept.map(percent), None, None, None],
        ));
        let likeness = self.likeness;
        rows.push((
            "agreement with the teacher".into(),
            [likeness.map(|l| percent(l.agreement)), None, None, None],
        ));
        rows.push((
            "KL from the teacher, nats".into(),
            [
                likeness.and_then(|l| l.mean_kl).map(figure),
                None,
                None,
                None,
            ],
        ));
        rows
    }

    fn size_rows(&self) -> Vec<TableRow> {
        let each = |cell: &dyn Fn(&ModelSize) -> Option<String>| {
            [
                cell(&self.student_model),
                None,
                self.teacher_model.as_ref().and_then(cell),
                None,
            ]
        };
        vec![
            ("encoder".into(), each(&|m| Some(m.encoder.clone()))),
            (
                "parameters".into(),
                each(&|m| Some(thousands(m.parameters as u64))),
            ),
            (
                "trained parameters".into(),
                each(&|m| m.trainable.map(|n| thousands(n as u64))),
            ),
            (
                "encoder on disk".into(),
                each(&|m| Some(mebibytes(m.encoder_bytes))),
            ),
            (
                "adapter on disk".into(),
                each(&|m| m.adapter_bytes.map(mebibytes)),
            ),
        ]
    }

    fn latency_rows(&self) -> Vec<TableRow> {
        let Some(latency) = &self.latency else {
            return Vec::new();
        };
        let mut rows = Vec::new();
        for at in [&latency.batch_1, &latency.batch_32] {
            rows.push(latency_row(at));
            rows.push((
                format!("speed-up, batch {}", at.batch),
                [at.speed_up.map(|x| format!("{x:.2}×")), None, None, None],
            ));
        }
        rows
    }

    fn write_gate(&self, text: &mut String) {
        let Some(gate) = &self.gate else { return };
        if gate.passed {
            text.push_str("\nGate: passed.\n");
        } else {
            text.push_str("\nGate: not passed.\n\n");
            for reason in &gate.reasons {
                let _ = writeln!(text, "- {reason}");
            }
        }
        if !gate.conditions.is_empty() {
            text.push('\n');
            write_conditions(text, &gate.conditions);
        }
    }

    /// The classes one by one, and what was taken for what.
    fn write_classes(&self, text: &mut String) {
        let classes = &self.student.classes;
        if classes.is_empty() {
            return;
        }
        text.push_str("\n| class | precision | recall | F1 | rows | predicted |\n");
        text.push_str("| --- | ---: | ---: | ---: | ---: | ---: |\n");
        for class in classes {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} |",
                cell(&class.label),
                figure(class.precision),
                figure(class.recall),
                figure(class.f1),
                class.support,
                class.predicted
            );
        }
        let Some(confusion) = &self.student.confusion else {
            return;
        };
        if classes.len() > MAX_SHOWN_CONFUSION {
            return;
        }
        text.push_str("\n| right ↓ answered → |");
        for class in classes {
            let _ = write!(text, " {} |", cell(&class.label));
        }
        text.push_str("\n| --- |");
        text.push_str(&" ---: |".repeat(classes.len()));
        text.push('\n');
        for (class, row) in classes.iter().zip(confusion) {
            let _ = write!(text, "| {} |", cell(&class.label));
            row.iter().for_each(|count| {
                let _ = write!(text, " {count} |");
            });
            text.push('\n');
        }
    }

    fn write_training(&self, text: &mut String) {
        if let Some(training) = &self.training {
            let _ = writeln!(
                text,
                "\nTraining: {} steps in {} epochs, {:.0} s, {:.0} tokens a second; \
                 weights of epoch {}.",
                training.steps,
                training.epochs,
                training.seconds,
                training.tokens_per_second,
                training.best_epoch
            );
        }
        let memory = self.peak_memory;
        if let Some(bytes) = memory.training_bytes {
            let _ = writeln!(text, "\nPeak memory in training: {}.", mebibytes(bytes));
        }
        if let Some(bytes) = memory.inference_bytes {
            let _ = writeln!(text, "\nPeak memory in inference: {}.", mebibytes(bytes));
        }
        if let Some(latency) = &self.latency {
            let _ = writeln!(
                text,
                "\nLatency on {} with {} threads, student and teacher in turns on the same inputs.",
                latency.device, latency.threads
            );
        }
    }

    fn write_data(&self, text: &mut String) {
        let checks = &self.data.checks;
        text.push_str("\nData:");
        for (i, split) in Split::ALL.into_iter().enumerate() {
            let counts = checks.split(split);
            let separator = if i == 0 { "" } else { "," };
            let _ = write!(
                text,
                "{separator} {} {split}",
                thousands(counts.rows as u64)
            );
        }
        text.push_str(" rows.");
        for (count, what) in [
            (checks.rejected, "rejected"),
            (
                checks.overlap_removed,
                "removed because they stand in another split too",
            ),
        ] {
            if count > 0 {
                let _ = write!(text, " Rows {what}: {}.", thousands(count as u64));
            }
        }
        if checks.conflicting_labels > 0 {
            let count = thousands(checks.conflicting_labels as u64);
            let _ = write!(text, " Texts with different labels: {count}.");
        }
        text.push('\n');
        for warning in &checks.warnings {
            let _ = writeln!(text, "\nWarning: {warning}.");
        }
    }
}

/// A table of conditions with their values and bounds.
pub(super) fn write_conditions(text: &mut String, conditions: &[Condition]) {
    text.push_str("| condition | value | bound | |\n| --- | ---: | ---: | --- |\n");
    for condition in conditions {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            condition.name,
            figure(condition.value),
            figure(condition.bound),
            if condition.passed { "holds" } else { "fails" }
        );
    }
}

/// A text that does not break its table.
pub(super) fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

fn latency_row(at: &LatencyAt) -> TableRow {
    let cell = |q: Quantiles| format!("{:.2} / {:.2} / {:.2}", q.p50_ms, q.p90_ms, q.p99_ms);
    (
        format!("p50 / p90 / p99 of batch {}, ms", at.batch),
        [Some(cell(at.student)), None, at.teacher.map(cell), None],
    )
}

fn figure(value: f64) -> String {
    // A tiny negative number would print as −0.0000.
    format!("{:.4}", if value.abs() < 5e-5 { 0.0 } else { value })
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

/// 1234567 → `1,234,567`.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => String::new(),
    }
}
