//! `kdlora distill`: one distillation pass, by hand or as a job of the server.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use super::CommandError;
use super::options::StudentArgs;
use crate::distill::models::Places;
use crate::distill::pass;
use crate::distill::progress::{Event, Stage};
use crate::distill::spec::DistillSpec;
use crate::telemetry::chain;

/// Distil a teacher into an adapter of the student.
///
/// SPEC is the JSON that `POST /admin/distill` takes. The adapter (a PEFT folder) and its
/// report.json appear in OUT, whole or not at all.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File with the request.
    #[arg(long, value_name = "FILE")]
    spec: PathBuf,
    /// Folder to write; it must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep the adapter of a teacher that was fine-tuned by LoRA here.
    #[arg(long, value_name = "DIR")]
    teacher_out: Option<PathBuf>,
    #[command(flatten)]
    student: StudentArgs,
    /// Folder of the ready-made adapters, among them the teachers'.
    #[arg(
        long,
        env = "KDLORA_ADAPTERS",
        default_value = "models/adapters",
        value_name = "DIR"
    )]
    adapters: PathBuf,
    /// Keep teachers' answers here between passes.
    #[arg(long, value_name = "DIR")]
    state_cache: Option<PathBuf>,
    /// Cores to use [default: all].
    #[arg(long, env = "KDLORA_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Report events as lines of JSON on standard output, and end when standard input is closed.
    #[arg(long)]
    job: bool,
}

/// Runs the pass; by hand, its report is printed as a Markdown table.
pub fn run(args: Args) -> Result<(), CommandError> {
    if args.job {
        end_with_parent()?;
    }
    let threads = match args.threads {
        Some(threads) => threads.max(1),
        None => std::thread::available_parallelism()?.get(),
    };
    let places = Places {
        cache: args.student.cache.folder()?,
        student: args.student.student,
        adapters: args.adapters,
        teacher_cache: args.state_cache,
        threads,
    };
    let spec: DistillSpec = serde_json::from_slice(&std::fs::read(&args.spec)?)?;
    let mut listener: Box<dyn FnMut(Event) + Send> = match args.job {
        true => Box::new(print_event),
        false => bar(),
    };
    let outcome = pass::run(
        &spec,
        &places,
        &args.out,
        args.teacher_out.as_deref(),
        &mut *listener,
    );
    match outcome {
        Ok(report) if !args.job => print!("{}", report.to_markdown()),
        Ok(_) => listener(Event::Done),
        Err(error) if args.job => {
            let error = chain(&error);
            listener(Event::Failed { error });
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Beside threads of ordinary niceness it gets one part in ten of a core: what is served hardly
/// notices (p99 at half of the capacity stays within its noise), and the pass still goes on, three
/// times as fast as at 19.
const NICENESS: i32 = 10;
/// When memory runs out, the kernel ends the process with the greatest score: the job, not its
/// server.
const OUT_OF_MEMORY_SCORE: &str = "500";

/// A job gives way to the server that it belongs to, and does not outlive it: the server holds the
/// other end of standard input.
fn end_with_parent() -> Result<(), CommandError> {
    // Both are courtesies; a system that refuses them is no reason to fail.
    let _ = rustix::process::nice(NICENESS);
    let _ = std::fs::write("/proc/self/oom_score_adj", OUT_OF_MEMORY_SCORE);
    std::thread::Builder::new()
        .name("parent-watch".into())
        .spawn(|| {
            let mut rest = Vec::new();
            let _ = std::io::stdin().lock().read_to_end(&mut rest);
            std::process::exit(1);
        })?;
    Ok(())
}

fn print_event(event: Event) {
    let Ok(line) = serde_json::to_string(&event) else {
        return;
    };
    let mut out = std::io::stdout().lock();
    // A closed pipe means that the server is gone; the watch on standard input ends the process.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// A progress bar a stage, on a terminal; otherwise a line a stage.
fn bar() -> Box<dyn FnMut(Event) + Send> {
    if !std::io::stderr().is_terminal() {
        return Box::new(|event| {
            if let Event::Stage { stage } = event {
                eprintln!("{}", title(stage));
            }
        });
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) =
        ProgressStyle::with_template("{msg:18} {bar:30} {pos}/{len} {prefix} eta {eta}")
    {
        bar.set_style(style);
    }
    Box::new(move |event| match event {
        Event::Stage { stage } => {
            bar.reset();
            bar.set_message(title(stage));
        }
        Event::Step(step) => {
            bar.set_length(step.steps as u64);
            bar.set_position(step.step as u64);
            let loss = step
                .loss
                .map_or(String::new(), |loss| format!("loss {loss:.4} "));
            bar.set_prefix(format!("{loss}{:.0} tokens/s", step.tokens_per_second));
        }
        Event::Done | Event::Failed { .. } => bar.finish_and_clear(),
    })
}

fn title(stage: Stage) -> &'static str {
    match stage {
        Stage::Data => "reading data",
        Stage::TeacherTraining => "tuning the teacher",
        Stage::TeacherLogits => "asking the teacher",
        Stage::StudentTraining => "training",
        Stage::Evaluation => "evaluating",
        Stage::Latency => "measuring latency",
    }
}
