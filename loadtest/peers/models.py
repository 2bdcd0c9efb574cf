"""The peers: one classifier, by ONNX Runtime (f32 and dynamic int8) and by PyTorch."""

import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModelForSequenceClassification, AutoTokenizer

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


def texts(path, count):
    """The first texts of a file of JSON lines."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count))]


def classifier(program, student, adapter, folder):
    """The adapter folded into its encoder, a folder as `transformers` has it."""
    if not (folder / "config.json").exists():
        command = [program, "adapter", "merge", adapter, "--student", student, "--out", folder]
        subprocess.run([str(part) for part in command], check=True)
    return folder


def export(folder):
    """`model.onnx` and `model.int8.onnx` beside the classifier."""
    path, quantised = folder / "model.onnx", folder / "model.int8.onnx"
    if quantised.exists():
        return path, quantised
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(["a text", "and a longer one"], padding=True, return_tensors="pt")
    names = [name for name in INPUTS if name in encoded]
    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    torch.onnx.export(
        model,
        tuple(),
        str(path),
        kwargs=dict(encoded),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={**axes, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    onnx.checker.check_model(str(path))
    quantize_dynamic(str(path), str(quantised), weight_type=QuantType.QInt8)
    return path, quantised


class Onnx:
    """A session with as many threads as given, all else as ONNX Runtime has it."""

    def __init__(self, path, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.names = {given.name for given in self.session.get_inputs()}

    def __call__(self, encoded):
        given = {name: encoded[name] for name in self.names}
        return self.session.run(None, given)[0]


class Torch:
    """Eager PyTorch in f32."""

    def __init__(self, folder, threads):
        torch.set_num_threads(threads)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def __call__(self, encoded):
        with torch.inference_mode():
            given = {name: torch.from_numpy(values) for name, values in encoded.items()}
            return self.model(**given).logits.numpy()


def batches(tokenizer, texts, size):
    """Padded batches in the order of the texts. Tokenised beforehand: it is not counted."""
    found = []
    for start in range(0, len(texts), size):
        encoded = tokenizer(texts[start : start + size], padding=True, return_tensors="np")
        found.append({name: values.astype(np.int64) for name, values in encoded.items()})
    return found


def default_cache():
    return Path.home() / ".cache" / "kdlora-peers"
