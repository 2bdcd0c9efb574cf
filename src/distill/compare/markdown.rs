//! The table of a comparison to read.

use std::fmt::Write as _;

use super::table::{Comparison, RowSummary};

type Column = (&'static str, fn(&RowSummary) -> Option<String>);

const COLUMNS: [Column; 12] = [
    ("95 % interval", |row| {
        Some(format!("{:.3} to {:.3}", row.low, row.high))
    }),
    ("of LoRA", |row| row.kept_of_lora.map(percent)),
    ("of FFT", |row| row.kept_of_fft.map(percent)),
    ("parameters", |row| Some(millions(row.parameters))),
    ("trained", |row| row.trainable.map(millions)),
    ("task, MiB", |row| Some(mebibytes(row.task_bytes))),
    ("training peak, MiB", |row| {
        row.training_bytes.map(mebibytes)
    }),
    ("inference peak, MiB", |row| {
        row.inference_bytes.map(mebibytes)
    }),
    ("p50 of batch 1, ms", |row| {
        Some(format!("{:.1}", row.latency?.batch_1.p50_ms))
    }),
    ("of batch 32, ms", |row| {
        Some(format!("{:.0}", row.latency?.batch_32.p50_ms))
    }),
    ("training, s", |row| {
        row.training_seconds.map(|seconds| format!("{seconds:.0}"))
    }),
    ("tokens/s", |row| {
        row.training_tokens_per_second
            .map(|rate| format!("{rate:.0}"))
    }),
];

impl Comparison {
    /// The table, what it was measured on, and what the teacher is worth.
    pub fn to_markdown(&self) -> String {
        let mut text = format!("# {}\n\n", self.task);
        let processor = self
            .machine
            .processor
            .as_deref()
            .unwrap_or("processor unknown");
        let threads = match self.machine.device.as_str() {
            "cpu" => "one thread",
            gpu => gpu,
        };
        let _ = writeln!(
            text,
            "{}: {} rows to train on, {} to choose the epoch by, {} to score. {}, {} cores, {}. \
             Latency is a forward pass on {threads}, all rows in turns.\n",
            capitalised(&self.problem_type.to_string()),
            self.train_rows,
            self.validation_rows,
            self.test_rows,
            processor,
            self.machine.cores,
            self.created_at,
        );
        let shown: Vec<&Column> = COLUMNS
            .iter()
            .filter(|(_, cell)| self.rows.iter().any(|row| cell(row).is_some()))
            .collect();
        let _ = write!(text, "| | encoder | {} |", self.metric);
        shown.iter().for_each(|(title, _)| {
            let _ = write!(text, " {title} |");
        });
        let _ = writeln!(
            text,
            "\n| --- | --- | ---: |{}",
            " ---: |".repeat(shown.len())
        );
        for row in &self.rows {
            let _ = write!(text, "| {} | {} | {} |", row.row, row.encoder, score(row));
            for (_, cell) in &shown {
                let _ = write!(text, " {} |", cell(row).unwrap_or_else(|| "–".into()));
            }
            text.push('\n');
        }
        text.push('\n');
        if let Some(majority) = self.majority {
            let _ = writeln!(text, "The most common answer alone: {majority:.3}.\n");
        }
        for row in &self.rows {
            if let Some(difference) = row.over_control {
                let _ = writeln!(
                    text,
                    "{} less lora-student: {:+.3} ({:+.3} to {:+.3}).\n",
                    row.row, difference.mean, difference.low, difference.high
                );
            }
        }
        let _ = writeln!(text, "| | scores by seed |\n| --- | --- |");
        for row in &self.rows {
            let seeds: Vec<String> = row
                .seeds
                .iter()
                .map(|seed| format!("{}: {:.4}", seed.seed, seed.score))
                .collect();
            let _ = writeln!(text, "| {} | {} |", row.row, seeds.join(", "));
        }
        text
    }
}

fn score(row: &RowSummary) -> String {
    match row.deviation {
        Some(deviation) => format!("{:.3} ± {deviation:.3}", row.mean),
        None => format!("{:.3}", row.mean),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn millions(count: usize) -> String {
    format!("{:.2} M", count as f64 / 1e6)
}

fn mebibytes(bytes: u64) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    match mebibytes < 10.0 {
        true => format!("{mebibytes:.1}"),
        false => format!("{mebibytes:.0}"),
    }
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).collect(),
        None => String::new(),
    }
}
