//! Whether a request can become a version, as far as that can be said before a pass. Blocks.

use std::path::Path;

use serde::Deserialize;

use crate::adapter::{AdapterFolder, EncoderIdentity, KnownEncoders, ProblemType, TaskConfig};
use crate::distill::dataset::{Dataset, KnownTask, Teacher, is_parquet};
use crate::distill::spec::{DistillSpec, SplitSpec, TeacherSpec};
use crate::encoder::{EncoderConfig, EncoderId, cached_encoder_digest};
use crate::files::{self, MAX_JSON_BYTES};
use crate::http::error::{ApiError, Problem};
use crate::hub;
use crate::parse;
use crate::telemetry::chain;

/// Larger files are read by the job alone: reading them here would cost the server as much
/// memory as a pass.
const MAX_CHECKED_BYTES: u64 = 64 * 1024 * 1024;

/// Checks teacher and data of a spec whose paths have been resolved. `folder` is the job's; its
/// path is left out of messages. `cache` holds fetched encoders. Returns what may spoil the result,
/// as far as the data are read here.
pub(super) fn check(
    spec: &DistillSpec,
    folder: &Path,
    known: &KnownEncoders,
    cache: &Path,
) -> Result<Vec<String>, ApiError> {
    let known = match &spec.teacher {
        Some(TeacherSpec { http: Some(_), .. }) => task_of_request(spec),
        Some(teacher) => {
            let task = known_task(teacher)?;
            check_base(teacher, known, cache)?;
            task
        }
        None => None,
    };
    if bytes_in_files(spec) > MAX_CHECKED_BYTES || has_parquet(spec) {
        return Ok(Vec::new());
    }
    if let Some(TeacherSpec { http: Some(_), .. }) = &spec.teacher
        && known.is_none()
    {
        // Only the endpoint knows its labels, and it is the job that asks it.
        return Ok(Vec::new());
    }
    let teacher = match (&spec.teacher, &known) {
        (None, _) => Teacher::None,
        (Some(_), None) => Teacher::Untrained,
        (Some(_), Some(known)) => Teacher::Trained(known),
    };
    match Dataset::load(&spec.data, spec.training.seed, teacher) {
        Ok(data) => Ok(data.checks.warnings),
        Err(error) => {
            let folder = format!("{}/", folder.display());
            Err(Problem::Unusable.with(chain(&error).replace(&folder, "")))
        }
    }
}

/// The labels that the teacher answers with; `None` if it is fine-tuned first.
fn known_task(teacher: &TeacherSpec) -> Result<Option<KnownTask>, ApiError> {
    let unusable = |error: &dyn std::error::Error| {
        Problem::Unusable.with(format!("the teacher cannot be used: {}", chain(error)))
    };
    if teacher.adapter.is_some() && teacher.finetune.is_some() {
        return Err(Problem::Unusable.with(
            "the teacher is either the classifier that `adapter` makes of the encoder, or trained \
             first with `finetune`; name one of them",
        ));
    }
    // A catalog name that is yet to be fetched, or layers of an encoder, have no folder to look
    // into.
    let model = Path::new(&teacher.model);
    if model.is_dir() {
        EncoderConfig::read(model).map_err(|error| unusable(&error))?;
    }
    let adapter = teacher.adapter.as_deref().map(Path::new);
    let adapter = adapter.map(AdapterFolder::read).transpose();
    let adapter = adapter.map_err(|error| unusable(&error))?;
    if teacher.finetune.is_some() {
        return Ok(None);
    }
    let task = match adapter {
        Some(adapter) => adapter.task,
        None if is_classifier(&teacher.model) => {
            TaskConfig::read(Path::new(&teacher.model)).map_err(|error| unusable(&error))?
        }
        None => {
            return Err(Problem::Unusable.with(format!(
                "the teacher '{}' is an encoder without a classifier: name its `adapter`, or have \
                 it trained on the labels first with `finetune`",
                teacher.model
            )));
        }
    };
    Ok(Some(KnownTask::of(&task)))
}

/// Refuses a teacher's adapter that was trained on another encoder than the teacher's, as far as
/// that can be said: an encoder that is yet to be fetched is known by its name only.
fn check_base(teacher: &TeacherSpec, known: &KnownEncoders, cache: &Path) -> Result<(), ApiError> {
    let Some(adapter) = &teacher.adapter else {
        return Ok(());
    };
    let digest = match known.digest_of(&teacher.model) {
        Some(digest) => Some(digest.to_owned()),
        None => hub::resolve(&teacher.model, cache)
            .ok()
            .and_then(|folder| cached_encoder_digest(&folder, cache).ok()),
    };
    let Some(digest) = digest else {
        return Ok(());
    };
    let encoder = EncoderIdentity {
        id: EncoderId {
            name: teacher.model.clone(),
            digest,
        },
        known: known.clone(),
    };
    match encoder.admit(Path::new(adapter)) {
        Ok(_) => Ok(()),
        Err(error) => Err(Problem::Unusable.with(format!(
            "the teacher's adapter can't be used: {}",
            chain(&error)
        ))),
    }
}

/// Whether a folder in the Hugging Face layout has a classification head.
fn is_classifier(model: &str) -> bool {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        architectures: Vec<String>,
    }
    let config = files::read(&Path::new(model).join("config.json"), MAX_JSON_BYTES).ok();
    let config = config.and_then(|config| parse::json::<Config>(&config).ok());
    config.is_some_and(|config| {
        let names = config.architectures.iter();
        names
            .into_iter()
            .any(|name| name.ends_with("ForSequenceClassification"))
    })
}

/// The task that a teacher over HTTP must have, where the request names its labels.
fn task_of_request(spec: &DistillSpec) -> Option<KnownTask> {
    let labels = spec.data.known_labels()?;
    let problem_type = spec.data.known_problem_type();
    Some(KnownTask {
        problem_type: problem_type.unwrap_or(ProblemType::SingleLabelClassification),
        labels,
    })
}

/// A Parquet file tells only when it is decompressed how large it is: that is left to the job's
/// process.
fn has_parquet(spec: &DistillSpec) -> bool {
    paths(spec).any(is_parquet)
}

fn paths(spec: &DistillSpec) -> impl Iterator<Item = &Path> {
    let data = &spec.data;
    let splits = [
        Some(&data.train),
        data.validation.as_ref(),
        data.test.as_ref(),
    ];
    splits
        .into_iter()
        .flatten()
        .filter_map(|split| match split {
            SplitSpec::Path(path) => Some(path.as_path()),
            SplitSpec::Rows(_) => None,
        })
}

fn bytes_in_files(spec: &DistillSpec) -> u64 {
    paths(spec)
        .map(|path| std::fs::metadata(path).map_or(0, |file| file.len()))
        .sum()
}
