//! Asks the teacher of a version about a text, on demand.
//!
//! A teacher is many times the student's size and slower by as much. So it is loaded only when
//! someone asks, one at a time, within a bound of memory, on a thread that gives way to those that
//! serve, and leaves memory when it has not been asked for a while.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::PassError;
use super::courtesy;
use super::models::{ADAPTER_WEIGHTS, Base, GpuLimits, Places, Teacher, TeacherSource};
use super::spec::TeacherSpec;
use crate::adapter::{Classifier, KnownEncoders, TaskConfig};
use crate::encoder::{EncoderError, EncoderId, Placement, StoredTensors};
use crate::hub::{self, HubError};
use crate::text::{Input, PackedBatch, Truncation};

/// Questions that wait while one is answered.
const WAITING: usize = 4;

/// Where teachers are found, and how much of them is borne.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Cache of fetched encoders.
    pub cache: PathBuf,
    /// Most bytes of a teacher's weights in memory; 0 keeps teachers out altogether.
    pub memory: u64,
    /// How long a teacher stays in memory after its last answer.
    pub idle: Duration,
    /// Encoders by name, to tell whether a teacher's adapter is its encoder's.
    pub known: KnownEncoders,
}

/// Texts for a teacher.
#[derive(Clone, Debug)]
pub struct Question {
    /// Names as `distill::models` takes them: paths have been checked.
    pub teacher: TeacherSpec,
    pub inputs: Vec<Input>,
    /// Tokens that a text is cut to, unless the encoder takes fewer.
    pub max_length: usize,
    pub truncation: Truncation,
    /// Digest of the encoder that taught the version, if its report has it.
    pub encoder_digest: Option<String>,
}

/// What a teacher said.
#[derive(Clone, Debug)]
pub struct Answer {
    /// `[inputs][labels]`
    pub logits: Vec<Vec<f32>>,
    /// What the logits mean.
    pub task: TaskConfig,
    /// Tokenising and the forward passes.
    pub compute: Duration,
    /// Absent if the teacher was in memory.
    pub load: Option<Duration>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("this server loads no teachers: --teacher-memory is 0")]
    Off,
    #[error(
        "the teacher was fine-tuned in the pass that made this version, and its weights were not kept"
    )]
    NotKept,
    #[error("the teacher of this version runs elsewhere and is asked over HTTP in passes only")]
    Elsewhere,
    #[error("the teacher's weights are not on this machine")]
    Missing(#[source] HubError),
    #[error(
        "the teacher's weights need {needed} bytes in memory, and --teacher-memory allows {allowed}"
    )]
    TooLarge { needed: u64, allowed: u64 },
    #[error("others are asking teachers at the moment")]
    Busy,
    #[error("the teacher's weights can't be read")]
    Unreadable(#[source] EncoderError),
    #[error("the teacher can't be loaded")]
    Load(#[source] Box<PassError>),
    #[error(
        "the encoder {found} is not the one that taught this version, which was {expected}; the \
         files behind its name have changed"
    )]
    OtherTeacher {
        found: EncoderId,
        expected: EncoderId,
    },
    #[error("the teacher can't answer")]
    Compute(#[source] Box<PassError>),
    #[error("asking the teacher panicked")]
    Panicked,
    #[error("the thread of teachers has ended")]
    Gone,
}

struct Asked {
    question: Question,
    reply: oneshot::Sender<Result<Answer, AskError>>,
}

/// A handle of the thread that asks teachers. Dropping the last one ends the thread.
#[derive(Clone, Debug)]
pub struct TeacherDesk {
    questions: SyncSender<Asked>,
}

impl TeacherDesk {
    /// Starts the thread; nothing is loaded yet.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let (questions, received) = sync_channel(WAITING);
        thread::Builder::new()
            .name("teacher".into())
            .spawn(move || {
                courtesy::give_way();
                Clerk::new(settings).work(&received);
            })?;
        Ok(Self { questions })
    }

    /// The teacher's answer. A question whose asker has gone is not answered.
    pub async fn ask(&self, question: Question) -> Result<Answer, AskError> {
        let (reply, answer) = oneshot::channel();
        match self.questions.try_send(Asked { question, reply }) {
            Ok(()) => answer.await.map_err(|_| AskError::Gone)?,
            Err(TrySendError::Full(_)) => Err(AskError::Busy),
            Err(TrySendError::Disconnected(_)) => Err(AskError::Gone),
        }
    }
}

/// A teacher in memory.
struct Loaded {
    model: String,
    adapter: Option<String>,
    base: Base,
    classifier: Classifier,
}

/// Who works on the thread.
struct Clerk {
    settings: Settings,
    loaded: Option<Loaded>,
}

impl Clerk {
    fn new(settings: Settings) -> Self {
        let loaded = None;
        Self { settings, loaded }
    }

    fn work(&mut self, questions: &Receiver<Asked>) {
        loop {
            match questions.recv_timeout(self.settings.idle) {
                Ok(Asked { question, reply }) => {
                    if !reply.is_closed() {
                        let answer = caught(|| self.answer(&question)).inspect_err(|error| {
                            if matches!(error, AskError::Panicked) {
                                // It may be half loaded.
                                self.loaded = None;
                            }
                        });
                        // The asker may go meanwhile.
                        let _ = reply.send(answer);
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.loaded = None,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn answer(&mut self, question: &Question) -> Result<Answer, AskError> {
        let asked = &question.teacher;
        let load = match &self.loaded {
            Some(loaded) if loaded.model == asked.model && loaded.adapter == asked.adapter => None,
            _ => {
                let started = Instant::now();
                // Before the next one comes in: there is room for one.
                self.loaded = None;
                self.loaded = Some(self.load(asked)?);
                Some(started.elapsed())
            }
        };
        let Some(Loaded {
            base, classifier, ..
        }) = &self.loaded
        else {
            return Err(AskError::Gone);
        };
        if let Some(expected) = &question.encoder_digest
            && *expected != base.digest
        {
            let id = |digest: &str| EncoderId {
                name: base.name.clone(),
                digest: digest.to_owned(),
            };
            return Err(AskError::OtherTeacher {
                found: id(&base.digest),
                expected: id(expected),
            });
        }
        let started = Instant::now();
        let logits = answers(base, classifier, question)
            .map_err(|error| AskError::Compute(Box::new(error)))?;
        Ok(Answer {
            logits,
            task: classifier.task.clone(),
            compute: started.elapsed(),
            load,
        })
    }

    fn load(&self, spec: &TeacherSpec) -> Result<Loaded, AskError> {
        if self.settings.memory == 0 {
            return Err(AskError::Off);
        }
        if spec.http.is_some() {
            return Err(AskError::Elsewhere);
        }
        if spec.finetune.is_some() {
            return Err(AskError::NotKept);
        }
        // An answer must not wait for hundreds of megabytes to be fetched.
        let folder = hub::resolve(&spec.model, &self.settings.cache).map_err(AskError::Missing)?;
        let mut needed = bytes_in_memory(StoredTensors::open(&folder))?;
        if let Some(adapter) = &spec.adapter {
            let weights = Path::new(adapter).join(ADAPTER_WEIGHTS);
            needed += bytes_in_memory(StoredTensors::of_file(weights))?;
        }
        let allowed = self.settings.memory;
        if needed > allowed {
            return Err(AskError::TooLarge { needed, allowed });
        }
        let places = Places {
            student: String::new(),
            cache: self.settings.cache.clone(),
            adapters: PathBuf::new(),
            known: self.settings.known.clone(),
            teacher_cache: None,
            placement: Placement::default(),
            gpu: GpuLimits::default(),
            threads: 1,
            memory_limit: None,
            checkpoints: None,
            teacher_origins: Vec::new(),
        };
        let failed = |error| AskError::Load(Box::new(error));
        let Teacher { base, source } = Teacher::load(spec, &places).map_err(failed)?;
        match source {
            TeacherSource::Trained { classifier, .. } => Ok(Loaded {
                model: spec.model.clone(),
                adapter: spec.adapter.clone(),
                base,
                classifier: *classifier,
            }),
            TeacherSource::Untrained => Err(AskError::NotKept),
        }
    }
}

/// Turns a panic into an error: the next question must find the thread.
fn caught<T>(work: impl FnOnce() -> Result<T, AskError>) -> Result<T, AskError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(AskError::Panicked))
}

/// One text a pass: the thread is alone, so batches would win little, and they take memory.
fn answers(
    base: &Base,
    classifier: &Classifier,
    question: &Question,
) -> Result<Vec<Vec<f32>>, PassError> {
    let max_length = base.max_length(question.max_length);
    let mut logits = Vec::with_capacity(question.inputs.len());
    for input in &question.inputs {
        let sequence = base
            .tokenizer
            .encode(input, max_length, Some(question.truncation))?;
        let batch = PackedBatch::new([&sequence]);
        logits.extend(classifier.logits(&batch)?);
    }
    Ok(logits)
}

/// Returns the size of stored tensors as f32, the type that they are computed with.
fn bytes_in_memory(stored: Result<StoredTensors, EncoderError>) -> Result<u64, AskError> {
    Ok(4 * stored.map_err(AskError::Unreadable)?.elements())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::{encoder_digest, weight_bytes};

    fn golden(path: &str) -> String {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let path = folder.join(path).into_os_string();
        path.into_string().expect("UTF-8")
    }

    fn settings(memory: u64) -> Settings {
        Settings {
            cache: PathBuf::from("no-cache"),
            memory,
            idle: Duration::from_secs(60),
            known: KnownEncoders::default(),
        }
    }

    fn question(model: &str, adapter: Option<&str>) -> Question {
        Question {
            teacher: TeacherSpec {
                model: golden(model),
                adapter: adapter.map(golden),
                http: None,
                finetune: None,
            },
            inputs: vec![Input {
                text: "a b c".into(),
                text_pair: None,
            }],
            max_length: 16,
            truncation: Truncation::LongestFirst,
            encoder_digest: None,
        }
    }

    /// An encoder's folder with a tokenizer, as golden models have none.
    fn model(name: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (from, file) in [
            (format!("models/{name}"), "config.json"),
            (format!("models/{name}"), "model.safetensors"),
            ("tokenizers/bert".to_owned(), "tokenizer.json"),
        ] {
            let from = Path::new(&golden(&from)).join(file);
            std::fs::copy(from, folder.path().join(file)).expect("a copy");
        }
        folder
    }

    #[test]
    fn a_teacher_is_loaded_once_and_answers_with_its_own_labels() {
        let folder = model("bert-labels");
        let mut clerk = Clerk::new(settings(1 << 30));
        let mut asked = question("models/bert-labels", None);
        asked.teacher.model = folder.path().to_str().expect("UTF-8").to_owned();
        let first = clerk.answer(&asked).expect("an answer");
        assert!(first.load.is_some());
        assert_eq!(first.logits.len(), 1);
        assert_eq!(first.logits[0].len(), first.task.labels.len());
        let second = clerk.answer(&asked).expect("an answer");
        assert!(second.load.is_none(), "it is in memory");
        assert_eq!(first.logits, second.logits);
        asked.encoder_digest = Some(encoder_digest(folder.path()).expect("a digest"));
        clerk.answer(&asked).expect("it is the one that taught");
        asked.encoder_digest = Some("of another".to_owned());
        let refused = clerk.answer(&asked).expect_err("another one taught");
        assert!(
            matches!(refused, AskError::OtherTeacher { .. }),
            "{refused}"
        );
    }

    #[test]
    fn what_cannot_be_asked_is_said_before_anything_is_loaded() {
        let labels = question("models/bert-labels", None);
        let refused = |memory, question: &Question| {
            let answer = Clerk::new(settings(memory)).answer(question);
            answer.expect_err("a refusal")
        };
        assert!(matches!(refused(0, &labels), AskError::Off));
        let mut tuned = labels.clone();
        tuned.teacher.finetune = serde_json::from_value(serde_json::json!({
            "mode": "full", "epochs": 1
        }))
        .expect("a spec");
        assert!(matches!(refused(1 << 30, &tuned), AskError::NotKept));
        let mut elsewhere = labels.clone();
        elsewhere.teacher.http = serde_json::from_value(serde_json::json!({
            "url": "http://127.0.0.1:1/predict"
        }))
        .expect("a spec");
        assert!(matches!(refused(1 << 30, &elsewhere), AskError::Elsewhere));
        let mut missing = labels.clone();
        missing.teacher.model = "mpnet-base".into();
        assert!(matches!(refused(1 << 30, &missing), AskError::Missing(_)));
        let folder = model("bert-labels");
        let mut large = labels;
        large.teacher.model = folder.path().to_str().expect("UTF-8").to_owned();
        let AskError::TooLarge { needed, allowed } = refused(1000, &large) else {
            panic!("it is larger than 1,000 bytes");
        };
        let stored = weight_bytes(folder.path());
        assert_eq!(allowed, 1000);
        assert!(needed <= stored && needed > stored / 2, "{needed}");
    }

    #[test]
    fn a_panic_is_an_error() {
        let panicked = caught::<()>(|| panic!("out of range"));
        assert!(matches!(panicked, Err(AskError::Panicked)));
        assert!(matches!(caught(|| Ok(1)), Ok(1)));
    }

    #[tokio::test]
    async fn the_desk_answers_from_its_thread() {
        let folder = model("bert-labels");
        let desk = TeacherDesk::start(settings(1 << 30)).expect("a thread");
        let mut asked = question("models/bert-labels", None);
        asked.teacher.model = folder.path().to_str().expect("UTF-8").to_owned();
        let answer = desk.ask(asked).await.expect("an answer");
        assert!(answer.logits[0].iter().all(|logit| logit.is_finite()));
    }
}
