//! `kdlora adapter`: PEFT folders from the command line.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device};
use clap::{Subcommand, ValueEnum};

use super::CommandError;
use super::options::{CacheArgs, StudentArgs};
use crate::adapter::{
    AdapterError, AdapterFolder, Classifier, ProblemType, Summary, TaskConfig, write_classifier,
};
use crate::config;
use crate::encoder::Encoder;
use crate::hub;
use crate::store::{Origin, Store};
use crate::text::Truncation;

const EXAMPLES: &str = "\
Examples:
  kdlora adapter inspect DIR --student minilm-l6
  kdlora adapter import DIR --task mood --promote
  kdlora adapter export mood@2 --out DIR
  kdlora adapter merge DIR --student minilm-l6 --out DIR";

/// Look at adapters (PEFT folders), bring them into a server's state folder and out of it, fold
/// them into plain models.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    command: AdapterCommand,
}

#[derive(Debug, Subcommand)]
enum AdapterCommand {
    Inspect(Inspect),
    Import(Import),
    Export(Export),
    Merge(Merge),
}

/// Show what an adapter is and, with a student, whether it fits.
#[derive(Debug, clap::Args)]
struct Inspect {
    /// The adapter's folder.
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    #[command(flatten)]
    student: OptionalStudent,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Add an adapter as a version of a task, after the same checks as a server's. No server may use
/// the state folder meanwhile.
#[derive(Debug, clap::Args)]
struct Import {
    /// The adapter's folder.
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// The task that gets the version.
    #[arg(long, value_name = "NAME")]
    task: String,
    #[command(flatten)]
    student: StudentArgs,
    #[command(flatten)]
    state: StateArgs,
    /// Let the task answer with this version.
    #[arg(long)]
    promote: bool,
    /// Names of the labels in the order of the outputs, for a folder without config.json.
    #[arg(long, value_name = "LABELS", value_delimiter = ',')]
    labels: Option<Vec<String>>,
    /// What the outputs mean, with --labels [default: one label is a regression, several are
    /// classes].
    #[arg(long, value_enum, requires = "labels")]
    problem_type: Option<ProblemTypeArg>,
}

/// Write a version of a task as a PEFT folder. No server may use the state folder meanwhile.
#[derive(Debug, clap::Args)]
struct Export {
    /// The task, and the version if it is not the live one.
    #[arg(value_name = "TASK[@VERSION]")]
    task: String,
    /// Folder to write; it must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    state: StateArgs,
}

/// Fold an adapter into its encoder: a plain Hugging Face classifier.
#[derive(Debug, clap::Args)]
struct Merge {
    /// The adapter's folder.
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    #[command(flatten)]
    student: StudentArgs,
    /// Folder to write; it must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the weights.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeArg,
}

#[derive(Debug, clap::Args)]
struct OptionalStudent {
    /// Encoder to try the adapter on: a catalog name or a folder.
    #[arg(long, value_name = "NAME|DIR")]
    student: Option<String>,
    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Debug, clap::Args)]
struct StateArgs {
    /// Folder of versions and their history [default: ~/.local/state/kdlora].
    #[arg(long, env = "KDLORA_STATE", value_name = "DIR")]
    state: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum ProblemTypeArg {
    SingleLabelClassification,
    MultiLabelClassification,
    Regression,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeArg {
    F32,
    F16,
    Bf16,
}

/// Who promoted an imported version, in the task's history.
const IMPORTER: &str = "kdlora adapter import";

pub fn run(args: Args) -> Result<(), CommandError> {
    match args.command {
        AdapterCommand::Inspect(args) => inspect(&args),
        AdapterCommand::Import(args) => import(args),
        AdapterCommand::Export(args) => export(&args),
        AdapterCommand::Merge(args) => merge(&args),
    }
}

fn inspect(args: &Inspect) -> Result<(), CommandError> {
    let adapter = AdapterFolder::read(&args.adapter)?;
    let summary = Summary::of(&args.adapter, &adapter)?;
    let fit = match &args.student.student {
        None => None,
        Some(student) => {
            let (_, encoder) = load_student(student, &args.student.cache)?;
            Some((student, fit(encoder, &adapter)?))
        }
    };
    if args.json {
        let mut json = serde_json::to_value(&summary)?;
        if let Some((student, fit)) = fit {
            json["student"] = serde_json::json!({"name": student, "mode": fit});
        }
        println!("{json:#}");
        return Ok(());
    }
    println!("{summary}");
    if let Some((student, fit)) = fit {
        println!("student      {student}: {fit}");
    }
    Ok(())
}

/// How the adapter can be served: `hot` or `merged`.
fn fit(encoder: Encoder, adapter: &AdapterFolder) -> Result<&'static str, AdapterError> {
    let shared = Arc::new(encoder);
    let classifier = Classifier::from_adapter(Arc::clone(&shared), adapter)?;
    Ok(match Arc::ptr_eq(&shared, &classifier.encoder) {
        true => "hot",
        false => "merged",
    })
}

fn import(args: Import) -> Result<(), CommandError> {
    let task = args
        .labels
        .clone()
        .map(|labels| task_of(labels, args.problem_type));
    let adapter = match task {
        None => AdapterFolder::read(&args.adapter)?,
        Some(task) => AdapterFolder::read_as(&args.adapter, task)?,
    };
    let (_, encoder) = load_student(&args.student.student, &args.student.cache)?;
    let mode = fit(encoder, &adapter)?;
    let place = tempfile::tempdir()?;
    let folder = place.path().join("adapter");
    adapter.repack(&args.adapter, &folder)?;
    let version = with_store(&args.state, |store| async move {
        let version = store
            .add_version(&args.task, &folder, Origin::Imported)
            .await?;
        if args.promote {
            let reason = "imported";
            let number = version.version;
            store.promote(&args.task, number, IMPORTER, reason).await?;
        }
        Ok(version)
    })?;
    let live = if args.promote { ", live" } else { "" };
    println!(
        "version {} of {} ({mode}{live})",
        version.version, version.task
    );
    Ok(())
}

fn task_of(labels: Vec<String>, problem_type: Option<ProblemTypeArg>) -> TaskConfig {
    let given = problem_type.map(|given| match given {
        ProblemTypeArg::SingleLabelClassification => ProblemType::SingleLabelClassification,
        ProblemTypeArg::MultiLabelClassification => ProblemType::MultiLabelClassification,
        ProblemTypeArg::Regression => ProblemType::Regression,
    });
    TaskConfig {
        problem_type: given.unwrap_or_else(|| ProblemType::of_labels(labels.len())),
        problem_type_declared: given.is_some(),
        labels,
        max_length: crate::adapter::DEFAULT_MAX_LENGTH,
        truncation: Truncation::LongestFirst,
        temperature: 1.0,
        base_model: None,
    }
}

fn export(args: &Export) -> Result<(), CommandError> {
    let (task, number) = match args.task.split_once('@') {
        None => (args.task.as_str(), None),
        Some((task, number)) => (task, Some(number.parse::<u64>()?)),
    };
    let folder = with_store(&args.state, |store| async move {
        match number {
            Some(number) => Ok(store.version(task, number).await?.path),
            None => live_folder(&store, task).await,
        }
    })?;
    let adapter = AdapterFolder::read(&folder)?;
    adapter.repack(&folder, &args.out)?;
    println!("{}", args.out.display());
    Ok(())
}

async fn live_folder(store: &Store, task: &str) -> Result<PathBuf, CommandError> {
    // For its error where there is no such task.
    store.versions(task).await?;
    let live = store.live(task).await?;
    live.map(|live| live.path).ok_or_else(|| {
        format!("no version of {task} is live; name one: {task}@1 is the first").into()
    })
}

fn merge(args: &Merge) -> Result<(), CommandError> {
    let adapter = AdapterFolder::read(&args.adapter)?;
    let (folder, encoder) = load_student(&args.student.student, &args.student.cache)?;
    let weights = adapter.merge(&encoder)?;
    let dtype = match args.dtype {
        DtypeArg::F32 => DType::F32,
        DtypeArg::F16 => DType::F16,
        DtypeArg::Bf16 => DType::BF16,
    };
    write_classifier(&args.out, &folder, &adapter.task, &weights, dtype)?;
    println!("{}", args.out.display());
    Ok(())
}

fn load_student(name: &str, cache: &CacheArgs) -> Result<(PathBuf, Encoder), CommandError> {
    let folder = hub::pull(name, &cache.folder()?, true)?;
    let encoder = Encoder::load(&folder, &Device::Cpu)?;
    Ok((folder, encoder))
}

/// Runs `work` on the state folder's store, and closes it.
fn with_store<T, F>(state: &StateArgs, work: impl FnOnce(Store) -> F) -> Result<T, CommandError>
where
    F: Future<Output = Result<T, CommandError>>,
{
    let folder = match &state.state {
        Some(folder) => folder.clone(),
        None => config::default_state()?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let store = Store::open(&folder).await?;
        let outcome = work(store.clone()).await;
        store.close().await;
        outcome
    })
}
