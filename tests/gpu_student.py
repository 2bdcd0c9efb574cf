"""Writes a copy of the student that packs well, for a machine with a GPU.

Weights are rounded to the eight significant bits of bf16, the type that a GPU computes in, and stored
as f16, which holds them. Word embeddings are those of the words in a data set; the rest are zeros.

    python tests/gpu_student.py ENCODER DATA OUT
"""

import json
import shutil
import sys
from pathlib import Path

import numpy
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

encoder, data, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
tokenizer.no_truncation()
tokenizer.no_padding()
used = set()
for file in sorted(data.glob("*.jsonl")):
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    used.update(i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids)
weights = load_file(encoder / "model.safetensors")
for name, tensor in weights.items():
    if tensor.dtype == numpy.float32:
        bits = tensor.astype(numpy.float16).view(numpy.uint16)
        weights[name] = ((bits + 4) & 0xFFF8).view(numpy.float16)
    if name.endswith("word_embeddings.weight"):
        others = sorted(set(range(len(tensor))) - used)
        weights[name][others] = 0
save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    if (encoder / name).exists():
        shutil.copy(encoder / name, out / name)
print(f"{len(used)} words of {tokenizer.get_vocab_size()}")
