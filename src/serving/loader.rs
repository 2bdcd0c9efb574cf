//! From a PEFT folder to a version that answers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::residents::{Load, LoadError};
use super::{Entry, LiveTask, Model, ModelError, TaskSegment};
use crate::adapter::{AdapterFolder, Classifier, Mode};
use crate::encoder::Encoder;
use crate::text::{Input, PackedBatch, Sequence, Tokenizer, Truncation};

/// The encoder that serves, with its tokenizer.
#[derive(Clone)]
pub struct Student {
    pub encoder: Arc<Encoder>,
    pub tokenizer: Tokenizer,
}

impl Student {
    /// Whether the adapter of `folder` can answer.
    pub fn check(&self, folder: &Path) -> Result<(), LoadError> {
        let task = self.bind(&AdapterFolder::read(folder)?, Mode::Hot)?;
        self.try_out(&task)
    }

    /// Runs a task over a few sizes of batches, up to `tokens`, so that the first requests find
    /// memory and code warm.
    pub fn warm_up(&self, task: &LiveTask, tokens: usize) -> Result<(), ModelError> {
        for length in [8, 32, 128].map(|length: usize| length.min(task.max_length)) {
            let sequence = Sequence {
                ids: vec![0; length],
                type_ids: vec![0; length],
                truncated: false,
            };
            for sequences in [1, (tokens / length).max(1)] {
                let batch = PackedBatch::new(std::iter::repeat_n(&sequence, sequences));
                let segment = TaskSegment {
                    sequences: 0..sequences,
                    task,
                };
                Model::logits(&*self.encoder, &batch, &[segment])?;
            }
        }
        Ok(())
    }

    /// Puts an adapter on the encoder. One that can't be hot is merged.
    fn bind(&self, adapter: &AdapterFolder, mode: Mode) -> Result<LiveTask, LoadError> {
        let Classifier {
            encoder, weights, ..
        } = match mode {
            Mode::Hot => Classifier::from_adapter(Arc::clone(&self.encoder), adapter)?,
            Mode::Merged => Classifier::merged(&self.encoder, adapter)?,
        };
        let merged = (!Arc::ptr_eq(&encoder, &self.encoder)).then_some(encoder);
        let own = merged.as_ref();
        let encoder_bytes = own.map_or(0, |own| own.bytes_beside(&self.encoder));
        let weight_bytes = (weights.bytes() + encoder_bytes) as u64;
        let most = self.encoder.config().max_sequence_length();
        Ok(LiveTask {
            name: String::new(),
            version: 0,
            weights,
            merged,
            weight_bytes,
            max_length: self.tokenizer.max_length(adapter.task.max_length.min(most)),
            config: adapter.task.clone(),
            memory: Default::default(),
        })
    }

    /// Lets a task answer a text.
    fn try_out(&self, task: &LiveTask) -> Result<(), LoadError> {
        let input = Input {
            text: "A first text.".to_owned(),
            text_pair: None,
        };
        let sequence =
            self.tokenizer
                .encode(&input, task.max_length, Some(Truncation::LongestFirst))?;
        let batch = PackedBatch::new([&sequence]);
        let segment = TaskSegment {
            sequences: 0..1,
            task,
        };
        let rows = Model::logits(&*self.encoder, &batch, &[segment])?;
        let row = rows.into_iter().next().unwrap_or_default();
        let fits = row.len() == task.config.labels.len();
        if fits && row.iter().all(|logit| logit.is_finite()) {
            Ok(())
        } else {
            Err(LoadError::Logits(row))
        }
    }
}

/// Of weights in f32.
fn bytes(elements: usize) -> u64 {
    4 * elements as u64
}

/// Loads versions onto the student. An unproven version is tried out once.
pub struct Loader {
    student: Student,
    host: Mutex<HostCache>,
}

impl Loader {
    /// `host_memory`: most bytes of adapters that are kept as they were read after they have left
    /// the device, so that they come back without the disk.
    pub fn new(student: Student, host_memory: u64) -> Self {
        Self {
            student,
            host: Mutex::new(HostCache::new(host_memory)),
        }
    }

    fn read(&self, entry: &Entry) -> Result<Arc<AdapterFolder>, LoadError> {
        let folder = &entry.folder;
        let cached = lock(&self.host).get(folder);
        if let Some(adapter) = cached {
            return Ok(adapter);
        }
        if let Some(sums) = &entry.sums {
            sums.verify(folder)?;
        }
        let adapter = Arc::new(AdapterFolder::read(folder)?);
        lock(&self.host).put(folder, &adapter);
        Ok(adapter)
    }
}

impl Load for Loader {
    fn expected_bytes(&self, entry: &Entry) -> u64 {
        Classifier::expected_bytes(&self.student.encoder, &entry.folder, entry.mode)
            // Loading it will say what is wrong with it, or find it in the host's memory.
            .unwrap_or_default()
    }

    fn load(&self, entry: &Entry) -> Result<LiveTask, LoadError> {
        let adapter = self.read(entry)?;
        let task = LiveTask {
            name: entry.name.clone(),
            version: entry.version,
            ..self.student.bind(&adapter, entry.mode)?
        };
        if entry.unproven.load(Ordering::Relaxed) {
            self.student.try_out(&task)?;
            entry.unproven.store(false, Ordering::Relaxed);
        }
        Ok(task)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adapters as they were read, by folder; the least recently used leaves.
struct HostCache {
    limit: u64,
    bytes: u64,
    uses: u64,
    adapters: HashMap<PathBuf, Cached>,
}

struct Cached {
    adapter: Arc<AdapterFolder>,
    bytes: u64,
    last_used: u64,
}

impl HostCache {
    fn new(limit: u64) -> Self {
        Self {
            limit,
            bytes: 0,
            uses: 0,
            adapters: HashMap::new(),
        }
    }

    fn get(&mut self, folder: &Path) -> Option<Arc<AdapterFolder>> {
        self.uses += 1;
        let cached = self.adapters.get_mut(folder)?;
        cached.last_used = self.uses;
        Some(Arc::clone(&cached.adapter))
    }

    fn put(&mut self, folder: &Path, adapter: &Arc<AdapterFolder>) {
        let bytes = bytes(adapter.parameters());
        if bytes > self.limit || self.adapters.contains_key(folder) {
            return;
        }
        while self.bytes + bytes > self.limit {
            let oldest = self.adapters.iter().min_by_key(|(_, c)| c.last_used);
            let Some(oldest) = oldest.map(|(folder, _)| folder.clone()) else {
                return;
            };
            if let Some(gone) = self.adapters.remove(&oldest) {
                self.bytes -= gone.bytes;
            }
        }
        self.uses += 1;
        self.bytes += bytes;
        let cached = Cached {
            adapter: Arc::clone(adapter),
            bytes,
            last_used: self.uses,
        };
        self.adapters.insert(folder.to_owned(), cached);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_keeps_what_was_used_last_within_its_bytes() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters");
        let adapter = AdapterFolder::read(&golden.join("bert-pairs-qv")).expect("an adapter");
        let adapter = Arc::new(adapter);
        let mut cache = HostCache::new(2 * bytes(adapter.parameters()) + 3);
        let [a, b, c] = ["a", "b", "c"].map(Path::new);
        cache.put(a, &adapter);
        cache.put(b, &adapter);
        assert!(cache.get(a).is_some());
        cache.put(c, &adapter);
        assert!(cache.get(a).is_some() && cache.get(b).is_none() && cache.get(c).is_some());
        assert_eq!(cache.bytes, 2 * bytes(adapter.parameters()));
        let mut none = HostCache::new(0);
        none.put(a, &adapter);
        assert!(none.get(a).is_none());
    }
}
