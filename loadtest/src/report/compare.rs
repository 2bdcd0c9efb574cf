//! `loadtest compare`: reports side by side.

use std::fmt::{self, Write};

use super::plot::Curve;
use super::{Load, Report, Stage, markdown, plot, print, with_plot, write};
use crate::args::CompareArgs;
use crate::error::Failure;

pub(crate) fn run(args: &CompareArgs) -> Result<(), Failure> {
    let reports: Result<Vec<Report>, Failure> =
        args.reports.iter().map(|path| Report::read(path)).collect();
    let reports = reports?;
    let text = table(&reports);
    print(&text)?;
    let Some(out) = &args.out else { return Ok(()) };
    let svg = svg(&reports);
    if let Some(svg) = &svg {
        write(out, "svg", svg)?;
    }
    write(out, "md", &with_plot(text, out, svg.is_some()))
}

/// The bound is drawn if the ramps had the same.
fn svg(reports: &[Report]) -> Option<String> {
    let curves = reports.iter().map(Report::curve);
    let curves: Vec<Curve> = curves.filter(|curve| !curve.points.is_empty()).collect();
    let mut bounds = reports
        .iter()
        .filter_map(|report| Some(report.ramp.as_ref()?.p99_bound_ms));
    let first = bounds.next();
    let bound = first.filter(|first| bounds.all(|bound| bound == *first));
    (!curves.is_empty()).then(|| plot::svg(&curves, bound))
}

fn table(reports: &[Report]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_table(&mut text, reports);
    text
}

fn write_table(out: &mut String, reports: &[Report]) -> fmt::Result {
    let names: Vec<&str> = reports.iter().map(|report| &*report.name).collect();
    writeln!(out, "# {}\n", names.join(", "))?;
    writeln!(
        out,
        "| | kind | load | answered/s | ratio | p50 ms | p99 | success | tokens/s | client CPU | \
         server CPU |"
    )?;
    writeln!(
        out,
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )?;
    let first = reports
        .first()
        .and_then(|report| Some(speed(report, best(report)?)));
    for report in reports {
        let Report { name, kind, .. } = report;
        let Some(stage) = best(report) else {
            writeln!(
                out,
                "| {name} | {kind} | – | – | – | – | – | – | – | – | – |"
            )?;
            continue;
        };
        let ratio = match first {
            Some(first) if first > 0.0 => format!("{:.2}×", speed(report, stage) / first),
            _ => "–".to_owned(),
        };
        let server = match stage.server_cpu_share {
            Some(share) => format!("{share:.2}"),
            None => "–".to_owned(),
        };
        writeln!(
            out,
            "| {name} | {kind} | {} | {:.1} | {ratio} | {:.1} | {:.1} | {:.2} % | {:.0} | {:.2} | \
             {server} |",
            markdown::load(stage.load),
            stage.goodput_per_second,
            stage.latency.p50_ms,
            stage.latency.p99_ms,
            (stage.success_share * 10_000.0).floor() / 100.0,
            stage.tokens_per_second,
            stage.client.cpu_share,
        )?;
    }
    writeln!(
        out,
        "\nOf a ramp, the highest rate that held; of others, the load with the most answers.\n"
    )?;
    for report in reports {
        if let Some(found) = &report.ramp {
            writeln!(out, "- {}: {}", report.name, markdown::verdict(found))?;
        }
    }
    for report in reports {
        let machine = &report.machine;
        let note = report.note.as_deref().unwrap_or_default();
        writeln!(
            out,
            "- {}: {}, {} with {} cores. {note}",
            report.name, report.created_at, machine.cpu, machine.cores
        )?;
    }
    Ok(())
}

/// The stage that a report is compared by: of a ramp the highest rate that held, of others the one
/// with the most answers.
fn best(report: &Report) -> Option<&Stage> {
    let held = |stage: &&Stage| report.ramp.is_none() || stage.held == Some(true);
    let stages = report.stages.iter().filter(held);
    stages.max_by(|a, b| speed(report, a).total_cmp(&speed(report, b)))
}

/// Requests a second by which a report is compared. What was offered to a ramp's stage is its
/// rate; how many requests came is subject to chance.
fn speed(report: &Report, stage: &Stage) -> f64 {
    match (&report.ramp, stage.load) {
        (Some(_), Load::Rate { rate }) => rate,
        _ => stage.goodput_per_second,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn ratios_are_to_the_first_report() {
        let reports = [
            fixture::ramp("teacher", 0.25),
            fixture::ramp("student", 1.0),
        ];
        insta::assert_snapshot!(table(&reports));
    }

    #[test]
    fn a_ramp_in_which_nothing_held_has_no_figures() {
        let mut report = fixture::ramp("slow", 1.0);
        for stage in &mut report.stages {
            stage.held = Some(false);
        }
        let text = table(&[report]);
        assert!(text.contains("| slow | ramp | – |"), "{text}");
    }

    #[test]
    fn the_bound_is_drawn_where_it_is_the_same_for_all() {
        let mut reports = [fixture::ramp("a", 1.0), fixture::ramp("b", 2.0)];
        assert!(svg(&reports).is_some_and(|svg| svg.contains("bound of p99: 200 ms")));
        if let Some(ramp) = &mut reports[1].ramp {
            ramp.p99_bound_ms = 50.0;
        }
        assert!(svg(&reports).is_some_and(|svg| !svg.contains("bound of p99")));
    }
}
