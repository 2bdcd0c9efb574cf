//! `kdlora distill`: one distillation pass, by hand or as a job of the server.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::CommandError;
use super::options::PlacesArgs;
use crate::config::Bytes;
use crate::distill::courtesy;
use crate::distill::models::Places;
use crate::distill::pass::{self, PassError};
use crate::distill::progress::{Event, Stage};
use crate::distill::report::Report;
use crate::distill::spec::DistillSpec;
use crate::distill::training::Checkpoints;
use crate::parse;
use crate::telemetry::chain;

const EXAMPLES: &str = "\
Examples:
  echo '{\"task\": \"film-mood\", \"data\": {\"train\": {\"path\": \"rows.jsonl\"}}, \\
    \"teacher\": {\"model\": \"mpnet-base\", \"adapter\": \"movie-sentiment\"}}' > pass.json
  kdlora distill --spec pass.json --out film-mood
  kdlora adapter import film-mood --task film-mood --promote";

/// Distil a teacher into an adapter of the student.
///
/// SPEC is the JSON that `POST /admin/distill` takes. The adapter (a PEFT folder) and its
/// report.json appear in OUT, whole or not at all.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
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
    places: PlacesArgs,
    /// Keep teachers' answers here between passes.
    #[arg(long, value_name = "DIR")]
    state_cache: Option<PathBuf>,
    /// Refuse a training that needs more memory than this, such as 2GiB.
    #[arg(long, env = "KDLORA_MEMORY_LIMIT", value_name = "BYTES")]
    memory_limit: Option<Bytes>,
    /// Go on with a pass that was killed, from its last checkpoint in OUT.checkpoint.
    #[arg(long)]
    resume: bool,
    /// Least seconds between two checkpoints; writing them takes a twentieth of the time at most.
    /// 0 writes one after each step.
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS")]
    checkpoint_every: f64,
    /// Report events as lines of JSON on standard output, and end when standard input is closed.
    #[arg(long)]
    job: bool,
}

/// Runs the pass; by hand, its report is printed as a Markdown table.
pub fn run(args: Args) -> Result<(), CommandError> {
    if args.job {
        give_way();
        watch_parent()?;
    }
    let checkpoints = Checkpoints {
        folder: beside(&args.out, ".checkpoint"),
        every: Duration::try_from_secs_f64(args.checkpoint_every)?,
    };
    if !args.resume {
        checkpoints.clear()?;
    }
    let places = Places {
        teacher_cache: args.state_cache,
        memory_limit: args.memory_limit.map(|Bytes(limit)| limit),
        checkpoints: Some(checkpoints),
        ..args.places.places()?
    };
    let spec: DistillSpec = parse::json(&std::fs::read(&args.spec)?)?;
    let mut listener: Box<dyn FnMut(Event) + Send> = match args.job {
        true => Box::new(print_event),
        false => bar(),
    };
    // A version appears whole: killed behind that, a pass has nothing left to do.
    let outcome = match args.resume && args.out.exists() {
        true => Report::read(&args.out).map_err(PassError::from),
        false => pass::run(
            &spec,
            &places,
            &args.out,
            args.teacher_out.as_deref(),
            &mut *listener,
        ),
    };
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

/// When memory runs out, the kernel ends the process with the greatest score: the job, not its
/// server.
const OUT_OF_MEMORY_SCORE: &str = "500";

/// A job gives way to the server that it belongs to.
fn give_way() {
    courtesy::give_way();
    // A system that refuses it is no reason to fail.
    let _ = std::fs::write("/proc/self/oom_score_adj", OUT_OF_MEMORY_SCORE);
}

/// The path with an ending behind its name.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Ends this process when its parent, which holds the other end of standard input, is gone.
pub(super) fn watch_parent() -> Result<(), CommandError> {
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
pub(super) fn bar() -> Box<dyn FnMut(Event) + Send> {
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
        // They stand in the report, which is printed at the end.
        Event::Data { .. } => {}
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
