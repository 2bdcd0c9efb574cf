"""Checks kdlora beside the real `transformers` and `peft`, and prints the table of what each family
of encoders can do.

    pip install -r tests/golden/requirements.txt
    python tests/peft/families.py [--seed N] [--rounds N]

The columns logits, gradients and batch independence are the tests of `tests/it/families`, which go by
golden files. The others are found out here, with models and adapters that no other test has seen:
drawn at the given seed, written by PEFT, read by the program, and the other way round.

    PEFT in     an adapter of PEFT, served: logits over HTTP beside PEFT's
    PEFT out    an adapter that `kdlora distill` made, loaded by PEFT: the same
    merge       `kdlora adapter merge`, loaded by transformers: the same
    serve       the test of that name, and every adapter above answered over HTTP
    distil      the test of that name, and the pass above

Exit status 1 if a cell is not what it should be.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    MPNetConfig,
    RobertaConfig,
)
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target" / "debug" / "kdlora"
if "CARGO_TARGET_DIR" in os.environ:
    PROGRAM = Path(os.environ["CARGO_TARGET_DIR"]) / "debug" / "kdlora"
TOLERANCE = 1e-4
COLUMNS = [
    "logits",
    "gradients",
    "batch independence",
    "PEFT in",
    "PEFT out",
    "merge",
    "serve",
    "distil",
]
TEXTS = [
    "the film is good",
    "a",
    "no long whole fool , very funny and not bad !",
    "the movie isn't good , is it ?",
    " ".join(["very very long and not lot"] * 3),
    "the zero control line",
]
PAIRS = [
    {"text": "the film is good", "text_pair": "a bad movie"},
    {"text": "is it", "text_pair": "love it , love it , love it"},
]


class Family:
    """How a family's models are drawn, and what may be adapted in them."""

    def __init__(self, config, tokenizer, linears, head=()):
        self.config = config
        self.tokenizer = tokenizer
        self.linears = linears
        # Modules beside `classifier` that PEFT may save whole.
        self.head = list(head)


def sizes(draw):
    heads = draw.choice([1, 2, 3, 5])
    return {
        "hidden_size": heads * draw.choice([4, 6, 8]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "intermediate_size": draw.randrange(9, 40),
        "max_position_embeddings": draw.randrange(40, 70),
    }


def distilbert(draw, **common):
    drawn = sizes(draw)
    return DistilBertConfig(
        dim=drawn["hidden_size"],
        n_layers=drawn["num_hidden_layers"],
        n_heads=drawn["num_attention_heads"],
        hidden_dim=drawn["intermediate_size"],
        max_position_embeddings=drawn["max_position_embeddings"],
        **common,
    )


def deberta(draw, **common):
    drawn = sizes(draw)
    buckets = draw.choice([-1, 4, 8])
    return DebertaV2Config(
        relative_attention=True,
        position_buckets=buckets,
        max_relative_positions=draw.choice([-1, 12]),
        norm_rel_ebd=draw.choice(["none", "layer_norm"]),
        share_att_key=draw.random() < 0.5,
        pos_att_type=draw.choice(["c2p", "p2c", "p2c|c2p"]),
        position_biased_input=draw.random() < 0.5,
        type_vocab_size=draw.choice([0, 2]),
        conv_kernel_size=draw.choice([0, 3]),
        **drawn,
        **common,
    )


BERT_LINEARS = ["query", "key", "value", "output.dense", "intermediate.dense"]
FAMILIES = {
    "bert": Family(
        lambda draw, **common: BertConfig(**sizes(draw), **common),
        "bert",
        BERT_LINEARS,
        ["pooler"],
    ),
    "roberta": Family(
        lambda draw, **common: RobertaConfig(**sizes(draw), pad_token_id=1, **common),
        "roberta",
        BERT_LINEARS,
    ),
    "distilbert": Family(
        distilbert, "bert", ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
    ),
    "mpnet": Family(
        lambda draw, **common: MPNetConfig(**sizes(draw), pad_token_id=1, **common),
        "mpnet",
        ["q", "k", "v", "o", "intermediate.dense", "output.dense"],
    ),
    "deberta-v2": Family(
        deberta,
        "deberta",
        ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"],
        ["pooler"],
    ),
}


def randomize(model, generator):
    """Wide weights: a network that is nearly linear would hide a mistake."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name.lower()
        if norm and name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            parameter.data = 0.2 * noise
        elif "embeddings" in name or "relative_attention_bias" in name:
            parameter.data = 0.5 * noise
        else:
            parameter.data = 1.5 * noise / parameter[0].numel() ** 0.5


def make_model(name, family, draw, folder):
    kind, count = draw.choice(
        [
            ("single_label_classification", 2),
            ("single_label_classification", 4),
            ("multi_label_classification", 3),
            ("regression", 1),
        ]
    )
    tokenizer = ROOT / "tests" / "golden" / "tokenizers" / family.tokenizer
    shutil.copytree(tokenizer, folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = family.config(draw, vocab_size=vocabulary, num_labels=count, problem_type=kind)
    config.id2label = {i: f"label {i}" for i in range(count)}
    config.label2id = {label: i for i, label in config.id2label.items()}
    model = AutoModelForSequenceClassification.from_config(config)
    randomize(model, torch.Generator().manual_seed(draw.randrange(2**31)))
    if draw.random() < 0.3:
        model = model.half()
    model.save_pretrained(folder)
    return config


def load_model(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def lora_options(family, draw, layers):
    """Options as users of PEFT set them, drawn at random."""
    linears = draw.sample(family.linears, draw.randrange(1, len(family.linears) + 1))
    options = {
        "r": draw.choice([1, 2, 3, 6]),
        "lora_alpha": draw.choice([1, 4, 7, 16]),
        "target_modules": linears,
        "use_rslora": draw.random() < 0.3,
        "use_dora": draw.random() < 0.4,
        "bias": draw.choice(["none", "none", "lora_only", "all"]),
    }
    way = draw.randrange(4)
    if way == 0 and not family.head and family.linears[0] != "q_lin":
        options["target_modules"] = "all-linear"
    elif way == 1:
        ends = "|".join(re.escape(linear) for linear in linears)
        options["target_modules"] = rf".*\.({ends})"
    elif way == 2 and layers > 1:
        options["layers_to_transform"] = sorted(draw.sample(range(layers), layers - 1))
    if draw.random() < 0.3:
        options["rank_pattern"] = {linears[0]: 4}
        options["alpha_pattern"] = {linears[-1]: 5}
    if family.head and draw.random() < 0.5:
        options["modules_to_save"] = ["classifier", *family.head]
    return options


def make_adapter(model_folder, options, draw, folder):
    """A PEFT adapter with nothing left at its start value."""
    model = load_model(model_folder)
    config = LoraConfig(task_type="SEQ_CLS", lora_dropout=0.0, **options)
    # PEFT draws the first values of A.
    torch.manual_seed(draw.randrange(2**31))
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.data = parameter.data * (1 + 0.2 * noise)
            elif parameter.dim() == 2:
                parameter.data = parameter.data + 0.7 * noise / parameter.shape[1] ** 0.5
            else:
                parameter.data = parameter.data + 0.2 * noise
    if draw.random() < 0.3:
        wrapped = wrapped.half()
    wrapped.save_pretrained(folder)
    model.config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(model_folder, folder):
    return PeftModel.from_pretrained(load_model(model_folder), folder).eval()


def torch_logits(model, tokenizer, inputs):
    rows = []
    for given in inputs:
        if isinstance(given, dict):
            encoded = tokenizer(given["text"], given["text_pair"], return_tensors="pt")
        else:
            encoded = tokenizer(given, return_tensors="pt")
        if getattr(model.config, "type_vocab_size", 0) < 2:
            encoded.pop("token_type_ids", None)
        with torch.no_grad():
            rows.append(model(**encoded).logits[0].tolist())
    return rows


def run(*arguments, check=True):
    done = subprocess.run(
        [PROGRAM, "--log", "warn", *map(str, arguments)], capture_output=True, text=True
    )
    if check and done.returncode != 0:
        raise Wrong(f"kdlora {arguments[0]} {arguments[1]}: {done.stderr.strip()}")
    return done


class Wrong(Exception):
    """A cell that is not what it should be."""


class Server:
    def __init__(self, student, adapters, state):
        self.process = subprocess.Popen(
            [PROGRAM, "--log", "error", "serve", "--bind", "127.0.0.1:0", "--threads", "1"]
            + ["--student", student, "--adapters", adapters, "--state", state],
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline().strip()
        self.url = line.removeprefix("kdlora listens on ")
        if self.url == line:
            raise Wrong(f"the server does not start: {line!r}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def logits(self, task, inputs, labels):
        body = json.dumps({"inputs": inputs, "raw_scores": True}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/classify/{task}", body, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise Wrong(f"{task}: {error.read().decode()}") from error
        return [
            [p["value"]] if "value" in p else [p["scores"][label] for label in labels]
            for p in answer["predictions"]
        ]


def compare(what, found, expected):
    """The greatest difference of a logit; of logits above 1, relative to the greatest of them."""
    scale = max(1.0, max(abs(x) for row in expected for x in row))
    worst = max(
        abs(a - b) for row, other in zip(found, expected, strict=True) for a, b in zip(row, other)
    )
    worst /= scale
    if not worst <= TOLERANCE:
        raise Wrong(f"{what}: logits differ by {worst:.1e}")
    return worst


def inputs_of(config):
    return TEXTS + (PAIRS if getattr(config, "type_vocab_size", 0) == 2 else [])


def check_adapters(name, family, draw, rounds, place):
    """PEFT in and merge: for each round a model with a few adapters."""
    worst = {"PEFT in": 0.0, "merge": 0.0}
    count = 0
    for number in range(rounds):
        folder = place / f"model-{number}"
        config = make_model(name, family, draw, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = inputs_of(config)
        labels = list(config.id2label.values())
        expected = {}
        for adapter in range(3):
            task = f"task-{adapter}"
            source = place / f"adapters-{number}" / task / "student"
            options = lora_options(family, draw, config.num_hidden_layers)
            make_adapter(folder, options, draw, source)
            expected[task] = torch_logits(load_adapter(folder, source), tokenizer, inputs)
            merged = place / f"merged-{number}-{adapter}"
            what = f"{name} {config.to_diff_dict()}, {options}"
            run("adapter", "merge", source, "--student", folder, "--out", merged)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                merged, output_loading_info=True
            )
            if info["missing_keys"] or info["unexpected_keys"]:
                raise Wrong(f"merge of {what}: {info}")
            found = torch_logits(model.eval(), tokenizer, inputs)
            difference = compare(f"merge of {what}", found, expected[task])
            worst["merge"] = max(worst["merge"], difference)
            count += 1
        with Server(folder, place / f"adapters-{number}", place / f"state-{number}") as server:
            for task, rows in expected.items():
                found = server.logits(task, inputs, labels)
                worst["PEFT in"] = max(worst["PEFT in"], compare(f"{task}: {what}", found, rows))
    return {column: f"{count} adapters, {value:.0e}" for column, value in worst.items()}


def check_distilled(name, family, draw, place):
    """PEFT out, and a pass with a teacher of the same family."""
    folder = place / "base"
    config = make_model(name, family, draw, folder)
    rows = [
        {"text": " ".join(draw.choices("abcdefgh" if i % 2 else "12345678", k=5)), "label": label}
        for i in range(80)
        for label in ["digits", "letters"][i % 2 : i % 2 + 1]
    ]
    spec = {
        "task": "kind",
        "data": {"train": {"rows": rows}},
        "teacher": {"model": str(folder), "finetune": {"mode": "lora", "epochs": 2}},
        "lora": {"r": 3, "alpha": 5, "targets": ["all-linear"]},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "max_length": 128},
    }
    (place / "spec.json").write_text(json.dumps(spec))
    out = place / "out" / "kind" / "student"
    run("distill", "--spec", place / "spec.json", "--student", folder, "--out", out)
    # PEFT puts an adapter on a model with a head of as many labels.
    labels = json.loads((out / "config.json").read_text())["id2label"]
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(labels), ignore_mismatched_sizes=True, dtype=torch.float32
    )
    base.config.problem_type = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, out).eval()
    inputs = inputs_of(config)
    expected = torch_logits(model, AutoTokenizer.from_pretrained(folder), inputs)
    with Server(folder, place / "out", place / "state") as server:
        found = server.logits("kind", inputs, list(labels.values()))
    return f"{compare(f'{name}: PEFT out', found, expected):.0e}"


def rust_tests():
    """Outcome of each test of `tests/it/families`, as (family, column). Cargo builds the program too,
    as it did for the README's test command."""
    done = subprocess.run(
        ["cargo", "test", "--workspace", "--locked", "--test", "it", "families::"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    outcomes = re.findall(r"^test families::(\w+)::(\w+) \.\.\. (\w+)$", done.stdout, re.MULTILINE)
    if not outcomes:
        sys.exit(done.stdout + done.stderr)
    return {
        (family.replace("_", "-"), column): outcome == "ok"
        for family, column, outcome in outcomes
    }


def main():
    parser = argparse.ArgumentParser(description="kdlora beside transformers and peft")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4, help="models drawn a family")
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")
    torch.set_num_threads(1)
    begin = time.monotonic()
    passed = rust_tests()
    failures = []
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, family in FAMILIES.items():
        draw = random.Random(f"{options.seed} {name}")
        cells = dict.fromkeys(COLUMNS, "")
        with tempfile.TemporaryDirectory() as place:
            place = Path(place)
            for check in [
                lambda: check_adapters(name, family, draw, options.rounds, place),
                lambda: {"PEFT out": check_distilled(name, family, draw, place)},
            ]:
                try:
                    cells |= check()
                except Wrong as wrong:
                    failures.append(f"{name}: {wrong}")
                    print(failures[-1], file=sys.stderr)
        for column in COLUMNS:
            if not passed.get((name, column.lower().replace(" ", "_")), False):
                cells[column] = "fails"
                failures.append(f"{name}: test {column}")
            elif column in ["PEFT in", "PEFT out", "merge"] and not cells[column]:
                cells[column] = "fails"
            else:
                cells[column] = f"✓ {cells[column]}".strip()
        lines.append(f"| {name} | " + " | ".join(cells[c] for c in COLUMNS) + " |")
    print("\n".join(lines))
    print(
        f"\nSeed {options.seed}, {options.rounds} models a family with three adapters each; the "
        f"greatest difference of a logit from PEFT's. {time.monotonic() - begin:.0f} s."
    )
    for failure in failures:
        print(failure, file=sys.stderr)
    counts = f"{len(FAMILIES) * len(COLUMNS) - len(failures)} passed, {len(failures)} failed"
    print(f"\nfamilies: {counts}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
