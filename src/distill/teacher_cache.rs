//! A teacher's answers, kept between passes.
//!
//! One file a teacher, named by the digest of its encoder, the sums of its weights and the length
//! that its inputs are cut to (of one over HTTP, by the digest of what is known of it); a line of
//! JSON an answer: the digest of the token ids (or the text), and the logits. Lines are only ever
//! appended, so a process that is killed leaves at worst a torn last line, which is passed over.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::adapter::sha256;
use crate::parse;
use crate::text::{Input, Sequence};

/// The answers of one teacher.
pub struct TeacherCache {
    /// `None` keeps answers in memory only.
    path: Option<PathBuf>,
    answers: HashMap<String, Vec<f32>>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    input: String,
    logits: Vec<f32>,
}

impl TeacherCache {
    /// The cache in `folder` of the teacher that has the encoder of that digest and, beside it, the
    /// weights in `files`.
    ///
    /// # Errors
    /// A file of the teacher or the cache cannot be read.
    pub fn open(
        folder: &Path,
        encoder: &str,
        files: &[PathBuf],
        max_length: usize,
    ) -> io::Result<Self> {
        let mut digest = Sha256::new_with_prefix(encoder);
        digest.update(max_length.to_le_bytes());
        for file in files {
            digest.update(sha256(file)?);
        }
        Self::at(folder, digest)
    }

    /// The cache in `folder` of a teacher that is known by `identity`.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn named(folder: &Path, identity: &str) -> io::Result<Self> {
        Self::at(folder, Sha256::new_with_prefix(identity))
    }

    /// Answers that are forgotten with the process.
    pub fn in_memory() -> Self {
        Self {
            path: None,
            answers: HashMap::new(),
        }
    }

    fn at(folder: &Path, digest: Sha256) -> io::Result<Self> {
        let path = folder.join(format!("{}.jsonl", short(digest)));
        let mut answers = HashMap::new();
        if path.exists() {
            for line in BufReader::new(File::open(&path)?).split(b'\n') {
                if let Ok(line) = parse::json::<Line>(&line?) {
                    answers.insert(line.input, line.logits);
                }
            }
        }
        Ok(Self {
            path: Some(path),
            answers,
        })
    }

    pub fn get(&self, sequence: &Sequence) -> Option<&Vec<f32>> {
        self.answers.get(&key(sequence))
    }

    /// The answer for a text as it is, untokenised.
    pub fn of_text(&self, input: &Input) -> Option<&Vec<f32>> {
        self.answers.get(&key_of_text(input))
    }

    /// Adds answers, on disk too.
    pub fn extend<'a>(
        &mut self,
        answers: impl Iterator<Item = (&'a Sequence, &'a Vec<f32>)>,
    ) -> io::Result<()> {
        self.add(answers.map(|(sequence, logits)| (key(sequence), logits)))
    }

    /// Adds answers for texts as they are, on disk too.
    pub fn add_texts<'a>(
        &mut self,
        answers: impl Iterator<Item = (&'a Input, &'a Vec<f32>)>,
    ) -> io::Result<()> {
        self.add(answers.map(|(input, logits)| (key_of_text(input), logits)))
    }

    fn add<'a>(&mut self, answers: impl Iterator<Item = (String, &'a Vec<f32>)>) -> io::Result<()> {
        let mut lines = Vec::new();
        for (input, logits) in answers {
            let line = Line {
                input,
                logits: logits.clone(),
            };
            lines.push(b'\n');
            serde_json::to_writer(&mut lines, &line)?;
            self.answers.insert(line.input, line.logits);
        }
        let Some(path) = self.path.as_ref().filter(|_| !lines.is_empty()) else {
            return Ok(());
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Each line begins with its break, so that one after a torn line stands by itself.
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
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
    short(digest)
}

fn key_of_text(input: &Input) -> String {
    let mut digest = Sha256::new();
    digest.update(input.text.len().to_le_bytes());
    digest.update(&input.text);
    if let Some(pair) = &input.text_pair {
        // Tells an empty second text from none.
        digest.update([0]);
        digest.update(pair);
    }
    short(digest)
}

/// Its first 16 bytes in hexadecimal digits.
fn short(digest: Sha256) -> String {
    format!("{:.32}", format!("{:x}", digest.finalize()))
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
        let files = std::slice::from_ref(&weights);
        let of = |encoder, length| TeacherCache::open(&folder, encoder, files, length);
        let open = |length| of("aa", length);
        let mut cache = open(128).unwrap();
        let (a, logits) = (sequence(&[1, 2]), vec![0.5, -1.25]);
        cache.extend([(&a, &logits)].into_iter()).unwrap();
        assert_eq!(open(128).unwrap().get(&a), Some(&logits));
        assert_eq!(open(128).unwrap().get(&sequence(&[1])), None);
        assert_eq!(open(64).unwrap().get(&a), None);
        assert_eq!(of("bb", 128).unwrap().get(&a), None);
        fs::write(&weights, "others").unwrap();
        assert_eq!(open(128).unwrap().get(&a), None);
    }

    #[test]
    fn a_torn_line_loses_itself_only() {
        let (place, weights) = place();
        let open = || TeacherCache::open(place.path(), "aa", std::slice::from_ref(&weights), 8);
        let (a, b, logits) = (sequence(&[1]), sequence(&[2]), vec![1.0]);
        let mut cache = open().unwrap();
        cache
            .extend([(&a, &logits), (&b, &logits)].into_iter())
            .unwrap();
        let path = cache.path.clone().unwrap();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut cache = open().unwrap();
        assert_eq!((cache.get(&a), cache.get(&b)), (Some(&logits), None));
        cache.extend([(&b, &logits)].into_iter()).unwrap();
        assert_eq!(open().unwrap().get(&b), Some(&logits));
    }
}
