//! `kdlora adapter`: PEFT folders from the command line.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device};
use clap::{Subcommand, ValueEnum};

use super::CommandError;
use super::options::{CacheArgs, DEFAULT_STUDENT, StudentArgs, identity, known_encoders};
use crate::adapter::{
    AdapterError, AdapterFolder, Classifier, EncoderIdentity, ProblemType, Summary, TaskConfig,
    read_report, write_classifier,
};
use crate::config;
use crate::encoder::Encoder;
use crate::hub;
use crate::store::{Origin, Store, Version};
use crate::text::Truncation;

const EXAMPLES: &str = "\
Examples:
  kdlora adapter inspect DIR --student minilm-l6
  kdlora adapter import DIR --task mood --promote
  kdlora adapter export mood@2 --out DIR
  kdlora adapter adopt mood@2 --student minilm-l6
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
    Adopt(Adopt),
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
    /// Encoder that carries the adapter: a catalog name or a folder [default: the one that the state
    /// folder was served with, or minilm-l6].
    #[arg(long, env = "KDLORA_STUDENT", value_name = "NAME|DIR")]
    student: Option<String>,
    #[command(flatten)]
    cache: CacheArgs,
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

/// Say which student versions were trained on, where nothing else says so. Until then they are served
/// unverified. Scores with the wrong student are noise: name the one that you know to be right.
#[derive(Debug, clap::Args)]
struct Adopt {
    /// The versions: one, or with a task alone all of it that have no student.
    #[arg(value_name = "TASK[@VERSION]", required = true)]
    tasks: Vec<String>,
    /// The encoder that they were trained on: a catalog name or a folder.
    #[arg(long, value_name = "NAME|DIR")]
    student: String,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    state: StateArgs,
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
        AdapterCommand::Adopt(args) => adopt(args),
    }
}

fn inspect(args: &Inspect) -> Result<(), CommandError> {
    let adapter = AdapterFolder::read(&args.adapter)?;
    let summary = Summary::of(&args.adapter, &adapter)?;
    let fit = match &args.student.student {
        None => None,
        Some(student) => {
            let loaded = Loaded::open(student, &args.student.cache)?;
            loaded.identity.admit(&args.adapter)?;
            let digest = loaded.identity.id.digest;
            Some((student, digest, fit(loaded.encoder, &adapter)?))
        }
    };
    if args.json {
        let mut json = serde_json::to_value(&summary)?;
        if let Some((student, digest, fit)) = fit {
            json["student"] = serde_json::json!({"name": student, "mode": fit, "digest": digest});
        }
        println!("{json:#}");
        return Ok(());
    }
    println!("{summary}");
    if let Some((student, digest, fit)) = fit {
        println!("student      {student}: {fit}, digest {digest}");
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
    let mut adapter = match task {
        None => AdapterFolder::read(&args.adapter)?,
        Some(task) => AdapterFolder::read_as(&args.adapter, task)?,
    };
    let place = tempfile::tempdir()?;
    let folder = place.path().join("adapter");
    let report = read_report(&args.adapter)?;
    let (version, mode) = with_store(&args.state, |store| async move {
        let remembered = store.student().await?;
        let student = args.student.or_else(|| remembered.clone());
        let student = student.unwrap_or_else(|| DEFAULT_STUDENT.to_owned());
        let loaded = Loaded::open(&student, &args.cache)?;
        adapter.task.base_digest = loaded.identity.admit(&args.adapter)?.digest;
        let mode = fit(loaded.encoder, &adapter)?;
        adapter.repack(report.as_ref(), &folder)?;
        let version = store
            .add_version(&args.task, &folder, Origin::Imported)
            .await?;
        if remembered.is_none() {
            let student = hub::Choice::parse(&student)?.absolute().to_string();
            store.set_student(&student).await?;
        }
        if args.promote {
            let reason = "imported";
            let number = version.version;
            store.promote(&args.task, number, IMPORTER, reason).await?;
        }
        Ok((version, mode))
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
        base_digest: None,
    }
}

/// Reads `TASK` or `TASK@VERSION`.
fn parse_version(text: &str) -> Result<(&str, Option<u64>), CommandError> {
    Ok(match text.split_once('@') {
        None => (text, None),
        Some((task, number)) => (task, Some(number.parse::<u64>()?)),
    })
}

fn export(args: &Export) -> Result<(), CommandError> {
    let (task, number) = parse_version(&args.task)?;
    let version = with_store(&args.state, |store| async move {
        let number = match number {
            Some(number) => number,
            None => live_version(&store, task).await?,
        };
        Ok(store.version(task, number).await?)
    })?;
    version.files.verify(&version.path)?;
    let mut adapter = AdapterFolder::read(&version.path)?;
    // Its student may have been recorded after its files were written.
    adapter.task.base_digest = version.base.digest;
    adapter.repack(read_report(&version.path)?.as_ref(), &args.out)?;
    println!("{}", args.out.display());
    Ok(())
}

async fn live_version(store: &Store, task: &str) -> Result<u64, CommandError> {
    // For its error where there is no such task.
    store.versions(task).await?;
    let live = store.live(task).await?;
    live.map(|live| live.version).ok_or_else(|| {
        format!("no version of {task} is live; name one: {task}@1 is the first").into()
    })
}

fn merge(args: &Merge) -> Result<(), CommandError> {
    let adapter = AdapterFolder::read(&args.adapter)?;
    let loaded = Loaded::open(&args.student.student, &args.student.cache)?;
    loaded.identity.admit(&args.adapter)?;
    let weights = adapter.merge(&loaded.encoder)?;
    let dtype = match args.dtype {
        DtypeArg::F32 => DType::F32,
        DtypeArg::F16 => DType::F16,
        DtypeArg::Bf16 => DType::BF16,
    };
    write_classifier(&args.out, &loaded.folder, &adapter.task, &weights, dtype)?;
    println!("{}", args.out.display());
    Ok(())
}

fn adopt(args: Adopt) -> Result<(), CommandError> {
    let loaded = Loaded::open(&args.student, &args.cache)?;
    let encoder = Arc::new(loaded.encoder);
    let identity = loaded.identity;
    let adopted = with_store(&args.state, |store| async move {
        let mut adopted = Vec::new();
        for task in &args.tasks {
            let (task, number) = parse_version(task)?;
            let versions = match number {
                Some(number) => vec![store.version(task, number).await?],
                None => store.versions(task).await?,
            };
            let all = number.is_none();
            let wanted = |version: &Version| !all || version.base.digest.is_none();
            for version in versions.into_iter().filter(wanted) {
                // A name that is certainly another encoder's is not argued with.
                identity.admit(&version.path)?;
                let adapter = AdapterFolder::read(&version.path)?;
                Classifier::from_adapter(Arc::clone(&encoder), &adapter)?;
                adopted.push(store.adopt(task, version.version, &identity.id).await?);
            }
        }
        Ok(adopted)
    })?;
    for version in &adopted {
        println!("{}@{}: {}", version.task, version.version, version.base);
    }
    if adopted.is_empty() {
        println!("every version has a student already");
    }
    Ok(())
}

/// A student in memory.
struct Loaded {
    folder: PathBuf,
    encoder: Encoder,
    identity: EncoderIdentity,
}

impl Loaded {
    fn open(name: &str, cache: &CacheArgs) -> Result<Self, CommandError> {
        let cache = cache.folder()?;
        let folder = hub::pull(name, &cache, true)?;
        Ok(Self {
            encoder: Encoder::load(&folder, &Device::Cpu)?,
            identity: identity(name, &folder, &cache)?,
            folder,
        })
    }
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
        store.settle_versions(&known_encoders()).await?;
        let outcome = work(store.clone()).await;
        store.close().await;
        outcome
    })
}
