//! A teacher that answers over HTTP: any endpoint that speaks text-embeddings-inference's `/predict`
//! or the text-classification of Hugging Face.
//!
//! The endpoint is asked for batches of texts by a few threads at a time. What fails for a reason
//! that may pass (no connection, a time-out, status 429 or 5xx) is tried again with growing pauses
//! until [`HttpTeacherSpec::patience_seconds`] are over, so that a pass survives a teacher's
//! restart; every answer goes to the cache at once, so that the next pass asks for the rest only.
//!
//! Only who may use the admin routes can name an endpoint, over http or https. What its name stands
//! for is checked when a connection is made, and no proxy of the environment is used, which would
//! look the name up by itself. The operator's token goes to the origins that the operator has named.
//! Redirections are not followed, answers are bounded in size and time, and of an answer that is no
//! prediction only its `error` is told.

mod answer;
mod client;
mod origin;
mod resolver;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use self::answer::{Names, Reading, Scores};
use self::client::Client;
pub use self::origin::{OriginError, TOKEN_VARIABLE, TeacherOrigin, TeacherToken};
use super::dataset::KnownTask;
use super::spec::{DataSpec, HttpTeacherSpec};
use super::teacher_cache::TeacherCache;
use crate::adapter::ProblemType;
use crate::text::Input;

/// Asked first, for the names of the labels.
const PROBE: &str = "a text to learn the label names from";

/// Why a teacher over HTTP cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HttpTeacherError {
    #[error("the teacher at {url} answered with status {status}{}", said(message))]
    Refused {
        url: String,
        status: u16,
        /// What the answer gives as its error, if it does.
        message: Option<String>,
    },
    #[error(
        "the teacher at {url} answered with status {status}; the token in {TOKEN_VARIABLE} was not \
         sent, since --teacher-origin does not name this origin"
    )]
    TokenWithheld { url: String, status: u16 },
    #[error("the teacher at {url} is not asked: {reason}")]
    Address { url: String, reason: String },
    #[error("the teacher at {url} could not be reached within {} s: {reason}", patience.as_secs())]
    Unreachable {
        url: String,
        patience: Duration,
        reason: String,
    },
    #[error("the answer of the teacher at {url} cannot be used: {reason}")]
    Answer { url: String, reason: String },
    #[error("the labels of the teacher at {url} cannot be used: {reason}")]
    Labels { url: String, reason: String },
    #[error("cannot use the cache of the teacher's answers")]
    Cache(#[source] io::Error),
}

fn said(message: &Option<String>) -> String {
    match message {
        Some(message) => format!(": {message}"),
        None => String::new(),
    }
}

/// An endpoint whose labels are known.
#[derive(Debug)]
pub struct HttpTeacher {
    spec: HttpTeacherSpec,
    client: Client,
    task: KnownTask,
    names: Names,
    scores: Scores,
}

/// How far the asking is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Texts that were answered since the last call.
    pub texts: usize,
}

impl HttpTeacher {
    /// Asks the endpoint for one text, to learn its labels and match them with those of the request.
    ///
    /// # Errors
    /// The endpoint cannot be reached, answers in another form, or with labels that don't match.
    pub fn connect(
        spec: &HttpTeacherSpec,
        data: &DataSpec,
        token: Option<&TeacherToken>,
    ) -> Result<Self, HttpTeacherError> {
        let client = Client::new(spec, token);
        let probe = Input {
            text: PROBE.to_owned(),
            text_pair: None,
        };
        let rows = client.ask(&[&probe])?;
        let names = Names::of(&rows, spec, data.known_labels())
            .map_err(|reason| client.labels_unusable(reason))?;
        let labels = names.ordered().to_vec();
        let problem_type = match (data.known_problem_type(), labels.len()) {
            (Some(given), _) => given,
            (None, 1) => ProblemType::Regression,
            (None, _) => ProblemType::SingleLabelClassification,
        };
        let scores = Scores::of(spec, problem_type);
        Ok(Self {
            spec: spec.clone(),
            client,
            task: KnownTask {
                problem_type,
                labels,
            },
            names,
            scores,
        })
    }

    pub fn known_task(&self) -> KnownTask {
        self.task.clone()
    }

    /// Returns the error of an endpoint that has given one label, which makes it a regression, where
    /// the rows turn out to be of several classes: it gives its best label only.
    pub fn only_label(&self) -> Option<HttpTeacherError> {
        match self.names.theirs.as_slice() {
            [only] => Some(self.client.labels_unusable(answer::only_label(only))),
            _ => None,
        }
    }

    /// Logits of the inputs, in order, `[inputs][labels]`; those that the cache in `folder` knows
    /// are not asked for again.
    ///
    /// # Errors
    /// An answer cannot be had or used, or the cache cannot be read or written.
    pub fn logits(
        &self,
        inputs: &[&Input],
        folder: Option<&Path>,
        progress: &mut (dyn FnMut(Asked, usize) + Send),
    ) -> Result<Vec<Vec<f32>>, HttpTeacherError> {
        let mut cache = match folder {
            Some(folder) => TeacherCache::named(folder, &self.identity()),
            None => Ok(TeacherCache::in_memory()),
        }
        .map_err(HttpTeacherError::Cache)?;
        let mut seen = HashSet::new();
        let new: Vec<&Input> = inputs
            .iter()
            .copied()
            .filter(|input| cache.of_text(input).is_none() && seen.insert(*input))
            .collect();
        self.ask_all(&new, &mut cache, progress)?;
        let known = |input: &&Input| cache.of_text(input).cloned().unwrap_or_default();
        Ok(inputs.iter().map(known).collect())
    }

    /// What answers depend on, as far as it is known here.
    fn identity(&self) -> String {
        serde_json::json!({
            "url": self.spec.url,
            "revision": self.spec.revision,
            "model": self.client.model(),
            "labels": self.task.labels,
            "names": self.spec.labels,
            "problem_type": self.task.problem_type,
            "scores": format!("{:?}", self.scores),
        })
        .to_string()
    }

    /// Shares the texts out over threads, each of which takes the next batch when it is free. The
    /// first error ends all of them; what has been answered stays in the cache.
    fn ask_all(
        &self,
        inputs: &[&Input],
        cache: &mut TeacherCache,
        progress: &mut (dyn FnMut(Asked, usize) + Send),
    ) -> Result<(), HttpTeacherError> {
        let batches: Vec<&[&Input]> = inputs.chunks(self.spec.batch_size.max(1)).collect();
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let reading = Reading {
            names: &self.names,
            scores: self.scores,
            problem_type: self.task.problem_type,
        };
        let shared = Mutex::new((cache, progress));
        let work = || -> Result<(), HttpTeacherError> {
            while !failed.load(Ordering::Relaxed) {
                let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return Ok(());
                };
                let rows = self.client.ask(batch)?;
                let logits = reading
                    .logits(&rows)
                    .map_err(|reason| self.client.unusable(reason))?;
                let mut shared = shared.lock().unwrap_or_else(|poison| poison.into_inner());
                let (cache, progress) = &mut *shared;
                cache
                    .add_texts(batch.iter().copied().zip(&logits))
                    .map_err(HttpTeacherError::Cache)?;
                let texts = batch.len();
                progress(Asked { texts }, inputs.len());
            }
            Ok(())
        };
        thread::scope(|scope| {
            let count = self.spec.concurrency.clamp(1, batches.len().max(1));
            let threads: Vec<_> = (0..count)
                .map(|_| {
                    scope.spawn(|| {
                        let outcome = work();
                        if outcome.is_err() {
                            failed.store(true, Ordering::Relaxed);
                        }
                        outcome
                    })
                })
                .collect();
            let outcomes: Vec<_> = threads
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect();
            for outcome in outcomes {
                match outcome {
                    Ok(outcome) => outcome?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(())
        })
    }
}

/// Names of the labels by the endpoint's names for them.
pub(super) type NameMap = BTreeMap<String, String>;
