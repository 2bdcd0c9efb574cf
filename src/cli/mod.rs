//! The command line: one file a command, each with an `Args` and a `run`.

pub mod adapter;
mod allocator;
pub mod compare;
pub mod completions;
pub mod distill;
pub mod man;
mod options;
pub mod pull;
pub mod serve;

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

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.command, Command::Distill(_) | Command::Compare(_)) {
        allocator::use_huge_pages();
    }
    let _flush = match logs::init(&cli.log, cli.log_format, cli.otlp_endpoint.as_deref()) {
        Ok(flush) => flush,
        Err(error) => {
            eprintln!("kdlora: {}", chain(&error));
            return ExitCode::from(2);
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
