//! The command line. Settings are serialisable: a report says what it was made with.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::units::{Length, Phase, Time, Turns, Weighted, rate, share};

/// Offers a server of text classifications a load, and reports how long its answers took.
///
/// Requests start at times drawn beforehand (a Poisson process with a seed), whatever is still
/// unanswered, and latency counts from the time a request was meant to start.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Offer one rate, or several one after the other.
    Run(RunArgs),
    /// Find the highest rate that holds a bound of the 99th percentile.
    Ramp(RampArgs),
    /// Let a number of clients ask in a loop, each as soon as it has its answer: the capacity.
    Closed(ClosedArgs),
    /// Offer load while versions of tasks are promoted in turn, and check which version answers.
    Promote(PromoteArgs),
    /// Put reports side by side: one table, one plot.
    Compare(CompareArgs),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TargetKind {
    /// `POST {url}/v1/classify/{task}`.
    Kdlora,
    /// text-embeddings-inference: `POST {url}/predict`, or the URL itself if it has a path.
    Tei,
}

/// Whom to ask what.
#[derive(Clone, Debug, Serialize, ClapArgs)]
pub(crate) struct Offer {
    /// Kind of server.
    #[arg(long, value_enum, default_value_t = TargetKind::Kdlora)]
    pub(crate) target: TargetKind,

    /// Where it is; http only.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub(crate) url: String,

    /// Tasks of a kdlora server and how often each is asked: a,b,c=3.
    #[arg(long, value_name = "TASK[=WEIGHT]", value_delimiter = ',')]
    pub(crate) tasks: Vec<Weighted>,

    /// Ask all tasks of the server, equally often.
    #[arg(long, conflicts_with = "tasks")]
    pub(crate) all_tasks: bool,

    /// JSON lines with `text` and perhaps `text_pair`; can be given more than once.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "data/movie-sentiment/test.jsonl"
    )]
    pub(crate) texts: Vec<PathBuf>,

    /// Longer inputs: each is made of K texts, with these odds (1=9,4=1: one in ten has four).
    #[arg(
        long,
        value_name = "K[=WEIGHT]",
        value_delimiter = ',',
        default_value = "1"
    )]
    pub(crate) lengths: Vec<Length>,

    /// Inputs in one request.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) batch: usize,

    /// What the arrival times, tasks, texts and misconduct are drawn from.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,

    /// Most connections. A request that finds all taken waits for one: that is counted, and its
    /// latency includes the wait.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub(crate) connections: usize,

    /// A client gives up this long after the intended start of its request.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(crate) timeout: Time,

    /// Share of clients that go away before they have their answer.
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = share)]
    pub(crate) cancel: f64,

    /// Share of clients that go away in the middle of sending their request.
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = share)]
    pub(crate) disconnect: f64,

    /// Share of clients that send a text over the server's limit; 413 or 422 is the right answer.
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = share)]
    pub(crate) oversize: f64,

    /// Characters of such a text.
    #[arg(long, value_name = "N", default_value_t = 200_000)]
    pub(crate) oversize_chars: usize,

    /// Server process whose memory and CPU time are sampled once a second, and with them the plain
    /// gauges of its /metrics.
    #[arg(long, value_name = "PID")]
    pub(crate) watch_pid: Option<u32>,

    /// Threads of this client.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) threads: usize,

    /// What the report calls the target [default: its kind].
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// A remark for the report: how the server was started, say.
    #[arg(long)]
    pub(crate) note: Option<String>,

    /// Write PATH.json, PATH.md and, where there is a curve, PATH.svg; missing folders are made.
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Clone, Debug, Serialize, ClapArgs)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) offer: Offer,

    /// Requests a second; several rates follow one another, each for --duration.
    #[arg(
        long,
        value_name = "RATE",
        value_delimiter = ',',
        value_parser = rate,
        required_unless_present = "phase"
    )]
    pub(crate) rate: Vec<f64>,

    /// How long each --rate lasts.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(crate) duration: Time,

    /// RATE:TIME, a phase of its own; can be given more than once, in place of --rate.
    #[arg(long, value_name = "RATE:TIME", conflicts_with = "rate")]
    pub(crate) phase: Vec<Phase>,

    /// Load at the first rate that comes before and is not counted.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(crate) warm_up: Time,
}

impl RunArgs {
    pub(crate) fn phases(&self) -> Vec<Phase> {
        if self.phase.is_empty() {
            let time = self.duration;
            let rates = self.rate.iter();
            rates.map(|rate| Phase { rate: *rate, time }).collect()
        } else {
            self.phase.clone()
        }
    }
}

#[derive(Clone, Debug, Serialize, ClapArgs)]
pub(crate) struct RampArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) offer: Offer,

    /// The bound of the 99th percentile.
    #[arg(long, value_name = "TIME", default_value = "200ms")]
    pub(crate) p99: Time,

    /// Share of requests that must be answered.
    #[arg(long, value_name = "SHARE", default_value = "0.999", value_parser = share)]
    pub(crate) success: f64,

    /// First rate, in requests a second.
    #[arg(long, value_name = "RATE", default_value = "10", value_parser = rate)]
    pub(crate) start: f64,

    /// The rate grows by this factor until it does not hold.
    #[arg(long, value_name = "FACTOR", default_value = "1.6", value_parser = rate)]
    pub(crate) factor: f64,

    /// The search ends when the highest rate that held and the lowest that did not are this close.
    #[arg(long, value_name = "SHARE", default_value = "0.04", value_parser = share)]
    pub(crate) precision: f64,

    /// Never offer less than this: where not even that holds, no rate does.
    #[arg(long, value_name = "RATE", default_value = "1", value_parser = rate)]
    pub(crate) min_rate: f64,

    /// Never offer more than this.
    #[arg(long, value_name = "RATE", default_value = "100000", value_parser = rate)]
    pub(crate) max_rate: f64,

    /// How often a rate is tried until it holds: where others use the machine too, one stall is not
    /// the server's.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) tries: u32,

    /// How long a rate is measured.
    #[arg(long, value_name = "TIME", default_value = "20s")]
    pub(crate) step: Time,

    /// A slow rate is measured longer, until it has had this many requests: fewer have no 99th
    /// percentile to speak of.
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub(crate) min_requests: u64,

    /// Load at each rate that comes before and is not counted.
    #[arg(long, value_name = "TIME", default_value = "3s")]
    pub(crate) settle: Time,
}

#[derive(Clone, Debug, Serialize, ClapArgs)]
pub(crate) struct ClosedArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) offer: Offer,

    /// Clients; several numbers follow one another, each for --duration.
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "16",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) clients: Vec<u32>,

    /// How long each number of clients is measured.
    #[arg(long, value_name = "TIME", default_value = "20s")]
    pub(crate) duration: Time,

    /// Load that comes before each and is not counted.
    #[arg(long, value_name = "TIME", default_value = "3s")]
    pub(crate) warm_up: Time,
}

#[derive(Clone, Debug, Serialize, ClapArgs)]
pub(crate) struct PromoteArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) run: RunArgs,

    /// A task and the versions that are promoted in turn, all it has if none is named; can be
    /// given more than once, tasks take turns. [default: all tasks that have two or more]
    #[arg(long = "promote", value_name = "TASK[=V1,V2]")]
    pub(crate) turns: Vec<Turns>,

    /// Promotions a second, of all tasks together.
    #[arg(long, value_name = "RATE", default_value = "17", value_parser = rate)]
    pub(crate) promote_rate: f64,

    /// Texts per task whose answers are asked of each version beforehand; the answers to these are
    /// then checked, label and scores. 0: only the versions' numbers are checked.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub(crate) learn: usize,

    /// How far a score may be from the one that was learnt.
    #[arg(long, value_name = "SCORE", default_value_t = 0.01)]
    pub(crate) tolerance: f64,

    /// File with the token of an admin and nothing else: no name, no comments.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) admin_token_file: Option<PathBuf>,
}

#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct CompareArgs {
    /// JSON reports; ratios are to the first.
    #[arg(required = true, num_args = 2.., value_name = "REPORT.json")]
    pub(crate) reports: Vec<PathBuf>,

    /// Write PATH.md and PATH.svg.
    #[arg(long, value_name = "PATH")]
    pub(crate) out: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Command, clap::Error> {
        Args::try_parse_from(words.split(' ')).map(|args| args.command)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn rates_and_phases_are_two_ways_to_say_the_same() {
        let phases = |words: &str| match parse(words) {
            Ok(Command::Run(args)) => args.phases(),
            other => panic!("{words}: {other:?}"),
        };
        assert_eq!(
            phases("loadtest run --rate 5,10 --duration 3s"),
            phases("loadtest run --phase 5:3s --phase 10:3s")
        );
        assert!(parse("loadtest run").is_err());
        assert!(parse("loadtest run --rate 5 --phase 5:3s").is_err());
    }
}
