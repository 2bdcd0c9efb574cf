//! What a load has shown, as JSON, as Markdown and as a plot.

pub(crate) mod compare;
mod markdown;
mod plot;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::args::{Offer, TargetKind};
use crate::error::Failure;
use crate::exchange::Outcome;
use crate::machine::Machine;
use crate::open_loop::Measured;
use crate::promote::Promotions;
use crate::ramp::Found;
use crate::session::Session;
use crate::texts::TextsSummary;
use crate::watch::Watched;
use plot::{Curve, Point};

/// Everything that one load has shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// `run`, `ramp`, `closed` or `promote`.
    pub(crate) kind: String,
    /// What the target is called in tables and plots.
    pub(crate) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    /// Of this program.
    pub(crate) version: String,
    /// RFC 3339.
    pub(crate) created_at: String,
    pub(crate) machine: Machine,
    pub(crate) texts: TextsSummary,
    pub(crate) connections_opened: u64,
    /// The command line.
    pub(crate) settings: serde_json::Value,
    pub(crate) stages: Vec<Stage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ramp: Option<Found>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) promotions: Option<Promotions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) watch: Option<Watched>,
    /// From the start of the warm-up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) timeline: Vec<Second>,
    /// Ended by hand, before its time.
    #[serde(default)]
    pub(crate) interrupted: bool,
}

/// A stretch of time with one load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stage {
    pub(crate) load: Load,
    pub(crate) seconds: f64,
    pub(crate) requests: u64,
    /// As they came: the rate itself is only their mean.
    pub(crate) offered_per_second: f64,
    pub(crate) outcomes: BTreeMap<Outcome, u64>,
    /// The answered, of those whose client behaved.
    pub(crate) success_share: f64,
    /// Answers that came during the stage, whenever their requests started.
    pub(crate) goodput_per_second: f64,
    pub(crate) inputs_per_second: f64,
    pub(crate) tokens_per_second: f64,
    /// Of the answered, from the intended start.
    pub(crate) latency: Quantiles,
    /// As the server says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokenize: Option<Quantiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) queue: Option<Quantiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) compute: Option<Quantiles>,
    pub(crate) client: Client,
    /// CPU time of the watched process, in cores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) server_cpu_share: Option<f64>,
    /// By weight.
    pub(crate) groups: Vec<Group>,
    pub(crate) tasks: Vec<TaskFigures>,
    /// Of a ramp: whether the bounds held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) held: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Load {
    /// Requests a second, whatever comes back.
    Rate { rate: f64 },
    /// Clients that wait for their answers.
    Clients { clients: u32 },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Quantiles {
    pub(crate) count: u64,
    pub(crate) mean_ms: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p90_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    pub(crate) max_ms: f64,
}

/// Whether the client itself was in the way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Client {
    /// From the intended start of a request to when this program got round to it.
    pub(crate) lag: Quantiles,
    /// Requests that found all connections taken.
    pub(crate) waited_for_connection: u64,
    /// CPU time, in cores.
    pub(crate) cpu_share: f64,
}

/// Tasks of one weight, together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Group {
    pub(crate) weight: f64,
    pub(crate) tasks: usize,
    pub(crate) requests: u64,
    pub(crate) success_share: f64,
    pub(crate) goodput_per_second: f64,
    pub(crate) latency: Quantiles,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TaskFigures {
    pub(crate) task: String,
    pub(crate) weight: f64,
    pub(crate) requests: u64,
    pub(crate) success_share: f64,
    pub(crate) outcomes: BTreeMap<Outcome, u64>,
    pub(crate) latency: Quantiles,
}

/// A row of the timeline; requests belong to the second they were meant to start in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Second {
    pub(crate) second: usize,
    /// Width of the row.
    pub(crate) seconds: usize,
    pub(crate) requests: u64,
    pub(crate) answered: u64,
    /// Answers that came in this second, whenever their requests started.
    pub(crate) delivered: u64,
    pub(crate) refused: u64,
    pub(crate) failed: u64,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
}

impl Report {
    /// A report without figures yet. `settings` are those of the command, `offer` included.
    pub(crate) fn new(
        kind: &str,
        offer: &Offer,
        settings: &impl Serialize,
        session: &Session,
    ) -> Result<Self, Failure> {
        let name = offer.name.clone().unwrap_or_else(|| {
            let name = match offer.target {
                TargetKind::Kdlora => "kdlora",
                TargetKind::Tei => "text-embeddings-inference",
            };
            name.to_owned()
        });
        Ok(Self {
            kind: kind.to_owned(),
            name,
            note: offer.note.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            created_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            machine: Machine::this(),
            texts: session.texts.summary(),
            connections_opened: 0,
            settings: serde_json::to_value(settings).map_err(Failure::Json)?,
            stages: Vec::new(),
            ramp: None,
            promotions: None,
            watch: None,
            timeline: Vec::new(),
            interrupted: false,
        })
    }

    pub(crate) fn add(&mut self, measured: Measured) {
        self.stages.extend(measured.stages);
        self.timeline = measured.timeline;
        self.connections_opened = measured.connections_opened;
        self.interrupted |= measured.interrupted;
    }

    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let text = fs::read(path).map_err(|source| Failure::Read {
            path: path.to_owned(),
            source,
        })?;
        serde_json::from_slice(&text).map_err(|source| Failure::Report {
            path: path.to_owned(),
            source,
        })
    }

    pub(crate) fn wrong_answers(&self) -> u64 {
        let outcomes = self.stages.iter().flat_map(|stage| &stage.outcomes);
        let wrong = outcomes.filter(|(outcome, _)| outcome.is_wrong());
        wrong.map(|(_, count)| count).sum()
    }

    /// Latency over the rate; empty where no rates were offered.
    fn curve(&self) -> Curve {
        let points = self.stages.iter().filter_map(|stage| match stage.load {
            Load::Rate { rate } if rate > 0.0 && stage.latency.count > 0 => Some(Point {
                rate,
                p50_ms: stage.latency.p50_ms,
                p99_ms: stage.latency.p99_ms,
                held: stage.held.unwrap_or(true),
            }),
            _ => None,
        });
        let mut points: Vec<Point> = points.collect();
        // Of several tries of a rate, the one that decided.
        points.reverse();
        points.sort_by(|a, b| a.rate.total_cmp(&b.rate));
        points.dedup_by_key(|point| point.rate);
        Curve {
            name: self.name.clone(),
            points,
        }
    }

    /// The plot, where there is more than one rate.
    fn svg(&self) -> Option<String> {
        let curve = self.curve();
        let bound = self.ramp.as_ref().map(|ramp| ramp.p99_bound_ms);
        (curve.points.len() > 1).then(|| plot::svg(&[curve], bound))
    }

    /// Prints the Markdown, and writes all forms beside each other where `out` says.
    pub(crate) fn publish(&self, out: Option<&Path>) -> Result<(), Failure> {
        let text = markdown::report(self);
        print(&text)?;
        let Some(out) = out else { return Ok(()) };
        let json = serde_json::to_string_pretty(self).map_err(Failure::Json)?;
        write(out, "json", &json)?;
        let svg = self.svg();
        if let Some(svg) = &svg {
            write(out, "svg", svg)?;
        }
        write(out, "md", &with_plot(text, out, svg.is_some()))
    }
}

/// Markdown that shows the plot beside it.
fn with_plot(text: String, out: &Path, plotted: bool) -> String {
    match out.file_name() {
        Some(name) if plotted => {
            let name = name.to_string_lossy();
            format!("{text}\n![Latency over rate]({name}.svg)\n")
        }
        _ => text,
    }
}

fn print(text: &str) -> Result<(), Failure> {
    let written = io::stdout().lock().write_all(text.as_bytes());
    written.map_err(|source| Failure::Write {
        path: "standard output".into(),
        source,
    })
}

/// `out` with an ending added: what comes after a dot in it belongs to its name.
fn write(out: &Path, ending: &str, text: &str) -> Result<(), Failure> {
    let mut path = out.as_os_str().to_owned();
    path.push(".");
    path.push(ending);
    let path = PathBuf::from(path);
    let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
    folder
        .and_then(|()| fs::write(&path, text))
        .map_err(|source| Failure::Write { path, source })
}

/// One line on standard error, for who waits.
pub(crate) fn progress(stage: &Stage) {
    let held = match stage.held {
        Some(true) => "  held",
        Some(false) => "  not held",
        None => "",
    };
    eprintln!(
        "{:>14}: {:8.1}/s answered, p50 {:7.1} ms, p99 {:7.1} ms, success {:.4}{held}",
        markdown::load(stage.load),
        stage.goodput_per_second,
        stage.latency.p50_ms,
        stage.latency.p99_ms,
        stage.success_share,
    );
}

#[cfg(test)]
pub(crate) mod fixture {
    use super::*;
    use crate::ramp::End;

    pub(crate) fn quantiles(p50_ms: f64) -> Quantiles {
        Quantiles {
            count: 1_000,
            mean_ms: p50_ms * 1.2,
            p50_ms,
            p90_ms: p50_ms * 2.0,
            p99_ms: p50_ms * 4.0,
            p999_ms: p50_ms * 5.0,
            max_ms: p50_ms * 6.0,
        }
    }

    pub(crate) fn stage(rate: f64, p50_ms: f64, held: bool) -> Stage {
        Stage {
            load: Load::Rate { rate },
            seconds: 20.0,
            requests: (rate * 20.0) as u64,
            offered_per_second: rate,
            outcomes: BTreeMap::from([(Outcome::Answered, 990), (Outcome::Refused, 10)]),
            success_share: 0.99,
            goodput_per_second: rate * 0.99,
            inputs_per_second: rate * 0.99,
            tokens_per_second: rate * 25.0,
            latency: quantiles(p50_ms),
            tokenize: Some(quantiles(0.25)),
            queue: Some(quantiles(p50_ms / 2.0)),
            compute: Some(quantiles(p50_ms / 4.0)),
            client: Client {
                lag: quantiles(0.0625),
                waited_for_connection: 0,
                cpu_share: 0.03,
            },
            server_cpu_share: Some(1.5),
            groups: vec![group(1.0, 1, p50_ms)],
            tasks: vec![TaskFigures {
                task: "mood".to_owned(),
                weight: 1.0,
                requests: 1_000,
                success_share: 0.99,
                outcomes: BTreeMap::from([(Outcome::Answered, 990), (Outcome::Refused, 10)]),
                latency: quantiles(p50_ms),
            }],
            held: Some(held),
        }
    }

    pub(crate) fn group(weight: f64, tasks: usize, p50_ms: f64) -> Group {
        Group {
            weight,
            tasks,
            requests: 1_000,
            success_share: 1.0,
            goodput_per_second: 50.0,
            latency: quantiles(p50_ms),
        }
    }

    /// A ramp that held up to 32 requests a second.
    pub(crate) fn ramp(name: &str, speed: f64) -> Report {
        Report {
            kind: "ramp".to_owned(),
            name: name.to_owned(),
            note: Some("two threads".to_owned()),
            version: "0.1.0".to_owned(),
            created_at: "2026-01-02T03:04:05Z".to_owned(),
            machine: Machine {
                cpu: "Some CPU".to_owned(),
                cores: 2,
                memory_bytes: Some(8 << 30),
            },
            texts: TextsSummary {
                rows: 100,
                mean_characters: 80.5,
                longest_characters: 200,
            },
            connections_opened: 12,
            settings: serde_json::json!({"seed": 1, "url": "http://mock", "batch": 1}),
            stages: vec![
                stage(8.0 * speed, 8.0, true),
                stage(32.0 * speed, 16.0, true),
                stage(64.0 * speed, 500.0, false),
            ],
            ramp: Some(Found {
                p99_bound_ms: 200.0,
                success_bound: 0.999,
                highest_rate: Some(32.0 * speed),
                end: End::Fails { rate: 64.0 * speed },
            }),
            promotions: None,
            watch: None,
            timeline: Vec::new(),
            interrupted: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_written_in_all_forms_and_read_back() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let out = folder.path().join("new/v1.2");
        let report = fixture::ramp("student", 1.0);
        report.publish(Some(&out)).expect("written");
        let read = Report::read(&folder.path().join("new/v1.2.json")).expect("read");
        assert_eq!(read, report);
        let text = fs::read_to_string(folder.path().join("new/v1.2.md")).expect("Markdown");
        assert!(text.contains("](v1.2.svg)"), "{text}");
        let svg = fs::read_to_string(folder.path().join("new/v1.2.svg")).expect("a plot");
        assert!(svg.starts_with("<svg"), "{svg}");
    }

    #[test]
    fn the_curve_has_the_try_that_decided() {
        let mut report = fixture::ramp("student", 1.0);
        report.stages = vec![
            fixture::stage(32.0, 900.0, false),
            fixture::stage(32.0, 16.0, true),
            fixture::stage(8.0, 8.0, true),
        ];
        let points = report.curve().points;
        let shape: Vec<_> = points.iter().map(|p| (p.rate, p.p50_ms, p.held)).collect();
        assert_eq!(shape, [(8.0, 8.0, true), (32.0, 16.0, true)]);
    }

    #[test]
    fn what_is_no_report_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(file.path(), "{\"kind\": \"run\"}").expect("written");
        let error = Report::read(file.path()).expect_err("not a report");
        assert!(error.chain().contains("is not a report of this program"));
    }

    #[test]
    fn the_form_of_the_json_stays() {
        let mut report = fixture::ramp("student", 1.0);
        report.stages.truncate(1);
        insta::assert_json_snapshot!(report);
    }
}
