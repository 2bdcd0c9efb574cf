//! Checkpoints of a training: all that it needs to go on after a kill with the bits that it would
//! have had without.
//!
//! One safetensors file a training. The variables, the optimizer's moments and the best weights so
//! far are its tensors; where the training is stands as JSON in its metadata. Random numbers are a
//! function of seed and step ([`CounterRng`](crate::distill::rng::CounterRng)), so the step is the
//! generator's state. A file is written beside the old one, flushed, and renamed over it.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::distill::report::EpochSummary;
use crate::encoder::StoredTensors;
use crate::parse;

/// A checkpoint takes at most one part in so many of a training's time.
const SHARE_OF_TIME: u32 = 20;

/// Key of the JSON in the file's metadata.
const POSITION: &str = "kdlora";

/// Where the checkpoints of a pass are, and how often they are written.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    pub folder: PathBuf,
    /// Least time between two; a large model's are further apart, so that writing takes no more
    /// than a twentieth of the time. 0 means one after each step, however long they take.
    pub every: Duration,
}

impl Checkpoints {
    /// The checkpoint of one of the pass's trainings. `context` is what the training depends on
    /// and does not see itself: its encoder, the request.
    pub fn of(&self, training: &str, context: &str) -> Checkpoint {
        Checkpoint {
            path: self.folder.join(format!("{training}.safetensors")),
            every: self.every,
            context: context.to_owned(),
        }
    }

    /// Removes whatever is there.
    pub fn clear(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

impl Default for Checkpoints {
    fn default() -> Self {
        Self {
            folder: PathBuf::new(),
            every: Duration::from_secs(30),
        }
    }
}

/// The checkpoint of one training.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub path: PathBuf,
    pub(super) every: Duration,
    pub(super) context: String,
}

/// Where a training is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Position {
    /// Digest of everything that the result depends on. A checkpoint of another training is not
    /// gone on with.
    pub(super) fingerprint: String,
    /// Shares of a batch: another number gives other roundings.
    pub(super) threads: usize,
    /// Optimizer steps done.
    pub(super) step: usize,
    /// Epoch under way, counted from 1, the batches of it that are done, and their loss.
    pub(super) epoch: usize,
    pub(super) batches: usize,
    pub(super) loss: f64,
    pub(super) tokens: usize,
    pub(super) seconds: f64,
    pub(super) history: Vec<EpochSummary>,
    pub(super) best: Option<BestEpoch>,
    /// Nothing is left to do; of the tensors only the best weights are in the file.
    pub(super) finished: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct BestEpoch {
    pub(super) epoch: usize,
    pub(super) score: f64,
}

/// Kinds of tensors in the file, in front of the variables' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Variable,
    FirstMoment,
    SecondMoment,
    Best,
}

impl Kind {
    const ALL: [Self; 4] = [
        Self::Variable,
        Self::FirstMoment,
        Self::SecondMoment,
        Self::Best,
    ];

    fn prefix(self) -> &'static str {
        match self {
            Self::Variable => "variable.",
            Self::FirstMoment => "first.",
            Self::SecondMoment => "second.",
            Self::Best => "best.",
        }
    }
}

/// What comes out of it.
pub(super) struct Stored {
    pub(super) position: Position,
    pub(super) variables: BTreeMap<String, Tensor>,
    pub(super) first: BTreeMap<String, Tensor>,
    pub(super) second: BTreeMap<String, Tensor>,
    pub(super) best: BTreeMap<String, Tensor>,
}

/// Decides when the next checkpoint is due.
pub(super) struct Clock {
    every: Duration,
    last: Instant,
    took: Duration,
}

impl Clock {
    pub(super) fn new(every: Duration) -> Self {
        Self {
            every,
            last: Instant::now(),
            took: Duration::ZERO,
        }
    }

    pub(super) fn is_due(&self) -> bool {
        let since = self.last.elapsed();
        self.every.is_zero() || since >= self.every.max(self.took * SHARE_OF_TIME)
    }

    fn written(&mut self, start: Instant) {
        self.took = start.elapsed();
        self.last = Instant::now();
    }
}

impl Checkpoint {
    /// Replaces the file. A kill at any moment leaves the old one or the new one, whole.
    pub(super) fn write<'a>(
        &self,
        clock: &mut Clock,
        position: &Position,
        tensors: impl Iterator<Item = (Kind, &'a str, &'a Tensor)>,
    ) -> io::Result<()> {
        let start = Instant::now();
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let part = self.path.with_extension("part");
        // A tensor is turned into bytes only when its turn to be written comes.
        let views = tensors.map(|(kind, name, tensor)| (kind.prefix().to_owned() + name, tensor));
        let metadata = HashMap::from([(POSITION.to_owned(), serde_json::to_string(position)?)]);
        safetensors::serialize_to_file(views, Some(metadata), &part).map_err(io::Error::other)?;
        File::open(&part)?.sync_all()?;
        fs::rename(&part, &self.path)?;
        File::open(folder)?.sync_all()?;
        clock.written(start);
        Ok(())
    }

    /// What a training with this fingerprint has left; `None` if there is nothing of use.
    pub(super) fn read(&self, fingerprint: &str) -> Option<Stored> {
        if !self.path.is_file() {
            return None;
        }
        match read(&self.path) {
            Ok(stored) if stored.position.fingerprint == fingerprint => Some(stored),
            Ok(_) => {
                tracing::warn!(
                    path = %self.path.display(),
                    "the checkpoint belongs to another training, which begins anew"
                );
                None
            }
            Err(error) => {
                tracing::warn!(
                    path = %self.path.display(), %error,
                    "the checkpoint cannot be used, and the training begins anew"
                );
                None
            }
        }
    }
}

fn read(path: &Path) -> io::Result<Stored> {
    let file = StoredTensors::of_file(path.to_owned()).map_err(io::Error::other)?;
    let position = file
        .header()
        .and_then(|entries| entries.get(POSITION))
        .ok_or_else(|| io::Error::other("it does not say where the training was"))?;
    let mut stored = Stored {
        position: parse::json(position.as_bytes())?,
        variables: BTreeMap::new(),
        first: BTreeMap::new(),
        second: BTreeMap::new(),
        best: BTreeMap::new(),
    };
    for name in file.names() {
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| name.starts_with(kind.prefix()));
        let kind = kind.ok_or_else(|| io::Error::other(format!("{name} has no place")))?;
        let tensor = file.read(name, &Device::Cpu).map_err(io::Error::other)?;
        let name = name[kind.prefix().len()..].to_owned();
        match kind {
            Kind::Variable => {
                stored.variables.insert(name, tensor);
            }
            Kind::Best => {
                stored.best.insert(name, tensor);
            }
            Kind::FirstMoment => {
                stored.first.insert(name, tensor);
            }
            Kind::SecondMoment => {
                stored.second.insert(name, tensor);
            }
        }
    }
    Ok(stored)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, Checkpoint) {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints {
            folder: folder.path().join("checkpoints"),
            every: Duration::ZERO,
        };
        (folder, checkpoints.of("student", "context"))
    }

    fn position() -> Position {
        Position {
            fingerprint: "f".into(),
            threads: 2,
            step: 7,
            epoch: 2,
            batches: 3,
            // Not a round number in decimals.
            loss: 0.1 + 0.2,
            history: vec![EpochSummary {
                epoch: 1,
                loss: 1.0 / 3.0,
                validation_score: None,
            }],
            best: Some(BestEpoch {
                epoch: 1,
                score: 2.0 / 3.0,
            }),
            ..Position::default()
        }
    }

    fn write(checkpoint: &Checkpoint, position: &Position) -> io::Result<()> {
        let tensor = Tensor::new(&[[1f32, -0.0], [f32::MIN_POSITIVE, 0.1]], &Device::Cpu).unwrap();
        let first = Tensor::new(&[1e-30f32, 2.0], &Device::Cpu).unwrap();
        let second = Tensor::new(&[0.3f32], &Device::Cpu).unwrap();
        let mut clock = Clock::new(Duration::ZERO);
        let tensors = [
            (Kind::Variable, "a.b", &tensor),
            (Kind::FirstMoment, "a.b", &first),
            (Kind::SecondMoment, "a.b", &second),
            (Kind::Best, "a.b", &tensor),
        ];
        checkpoint.write(&mut clock, position, tensors.into_iter())
    }

    #[test]
    fn what_is_written_is_read_back_to_the_bit() {
        let (_folder, checkpoint) = place();
        write(&checkpoint, &position()).unwrap();
        let stored = checkpoint.read("f").unwrap();
        assert_eq!(stored.position, position());
        assert_eq!(stored.first["a.b"].to_vec1::<f32>().unwrap(), [1e-30, 2.0]);
        assert_eq!(stored.second["a.b"].to_vec1::<f32>().unwrap(), [0.3]);
        for tensor in [&stored.variables["a.b"], &stored.best["a.b"]] {
            assert_eq!(tensor.dims(), [2, 2]);
            let bits = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = [1f32, -0.0, f32::MIN_POSITIVE, 0.1].map(f32::to_bits);
            assert_eq!(
                bits.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
                expected
            );
        }
    }

    #[test]
    fn a_checkpoint_of_another_training_is_not_used() {
        let (_folder, checkpoint) = place();
        write(&checkpoint, &position()).unwrap();
        assert!(checkpoint.read("g").is_none());
    }

    #[test]
    fn a_file_that_is_cut_anywhere_is_not_used() {
        let (_folder, checkpoint) = place();
        write(&checkpoint, &position()).unwrap();
        let whole = fs::read(&checkpoint.path).unwrap();
        for length in 0..whole.len() {
            fs::write(&checkpoint.path, &whole[..length]).unwrap();
            assert!(checkpoint.read("f").is_none(), "{length} bytes");
        }
    }

    #[test]
    fn a_half_written_file_leaves_the_old_one_in_force() {
        let (_folder, checkpoint) = place();
        write(&checkpoint, &position()).unwrap();
        fs::write(checkpoint.path.with_extension("part"), "half").unwrap();
        assert!(checkpoint.read("f").is_some());
        write(
            &checkpoint,
            &Position {
                step: 8,
                ..position()
            },
        )
        .unwrap();
        assert_eq!(checkpoint.read("f").unwrap().position.step, 8);
    }
}
