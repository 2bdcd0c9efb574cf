"""Forwards of a student and a teacher on a GPU in PyTorch, for comparison with kdlora's
`benches/device.rs`.

    python loadtest/peers/gpu_forward.py --student DIR --teacher DIR

Needs torch and transformers. The same texts, tokens made beforehand, sorted by length; bf16, scaled
dot product attention, `torch.compile`; the padded batch sizes named below, the fastest counts. A
forward of one text is compiled for any length, and with CUDA graphs for each length rounded up to 8;
the faster counts.

Prints a JSON object a line: name, value, unit; medians of five rounds.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROUNDS = 5
BATCHES = (256, 1024)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--texts", type=Path, default="data/movie-sentiment/test.jsonl")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def say(name, value, unit):
    print(json.dumps({"name": name, "value": value, "unit": unit}), flush=True)


def load(folder, device):
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.eval().to(device)


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


def padded(sequences, device, multiple=1):
    longest = -(-max(map(len, sequences)) // multiple) * multiple
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    if device != "cpu":
        ids, mask = ids.pin_memory(), mask.pin_memory()
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def throughput(model, sequences, size, device):
    batches = [sequences[i : i + size] for i in range(0, len(sequences), size)]

    def one_round():
        start = time.perf_counter()
        answers = [model(*padded(batch, device)).logits for batch in batches]
        torch.cat([answer.float().cpu() for answer in answers])
        return len(sequences) / (time.perf_counter() - start)

    one_round()
    return statistics.median(one_round() for _ in range(ROUNDS))


def lone(model, sequences, device, multiple):
    times = []
    for i, sequence in enumerate((sequences * ROUNDS)[: ROUNDS * 200]):
        wait(device)
        start = time.perf_counter()
        model(*padded([sequence], device, multiple)).logits.float().cpu()
        if i >= 100:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(name, folder, sequences, args):
    model = load(folder, args.device)
    repeated = sorted(sequences * args.repeat, key=len)
    compiled = torch.compile(model, dynamic=True)
    say(f"{name} throughput", max(throughput(compiled, repeated, n, args.device) for n in BATCHES), "texts/s")
    by_length = torch.compile(model, mode="reduce-overhead", dynamic=False)
    # A graph for each length.
    torch._dynamo.config.cache_size_limit = 64
    for length in range(8, 136, 8):
        for _ in range(3):
            by_length(*padded([[1] * length], args.device))
    say(
        f"{name} lone forward",
        min(lone(compiled, sequences, args.device, 1), lone(by_length, sequences, args.device, 8)),
        "ms",
    )


def main():
    args = arguments()
    say("peer", f"torch {torch.__version__}", "")
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    rows = [json.loads(line)["text"] for line in args.texts.read_text().splitlines()]
    sequences = tokenizer(rows, truncation=True, max_length=128)["input_ids"]
    with torch.inference_mode():
        measure("student", args.student, sequences, args)
        if args.teacher:
            measure("teacher", args.teacher, sequences, args)


if __name__ == "__main__":
    main()
