"""A real server with a tiny student made of the golden files, for tests that talk to it."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
PROGRAM = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug" / "kdlora"

# Words that the tiny student has.
VOCABULARY = 60

ADMIN = "an-admin-token-for-the-tests"
READER = "a-reader-token-for-the-tests"


class Server:
    """`kdlora serve` in a folder of its own, on a free port, until the `with` block ends.

    The tasks are `pairs` and `labels`, which has the same weights but several labels. `closed`
    gives it tokens for admins and readers.
    """

    def __init__(self, *options, closed=False, environment=None):
        self.folder = Path(tempfile.mkdtemp(prefix="kdlora-api-"))
        self.options = [str(option) for option in options]
        self.closed = closed
        self.environment = environment or {}

    def _install(self):
        shutil.copytree(GOLDEN / "models" / "bert-pairs", self.folder / "student")
        tokenizer = json.loads((GOLDEN / "tokenizers/bert/tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {w: i for w, i in words.items() if i < VOCABULARY}
        (self.folder / "student/tokenizer.json").write_text(json.dumps(tokenizer))
        for task in ("pairs", "labels"):
            adapter = self.folder / "adapters" / task / "student"
            shutil.copytree(GOLDEN / "adapters/bert-pairs-qv", adapter)
        config = self.folder / "adapters/labels/student/config.json"
        labels = json.loads(config.read_text()) | {"problem_type": "multi_label_classification"}
        config.write_text(json.dumps(labels))
        (self.folder / "data").mkdir()
        (self.folder / "admins").write_text(f"# who may do all\nada:{ADMIN}\n")
        (self.folder / "readers").write_text(f"ray:{READER}\n")

    def __enter__(self):
        self._install()
        command = [PROGRAM, "--log", "warn", "serve", "--bind", "127.0.0.1:0", "--threads", "2"]
        command += ["--student", self.folder / "student", "--adapters", self.folder / "adapters"]
        command += ["--state", self.folder / "state", "--data-root", self.folder / "data"]
        if self.closed:
            command += ["--admin-token-file", self.folder / "admins"]
            command += ["--api-token-file", self.folder / "readers"]
        self.log = open(self.folder / "log", "w")
        self.process = subprocess.Popen(
            [*map(str, command), *self.options],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **self.environment},
        )
        line = self.process.stdout.readline()
        if "listens on " not in line:
            self.__exit__()
            raise RuntimeError(f"the server did not start: {self.read_log()}")
        self.url = line.split("listens on ")[1].strip()
        self.host, port = self.url.removeprefix("http://").split(":")
        self.port = int(port)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.last_log = (self.folder / "log").read_text()
        shutil.rmtree(self.folder, ignore_errors=True)

    def read_log(self):
        path = self.folder / "log"
        return path.read_text() if path.exists() else self.last_log

    def resident_bytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def is_alive(self):
        return self.process.poll() is None
