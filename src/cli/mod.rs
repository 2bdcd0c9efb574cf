//! The command line: one file a command, each with an `Args` and a `run`.

pub mod adapter;
mod allocator;
pub mod compare;
pub mod completions;
mod descriptors;
pub mod distill;
pub mod man;
mod options;
pub mod pull;
pub mod serve;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::telemetry::chain;
use crate::telemetry::logs::{self, LogFormat};

const EXAMPLES: &str = "\
Examples:
  kdlora serve                                  the ready-made tasks, and a page, on http://127.0.0.1:8080
  kdlora pull --list                            encoders that can be named
  kdlora distill --spec pass.json --out DIR     one distillation by hand
  kdlora compare --spec ways.json --out DIR     the ways to make a classifier, side by side
  kdlora adapter inspect DIR                    what an adapter of PEFT is";

/// Serves text classifiers distilled into LoRA adapters of one small encoder, and distils them.
#[derive(Debug, Parser)]
#[command(name = "kdlora", version, after_help = EXAMPLES)]
pub struct Cli {
    /// What to log to standard error: a level, or `target=level` pairs, comma-separated.
    #[arg(
        long,
        global = true,
        env = "KDLORA_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    pub log: String,
    /// How log lines look.
    #[arg(
        long,
        global = true,
        env = "KDLORA_LOG_FORMAT",
        value_enum,
        default_value_t
    )]
    pub log_format: LogFormat,
    /// Send traces of requests to this OpenTelemetry collector (OTLP over HTTP), as in
    /// http://127.0.0.1:4318.
    #[arg(long, global = true, env = "KDLORA_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Serve(Box<serve::Args>),
    Distill(distill::Args),
    Compare(compare::Args),
    Adapter(adapter::Args),
    Pull(pull::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// What a command ends with when it fails; printed with its causes, exit status 1.
pub type CommandError = Box<dyn std::error::Error + Send + Sync>;

/// Status of a process that ends because of its command line or its environment.
const USAGE: u8 = 2;

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let parsed = Cli::try_parse();
    // An empty variable is seldom meant, and would be refused without its name, or, as a list of
    // tokens, open the server. Help is given all the same.
    if let Some(name) = empty_variable()
        && !parsed.as_ref().is_err_and(|error| !error.use_stderr())
    {
        let name = name.display();
        eprintln!("kdlora: the variable {name} is set, but empty: give it a value, or unset it");
        return ExitCode::from(USAGE);
    }
    let cli = parsed.unwrap_or_else(|error| error.exit());
    if matches!(cli.command, Command::Distill(_) | Command::Compare(_)) {
        allocator::use_huge_pages();
    }
    let _flush = match logs::init(&cli.log, cli.log_format, cli.otlp_endpoint.as_deref()) {
        Ok(flush) => flush,
        Err(error) => {
            eprintln!("kdlora: {}", chain(&error));
            return ExitCode::from(USAGE);
        }
    };
    let outcome = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Distill(args) => distill::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Adapter(args) => adapter::run(args),
        Command::Pull(args) => pull::run(args).map_err(Into::into),
        Command::Completions(args) => {
            completions::run(&args);
            Ok(())
        }
        Command::Man(args) => man::run(&args).map_err(Into::into),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kdlora: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Finds a variable of this program's that is set to an empty text.
fn empty_variable() -> Option<OsString> {
    let ours = |name: &OsString| name.as_encoded_bytes().starts_with(b"KDLORA_");
    let mut empty = env::vars_os().filter(|(name, value)| ours(name) && value.is_empty());
    empty.next().map(|(name, _)| name)
}
