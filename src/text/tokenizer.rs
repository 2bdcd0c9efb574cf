//! From texts to token ids, the same as `transformers`' `AutoTokenizer` gives.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{Encoding, PostProcessor};

use super::{Input, Sequence};

/// Bytes of text for each token asked for, in the first attempt on a long text.
const BYTES_PER_TOKEN: usize = 12;
/// Growth of the next attempt where that was too little.
const GROWTH: usize = 4;
/// Texts of a pair up to this many bytes are tokenised to their end.
const COUNTED_BYTES: usize = 16 * 1024;

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
        source: serde_json::Error,
    },
    #[error("the input has {tokens} tokens or more, the limit is {max_length}")]
    TooLong { tokens: usize, max_length: usize },
    #[error("a limit of {max_length} tokens leaves no room beside {special} special tokens")]
    LimitTooLow { max_length: usize, special: usize },
    #[error("the text cannot be tokenised")]
    Encode(#[source] tokenizers::Error),
}

/// A tokenizer of the Hugging Face layout. Cheap to clone, shared by threads.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    model_max_length: Option<usize>,
    /// Bytes of the longest token that is found in the text before it is split into words.
    longest_added_token: usize,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    /// A float of 1e30 where there is no limit.
    model_max_length: Option<f64>,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, and `tokenizer_config.json` where there is one.
    ///
    /// Padding and truncation set inside `tokenizer.json` (sentence-transformers writes both) are
    /// switched off: sequences are packed, not padded, and the length belongs to the task.
    pub fn load(encoder_dir: &Path) -> Result<Self, TokenizerError> {
        let path = encoder_dir.join("tokenizer.json");
        let format = |source| TokenizerError::Format {
            path: path.clone(),
            source,
        };
        let bytes = read(&path)?.ok_or_else(|| TokenizerError::Missing(path.clone()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(format)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(format)?;
        let longest_added_token = inner
            .get_added_tokens_decoder()
            .values()
            .map(|token| token.content.len())
            .max()
            .unwrap_or(0);
        Ok(Self {
            inner: Arc::new(inner),
            model_max_length: model_max_length(encoder_dir)?,
            longest_added_token,
        })
    }

    /// The limit that the folder itself declares, special tokens included.
    pub fn model_max_length(&self) -> Option<usize> {
        self.model_max_length
    }

    /// Number of token ids; every id is below it.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Token ids with special tokens, `max_length` at most. An empty text gives the special tokens.
    ///
    /// Of a pair the longer text is cut first, both to about half where both are longer. Without
    /// `truncate` an input over the limit is an error.
    ///
    /// Of a long text only as much is tokenised as can show in the result, so that a megabyte costs
    /// hardly more than a page. The exception are texts with hardly a token in a megabyte, such as
    /// one endless word or mere invisible characters: they are read to their end, at about a
    /// microsecond a byte. Who takes texts from strangers bounds their bytes.
    ///
    /// Where both texts of a pair are cut and the room is odd, the longer one gets the odd token.
    /// Of texts over [`COUNTED_BYTES`] the bytes are compared for this, of others the tokens, as
    /// `transformers` does.
    pub fn encode(
        &self,
        input: &Input,
        max_length: usize,
        truncate: bool,
    ) -> Result<Sequence, TokenizerError> {
        let special = self.special_tokens(input.text_pair.is_some());
        if max_length <= special {
            return Err(TokenizerError::LimitTooLow {
                max_length,
                special,
            });
        }
        let room = max_length - special;
        let (first, second) = match &input.text_pair {
            None => (self.head(&input.text, room)?, None),
            Some(text) => (
                self.counted_head(&input.text, room)?,
                Some(self.counted_head(text, room)?),
            ),
        };
        let tokens = special + first.tokens + second.as_ref().map_or(0, |second| second.tokens);
        let truncated = tokens > max_length;
        if truncated && !truncate {
            return Err(TokenizerError::TooLong { tokens, max_length });
        }
        let (first, second) = cut(first, second, room);
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
        let mut length = room.saturating_add(1).saturating_mul(BYTES_PER_TOKEN);
        while length < text.len() {
            let prefix = &text[..floor_char_boundary(text, length)];
            let encoding = self.plain(prefix)?;
            if let Some(tokens) = self.certain_tokens(&encoding, prefix.len(), room) {
                return Ok(Head {
                    encoding,
                    tokens,
                    size: Size::Bytes(text.len()),
                });
            }
            length = length.saturating_mul(GROWTH);
        }
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

    /// Like [`Self::head`], with all tokens of a text of moderate length.
    fn counted_head(&self, text: &str, room: usize) -> Result<Head, TokenizerError> {
        let all = match text.len() {
            0..=COUNTED_BYTES => COUNTED_BYTES,
            _ => room,
        };
        self.head(text, all.max(room))
    }

    /// The number of tokens, if more than `room`, that the whole text begins with too, whatever
    /// follows the prefix.
    ///
    /// What follows can change the last word of the prefix, as words are tokenised by themselves,
    /// or complete an added token (`[SEP]`), which is looked for before words are. Nothing reaches
    /// further back: the normalizers in use work character by character, marks going with the
    /// character before them.
    fn certain_tokens(&self, encoding: &Encoding, prefix: usize, room: usize) -> Option<usize> {
        self.inner.get_pre_tokenizer()?;
        let words = encoding.get_word_ids();
        let word = words.get(room)?;
        let rest = words[room..].iter().take_while(|other| *other == word);
        let end = room + rest.count();
        let next_word = encoding.get_offsets().get(end)?.0;
        (next_word + self.longest_added_token < prefix).then_some(end)
    }

    fn plain(&self, text: &str) -> Result<Encoding, TokenizerError> {
        self.inner
            .encode(text, false)
            .map_err(TokenizerError::Encode)
    }
}

/// The beginning of a text in tokens.
struct Head {
    /// Of these the first `tokens` are those of the whole text.
    encoding: Encoding,
    tokens: usize,
    size: Size,
}

/// How long a text is.
#[derive(Clone, Copy)]
enum Size {
    /// It was read to its end.
    Tokens { tokens: usize, bytes: usize },
    /// Its tokens were not all counted.
    Bytes(usize),
}

impl Size {
    fn is_longer_than(self, other: Self) -> bool {
        match (self, other) {
            (Self::Tokens { tokens, .. }, Self::Tokens { tokens: other, .. }) => tokens > other,
            _ => self.bytes() > other.bytes(),
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::Tokens { bytes, .. } | Self::Bytes(bytes) => bytes,
        }
    }
}

/// Cuts a text, or a pair by the longest first, to `room` tokens in all.
fn cut(first: Head, second: Option<Head>, room: usize) -> (Encoding, Option<Encoding>) {
    let Some(second) = second else {
        return (keep(first.encoding, first.tokens.min(room)), None);
    };
    let half = room / 2;
    let of_first = if first.tokens <= half {
        first.tokens
    } else if second.tokens <= half {
        room - second.tokens
    } else if first.size.is_longer_than(second.size) {
        room - half
    } else {
        half
    };
    let of_second = room - of_first;
    (
        keep(first.encoding, first.tokens.min(of_first)),
        Some(keep(second.encoding, second.tokens.min(of_second))),
    )
}

/// The first `length` tokens.
fn keep(mut encoding: Encoding, length: usize) -> Encoding {
    if length < encoding.len() {
        encoding.truncate(length, 0, TruncationDirection::Right);
        // What was cut off is kept beside it, and would be given special tokens too.
        encoding.take_overflowing();
    }
    encoding
}

fn floor_char_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len()))
        .rev()
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0)
}

fn model_max_length(dir: &Path) -> Result<Option<usize>, TokenizerError> {
    let path = dir.join("tokenizer_config.json");
    let Some(bytes) = read(&path)? else {
        return Ok(None);
    };
    let config: TokenizerConfig =
        serde_json::from_slice(&bytes).map_err(|source| TokenizerError::Json { path, source })?;
    Ok(config
        .model_max_length
        .filter(|length| (1.0..1e9).contains(length))
        .map(|length| length as usize))
}

/// `None` where there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io {
            path: path.to_path_buf(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokenizers::utils::truncation::{TruncationParams, truncate_encodings};

    use super::*;

    fn golden(name: &str) -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers");
        Tokenizer::load(&folder.join(name)).unwrap()
    }

    fn single(text: impl Into<String>) -> Input {
        Input {
            text: text.into(),
            text_pair: None,
        }
    }

    fn pair(text: impl Into<String>, text_pair: impl Into<String>) -> Input {
        Input {
            text: text.into(),
            text_pair: Some(text_pair.into()),
        }
    }

    #[derive(Deserialize)]
    struct Golden {
        inputs: Vec<Input>,
        encodings: std::collections::BTreeMap<String, Vec<Expected>>,
    }

    #[derive(Deserialize)]
    struct Expected {
        input: usize,
        max_length: usize,
        ids: Vec<u32>,
        type_ids: Vec<u32>,
    }

    #[test]
    fn ids_are_those_of_transformers() {
        let golden_file: Golden =
            serde_json::from_str(include_str!("../../tests/golden/tokens.json")).unwrap();
        let mut seen = 0;
        for (name, encodings) in &golden_file.encodings {
            let tokenizer = golden(name);
            for expected in encodings {
                let input = &golden_file.inputs[expected.input];
                let case = format!("{name}, {} tokens, {input:?}", expected.max_length);
                match tokenizer.encode(input, expected.max_length, true) {
                    Ok(found) => {
                        assert_eq!(found.ids, expected.ids, "{case}");
                        assert_eq!(found.type_ids, expected.type_ids, "{case}");
                        seen += 1;
                    }
                    // No room for a single token of the text: an error here.
                    Err(TokenizerError::LimitTooLow { special, .. }) => {
                        assert_eq!(expected.ids.len(), special, "{case}");
                    }
                    Err(error) => panic!("{case}: {error}"),
                }
            }
        }
        assert!(seen > 250, "{seen}");
    }

    #[test]
    fn an_empty_text_is_its_special_tokens() {
        for name in ["bert", "mpnet"] {
            let sequence = golden(name).encode(&single(""), 16, true).unwrap();
            assert_eq!(sequence.ids.len(), 2);
            assert!(!sequence.truncated);
        }
    }

    #[test]
    fn too_long_is_an_error_only_without_truncation() {
        let tokenizer = golden("bert");
        let five = single("the film is good");
        assert!(!tokenizer.encode(&five, 6, false).unwrap().truncated);
        let cut = tokenizer.encode(&five, 5, true).unwrap();
        assert!(cut.truncated);
        assert_eq!(cut.ids.len(), 5);
        let error = tokenizer.encode(&five, 5, false).unwrap_err();
        assert!(
            matches!(
                error,
                TokenizerError::TooLong {
                    tokens: 6,
                    max_length: 5
                }
            ),
            "{error}"
        );
        let error = tokenizer.encode(&five, 2, true).unwrap_err();
        assert!(matches!(
            error,
            TokenizerError::LimitTooLow { special: 2, .. }
        ));
    }

    #[test]
    fn padding_and_truncation_of_the_file_are_off() {
        let tokenizer = golden("bert");
        let long = tokenizer.encode(&single("film ".repeat(50)), 512, false);
        assert_eq!(long.unwrap().ids.len(), 52);
        assert_eq!(tokenizer.model_max_length(), Some(512));
    }

    /// Tokens of the whole text, cut afterwards by `tokenizers` itself.
    fn slowly(tokenizer: &Tokenizer, input: &Input, max_length: usize) -> Vec<u32> {
        let special = tokenizer.special_tokens(input.text_pair.is_some());
        let limit = TruncationParams {
            max_length: max_length - special,
            ..TruncationParams::default()
        };
        let whole = |text: &String| tokenizer.plain(text).unwrap();
        let second = input.text_pair.as_ref().map(whole);
        let (mut first, mut second) =
            truncate_encodings(whole(&input.text), second, &limit).unwrap();
        first.take_overflowing();
        if let Some(second) = &mut second {
            second.take_overflowing();
        }
        let encoding = tokenizer.inner.post_process(first, second, true).unwrap();
        encoding.get_ids().to_vec()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

        #[test]
        fn reading_only_the_beginning_changes_nothing(
            pieces in proptest::collection::vec(
                proptest::sample::select(vec![
                    "the", "film", " ", " ", " ", "  \n", "!", "[SEP]", "[SE", "<mask>", "<ma", "e", "\u{301}",
                    "电", "影", "\u{200b}", "😀", "averyverylongword", "مر", "ß", "İ", "'", ".", "-",
                ]),
                0..400,
            ),
            split in 0usize..400,
            max_length in 5usize..12,
            mpnet: bool,
        ) {
            let tokenizer = golden(if mpnet { "mpnet" } else { "bert" });
            let split = split.min(pieces.len());
            for input in [
                single(pieces.concat()),
                pair(pieces[..split].concat(), pieces[split..].concat()),
            ] {
                let found = tokenizer.encode(&input, max_length, true).unwrap();
                let expected = slowly(&tokenizer, &input, max_length);
                proptest::prop_assert_eq!(found.ids, expected);
            }
        }
    }

    #[test]
    fn a_megabyte_costs_hardly_more_than_a_page() {
        let tokenizer = golden("bert");
        for text in ["the film is good, ", "电影", "a!", "film\u{301} "] {
            let long = text.repeat(1_000_000 / text.len());
            let begin = Instant::now();
            let sequence = tokenizer.encode(&pair(&long, &long), 128, true).unwrap();
            assert_eq!(sequence.ids.len(), 128);
            assert!(sequence.truncated);
            assert!(begin.elapsed() < Duration::from_millis(500), "{text}");
        }
    }

    #[test]
    fn a_long_text_of_few_tokens_does_not_cut_its_partner() {
        let tokenizer = golden("bert");
        let invisible = format!("film{}", "\u{200b}".repeat(20_000));
        let film = tokenizer.inner.token_to_id("film").unwrap();
        let long = "film ".repeat(10_000);
        for input in [pair(&invisible, &long), pair(&long, &invisible)] {
            let sequence = tokenizer.encode(&input, 20, true).unwrap();
            let films = sequence.ids.iter().filter(|id| **id == film).count();
            assert_eq!(films, 17);
        }
    }

    #[test]
    fn a_folder_without_tokenizer_json_is_explained() {
        let empty = tempfile::tempdir().unwrap();
        let Err(error) = Tokenizer::load(empty.path()) else {
            panic!("loaded from nothing");
        };
        assert!(error.to_string().contains("tokenizer.json is missing"));
        fs::write(empty.path().join("tokenizer.json"), "{}").unwrap();
        assert!(matches!(
            Tokenizer::load(empty.path()),
            Err(TokenizerError::Format { .. })
        ));
    }
}
