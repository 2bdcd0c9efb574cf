//! Offers a server of classifications a load that does not wait for its answers, and reports how
//! long they took.
//!
//! - [`args`], [`units`]: what the user typed.
//! - [`arrivals`], [`mix`], [`texts`]: when requests start and what they ask, drawn from the seed.
//! - [`target`], [`http`], [`exchange`]: one request and its answer.
//! - [`session`]: what all of a run shares; [`open_loop`], [`closed_loop`], [`ramp`]: the loads.
//! - [`promote`], [`versions`]: changes versions under load and knows which may answer.
//! - [`record`], [`times`], [`watch`], [`machine`]: what is measured.
//! - [`report`]: JSON, Markdown, SVG.

mod args;
mod arrivals;
mod closed_loop;
mod error;
mod exchange;
mod http;
mod machine;
mod mix;
mod open_loop;
mod promote;
mod ramp;
mod record;
mod report;
mod session;
mod target;
mod texts;
mod times;
mod units;
mod versions;
mod watch;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command, Offer};
use error::Failure;
use report::Report;

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Run(args) => with_runtime(&args.offer, open_loop::run(&args)),
        Command::Ramp(args) => with_runtime(&args.offer, ramp::run(&args)),
        Command::Closed(args) => with_runtime(&args.offer, closed_loop::run(&args)),
        Command::Promote(args) => with_runtime(&args.run.offer, promote::run(&args)),
        Command::Compare(args) => report::compare::run(&args).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|failure| {
        eprintln!("loadtest: {}", failure.chain());
        ExitCode::FAILURE
    })
}

/// Runs `load` and hands its report out. Wrong answers make the exit status 1, whatever the
/// latency: a server that answers wrongly is not fast.
fn with_runtime(
    offer: &Offer,
    load: impl Future<Output = Result<Report, Failure>>,
) -> Result<ExitCode, Failure> {
    let mut builder = match offer.threads {
        0 | 1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if offer.threads > 1 {
        builder.worker_threads(offer.threads);
    }
    let runtime = builder.enable_all().build().map_err(Failure::Runtime)?;
    let report = runtime.block_on(load)?;
    runtime.shutdown_background();
    report.publish(offer.out.as_deref())?;
    Ok(match report.wrong_answers() {
        0 => ExitCode::SUCCESS,
        wrong => {
            eprintln!("loadtest: {wrong} answers were wrong");
            ExitCode::FAILURE
        }
    })
}
