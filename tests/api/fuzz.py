"""Tries the whole API against its own OpenAPI document with schemathesis.

    pip install -r tests/api/requirements.txt
    python tests/api/fuzz.py [--seed N] [--examples N] [--cases N]

A real server with a tiny student answers. Requests are drawn from the document, fitting and not
fitting; no answer may be a 5xx, have a status, a content type or a body outside the document, take
what the document forbids or refuse what it allows, or ignore a missing token. Exit status 1 if one
is, or if there were fewer than --cases requests.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

from server import ADMIN, Server

HERE = Path(__file__).resolve().parent

# Tasks are asked with POST and taken out of service with DELETE: neither makes or removes what the
# routes around it show, and requests of other cases take tasks out of service meanwhile.
NOT_PROMISED = "ensure_resource_availability,use_after_free"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=300, help="requests of an operation, fuzzing")
    parser.add_argument("--cases", type=int, default=10_000, help="requests that there must be")
    parser.add_argument("--only", help="path of the operations to try")
    options = parser.parse_args()

    started = time.monotonic()
    with Server("--default-task", "pairs", closed=True) as server:
        # Hypothesis keeps what it has found in the current folder.
        with tempfile.TemporaryDirectory() as folder:
            status = run(server, options, folder)
        alive = server.is_alive()
        metrics = requests.get(
            f"{server.url}/metrics", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60
        )
        log = server.read_log()
    panics = re.findall(r".*panicked.*", log)
    cases = sum(status["cases"].values())
    print(f"{cases} requests to {len(status['cases'])} operations in {time.monotonic() - started:.0f} s")
    problems = [
        (status["code"] != 0, "schemathesis has found something"),
        (not alive, "the server has died"),
        (metrics.status_code != 200, "the server does not answer any more"),
        (bool(panics), f"a panic is in the log: {panics[:1]}"),
        (cases < options.cases, f"fewer than {options.cases} requests"),
    ]
    failures = [sentence for failed, sentence in problems if failed]
    if failures:
        print(log[-4000:], file=sys.stderr)
        sys.exit("; ".join(failures))


def run(server, options, folder):
    report = Path(folder) / "events.ndjson"
    command = [Path(sys.executable).with_name("schemathesis"), "--config-file", HERE / "schemathesis.toml"]
    command += ["run", f"{server.url}/openapi.json", "--checks", "all", "--mode", "all"]
    command += ["--exclude-checks", NOT_PROMISED]
    command += ["--seed", options.seed, "--max-examples", options.examples, "--workers", "1"]
    command += ["--header", f"Authorization: Bearer {ADMIN}", "--continue-on-failure"]
    command += ["--generation-database", "none", "--request-timeout", "60", "--no-color"]
    command += ["--suppress-health-check", "all", "--warnings", "off"]
    command += ["--report", "ndjson", "--report-ndjson-path", report]
    if options.only:
        command += ["--include-path", options.only]
    code = subprocess.run([str(word) for word in command], cwd=folder).returncode
    return {"code": code, "cases": count(report)}


def count(report):
    """Requests by operation."""
    import json

    cases = {}
    for line in report.read_text().splitlines():
        scenario = json.loads(line).get("ScenarioFinished")
        if scenario:
            recorder = scenario["recorder"]
            label = recorder["label"]
            # What is empty is left out of the report.
            cases[label] = cases.get(label, 0) + len(recorder.get("interactions", {}))
    return cases


if __name__ == "__main__":
    main()
