"""Writes many adapters of random weights, for load tests of many tasks.

    python loadtest/make_adapters.py FOLDER --tasks 100 [--swapped 1]

Each is `FOLDER/task-0000/student`, ready for `kdlora serve --adapters FOLDER`: LoRA of rank 8 on
query and value of MiniLM-L6 (6 layers of 384), a pooler, and a head of two classes. Only the
standard library is needed. With `--swapped 1`, beside each folder `FOLDER` there is a second one,
`FOLDER-swapped`, whose adapters have the same weights and the labels the other way round: a mix of
two versions then shows.
"""

import argparse
import array
import json
import random
import struct
from pathlib import Path

LAYERS, HIDDEN, RANK = 6, 384, 8


def tensors(rng):
    def draw(rows, columns, scale):
        return (rows, columns), array.array("f", (rng.gauss(0, scale) for _ in range(rows * columns)))

    # Drawing is slow in Python: one pair of matrices serves all layers of a task.
    a, b = draw(RANK, HIDDEN, 0.05), draw(HIDDEN, RANK, 0.05)
    for layer in range(LAYERS):
        for name in ("query", "value"):
            module = f"base_model.model.bert.encoder.layer.{layer}.attention.self.{name}"
            yield f"{module}.lora_A.weight", *a
            yield f"{module}.lora_B.weight", *b
    row = [rng.gauss(0, 0.05) for _ in range(HIDDEN)]
    pooler = array.array("f", (x for i in range(HIDDEN) for x in row[i:] + row[:i]))
    yield "base_model.model.bert.pooler.dense.weight", (HIDDEN, HIDDEN), pooler
    yield "base_model.model.bert.pooler.dense.bias", (HIDDEN,), array.array("f", [0.0] * HIDDEN)
    yield "base_model.model.classifier.weight", *draw(2, HIDDEN, 0.1)
    yield "base_model.model.classifier.bias", (2,), array.array("f", [0.0, 0.0])


def write_safetensors(path, named):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, shape, values in named:
        start = len(data)
        data += values.tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_adapter(folder, named, labels):
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", named)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "minilm-l6",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier", "pooler"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {"id2label": dict(enumerate(labels)), "label2id": {l: i for i, l in enumerate(labels)}}
    task = {"model_type": "bert", **names, "kdlora": {"max_length": 128}}
    (folder / "config.json").write_text(json.dumps(task))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--swapped", type=int, default=0, help="tasks that get a second version")
    args = parser.parse_args()
    for i in range(args.tasks):
        named = list(tensors(random.Random(args.seed * 1_000_000 + i)))
        write_adapter(args.folder / f"task-{i:04}" / "student", named, ["no", "yes"])
        if i < args.swapped:
            second = args.folder.with_name(args.folder.name + "-swapped")
            write_adapter(second / f"task-{i:04}" / "student", named, ["yes", "no"])


if __name__ == "__main__":
    main()
