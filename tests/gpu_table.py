"""The short table of `tests/gpu.sh`: python tests/gpu_table.py OUT. Rows whose figures are missing say so."""

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


def row(what, own, peer, ratio_is, aim):
    ratio = None
    if own and peer:
        ratio = own / peer if ratio_is == "own/peer" else peer / own
    print(f"| {what} | {shown(own)} | {shown(peer)} | {'-' if ratio is None else f'{ratio:.2f}'} | {aim} |")


own, torch = figures("kdlora.jsonl"), figures("torch.jsonl")
training, peft = report("student.json"), report("peft.json")
memory = lambda name: (report(name).get("peak_memory") or {}).get("training_bytes")
mebibytes = lambda value: None if value is None else value / 2**20

print(text("gpu.txt").strip(), "|", torch.get("peer", "no PyTorch"), "\n")
print("| | kdlora | beside | ratio | aim |\n| --- | ---: | ---: | ---: | --- |")
for who, aim in (("student", "≥ 2"), ("teacher", "≥ 1.2")):
    name = f"{who} throughput"
    row(f"{name}, texts/s (PyTorch)", own.get(name), torch.get(name), "own/peer", aim)
name = "student lone forward"
row(f"{name}, ms (PyTorch)", own.get(name), torch.get(name), "own/peer", "≤ 0.5")
name = "teacher lone forward"
row(f"{name}, ms (PyTorch)", own.get(name), torch.get(name), "own/peer", "")
row(
    "100 adapters mixed, texts/s (one adapter)",
    own.get("100 adapters mixed"), own.get("student throughput"), "own/peer", "≥ 0.9",
)
row(
    "training, tokens/s (PEFT)",
    (training.get("training") or {}).get("tokens_per_second"), peft.get("tokens_per_second"),
    "own/peer", "≥ 1.5",
)
row(
    "training peak, MiB (PEFT)",
    mebibytes(memory("student.json")), mebibytes(peft.get("peak_bytes")), "own/peer", "",
)
row(
    "KD-LoRA's training peak, MiB (LoRA on the teacher)",
    mebibytes(memory("kd-lora.json")), mebibytes(memory("lora-teacher.json")), "own/peer", "≤ 0.7",
)
row("labels as on the CPU in f32, %", own.get("labels as on the CPU in f32"), None, "", "≥ 99.8")
row("greatest distance of a logit", own.get("greatest distance of a logit"), None, "", "rounding of bf16")
row("student's peak memory in inference, MiB", own.get("student peak memory"), None, "", "")
print(f"\nOps against the CPU: {tests('lib-tests.txt')}. Golden answers, server, pass: {tests('gpu-tests.txt')}.")
