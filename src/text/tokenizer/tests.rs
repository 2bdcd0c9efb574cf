//! Ids against `transformers` (see `tests/golden/make_golden.py`), limits, and long texts.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::utils::truncation::{TruncationParams, truncate_encodings};

use super::*;

const CUT: Option<Truncation> = Some(Truncation::LongestFirst);
const TOKENIZERS: [&str; 5] = ["bert", "mpnet", "roberta", "deberta", "deberta-4"];

const CASES: u32 = 150;

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
    inputs: Vec<GoldenInput>,
    encodings: BTreeMap<String, Vec<Expected>>,
}

#[derive(Deserialize)]
struct GoldenInput {
    text: String,
    text_pair: Option<String>,
    repeat: Option<usize>,
}

#[derive(Deserialize)]
struct Expected {
    input: usize,
    max_length: usize,
    #[serde(default)]
    truncation: Truncation,
    /// None: `transformers` refuses to cut it.
    ids: Option<Vec<u32>>,
    #[serde(default)]
    type_ids: Vec<u32>,
}

#[test]
fn ids_are_those_of_transformers() {
    let golden_file: Golden =
        serde_json::from_str(include_str!("../../../tests/golden/tokens.json")).unwrap();
    let inputs: Vec<Input> = golden_file
        .inputs
        .into_iter()
        .map(|input| Input {
            text: input.text.repeat(input.repeat.unwrap_or(1)),
            text_pair: input.text_pair,
        })
        .collect();
    assert!(golden_file.encodings.keys().eq(sorted(TOKENIZERS).iter()));
    for (name, encodings) in &golden_file.encodings {
        let tokenizer = golden(name);
        let (mut seen, mut refused) = (0, 0);
        for expected in encodings {
            let input = &inputs[expected.input];
            let beginning: String = input.text.chars().take(60).collect();
            let case = format!(
                "{name}, {} tokens, {:?}, {beginning:?} ({} bytes), {:?}",
                expected.max_length,
                expected.truncation,
                input.text.len(),
                input.text_pair
            );
            let found = tokenizer.encode(input, expected.max_length, Some(expected.truncation));
            match (found, &expected.ids) {
                (Ok(found), Some(ids)) => {
                    assert_eq!(&found.ids, ids, "{case}");
                    assert_eq!(found.type_ids, expected.type_ids, "{case}");
                    seen += 1;
                }
                // No room for a single token of the text: an error here.
                (Err(TokenizerError::LimitTooLow { special, .. }), Some(ids)) => {
                    assert_eq!(ids.len(), special, "{case}");
                }
                (Err(TokenizerError::FirstTooLong { .. }), None) => refused += 1,
                (found, expected) => panic!("{case}: {found:?}, expected {expected:?}"),
            }
        }
        assert!(seen > 200 && refused > 5, "{name}: {seen}, {refused}");
    }
}

/// A tokenizer with some settings changed, and what `AutoTokenizer` makes of it.
#[derive(Deserialize)]
struct SettingsCase {
    name: String,
    tokenizer: String,
    config: Map<String, Value>,
    #[serde(default)]
    without: Vec<String>,
    #[serde(default)]
    file: Map<String, Value>,
    model: Option<Value>,
    /// What the message names where the folder is refused here.
    refused: Option<String>,
    ids: Option<Vec<Vec<u32>>>,
}

#[derive(Deserialize)]
struct SettingsInput {
    text: String,
    text_pair: Option<String>,
    truncation: Truncation,
    /// None: as the folder has it.
    max_length: Option<usize>,
}

#[derive(Deserialize)]
struct SettingsFile {
    inputs: Vec<SettingsInput>,
    cases: Vec<SettingsCase>,
}

impl SettingsCase {
    fn load(&self) -> Result<Tokenizer, TokenizerError> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers");
        let read = |name: &str| -> Map<String, Value> {
            let text = fs::read(golden.join(&self.tokenizer).join(name)).unwrap();
            serde_json::from_slice(&text).unwrap()
        };
        let place = tempfile::tempdir().unwrap();
        let write = |name: &str, json: Value| {
            fs::write(place.path().join(name), json.to_string()).unwrap();
        };
        let mut file = read("tokenizer.json");
        file.extend(self.file.clone());
        write("tokenizer.json", file.into());
        let mut config = read("tokenizer_config.json");
        config.extend(self.config.clone());
        config.retain(|key, _| !self.without.contains(key));
        write("tokenizer_config.json", config.into());
        if let Some(model) = &self.model {
            write("config.json", model.clone());
        }
        Tokenizer::load(place.path())
    }
}

#[test]
fn settings_count_as_they_do_for_transformers() {
    let golden: SettingsFile =
        serde_json::from_str(include_str!("../../../tests/golden/settings.json")).unwrap();
    assert!(golden.cases.len() > 50);
    for case in &golden.cases {
        let name = format!("{}: {}", case.tokenizer, case.name);
        let tokenizer = match (case.load(), &case.refused) {
            (Ok(tokenizer), None) => tokenizer,
            (Err(error), Some(refused)) => {
                let message = error.to_string();
                assert!(message.contains(refused), "{name}: {message}");
                assert!(message.contains("tokenizer_config.json"), "{message}");
                continue;
            }
            (Ok(_), Some(_)) => panic!("{name}: not refused"),
            (Err(error), None) => panic!("{name}: {error}"),
        };
        for (input, ids) in golden.inputs.iter().zip(case.ids.as_ref().unwrap()) {
            let max_length = tokenizer.max_length(usize::MAX);
            let found = tokenizer.encode(
                &Input {
                    text: input.text.clone(),
                    text_pair: input.text_pair.clone(),
                },
                input.max_length.unwrap_or(max_length),
                Some(input.truncation),
            );
            assert_eq!(&found.unwrap().ids, ids, "{name}: {:?}", input.text);
        }
    }
}

#[test]
fn what_is_cut_on_the_left_is_the_end_of_a_long_text() {
    let golden: SettingsFile =
        serde_json::from_str(include_str!("../../../tests/golden/settings.json")).unwrap();
    let left = golden
        .cases
        .iter()
        .filter(|case| case.name == "cut on the left");
    for case in left {
        let tokenizer = case.load().unwrap();
        let end = "the film is good and the movie is bad";
        let long = format!("{}{end}", "no fool , ".repeat(5_000));
        let whole = tokenizer.encode(&single(end), 64, None).unwrap();
        let cut = tokenizer.encode(&single(long), 9, CUT).unwrap();
        assert!(cut.truncated);
        assert_eq!(
            cut.ids[1..],
            whole.ids[whole.ids.len() - 8..],
            "{}",
            case.tokenizer
        );
    }
}

#[test]
fn a_git_lfs_pointer_is_told_from_a_tokenizer() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers/bert");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let place = tempfile::tempdir().unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(golden.join(name), place.path().join(name)).unwrap();
        }
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n";
        fs::write(place.path().join(file), pointer).unwrap();
        let message = Tokenizer::load(place.path()).err().unwrap().to_string();
        assert!(
            message.contains(file) && message.contains("git lfs pull"),
            "{message}"
        );
    }
}

fn sorted(mut names: [&str; 5]) -> [&str; 5] {
    names.sort_unstable();
    names
}

#[test]
fn an_empty_text_is_its_special_tokens() {
    for name in TOKENIZERS {
        let sequence = golden(name).encode(&single(""), 16, CUT).unwrap();
        assert_eq!(sequence.ids.len(), 2);
        assert!(!sequence.truncated);
    }
}

#[test]
fn too_long_is_an_error_only_without_truncation() {
    let tokenizer = golden("bert");
    let five = single("the film is good");
    assert!(!tokenizer.encode(&five, 6, None).unwrap().truncated);
    let cut = tokenizer.encode(&five, 5, CUT).unwrap();
    assert!(cut.truncated);
    assert_eq!(cut.ids.len(), 5);
    let error = tokenizer.encode(&five, 5, None).unwrap_err();
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
    let error = tokenizer.encode(&five, 2, CUT).unwrap_err();
    assert!(matches!(
        error,
        TokenizerError::LimitTooLow { special: 2, .. }
    ));
}

#[test]
fn padding_and_truncation_of_the_file_are_off() {
    let tokenizer = golden("bert");
    let long = tokenizer.encode(&single("film ".repeat(50)), 512, None);
    assert_eq!(long.unwrap().ids.len(), 52);
    assert_eq!(tokenizer.max_length(1000), 512);
    assert_eq!(tokenizer.max_length(100), 100);
}

/// Tokens of the whole text, cut afterwards by `tokenizers` itself.
fn slowly(tokenizer: &Tokenizer, input: &Input, max_length: usize) -> Vec<u32> {
    slowly_at(tokenizer, input, max_length, TruncationDirection::Right)
}

fn slowly_at(
    tokenizer: &Tokenizer,
    input: &Input,
    max_length: usize,
    direction: TruncationDirection,
) -> Vec<u32> {
    let special = tokenizer.special_tokens(input.text_pair.is_some());
    let limit = TruncationParams {
        max_length: max_length - special,
        direction,
        ..TruncationParams::default()
    };
    let whole = |text: &String| tokenizer.plain(text).unwrap();
    let second = input.text_pair.as_ref().map(whole);
    let (mut first, mut second) = truncate_encodings(whole(&input.text), second, &limit).unwrap();
    first.take_overflowing();
    if let Some(second) = &mut second {
        second.take_overflowing();
    }
    let encoding = tokenizer.inner.post_process(first, second, true).unwrap();
    encoding.get_ids().to_vec()
}

#[test]
fn the_beginning_of_a_text_is_cut_off_on_demand() {
    let long = "one sat the cat ".repeat(5_000) + "a wonderful film";
    let short = "the end";
    for name in TOKENIZERS {
        let tokenizer = golden(name);
        for input in [
            single(&long),
            single(short),
            pair(&long, short),
            pair(short, &long),
            pair(&long, format!("{long} indeed")),
        ] {
            for max_length in [8, 33, 128] {
                let given = tokenizer
                    .encode_from(&input, max_length, CUT, Some(TruncationDirection::Left))
                    .unwrap();
                let expected = slowly_at(&tokenizer, &input, max_length, TruncationDirection::Left);
                let beginning: String = input.text.chars().take(9).collect();
                assert_eq!(given.ids, expected, "{name}, {max_length}, {beginning}");
            }
        }
        let ends_alike =
            tokenizer.encode_from(&single(&long), 8, CUT, Some(TruncationDirection::Left));
        assert!(ends_alike.unwrap().truncated, "{name}");
    }
}

const PIECES: [&str; 55] = [
    "the",
    "film",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    " \n\n ",
    "\t",
    "\u{a0}",
    "\u{3000}",
    "\u{2003}",
    "!",
    "[SEP]",
    "[SE",
    "[UNK]",
    "[UN",
    "]",
    "<mask>",
    "<ma",
    "sk>",
    "</s>",
    "<unk>",
    "<un",
    "e",
    "\u{301}",
    "\u{323}",
    "\u{338}",
    "<",
    "=",
    "电",
    "影",
    "\u{200b}",
    "\u{200b}\u{200b}\u{200b}",
    "\0",
    "\u{1}\u{1}\u{1}",
    "\u{200d}",
    "😀",
    "🇩",
    "🇪",
    "averyverylongword",
    "مر",
    "ß",
    "İ",
    "'",
    "'l",
    "l",
    "s",
    ".",
    "-",
    "12",
    "ﬁ",
    "Ｆ",
    "\u{2581}",
    "\u{1100}\u{1161}",
];

/// The tokens that are certain after any beginning of a text are those of the whole text.
fn check_beginnings(name: &str, tokenizer: &Tokenizer, text: &str) {
    let lookahead = tokenizer.lookahead.unwrap();
    let whole = tokenizer.plain(text).unwrap();
    for (end, _) in text.char_indices() {
        let prefix = &text[..end];
        let encoding = tokenizer.plain(prefix).unwrap();
        let certain = (0..encoding.len())
            .filter_map(|room| lookahead.certain_tokens(&encoding, prefix, room))
            .max()
            .unwrap_or(0);
        assert!(
            whole.get_ids().starts_with(&encoding.get_ids()[..certain]),
            "{name}: {certain} tokens of {prefix:?} are not those of {text:?}"
        );
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(CASES))]

    #[test]
    fn what_follows_does_not_change_tokens_that_were_certain(
        // Runs, so that much of a text can turn on what stands behind them.
        pieces in proptest::collection::vec(
            (
                proptest::sample::select(PIECES.to_vec()),
                proptest::sample::select(vec![1, 1, 1, 1, 2, 9, 30]),
            ),
            0..12,
        ),
    ) {
        let text: String = pieces.iter().map(|(piece, count)| piece.repeat(*count)).collect();
        for name in TOKENIZERS {
            check_beginnings(name, &golden(name), &text);
        }
    }

    #[test]
    fn reading_only_the_beginning_changes_nothing(
        pieces in proptest::collection::vec(proptest::sample::select(PIECES.to_vec()), 0..400),
        split in 0usize..400,
        max_length in 5usize..12,
    ) {
        let split = split.min(pieces.len());
        for name in TOKENIZERS {
            let tokenizer = golden(name);
            for input in [
                single(pieces.concat()),
                pair(pieces[..split].concat(), pieces[split..].concat()),
            ] {
                let found = tokenizer.encode(&input, max_length, CUT).unwrap();
                let expected = slowly(&tokenizer, &input, max_length);
                proptest::prop_assert_eq!(found.ids, expected, "{}", name);
            }
        }
    }
}

#[test]
fn what_stands_far_behind_still_counts() {
    for (filling, ending) in [
        (" ", "<mask>"),
        (" ", "[MASK]"),
        (" ", "film"),
        ("\0", "k>"),
        ("\0", "K]"),
        ("\u{1}", "K]"),
        ("\u{301}", "\u{323}"),
        ("\u{301}", "\u{338}"),
        ("\u{200b}", "[SEP]"),
        ("\n", " film"),
        ("", "'ll"),
        ("🇩", "🇪"),
    ] {
        for beginning in [
            "film",
            "a film <un",
            "a film [UN",
            "film s",
            "film =",
            "a film <",
        ] {
            let text = format!("{beginning}{}{ending} the film", filling.repeat(40));
            for name in TOKENIZERS {
                check_beginnings(name, &golden(name), &text);
            }
        }
    }
}

/// A tokenizer.json as a file of the test's own.
fn changed(name: &str, change: impl FnOnce(&mut serde_json::Value)) -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers");
    let text = fs::read(folder.join(name).join("tokenizer.json")).unwrap();
    let mut json = serde_json::from_slice(&text).unwrap();
    change(&mut json);
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::load(place.path()).unwrap()
}

#[test]
fn contractions_are_awaited_without_added_tokens_too() {
    let tokenizer = changed("roberta", |json| {
        json["added_tokens"] = serde_json::json!([]);
    });
    for text in ["it'll film", "we've we're", "''ll' s", "film   \n film's"] {
        check_beginnings("roberta", &tokenizer, text);
    }
}

#[test]
fn what_is_not_known_to_be_local_is_read_whole() {
    let whole = |name: &str, change: fn(&mut serde_json::Value)| {
        assert!(changed(name, change).lookahead.is_none(), "{name}");
    };
    // A mark far behind changes a word that ended before the first mark.
    whole("roberta", |json| {
        json["normalizer"] = serde_json::json!({"type": "NFC"})
    });
    whole("deberta", |json| {
        json["added_tokens"][0]["content"] = ">".into();
        json["added_tokens"][0]["normalized"] = true.into();
    });
    whole("deberta", |json| {
        json["pre_tokenizer"]["pretokenizers"][0]["split"] = false.into()
    });
    whole("deberta-4", |json| {
        json["normalizer"]["normalizers"][2]["content"] = "".into()
    });
    whole("bert", |json| {
        json["pre_tokenizer"]["type"] = "Whitespace".into()
    });
    whole("bert", |json| {
        json["pre_tokenizer"] = serde_json::Value::Null
    });
}

#[test]
fn a_megabyte_costs_hardly_more_than_a_page() {
    for name in TOKENIZERS {
        let tokenizer = golden(name);
        for text in ["the film is good, ", "电影 ", "a! ", "film\u{301} "] {
            let long = text.repeat(1_000_000 / text.len());
            let begin = Instant::now();
            let sequence = tokenizer.encode(&pair(&long, &long), 128, CUT).unwrap();
            assert_eq!(sequence.ids.len(), 128);
            assert!(sequence.truncated);
            assert!(
                begin.elapsed() < Duration::from_millis(500),
                "{name}: {text}"
            );
        }
    }
}

#[test]
fn texts_that_must_be_read_whole_take_time_by_their_length() {
    for name in TOKENIZERS {
        let tokenizer = golden(name);
        for text in [
            "a", "电影", "\u{200b}", "e\u{301}", " ", "\u{a0}", "<mask", "\0", "'",
        ] {
            let long = text.repeat(500_000 / text.len());
            let begin = Instant::now();
            tokenizer.encode(&single(&long), 128, CUT).unwrap();
            assert!(begin.elapsed() < Duration::from_secs(4), "{name}: {text:?}");
        }
    }
}

#[test]
fn a_long_text_of_few_tokens_does_not_cut_its_partner() {
    let tokenizer = golden("bert");
    let invisible = format!("film{}", "\u{200b}".repeat(20_000));
    let film = tokenizer.inner.token_to_id("film").unwrap();
    let long = "film ".repeat(10_000);
    for input in [pair(&invisible, &long), pair(&long, &invisible)] {
        let sequence = tokenizer.encode(&input, 20, CUT).unwrap();
        let films = sequence.ids.iter().filter(|id| **id == film).count();
        assert_eq!(films, 17);
    }
}

#[test]
fn only_the_second_text_is_cut_if_that_is_asked_for() {
    let tokenizer = golden("bert");
    let cut = |input: &Input, max_length| {
        tokenizer.encode(input, max_length, Some(Truncation::OnlySecond))
    };
    let long = "movie ".repeat(30);
    let whole = tokenizer
        .encode(&single("the film is good"), 20, CUT)
        .unwrap();
    let found = cut(&pair("the film is good", &long), 12).unwrap();
    assert_eq!(found.ids[..6], whole.ids);
    assert_eq!(found.ids.len(), 12);
    assert!(found.truncated);
    // Not even a token of the second text would be left.
    for input in [
        pair("the film is good", &long),
        single("the film is good and bad"),
    ] {
        let message = cut(&input, 7).unwrap_err().to_string();
        assert!(
            message.contains("only the second text may be cut"),
            "{message}"
        );
    }
    let whole = cut(&pair("the film is good", ""), 7).unwrap();
    assert_eq!(whole.ids.len(), 7);
}

#[test]
fn a_sentencepiece_vocabulary_alone_is_refused_with_how_to_convert_it() {
    for vocabulary in ["spm.model", "sentencepiece.bpe.model"] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(vocabulary), "").unwrap();
        let Err(error) = Tokenizer::load(folder.path()) else {
            panic!("loaded from {vocabulary}");
        };
        let message = error.to_string();
        assert!(message.contains(vocabulary), "{message}");
        assert!(message.contains("save_pretrained"), "{message}");
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
