"""Texts that tokenizers trip over, and small tokenizers of every kind that encoders come with:

bert, mpnet     WordPiece in the layout of sentence-transformers (padding and truncation are set
                inside tokenizer.json, as in the published folders)
roberta         byte-level BPE, as transformers saves RobertaTokenizer
deberta         Unigram, as transformers 5 saves DebertaV2Tokenizer
deberta-4       Unigram, as transformers 4 saved DebertaV2TokenizerFast: with the character map of
                SentencePiece. transformers 5 would put its own normalizer in the place of the
                file's where it knows the class, so this folder does not name it.
"""

import base64
import json

from tokenizers import AddedToken, normalizers, pre_tokenizers, trainers
from tokenizers import Regex, Tokenizer, models
from transformers import DebertaV2Tokenizer, RobertaTokenizer

TEXTS = [
    "",
    " ",
    "\t\n\r \u00a0\u2003\u3000",
    "A whole lot foul, freaky and funny.",
    "It's THE film -- isn't it?!... (no)",
    "na\u00efve caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \u0130stanbul stra\u00dfe \u1e9e",
    "I love it \U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f :)",
    "zero\u200bwidth\u200djoin\ufeffmark soft\u00adhyphen",
    "\x00control\x01chars\x07 and \x1b[31mcolour\x1b[0m \x7f end\ufffd",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",
    "\u6211\u559c\u6b22\u8fd9\u90e8\u7535\u5f71\uff0c\u975e\u5e38\u597d\u770b\u3002 \u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "[CLS] fake [SEP] special [MASK] <s> </s> <mask> [PAD] <pad> [UNK] <unk>",
    "film[SEP]film <mask>film  <mask>  film",
    "averyveryveryveryverylongwordthatnovocabularyknows" * 4,
    "a" * 99 + " " + "a" * 100 + " " + "a" * 101,
    "1234567890 3.14159 -2e10 $5.00 50% #1 a_b c/d e\\f g@h",
    "\u0301\u0301\u0301 \u0301a",
    "e" + "\u0301" * 50 + " film",
    "\u2028line\u2029separators\x85here\x0bvertical\x0cfeed",
    "\U000e0001\U000e0041tags \ue000private \U0010ffff",
    "the film " * 200,
    "\u7535\u5f71" * 120,
    "\u200b" * 300 + "the film",
    " " * 3000 + "the film" + " " * 3000,
    "!" * 300,
    "they're  I'LL we'd '' 's ' s\u2019s can'\tt  12ab34 \n\n  x\u00a0\u00a0y",
    "two  spaces   three \u3000 wide \u2581 under\u2581\u2581line \u200b\u200b zero",
    "\uff26\uff29\uff2c\uff2d \ufb01lm \u2460 \u00bd \u2126 \u212b e\u0323\u0301 \u0065\u0301\u0323",
    "\U0001f1e9\U0001f1ea\U0001f1eb film\u0903\u0901 \u1100\u1161\u11a8 \u0600123",
    "  film  ",
]

# (unit, how often): 100,000 characters each, or nearly.
LONG = [
    ("the film is good, ", 5555),
    ("a", 100_000),
    ("ab1 ", 25_000),
    ("\u7535\u5f71", 50_000),
    ("\u0645\u0631 ", 33_333),
    ("\U0001f600", 100_000),
    ("e\u0301", 50_000),
    ("\u200b", 100_000),
    (" ", 100_000),
    ("!?", 50_000),
    ("\x00", 100_000),
    ("film[SEP] <mask>", 6_250),
]

PAIRS = [
    ("the film", "the movie"),
    ("", ""),
    ("", "the film"),
    ("the film", ""),
    ("the film " * 60, "a movie"),
    ("a movie", "the film " * 60),
    ("the film " * 60, "a movie is good " * 60),
    ("a movie is good " * 60, "the film " * 60),
    ("the film is", "a movie is"),
    ("the film is good", "a movie is"),
    ("the film is", "a movie is bad"),
    ("the film is good and funny", "a movie is bad and long , no ?"),
    ("film [SEP] film", "<mask> </s> film"),
    ("\U0001f600" * 20, "\u6211\u559c\u6b22" * 20),
]

WORDS = (
    "the film movie a is good bad and funny long no love it isn not lot whole fool very"
    " zero control chars end test line here fake special well known"
).split()
PIECES = (
    "ing ed ly s y er al is the film word long very know"
).split()


# Pairs of which only the second may be cut, beside PAIRS.
ONLY_SECOND = [
    ("the film is good and funny", "a"),
    ("the film is good and", "a movie is bad"),
    ("the film is good", ""),
]


def inputs():
    """Dictionaries with `text`, `text_pair` and, if the text is to be repeated, `repeat`."""
    made = [{"text": text, "text_pair": None} for text in TEXTS]
    made += [{"text": text, "text_pair": pair} for text, pair in PAIRS + ONLY_SECOND]
    for unit, repeat in LONG:
        made.append({"text": unit, "text_pair": None, "repeat": repeat})
        made.append({"text": unit, "text_pair": "a movie", "repeat": repeat})
    return made


def vocabulary():
    """Words, pieces, and single characters of some of the texts, each alone and as a
    continuation; what is missing becomes unknown."""
    characters = {c for c in "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()[]<>/-_#$%&*+=@\\"}
    for text in TEXTS[5:12]:
        characters |= set(text.lower())
    characters = sorted(c for c in characters if not c.isspace() and ord(c) > 32)
    continuations = [f"##{c}" for c in characters] + [f"##{p}" for p in PIECES]
    return list(dict.fromkeys(characters + WORDS + continuations))


def tokenizer_json(special, post_processor, pad):
    tokens = list(special) + [t for t in vocabulary() if t not in special]
    ids = {token: i for i, token in enumerate(tokens)}
    added = [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": token == "<mask>",
            "rstrip": False,
            "normalized": token == "<unk>",
            "special": True,
        }
        for token in special
    ]
    return {
        "version": "1.0",
        "truncation": {"max_length": 20, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 20},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": ids[pad],
            "pad_type_id": 0,
            "pad_token": pad,
        },
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": post_processor(ids),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }


def bert_processor(ids):
    def special(token, type_id):
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def sequence(name, type_id):
        return {"Sequence": {"id": name, "type_id": type_id}}

    single = [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + [sequence("B", 1), special("[SEP]", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in ["[CLS]", "[SEP]"]
        },
    }


def mpnet_processor(ids):
    return {
        "type": "RobertaProcessing",
        "sep": ["</s>", ids["</s>"]],
        "cls": ["<s>", ids["<s>"]],
        "trim_offsets": True,
        "add_prefix_space": False,
    }


def make_tokenizers(folder):
    kinds = {
        "bert": (
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            bert_processor,
            "[PAD]",
            {
                "tokenizer_class": "BertTokenizer",
                "unk_token": "[UNK]",
                "sep_token": "[SEP]",
                "pad_token": "[PAD]",
                "cls_token": "[CLS]",
                "mask_token": "[MASK]",
            },
        ),
        "mpnet": (
            ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"],
            mpnet_processor,
            "<pad>",
            {
                "tokenizer_class": "MPNetTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "sep_token": "</s>",
                "cls_token": "<s>",
                "unk_token": "[UNK]",
                "pad_token": "<pad>",
                "mask_token": "<mask>",
            },
        ),
    }
    for name, (special, processor, pad, config) in kinds.items():
        target = folder / name
        target.mkdir(parents=True)
        made = tokenizer_json(special, processor, pad)
        config |= {
            "do_lower_case": True,
            "tokenize_chinese_chars": True,
            "strip_accents": None,
            "model_max_length": 512,
        }
        (target / "tokenizer.json").write_text(json.dumps(made) + "\n")
        (target / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
        (target / "vocab.txt").write_text("\n".join(made["model"]["vocab"]) + "\n")
    make_roberta(folder / "roberta")
    make_deberta(folder / "deberta")
    make_deberta_4(folder / "deberta-4")


def make_roberta(target):
    """Merges learnt from the texts; all bytes are tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [text[:200] for text in TEXTS] + [" ".join(WORDS), "film's don't they're we'll I've 2024"] * 6
    trained.train_from_iterator(words, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = RobertaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        mask_token=AddedToken("<mask>", lstrip=True, normalized=False, special=True),
        model_max_length=512,
    )
    tokenizer.save_pretrained(target)


def unigram_vocabulary():
    """Pieces with scores that prefer long and early ones; no two are the same."""
    pieces = [f"\u2581{word}" for word in WORDS] + WORDS + PIECES + ["\u2581"]
    characters = {c for text in TEXTS[3:12] for c in text if not c.isspace() and ord(c) > 32}
    pieces = list(dict.fromkeys(pieces + sorted(characters)))
    scored = [(piece, -8 - i / 64 - 2 / len(piece)) for i, piece in enumerate(pieces)]
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    return [(token, 0.0) for token in special] + scored


def make_deberta(target):
    tokenizer = DebertaV2Tokenizer(vocab=unigram_vocabulary(), model_max_length=512)
    tokenizer.save_pretrained(target)


# What SentencePiece compiles from a few rules (--normalization_rule_tsv): full-width F, I, L, M, the
# ligature fi, the circled 1, the half, Ohm, Angstrom, e with one and with two combining marks; tab,
# line feed, carriage return, U+00A0, U+2003, U+3000 and U+200B become a space; U+0001, U+001B, U+200D
# and U+FEFF become nothing.
CHARSMAP = (
    "AAQAAAAMAAAAAACAAQ0AAMwcAgABAACAgQ0AABkAAIDMOAIAgQ0AAAo1AAAJOQAAHwAAgKAhAAAFAACADSkAAJHoAgAcAACAvXEA"
    "AKYJAACDXQAAFgAAgKANAAADAACAgDgCABtlAACAdQAAhLgCAIt9AACB9QAAjXEAAIA4AgCrLQAArPQCABMAAIALAACAv4kAAKYZ"
    "AAANAACADwAAgKOwAwARAACAKwAAACgAAACpOQAALgAAAC8AAACsIQAArR0AALzIAgAzAAAAMAAAADEAAAA2AAAANwAAADQAAAC7"
    "rAIAOgAAADsAAAA4AAAAOQAAAD4AAAA/AAAAPAAAAD0AAABCAAAAQwAAAEAAAABBAAAARgAAAEcAAABEAAAARQAAAEoAAABLAAAA"
    "SAAAAEkAAABOAAAATwAAAEwAAABNAAAAUgAAAFMAAABQAAAAUQAAAFYAAABXAAAAVAAAAFUAAABaAAAAWwAAAFgAAABZAAAAXgAA"
    "AF8AAABcAAAAXQAAAGIAAABjAAAAYAAAAGEAAABmAAAAZwAAAGWkAgBlAAAAagAAAGsAAABoAAAAaQAAAG4AAABvAAAAbAAAAG0A"
    "AAByAAAAcwAAAHAAAABxAAAAdgAAAHcAAAB0AAAAdQAAAHoAAAB7AAAAeAAAAHkAAAB+AAAAfwAAAHwAAAB9AAAAggAAAIMAAACA"
    "AAAAgQAAAIYAAACHAAAAhAAAAIUAAACKAAAAiwAAAIgAAACJAAAAjgAAAI8AAACMAAAAjQAAAJIAAACTAAAAkAAAAJEAAACWAAAA"
    "lwAAAJQAAACVAAAAmgAAAJsAAACYAAAAmQAAAJ4AAACfAAAAnAAAAJ0AAACiAAAAowAAAKAAAAChAAAApgAAAKcAAACkAAAApQAA"
    "AKoAAACrAAAAqAAAAKkAAACuAAAArwAAAKwAAACtAAAAsgAAALMAAACwAAAAsQAAALYAAAC3AAAAtAAAALUAAAC6AAAAuwAAALgA"
    "AAC5AAAAvgAAAL8AAAC8AAAAvQAAAMIAAADCtAEAwAAAAMEAAADGAAAAxwAAAMQAAADFAAAAygAAAMsAAADIAAAAyQAAAM4AAADP"
    "AAAAzAAAAM0AAADSAAAA0wAAANAAAADRAAAA1gAAANcAAADUAAAA1QAAANoAAADbAAAA2AAAANkAAADeAAAA3wAAANwAAADdAAAA"
    "49wBAOL8AQDgAAAA4QAAAOYAAADnAAAA5AAAAOUAAADqAAAA6wAAAOgAAADpAAAA74ABAO8AAADsAAAA7QAAAPIAAADzAAAA8AAA"
    "APEAAAD2AAAA9wAAAPQAAAD1AAAA+gAAAPsAAAD4AAAA+QAAAP4AAAD/AAAA/AAAAP0AAAAAIAAxADHigYQyAEYASQBMAE0AZmkA"
    "w4UAw6kAzqkA4bq5zIEA"
)


def make_deberta_4(target):
    built = DebertaV2Tokenizer(vocab=unigram_vocabulary()).backend_tokenizer
    built.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(),
            normalizers.Precompiled(base64.b64decode(CHARSMAP)),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    built.add_special_tokens([AddedToken("[UNK]", normalized=True, special=True)])
    target.mkdir(parents=True)
    built.save(str(target / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_max_length": 512,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


# Inputs for tokenizers with changed settings. A max_length of None is that of the folder.
SETTINGS_INPUTS = [
    {"text": text, "text_pair": pair, "truncation": truncation, "max_length": max_length}
    for text, pair, truncation, max_length in [
        ("The na\u00efve FILM, isn't it?", None, "longest_first", 128),
        ("\u6211\u559c\u6b22\u8fd9\u90e8\u7535\u5f71 caf\u00e9 cafe\u0301 \u0130 stra\u00dfe", None, "longest_first", 128),
        ("the film is good and the movie is bad no", None, "longest_first", 8),
        ("the film is good and", "the movie is bad no it isn not", "longest_first", 11),
        ("the film", "the movie is bad no it isn not", "only_second", 9),
        ("the film " * 40, None, "longest_first", None),
    ]
]

NO_LIMIT = 1000000000000000019884624838656


def bert_normalizer(**changes):
    return {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    } | changes


def truncation(direction):
    return {"max_length": 20, "strategy": "LongestFirst", "stride": 0, "direction": direction}


def byte_level(add_prefix_space):
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }


def settings():
    """Tokenizers of which tokenizer_config.json (`config`, `without`), tokenizer.json (`file`) and
    config.json (`model`) are changed. `refused` is what kdlora's message names where it refuses the
    folder: versions of transformers differ, or it refuses too."""

    def case(name, tokenizer, config=None, **more):
        return {"name": name, "tokenizer": tokenizer, "config": config or {}} | more

    cased = {"normalizer": bert_normalizer(lowercase=False)}
    for_lack = ["do_lower_case", "strip_accents", "tokenize_chinese_chars"]
    made = []
    for base in ["bert", "mpnet"]:
        made += [
            case("cased by the settings", base, {"do_lower_case": False}),
            case("cased by the file", base, file=cased),
            case("cased by the file, silent settings", base, file=cased, without=for_lack),
            case("cased by both", base, {"do_lower_case": False}, file=cased),
            case("accents kept", base, {"strip_accents": False}),
            case("cased without accents", base, {"do_lower_case": False, "strip_accents": True}),
            case("accents kept by the file", base, file={"normalizer": bert_normalizer(strip_accents=False)}),
            case("Chinese in words", base, {"tokenize_chinese_chars": False}),
            case("Chinese in words by the file", base, file={"normalizer": bert_normalizer(handle_chinese_chars=False)}),
            case("no normalizer", base, file={"normalizer": None}),
            case("another normalizer", base, file={"normalizer": {"type": "NFC"}}, refused="normalizer of BERT"),
            case("a plain class", base, {"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"}, file=cased),
        ]
    for name in ["BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast", "ElectraTokenizer"]:
        made.append(case(f"cased {name}", "bert", {"do_lower_case": False, "tokenizer_class": name}))
    silent = ["tokenizer_class"]
    for model in ["bert", "distilbert", "mpnet"]:
        base = "mpnet" if model == "mpnet" else "bert"
        made.append(case(f"cased, class of {model}", base, {"do_lower_case": False}, without=silent, model={"model_type": model}))
    made += [
        case("class of config.json", "bert", without=silent, file=cased,
             model={"model_type": "bert", "tokenizer_class": "PreTrainedTokenizerFast"}),
        case("BERT's class on RoBERTa's model", "bert", {"do_lower_case": False}, model={"model_type": "roberta"}),
        case("an unknown class", "bert", {"do_lower_case": False, "tokenizer_class": "NoSuchTokenizer"},
             model={"model_type": "bert"}),
        case("prefix space of the settings", "roberta", {"add_prefix_space": True}),
        case("prefix space of the file", "roberta", file={"pre_tokenizer": byte_level(True)}),
        case("prefix space of a plain class", "roberta", {"tokenizer_class": "PreTrainedTokenizerFast"},
             file={"pre_tokenizer": byte_level(True)}),
        case("lower case means nothing to RoBERTa", "roberta", {"do_lower_case": True}),
        case("lower case", "deberta", {"do_lower_case": True}, refused="do_lower_case is true"),
        case("punctuation", "deberta", {"split_by_punct": True}, refused="split_by_punct is true"),
        case("lower case, plain class", "deberta-4", {"do_lower_case": True}),
    ]
    for base in ["bert", "mpnet", "roberta", "deberta", "deberta-4"]:
        made += [
            case("cut on the left", base, {"truncation_side": "left"}),
            case("cut on the left by the file", base, file={"truncation": truncation("Left")}),
            case("the settings win", base, {"truncation_side": "right"}, file={"truncation": truncation("Left")}),
        ]
    made.append(case("cut above", "bert", {"truncation_side": "up"}, refused="truncation_side"))
    for limit in [10, 128, NO_LIMIT, 1e30, None]:
        made.append(case(f"at most {limit}", "bert", {"model_max_length": limit}))
    made.append(case("the old name", "bert", {"max_len": 10}, without=["model_max_length"]))
    made.append(case("both names", "bert", {"max_len": 10, "model_max_length": 20}))
    made.append(case("no limit", "bert", without=["model_max_length"]))
    for limit in [0, 2, -1, 2.5]:
        made.append(case(f"at most {limit}", "bert", {"model_max_length": limit}, refused="model_max_length"))
    return made


SETTINGS = settings()
