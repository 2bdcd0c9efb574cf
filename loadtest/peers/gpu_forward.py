"""Forwards of a student and a teacher on a GPU in PyTorch, for comparison with kdlora's
`benches/device.rs`.

    python loadtest/peers/gpu_forward.py --student DIR --teacher DIR

Needs torch and transformers. The same texts, as tokens made beforehand, sorted by length or in the
order of the file, in bf16, with scaled dot product attention where the model has it (MPNet has none),
eager and by `torch.compile` once for all shapes. Batches are padded to their longest text before the clock starts
and lie in pinned memory. "End to end" is from there to logits in host memory; for "GPU only" the
batches are on the device beforehand, and their logits stay there. The fastest of both ways and the
batch sizes named below counts.

A forward of one text, of the student alone, is also measured as a CUDA graph for each of the lengths named below, to which
texts are padded; the fastest counts.

Prints one JSON object per line with name, value and unit; each value is the median of five rounds.
A way that fails is named on stderr and does not count.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROUNDS = 5
BATCHES = (256, 1024)
GRAPHS = (32, 64, 128)
LONE, WARM_UP = 400, 100


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--file", type=Path, default="data/movie-sentiment/test.jsonl")
    parser.add_argument("--texts", type=int, help="only the first of them")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def say(name, value, unit):
    print(json.dumps({"name": name, "value": value, "unit": unit}), flush=True)


def load(folder, device):
    def model(attention):
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, dtype=torch.bfloat16, attn_implementation=attention
        )

    try:
        loaded = model("sdpa")
    except ValueError as error:
        print(error, file=sys.stderr)
        loaded = model("eager")
    return loaded.eval().to(device)


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


def padded(sequences, device, length=None):
    """Ids and mask in host memory, pinned where there is a GPU."""
    length = length or max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return (ids, mask) if device == "cpu" else (ids.pin_memory(), mask.pin_memory())


def to(device, batch):
    return [tensor.to(device, non_blocking=True) for tensor in batch]


def rounds(texts, device, one_round):
    """The texts per second of the median round, after one that is not timed."""
    times = []
    for _ in range(1 + ROUNDS):
        wait(device)
        start = time.perf_counter()
        one_round()
        wait(device)
        times.append(time.perf_counter() - start)
    return texts / statistics.median(times[1:])


def tried(name, ways):
    """The values of those ways that work."""
    values = {}
    for way, measured in ways.items():
        try:
            values[way] = measured()
        except Exception as error:
            print(f"{name}, {way}: {error}", file=sys.stderr)
    return values


def throughput(name, models, sequences, device):
    for timing, prepared in (("end to end", False), ("GPU only", True)):
        ways = {
            f"{way}, batches of {size}": lambda model=model, size=size: speed(
                model, sequences, size, prepared, device
            )
            for way, model in models.items()
            for size in BATCHES
        }
        values = tried(f"{name}, {timing}", ways)
        if values:
            way = max(values, key=values.get)
            say(f"{name}, {timing}", values[way], "texts/s")
            say(f"{name}, {timing}, is", way, "")


def speed(model, sequences, size, prepared, device):
    batches = [padded(sequences[i : i + size], device) for i in range(0, len(sequences), size)]
    there = [to(device, batch) for batch in batches] if prepared else []

    def end_to_end():
        answers = [model(*to(device, batch)).logits for batch in batches]
        torch.cat([answer.float() for answer in answers]).cpu()

    def gpu_only():
        for batch in there:
            model(*batch)

    return rounds(len(sequences), device, gpu_only if prepared else end_to_end)


def lone(answer, batches, device):
    """Median seconds of `answer`, which returns logits in host memory."""
    times = []
    for i in range(LONE + WARM_UP):
        batch = batches[i % len(batches)]
        wait(device)
        start = time.perf_counter()
        answer(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def graph(model, length, device):
    """A CUDA graph of one text of this length, behind a function from tokens to logits."""
    ids, mask = to(device, padded([[1] * length], device))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            model(ids, mask)
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        logits = model(ids, mask).logits.float()

    def answer(batch):
        ids.copy_(batch[0], non_blocking=True)
        mask.copy_(batch[1], non_blocking=True)
        captured.replay()
        return logits.cpu()

    return answer


def graphs(model, device):
    answers = {length: graph(model, length, device) for length in GRAPHS}
    return lambda batch: answers[batch[0].shape[1]](batch)


def measure_lone(name, models, sequences, device):
    plain = [padded([sequence], device) for sequence in sequences]
    ways = {
        way: lambda model=model: lone(
            lambda batch: model(*to(device, batch)).logits.float().cpu(), plain, device
        )
        for way, model in models.items()
    }
    if device != "cpu":
        rounded = [
            padded([sequence], device, next(n for n in GRAPHS if n >= len(sequence)))
            for sequence in sequences
        ]
        for way, model in models.items():
            ways[f"{way}, CUDA graph"] = lambda model=model: lone(
                graphs(model, device), rounded, device
            )
    times = tried(f"{name} lone forward", ways)
    if times:
        way = min(times, key=times.get)
        say(f"{name} lone forward", 1e3 * times[way], "ms")
        say(f"{name} lone forward is", way, "")


def measure(name, folder, sequences, args):
    eager = load(folder, args.device)
    models = {"eager": eager, "compiled": torch.compile(eager, dynamic=True)}
    say(f"{name}'s attention", eager.config._attn_implementation, "")
    repeated = sequences * args.repeat
    throughput(f"{name} sorted", models, sorted(repeated, key=len), args.device)
    if name == "student":
        measure_lone(name, models, sequences, args.device)
        throughput(f"{name} in order", models, repeated, args.device)


def main():
    args = arguments()
    say("peer", f"torch {torch.__version__}", "")
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    rows = [json.loads(line)["text"] for line in args.file.read_text().splitlines()]
    sequences = tokenizer(rows[: args.texts], truncation=True, max_length=128)["input_ids"]
    with torch.inference_mode():
        measure("student", args.student, sequences, args)
        if args.teacher:
            measure("teacher", args.teacher, sequences, args)


if __name__ == "__main__":
    main()
