"""Makes the golden files of tokenizers; needs transformers and tokenizers only, not torch.

    python make_tokens.py

What is written beside this script:

    tokenizers/NAME/    a tokenizer (see texts.py)
    tokens.json         texts, and their ids by AutoTokenizer
    settings.json       the same for tokenizers whose files say different things (see texts.py)
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer

import texts

HERE = Path(__file__).parent
TOKENIZERS = ["bert", "mpnet", "roberta", "deberta", "deberta-4"]


def tokens_case(name):
    """What AutoTokenizer gives. `ids` is missing where it refuses: only the second text may be cut,
    and that is not enough."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tokenizers" / name)
    encodings = []
    for i, given in enumerate(texts.inputs()):
        text, pair = given["text"] * given.get("repeat", 1), given["text_pair"]
        cuts = [("longest_first", length) for length in [4, 8, 13, 128]]
        if "repeat" in given:
            cuts = [("longest_first", 7), ("longest_first", 128)]
        if pair is not None:
            cuts += [("only_second", 8), ("only_second", 13)]
        for truncation, max_length in cuts:
            case = {"input": i, "max_length": max_length}
            if truncation != "longest_first":
                case["truncation"] = truncation
            try:
                # As a batch of one: outside a batch an empty second text counts as none.
                found = tokenizer(
                    [text],
                    [pair] if pair is not None else None,
                    truncation=truncation,
                    max_length=max_length,
                    padding=False,
                    return_token_type_ids=True,
                )
                case["ids"] = found["input_ids"][0]
                case["type_ids"] = found["token_type_ids"][0]
            except Exception as error:
                if "Truncation error" not in str(error):
                    raise
            encodings.append(case)
    return encodings


def settings_case(case):
    """What AutoTokenizer gives for a folder with some settings changed; None where it refuses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in (HERE / "tokenizers" / case["tokenizer"]).iterdir():
            shutil.copy(file, folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | case.get("file", {})))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) | case.get("config", {})
        config = {key: value for key, value in config.items() if key not in case.get("without", [])}
        path.write_text(json.dumps(config))
        if "model" in case:
            (folder / "config.json").write_text(json.dumps(case["model"]))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            return [
                tokenizer(
                    [given["text"]],
                    [given["text_pair"]] if given["text_pair"] is not None else None,
                    truncation=given["truncation"],
                    max_length=given["max_length"],
                )["input_ids"][0]
                for given in texts.SETTINGS_INPUTS
            ]
        except (ValueError, TypeError, OverflowError) as error:
            print(f"{case['name']}: refused, {error}")
            return None


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def main():
    shutil.rmtree(HERE / "tokenizers", ignore_errors=True)
    texts.make_tokenizers(HERE / "tokenizers")
    tokens = {
        "inputs": texts.inputs(),
        "encodings": {name: tokens_case(name) for name in TOKENIZERS},
    }
    write_json(HERE / "tokens.json", tokens)
    settings = {
        "inputs": texts.SETTINGS_INPUTS,
        "cases": [case | {"ids": settings_case(case)} for case in texts.SETTINGS],
    }
    write_json(HERE / "settings.json", settings)


if __name__ == "__main__":
    main()
