"""kdlora beside ONNX Runtime and PyTorch: the same classifier, the same texts, in turns.

The peers run inside this process, on texts that are tokenised already; kdlora is asked over HTTP by
`loadtest closed`, one text a request, and tokenises itself. Figures are medians of the rounds.

kdlora's figures have a third: the share of its CPU time that its workers and their helpers have not
taken, which is HTTP, tokenizer and the rest of the program.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from transformers import AutoTokenizer

import models

ROOT = Path(__file__).resolve().parents[2]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kdlora", type=Path, default=ROOT / "target/release/kdlora")
    parser.add_argument("--loadtest", type=Path, default=ROOT / "target/release/loadtest")
    parser.add_argument("--task", default="movie-sentiment")
    parser.add_argument("--version", choices=["student", "teacher"], default="student")
    parser.add_argument("--encoder", help="catalog name [default: minilm-l6 or mpnet-base]")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--count", type=int, default=192, help="texts of a measurement")
    parser.add_argument("--clients", default="1,8,32,128", help="requests at once")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement of kdlora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtypes", default="f32,int8")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--cache", type=Path, default=models.default_cache())
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    given.encoder = given.encoder or {"student": "minilm-l6", "teacher": "mpnet-base"}[given.version]
    given.texts = given.texts or ROOT / f"data/{given.task}/test.jsonl"
    given.clients = [int(clients) for clients in given.clients.split(",")]
    return given


@contextlib.contextmanager
def server(given, dtype, folder):
    """A kdlora server of one task; yields its address and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % free.getsockname()[1]
    adapters = folder / "adapters" / given.task
    adapters.mkdir(parents=True, exist_ok=True)
    source = ROOT / "models/adapters" / given.task / given.version
    (adapters / "student").symlink_to(source, target_is_directory=True)
    command = [given.kdlora, "serve", "--bind", address, "--state", folder / "state"]
    command += ["--student", given.encoder, "--adapters", adapters.parent, "--dtype", dtype]
    # The clients ask as fast as they get answers: none is to be refused.
    command += ["--threads", given.threads, "--max-queue-wait", "10s"]
    log = open(folder / "log", "wb")
    process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit("kdlora ended:\n" + (folder / "log").read_text())
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{address}/readyz", timeout=1)
                break
            time.sleep(0.1)
        yield f"http://{address}", process.pid
    finally:
        process.terminate()
        process.wait()


def thread_ticks(pid):
    """CPU time of the threads that compute, and of all."""
    computing = everything = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, times = (thread / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            user, system = times.split()[11:13]
            everything += int(user) + int(system)
            if name.startswith(("worker-", "helper-")):
                computing += int(user) + int(system)
    return computing, everything


def ask(given, server, clients, folder):
    """Sentences a second, the median latency in milliseconds, and the share of the CPU time beside
    the workers'."""
    url, pid = server
    before = thread_ticks(pid)
    out = folder / "closed"
    command = [given.loadtest, "closed", "--url", url, "--tasks", given.task, "--texts"]
    command += [given.texts, "--clients", clients, "--duration", f"{given.seconds}s"]
    command += ["--warm-up", "500ms", "--out", out]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    report = json.loads(out.with_suffix(".json").read_text())
    stage = report["stages"][0]
    computing, everything = (now - then for now, then in zip(thread_ticks(pid), before))
    beside = 1 - computing / max(everything, 1)
    return stage["goodput_per_second"], stage["latency"]["p50_ms"], beside


def time_peer(peer, batches):
    """Sentences a second and the median latency of a batch in milliseconds."""
    times = []
    for batch in batches:
        start = time.perf_counter()
        peer(batch)
        times.append(time.perf_counter() - start)
    sentences = sum(len(batch["input_ids"]) for batch in batches)
    return sentences / sum(times), statistics.median(times) * 1e3


def main():
    given = arguments()
    name = f"{given.task}-{given.version}"
    adapter = ROOT / "models/adapters" / given.task / given.version
    given.cache.mkdir(parents=True, exist_ok=True)
    folder = given.cache / name
    models.classifier(given.kdlora, given.encoder, adapter, folder)
    path, quantised = models.export(folder)
    peers = {}
    dtypes = given.dtypes.split(",")
    if "f32" in dtypes:
        peers["onnxruntime f32"] = models.Onnx(path, given.threads)
        if not given.no_torch:
            peers["torch f32"] = models.Torch(folder, given.threads)
    if "int8" in dtypes:
        peers["onnxruntime int8"] = models.Onnx(quantised, given.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = models.texts(given.texts, given.count)
    batches = {size: models.batches(tokenizer, texts, size) for size in given.clients}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[given.clients[0]])
    print(f"{len(texts)} texts of {tokens / len(texts):.1f} tokens, {given.threads} threads, "
          f"{platform.processor() or platform.machine()}", file=sys.stderr)

    found = {}

    def note(who, size, figures):
        found.setdefault(who, {}).setdefault(size, []).append(figures)

    with contextlib.ExitStack() as stack:
        servers = {}
        for dtype in dtypes:
            at = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers[dtype] = stack.enter_context(server(given, dtype, at)), at
        for peer in peers.values():
            for size in given.clients:
                peer(batches[size][0])
        for turn in range(given.rounds):
            for size in given.clients:
                for who, peer in peers.items():
                    note(who, size, time_peer(peer, batches[size]))
                for dtype, (server_of, at) in servers.items():
                    note(f"kdlora {dtype}", size, ask(given, server_of, size, at))
            print(f"round {turn + 1} of {given.rounds}", file=sys.stderr)
    report(given, found)


def report(given, found):
    median = {
        who: {
            size: [statistics.median(values) for values in zip(*rounds)]
            for size, rounds in sizes.items()
        }
        for who, sizes in found.items()
    }
    print("| | " + " | ".join(f"{size} at once" for size in given.clients) + " |")
    print("| --- |" + " ---: |" * len(given.clients))
    for who, sizes in median.items():
        cells = [f"{rate:.0f}/s, {ms:.2f} ms" for rate, ms, *_ in sizes.values()]
        print(f"| {who} | " + " | ".join(cells) + " |")
    for dtype in given.dtypes.split(","):
        own, peer = median[f"kdlora {dtype}"], median[f"onnxruntime {dtype}"]
        cells = [f"{100 * own[size][2]:.1f} %" for size in given.clients]
        print(f"| kdlora {dtype}, CPU time beside the workers' | " + " | ".join(cells) + " |")
        cells = [f"{own[size][0] / peer[size][0]:.2f}×" for size in given.clients]
        print(f"| kdlora {dtype} : onnxruntime {dtype}, batches as large | " + " | ".join(cells) + " |")
        if 1 in given.clients:
            cells = [f"{own[size][0] / peer[1][0]:.2f}×" for size in given.clients]
            print(f"| the same, onnxruntime one by one | " + " | ".join(cells) + " |")
            print(f"\nLatency alone, {dtype}: {own[1][1] / peer[1][1]:.2f}× of onnxruntime's\n")
    if given.out:
        given.out.write_text(json.dumps({"rounds": found, "medians": median}, indent=1))


if __name__ == "__main__":
    main()
