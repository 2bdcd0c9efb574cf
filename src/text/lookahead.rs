//! How far back a text's tokens depend on what follows, so that of a long text only the beginning
//! need be tokenised.

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Encoding;

use crate::parse;

/// Bytes at the end of a prefix (or before an added token there) whose words what follows may
/// change: a contraction (`'ll`), the last of several spaces, or a cluster of characters that
/// SentencePiece's character map takes as one if it has less than six bytes.
const UNSETTLED_BYTES: usize = 8;

/// For tokenizers of which it is known.
///
/// With the steps that [`known`] lists, words are tokenised by themselves, so what follows a prefix
/// can change
/// - its last word, and the words before that within [`UNSETTLED_BYTES`];
/// - whatever is about to become an added token (`[SEP]`), as these are looked for first: some in
///   the text as it is, some in the normalised text, where a character may stand for many bytes of
///   the text;
/// - the spaces before such a token, if it takes them along (`lstrip`) or the normalizer strips
///   them off; but all spaces in a row are one word, save the last one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lookahead {
    bytes: usize,
    /// Tokens, that is, at least as many normalised characters.
    tokens: usize,
}

impl Lookahead {
    /// Reads a `tokenizer.json`. `None` where texts have to be read to their end.
    pub(super) fn of(tokenizer_json: &[u8]) -> Option<Self> {
        let file: File = parse::json(tokenizer_json).ok()?;
        let steps = known(file.normalizer.as_ref(), file.pre_tokenizer.as_ref())?;
        let (mut raw, mut normalized) = (0, 0);
        for token in &file.added_tokens {
            if token.normalized {
                normalized = normalized.max(token.content.chars().count());
            } else {
                raw = raw.max(token.content.len());
            }
        }
        let readable = |token: &AddedToken| {
            // Marks that follow could melt into the token's last character, and undo it. Nothing
            // melts into "]".
            let melts = steps == Steps::Composing && !token.content.ends_with(']');
            !(token.normalized && (token.lstrip || melts))
        };
        file.added_tokens.iter().all(readable).then_some(Self {
            bytes: raw + UNSETTLED_BYTES,
            tokens: normalized,
        })
    }

    /// The number of tokens, if more than `room`, that a text begins with too if it begins with
    /// `prefix`, whose encoding this is.
    pub(super) fn certain_tokens(
        self,
        encoding: &Encoding,
        prefix: &str,
        room: usize,
    ) -> Option<usize> {
        let words = encoding.get_word_ids();
        let word = words.get(room)?;
        let rest = words[room..].iter().take_while(|other| *other == word);
        let end = room + rest.count();
        let next_word = encoding.get_offsets().get(end)?.0;
        let settled = floor_char_boundary(prefix, prefix.len().saturating_sub(self.bytes));
        (next_word <= settled && encoding.len() - end > self.tokens).then_some(end)
    }
}

pub(super) fn floor_char_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len()))
        .rev()
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0)
}

/// What is read of a `tokenizer.json`.
#[derive(Deserialize)]
struct File {
    normalizer: Option<Normalizer>,
    pre_tokenizer: Option<PreTokenizer>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    normalized: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Normalizer {
    #[serde(rename = "BertNormalizer")]
    Bert,
    Sequence {
        normalizers: Vec<Normalizer>,
    },
    Replace {
        /// `{"Regex": …}` or `{"String": …}`
        pattern: Value,
        content: String,
    },
    #[serde(rename = "NFC")]
    Nfc,
    Strip,
    Precompiled,
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    #[serde(rename = "BertPreTokenizer")]
    Bert,
    ByteLevel {
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Metaspace {
        #[serde(default = "yes")]
        split: bool,
    },
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
    #[serde(other)]
    Other,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Steps {
    /// Character by character, but for marks that go with the character before them.
    ByCharacter,
    /// Marks are sorted and melt into the character before them, however far they are from it. All
    /// words are separated by spaces, which nothing melts into.
    Composing,
}

/// The steps of BERT and MPNet, of RoBERTa, and of DeBERTa-v3 as transformers 5 and 4 write them.
///
/// Others may well be as harmless, but each needs a thought: in composed text that is split between
/// a letter and a mark, for example, a mark can change a word any distance back.
fn known(normalizer: Option<&Normalizer>, pre_tokenizer: Option<&PreTokenizer>) -> Option<Steps> {
    let split = match pre_tokenizer? {
        PreTokenizer::Sequence { pretokenizers } => match pretokenizers.as_slice() {
            [only] => only,
            _ => return None,
        },
        single => single,
    };
    match (normalizer, split) {
        (None | Some(Normalizer::Bert), PreTokenizer::Bert)
        | (None, PreTokenizer::ByteLevel { use_regex: true }) => Some(Steps::ByCharacter),
        (Some(Normalizer::Sequence { normalizers }), PreTokenizer::Metaspace { split: true }) => {
            match normalizers.as_slice() {
                [spaces, Normalizer::Nfc, Normalizer::Strip]
                    if spaces.makes_one_space_of(r"\s{2,}|[\n\r\t]") =>
                {
                    Some(Steps::Composing)
                }
                [Normalizer::Strip, Normalizer::Precompiled, spaces]
                    if spaces.makes_one_space_of(" {2,}") =>
                {
                    Some(Steps::ByCharacter)
                }
                _ => None,
            }
        }
        _ => None,
    }
}

impl Normalizer {
    fn makes_one_space_of(&self, regex: &str) -> bool {
        match self {
            Self::Replace { pattern, content } => pattern["Regex"] == regex && content == " ",
            _ => false,
        }
    }
}
