"""Prints the table of `tests/gpu.sh`: python tests/gpu_table.py OUT. A missing figure is shown as -."""

import json
import re
import sys
from pathlib import Path

out = Path(sys.argv[1])


def text(name):
    path = out / name
    return path.read_text() if path.exists() else ""


def figures(name):
    rows = (json.loads(line) for line in text(name).splitlines())
    return {row["name"]: row["value"] for row in rows}


def report(name):
    return json.loads(text(name) or "{}")


def tests(name):
    found = re.findall(r"(\d+) passed; (\d+) failed", text(name))
    return f"{found[-1][0]} passed, {found[-1][1]} failed" if found else "did not end"


def shown(value):
    return "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def row(what, own, peer, aim):
    ratio = own / peer if own and peer else None
    print(f"| {what} | {shown(own)} | {shown(peer)} | {'-' if ratio is None else f'{ratio:.2f}'} | {aim} |")


own, torch = figures("kdlora.jsonl"), figures("torch.jsonl")
training, peft = report("student.json"), report("peft.json")
memory = lambda name: (report(name).get("peak_memory") or {}).get("training_bytes")
mebibytes = lambda value: None if value is None else value / 2**20

print(text("gpu.txt").strip(), "|", torch.get("peer", "no PyTorch"), "\n")
print("| | kdlora | beside | ratio | aim |\n| --- | ---: | ---: | ---: | --- |")
# PyTorch's student has no adapter: as a merged one, and one that is hot computes more.
for name, beside, aim in (
    ("student sorted", "student sorted", "≥ 0.8"),
    ("student merged sorted", "student sorted", "≥ 1.0"),
    ("student in order", "student in order", "≥ 2"),
    ("teacher sorted", "teacher sorted", "≥ 1.2"),
):
    for timing in ("end to end", "GPU only"):
        row(
            f"{name}, {timing}, texts/s (PyTorch)",
            own.get(f"{name}, {timing}"), torch.get(f"{beside}, {timing}"), aim,
        )
name = "student lone forward"
row(f"{name}, ms (PyTorch)", own.get(name), torch.get(name), "≤ 2")
row(
    "100 adapters sorted, GPU only, texts/s (one adapter)",
    own.get("100 adapters sorted, GPU only"), own.get("student sorted, GPU only"), "≥ 0.7",
)
row(
    "training, tokens/s, kdlora's with its start and validation (PEFT)",
    (training.get("training") or {}).get("tokens_per_second"), peft.get("tokens_per_second"),
    "≥ 1.5",
)
row(
    "training peak, MiB (PEFT)",
    mebibytes(memory("student.json")), mebibytes(peft.get("peak_bytes")), "",
)
row(
    "KD-LoRA's training peak, MiB (LoRA on the teacher)",
    mebibytes(memory("kd-lora.json")), mebibytes(memory("lora-teacher.json")), "≤ 0.7",
)
row("labels as on the CPU in f32, %", own.get("labels as on the CPU in f32"), None, "≥ 99.8")
row("greatest distance of a logit", own.get("greatest distance of a logit"), None, "rounding of bf16")
row("student's peak memory in inference, MiB", own.get("student peak memory"), None, "")
print(f"\nOps against the CPU: {tests('lib-tests.txt')}. Golden answers, server, pass: {tests('it.txt')}.")
for name, value in torch.items():
    if isinstance(value, str) and name != "peer":
        print(f"- PyTorch: {name} {value}")
for path in sorted(out.glob("failed-*.txt")):
    print(path.read_text().strip())
