//! A report for people.

use std::fmt::{self, Write};

use crate::exchange::Outcome;
use crate::promote::Promotions;
use crate::ramp::{End, Found};
use crate::watch::Watched;

use super::{Load, Quantiles, Report, Stage};

/// Tasks that are listed one by one; more are shown by weight only.
const MOST_TASKS: usize = 12;

pub(super) fn report(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_report(&mut text, report);
    text
}

fn write_report(out: &mut String, report: &Report) -> fmt::Result {
    let Report { name, kind, .. } = report;
    writeln!(out, "# {name}: {kind}\n")?;
    if report.interrupted {
        writeln!(out, "Interrupted: what follows is a part.\n")?;
    }
    conditions(out, report)?;
    if let Some(found) = &report.ramp {
        writeln!(out, "{}\n", verdict(found))?;
    }
    stages(out, &report.stages)?;
    outcomes(out, &report.stages)?;
    where_the_time_went(out, &report.stages)?;
    client(out, &report.stages)?;
    tasks(out, &report.stages)?;
    if let Some(promotions) = &report.promotions {
        write_promotions(out, promotions)?;
    }
    if let Some(watched) = &report.watch {
        watch(out, watched)?;
    }
    Ok(())
}

fn conditions(out: &mut String, report: &Report) -> fmt::Result {
    let machine = &report.machine;
    let texts = &report.texts;
    let setting = |name: &str| match report.settings.get(name) {
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => "?".to_owned(),
    };
    writeln!(
        out,
        "{}, seed {}, {} with {} cores; inputs in a request: {}, from {} texts of {:.0} characters \
         on average; connections opened: {}.",
        report.created_at,
        setting("seed"),
        machine.cpu,
        machine.cores,
        setting("batch"),
        texts.rows,
        texts.mean_characters,
        report.connections_opened,
    )?;
    if let Some(note) = &report.note {
        writeln!(out, "{note}")?;
    }
    writeln!(out)
}

/// The ramp's result, in a sentence.
pub(super) fn verdict(found: &Found) -> String {
    let Found {
        p99_bound_ms,
        success_bound,
        ..
    } = found;
    let bounds = format!("p99 <= {p99_bound_ms:.0} ms and {success_bound} answered");
    match (found.highest_rate, &found.end) {
        (None, _) => format!("No rate that was tried held {bounds}."),
        (Some(rate), End::Fails { rate: fails }) => {
            format!("**{rate:.1} requests a second** held {bounds}; {fails:.1} did not.")
        }
        (Some(rate), End::MaxRate) => {
            format!("All rates up to **{rate:.1} requests a second**, the highest, held {bounds}.")
        }
        (Some(rate), End::Interrupted) => {
            format!("Interrupted; **{rate:.1} requests a second** held {bounds}.")
        }
    }
}

fn stages(out: &mut String, stages: &[Stage]) -> fmt::Result {
    let ramp = stages.iter().any(|stage| stage.held.is_some());
    writeln!(
        out,
        "| load | offered/s | answered/s | success | p50 ms | p90 | p99 | p99.9 | max | \
         tokens/s |{}",
        if ramp { " held |" } else { "" }
    )?;
    writeln!(
        out,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |{}",
        if ramp { " --- |" } else { "" }
    )?;
    for stage in stages {
        let latency = &stage.latency;
        write!(
            out,
            "| {} | {:.1} | {:.1} | {} | {} | {} | {} | {} | {} | {:.0} |",
            load(stage.load),
            stage.offered_per_second,
            stage.goodput_per_second,
            percent(stage.success_share),
            ms(latency, latency.p50_ms),
            ms(latency, latency.p90_ms),
            ms(latency, latency.p99_ms),
            ms(latency, latency.p999_ms),
            ms(latency, latency.max_ms),
            stage.tokens_per_second,
        )?;
        match stage.held {
            Some(true) => writeln!(out, " yes |")?,
            Some(false) => writeln!(out, " no |")?,
            None => writeln!(out)?,
        }
    }
    writeln!(
        out,
        "\nLatency is that of answered requests, from their intended start; answers per second are \
         counted when they come.\n"
    )
}

fn outcomes(out: &mut String, stages: &[Stage]) -> fmt::Result {
    let seen: Vec<Outcome> = Outcome::ALL
        .iter()
        .copied()
        .filter(|outcome| stages.iter().any(|s| s.outcomes.contains_key(outcome)))
        .collect();
    if seen.iter().all(|outcome| *outcome == Outcome::Answered) {
        return Ok(());
    }
    let labels: Vec<&str> = seen.iter().map(|outcome| outcome.label()).collect();
    writeln!(out, "| load | {} |", labels.join(" | "))?;
    writeln!(out, "| --- |{}", " ---: |".repeat(seen.len()))?;
    for stage in stages {
        write!(out, "| {} |", load(stage.load))?;
        for outcome in &seen {
            write!(out, " {} |", stage.outcomes.get(outcome).unwrap_or(&0))?;
        }
        writeln!(out)?;
    }
    writeln!(out)
}

fn where_the_time_went(out: &mut String, stages: &[Stage]) -> fmt::Result {
    let parts = |stage: &Stage| [stage.tokenize, stage.queue, stage.compute];
    if stages.iter().flat_map(parts).all(|part| part.is_none()) {
        return Ok(());
    }
    writeln!(
        out,
        "| as the server says, ms | tokenize p50 | p99 | queue p50 | p99 | compute p50 | p99 |"
    )?;
    writeln!(out, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    for stage in stages {
        write!(out, "| {} |", load(stage.load))?;
        for part in parts(stage) {
            match part {
                Some(times) => write!(out, " {:.2} | {:.2} |", times.p50_ms, times.p99_ms)?,
                None => write!(out, " – | – |")?,
            }
        }
        writeln!(out)?;
    }
    writeln!(out)
}

fn client(out: &mut String, stages: &[Stage]) -> fmt::Result {
    writeln!(
        out,
        "| the client itself | lag p50 ms | p99 | max | waited for a connection | CPU, cores | \
         server's CPU |"
    )?;
    writeln!(out, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    for stage in stages {
        let client = &stage.client;
        let server = match stage.server_cpu_share {
            Some(share) => format!("{share:.2}"),
            None => "–".to_owned(),
        };
        writeln!(
            out,
            "| {} | {:.2} | {:.2} | {:.2} | {} | {:.2} | {server} |",
            load(stage.load),
            client.lag.p50_ms,
            client.lag.p99_ms,
            client.lag.max_ms,
            client.waited_for_connection,
            client.cpu_share,
        )?;
    }
    writeln!(out)
}

fn tasks(out: &mut String, stages: &[Stage]) -> fmt::Result {
    if stages.iter().any(|stage| stage.groups.len() > 1) {
        writeln!(
            out,
            "| tasks by weight | tasks | requests | answered/s | success | p50 ms | p99 | max |"
        )?;
        writeln!(
            out,
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        )?;
        for stage in stages {
            for group in &stage.groups {
                let latency = &group.latency;
                writeln!(
                    out,
                    "| {}, weight {} | {} | {} | {:.1} | {} | {} | {} | {} |",
                    load(stage.load),
                    group.weight,
                    group.tasks,
                    group.requests,
                    group.goodput_per_second,
                    percent(group.success_share),
                    ms(latency, latency.p50_ms),
                    ms(latency, latency.p99_ms),
                    ms(latency, latency.max_ms),
                )?;
            }
        }
        writeln!(out)?;
    }
    let most = stages.iter().map(|stage| stage.tasks.len()).max();
    if !most.is_some_and(|most| (2..=MOST_TASKS).contains(&most)) {
        return Ok(());
    }
    writeln!(out, "| task | requests | success | p50 ms | p99 | max |")?;
    writeln!(out, "| --- | ---: | ---: | ---: | ---: | ---: |")?;
    for stage in stages {
        for task in &stage.tasks {
            let latency = &task.latency;
            writeln!(
                out,
                "| {}, {} | {} | {} | {} | {} | {} |",
                load(stage.load),
                task.task,
                task.requests,
                percent(task.success_share),
                ms(latency, latency.p50_ms),
                ms(latency, latency.p99_ms),
                ms(latency, latency.max_ms),
            )?;
        }
    }
    writeln!(out)
}

fn write_promotions(out: &mut String, promotions: &Promotions) -> fmt::Result {
    let Promotions {
        asked_per_second,
        attempted,
        succeeded,
        failures,
        seconds,
        latency,
        learnt_answers,
    } = promotions;
    writeln!(
        out,
        "{succeeded} of {attempted} promotions succeeded in {seconds:.1} s, {:.1} a second \
         ({asked_per_second:.1} were asked for); a promotion took {:.1} ms at p50, {:.1} at p99, \
         {:.1} at most. Answers that were learnt beforehand to check by: {learnt_answers}.\n",
        *attempted as f64 / seconds.max(f64::MIN_POSITIVE),
        latency.p50_ms,
        latency.p99_ms,
        latency.max_ms,
    )?;
    for (reason, count) in failures {
        writeln!(out, "- {count} × {reason}")?;
    }
    if failures.is_empty() {
        Ok(())
    } else {
        writeln!(out)
    }
}

fn watch(out: &mut String, watched: &Watched) -> fmt::Result {
    writeln!(out, "| watched every second | first | last | most |")?;
    writeln!(out, "| --- | ---: | ---: | ---: |")?;
    if let Some(memory) = &watched.resident_mib {
        writeln!(
            out,
            "| resident memory, MiB | {:.1} | {:.1} | {:.1} |",
            memory.first, memory.last, memory.max
        )?;
    }
    for (name, series) in &watched.gauges {
        writeln!(
            out,
            "| `{name}` | {} | {} | {} |",
            series.first, series.last, series.max
        )?;
    }
    if let Some(slope) = watched.resident_mib_per_hour {
        writeln!(
            out,
            "\nOver the second half, resident memory changed by {slope:+.1} MiB an hour."
        )?;
    }
    if watched.ended {
        writeln!(out, "\nThe watched process ended.")?;
    }
    writeln!(out)
}

pub(super) fn load(load: Load) -> String {
    match load {
        Load::Rate { rate } => format!("{rate:.1}/s"),
        Load::Clients { clients: 1 } => "1 client".to_owned(),
        Load::Clients { clients } => format!("{clients} clients"),
    }
}

/// A quantile, if there was anything to take it of.
fn ms(of: &Quantiles, value: f64) -> String {
    match of.count {
        0 => "–".to_owned(),
        _ => format!("{value:.1}"),
    }
}

fn percent(share: f64) -> String {
    // Rounded down: 100 % is said of all only.
    format!("{:.2} %", (share * 10_000.0).floor() / 100.0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::report::fixture;
    use crate::watch::Series;

    #[test]
    fn a_ramp_reads_as_it_should() {
        insta::assert_snapshot!(report(&fixture::ramp("student", 1.0)));
    }

    #[test]
    fn a_run_with_all_its_parts_reads_as_it_should() {
        let mut run = fixture::ramp("kdlora", 1.0);
        run.kind = "promote".to_owned();
        run.ramp = None;
        run.interrupted = true;
        run.stages.truncate(1);
        let stage = &mut run.stages[0];
        stage.held = None;
        stage.groups = vec![fixture::group(1.0, 99, 8.0), fixture::group(10.0, 1, 80.0)];
        stage.outcomes.insert(Outcome::WrongVersion, 1);
        let mut other = stage.tasks[0].clone();
        other.task = "topic".to_owned();
        stage.tasks.push(other);
        run.promotions = Some(Promotions {
            asked_per_second: 17.0,
            attempted: 1_000,
            succeeded: 999,
            failures: BTreeMap::from([("status 409: Conflicting state".to_owned(), 1)]),
            seconds: 60.0,
            latency: fixture::quantiles(12.0),
            learnt_answers: 400,
        });
        let series = Series {
            first: 100.0,
            last: 101.5,
            max: 102.25,
        };
        run.watch = Some(Watched {
            samples: Vec::new(),
            resident_mib: Some(series),
            resident_mib_per_hour: Some(-0.25),
            gauges: BTreeMap::from([("kdlora_in_flight_requests".to_owned(), series)]),
            ended: true,
        });
        insta::assert_snapshot!(report(&run));
    }

    #[test]
    fn a_share_is_never_rounded_up_to_all() {
        assert_eq!(percent(0.99999), "99.99 %");
        assert_eq!(percent(1.0), "100.00 %");
    }
}
