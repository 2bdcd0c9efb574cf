//! A teacher's answers, kept between passes.
//!
//! One file a teacher, named by the digest of its weights and the length its inputs are cut to; a
//! line of JSON an answer: the digest of the token ids, and the logits. Lines are only ever
//! appended, so a process that is killed leaves at worst a torn last line, which is passed over.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::text::Sequence;

/// The answers of one teacher.
pub struct TeacherCache {
    path: PathBuf,
    answers: HashMap<String, Vec<f32>>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    input: String,
    logits: Vec<f32>,
}

impl TeacherCache {
    /// The cache in `folder` of the teacher whose weights are `files`.
    ///
    /// # Errors
    /// A file of the teacher or the cache cannot be read.
    pub fn open(folder: &Path, files: &[PathBuf], max_length: usize) -> io::Result<Self> {
        let mut digest = Sha256::new();
        digest.update(max_length.to_le_bytes());
        for file in files {
            update_with_file(&mut digest, file)?;
        }
        let path = folder.join(format!("{}.jsonl", hex(&digest.finalize()[..16])));
        let mut answers = HashMap::new();
        if path.exists() {
            for line in BufReader::new(File::open(&path)?).split(b'\n') {
                if let Ok(line) = serde_json::from_slice::<Line>(&line?) {
                    answers.insert(line.input, line.logits);
                }
            }
        }
        Ok(Self { path, answers })
    }

    pub fn get(&self, sequence: &Sequence) -> Option<&Vec<f32>> {
        self.answers.get(&key(sequence))
    }

    /// Adds answers, on disk too.
    pub fn extend<'a>(
        &mut self,
        answers: impl Iterator<Item = (&'a Sequence, &'a Vec<f32>)>,
    ) -> io::Result<()> {
        let mut lines = Vec::new();
        for (sequence, logits) in answers {
            let line = Line {
                input: key(sequence),
                logits: logits.clone(),
            };
            lines.push(b'\n');
            serde_json::to_writer(&mut lines, &line)?;
            self.answers.insert(line.input, line.logits);
        }
        if lines.is_empty() {
            return Ok(());
        }
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Each line begins with its break, so that one after a torn line stands by itself.
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path)?;
        file.write_all(&lines)?;
        file.sync_data()
    }
}

fn key(sequence: &Sequence) -> String {
    let mut digest = Sha256::new();
    for values in [&sequence.ids, &sequence.type_ids] {
        digest.update(values.len().to_le_bytes());
        values
            .iter()
            .for_each(|value| digest.update(value.to_le_bytes()));
    }
    hex(&digest.finalize()[..16])
}

fn update_with_file(digest: &mut Sha256, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(()),
            n => digest.update(&block[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(ids: &[u32]) -> Sequence {
        Sequence {
            ids: ids.to_vec(),
            type_ids: vec![0; ids.len()],
            truncated: false,
        }
    }

    /// A folder with a teacher's file in it.
    fn place() -> (tempfile::TempDir, PathBuf) {
        let place = tempfile::tempdir().unwrap();
        let weights = place.path().join("model.safetensors");
        fs::write(&weights, "weights").unwrap();
        (place, weights)
    }

    #[test]
    fn answers_are_there_for_the_next_pass_and_for_that_teacher_only() {
        let (place, weights) = place();
        let folder = place.path().join("cache");
        let open = |length| TeacherCache::open(&folder, std::slice::from_ref(&weights), length);
        let mut cache = open(128).unwrap();
        let (a, logits) = (sequence(&[1, 2]), vec![0.5, -1.25]);
        cache.extend([(&a, &logits)].into_iter()).unwrap();
        assert_eq!(open(128).unwrap().get(&a), Some(&logits));
        assert_eq!(open(128).unwrap().get(&sequence(&[1])), None);
        assert_eq!(open(64).unwrap().get(&a), None);
        fs::write(&weights, "others").unwrap();
        assert_eq!(open(128).unwrap().get(&a), None);
    }

    #[test]
    fn a_torn_line_loses_itself_only() {
        let (place, weights) = place();
        let open = || TeacherCache::open(place.path(), std::slice::from_ref(&weights), 8);
        let (a, b, logits) = (sequence(&[1]), sequence(&[2]), vec![1.0]);
        let mut cache = open().unwrap();
        cache
            .extend([(&a, &logits), (&b, &logits)].into_iter())
            .unwrap();
        let whole = fs::read(&cache.path).unwrap();
        fs::write(&cache.path, &whole[..whole.len() - 3]).unwrap();
        let mut cache = open().unwrap();
        assert_eq!((cache.get(&a), cache.get(&b)), (Some(&logits), None));
        cache.extend([(&b, &logits)].into_iter()).unwrap();
        assert_eq!(open().unwrap().get(&b), Some(&logits));
    }
}
