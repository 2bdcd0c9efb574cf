//! From texts to token ids, the same as `transformers`' `AutoTokenizer` gives.

mod settings;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use tokenizers::{Encoding, PostProcessor, TruncationDirection};

use self::settings::Settings;
use super::lookahead::{Lookahead, floor_char_boundary};
use super::truncation::{Head, Size};
use super::{Input, Sequence, Truncation};
use crate::files;
use crate::lfs::{LfsPointer, refuse_pointer};
use crate::parse::{self, ParseError};

/// Bytes of text for each token asked for, in the first attempt on a long text.
const BYTES_PER_TOKEN: usize = 12;
/// Growth of the next attempt where that was too little.
const GROWTH: usize = 4;
/// Texts of a pair up to this many bytes are tokenised to their end.
const COUNTED_BYTES: usize = 16 * 1024;
/// Largest file of a tokenizer; those of the largest vocabularies have 40 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;
/// What SentencePiece's vocabulary is called in a folder.
const SENTENCEPIECE: [&str; 3] = ["spm.model", "sentencepiece.bpe.model", "spiece.model"];

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read {path}", path = .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{path} is missing; save the tokenizer in its fast form \
         (AutoTokenizer.from_pretrained(…).save_pretrained(…))",
        path = .0.display()
    )]
    Missing(PathBuf),
    #[error(
        "{folder} has {vocabulary} but no tokenizer.json; make it with Python (`pip install \
         transformers sentencepiece protobuf`): `from transformers import AutoTokenizer; \
         AutoTokenizer.from_pretrained(\"{folder}\").save_pretrained(\"{folder}\")`",
        folder = .folder.display()
    )]
    SentencePiece {
        folder: PathBuf,
        vocabulary: &'static str,
    },
    #[error("{path} is not a tokenizer.json that can be used", path = .path.display())]
    Format {
        path: PathBuf,
        #[source]
        source: tokenizers::Error,
    },
    #[error("{path} is not the JSON expected", path = .path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: ParseError,
    },
    #[error("{path}: {problem}", path = .path.display())]
    Settings { path: PathBuf, problem: String },
    #[error(transparent)]
    LfsPointer(#[from] LfsPointer),
    #[error("the input has {tokens} tokens or more, the limit is {max_length}")]
    TooLong { tokens: usize, max_length: usize },
    #[error(
        "the first text has {tokens} tokens or more, too many for the limit of {max_length}, and \
         only the second text may be cut (truncation only_second)"
    )]
    FirstTooLong { tokens: usize, max_length: usize },
    #[error("a limit of {max_length} tokens leaves no room beside {special} special tokens")]
    LimitTooLow { max_length: usize, special: usize },
    #[error("the tokenizer cannot be written as JSON")]
    Serialize(#[source] tokenizers::Error),
    #[error("the text cannot be tokenised")]
    Encode(#[source] tokenizers::Error),
}

/// A tokenizer of the Hugging Face layout. Cheap to clone, shared by threads.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    model_max_length: Option<usize>,
    /// The side on which long texts are cut.
    direction: TruncationDirection,
    /// None: long texts are read to their end.
    lookahead: Option<Lookahead>,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, and `tokenizer_config.json` where there is one, whose settings count
    /// as they do for `AutoTokenizer`.
    ///
    /// Padding and the length of truncation set inside `tokenizer.json` (sentence-transformers
    /// writes both) are switched off: sequences are packed, not padded, and the length belongs to
    /// the task.
    ///
    /// # Errors
    /// A file is missing or cannot be read, or the two contradict each other.
    pub fn load(encoder_dir: &Path) -> Result<Self, TokenizerError> {
        let path = encoder_dir.join("tokenizer.json");
        let format = |source| TokenizerError::Format {
            path: path.clone(),
            source,
        };
        let bytes = read(&path)?.ok_or_else(|| missing(encoder_dir))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(format)?;
        let settings = Settings::read(encoder_dir)?;
        settings.apply(&mut inner)?;
        let model_max_length = settings.model_max_length(&inner)?;
        let direction = settings.direction(&inner)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(format)?;
        Ok(Self {
            inner: Arc::new(inner),
            model_max_length,
            direction,
            lookahead: Lookahead::of(&bytes),
        })
    }

    /// Returns the most tokens of a sequence, special tokens included: `asked`, unless the folder's
    /// `model_max_length` is less.
    pub fn max_length(&self, asked: usize) -> usize {
        self.model_max_length.map_or(asked, |most| most.min(asked))
    }

    /// Writes the tokenizer in one form that does not depend on how its file is formatted, for the
    /// digest of an encoder. Padding and truncation of the file, which are switched off, are not in
    /// it.
    pub fn canonical(&self) -> Result<String, TokenizerError> {
        let mut text = self
            .inner
            .to_string(false)
            .map_err(TokenizerError::Serialize)?;
        // Only where it is not the common side: digests of other tokenizers stay as they are.
        if self.direction == TruncationDirection::Left {
            text.push_str("\ntruncation_side left");
        }
        Ok(text)
    }

    /// Number of token ids; every id is below it.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Token ids with special tokens, `max_length` at most. An empty text gives the special tokens.
    ///
    /// Without `truncation` an input over the limit is an error. Texts are cut on the side that the
    /// folder's `truncation_side` names; one that is cut on the left is read to its end.
    ///
    /// Of a long text only as much is tokenised as can show in the result, so that a megabyte costs
    /// hardly more than a page. The exception are texts with hardly a token in a megabyte, such as
    /// one endless word or mere invisible characters, and all texts where the tokenizer is of a kind
    /// that needs them whole (see [`Lookahead`]): they are read to their end, at about a microsecond
    /// a byte. Who takes texts from strangers bounds their bytes.
    ///
    /// Where both texts of a pair are cut and the room is odd, the longer one gets the odd token.
    /// Of texts over [`COUNTED_BYTES`] the bytes are compared for this, of others the tokens, as
    /// `transformers` does.
    ///
    /// # Errors
    /// The input is too long and must not be cut, or not so that it would fit; the limit leaves no
    /// room for a text at all.
    pub fn encode(
        &self,
        input: &Input,
        max_length: usize,
        truncation: Option<Truncation>,
    ) -> Result<Sequence, TokenizerError> {
        self.encode_from(input, max_length, truncation, None)
    }

    /// Like [`Self::encode`], cutting texts on the side that `direction` names, if it names one.
    pub fn encode_from(
        &self,
        input: &Input,
        max_length: usize,
        truncation: Option<Truncation>,
        direction: Option<TruncationDirection>,
    ) -> Result<Sequence, TokenizerError> {
        let special = self.special_tokens(input.text_pair.is_some());
        if max_length <= special {
            return Err(TokenizerError::LimitTooLow {
                max_length,
                special,
            });
        }
        let room = max_length - special;
        let direction = direction.unwrap_or(self.direction);
        let (first, second) = match &input.text_pair {
            _ if direction == TruncationDirection::Left => {
                let second = input.text_pair.as_deref().map(|text| self.whole(text));
                (self.whole(&input.text)?, second.transpose()?)
            }
            None => (self.head(&input.text, room)?, None),
            Some(text) => (
                self.counted_head(&input.text, room)?,
                Some(self.counted_head(text, room)?),
            ),
        };
        let tokens = special + first.tokens + second.as_ref().map_or(0, |second| second.tokens);
        let truncated = tokens > max_length;
        let truncation = match truncation {
            None if truncated => return Err(TokenizerError::TooLong { tokens, max_length }),
            truncation => truncation.unwrap_or_default(),
        };
        let too_long = TokenizerError::FirstTooLong {
            tokens: first.tokens,
            max_length,
        };
        let (first, second) = truncation
            .cut(first, second, room, direction)
            .ok_or(too_long)?;
        let encoding = self
            .inner
            .post_process(first, second, true)
            .map_err(TokenizerError::Encode)?;
        Ok(Sequence {
            ids: encoding.get_ids().to_vec(),
            type_ids: encoding.get_type_ids().to_vec(),
            truncated,
        })
    }

    fn special_tokens(&self, pair: bool) -> usize {
        self.inner
            .get_post_processor()
            .map_or(0, |processor| processor.added_tokens(pair))
    }

    /// At least the first `room` tokens of a text and one more, if there are as many; without
    /// special tokens.
    fn head(&self, text: &str, room: usize) -> Result<Head, TokenizerError> {
        if let Some(head) = self.part(text, room)? {
            return Ok(head);
        }
        self.whole(text)
    }

    fn whole(&self, text: &str) -> Result<Head, TokenizerError> {
        let encoding = self.plain(text)?;
        let tokens = encoding.len();
        Ok(Head {
            encoding,
            tokens,
            size: Size::Tokens {
                tokens,
                bytes: text.len(),
            },
        })
    }

    /// The same from a part of the text, if a part is enough.
    fn part(&self, text: &str, room: usize) -> Result<Option<Head>, TokenizerError> {
        let Some(lookahead) = self.lookahead else {
            return Ok(None);
        };
        let mut length = room.saturating_add(1).saturating_mul(BYTES_PER_TOKEN);
        while length < text.len() {
            let prefix = &text[..floor_char_boundary(text, length)];
            let encoding = self.plain(prefix)?;
            if let Some(tokens) = lookahead.certain_tokens(&encoding, prefix, room) {
                return Ok(Some(Head {
                    encoding,
                    tokens,
                    size: Size::Bytes(text.len()),
                }));
            }
            length = length.saturating_mul(GROWTH);
        }
        Ok(None)
    }

    /// Like [`Self::head`], with all tokens of a text of moderate length.
    fn counted_head(&self, text: &str, room: usize) -> Result<Head, TokenizerError> {
        let all = match text.len() {
            0..=COUNTED_BYTES => COUNTED_BYTES,
            _ => room,
        };
        self.head(text, all.max(room))
    }

    fn plain(&self, text: &str) -> Result<Encoding, TokenizerError> {
        self.inner
            .encode(text, false)
            .map_err(TokenizerError::Encode)
    }
}

fn missing(encoder_dir: &Path) -> TokenizerError {
    let found = SENTENCEPIECE
        .into_iter()
        .find(|name| encoder_dir.join(name).is_file());
    match found {
        Some(vocabulary) => TokenizerError::SentencePiece {
            folder: encoder_dir.to_path_buf(),
            vocabulary,
        },
        None => TokenizerError::Missing(encoder_dir.join("tokenizer.json")),
    }
}

/// Reads a JSON file; the default where there is none.
fn read_json<T: DeserializeOwned + Default>(path: PathBuf) -> Result<T, TokenizerError> {
    match read(&path)? {
        None => Ok(T::default()),
        Some(bytes) => parse::json(&bytes).map_err(|source| TokenizerError::Json { path, source }),
    }
}

/// `None` where there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match files::read(path, MAX_FILE_BYTES) {
        Ok(bytes) => {
            refuse_pointer(path, &bytes)?;
            Ok(Some(bytes))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io {
            path: path.to_path_buf(),
            source,
        }),
    }
}
