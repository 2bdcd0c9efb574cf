"""Attacks on a real server. docs/security.md lists them, and what happens.

Each one asks afterwards whether the server still answers, and has not grown.
"""

import gzip
import io
import json
import socket
import statistics
import struct
import threading
import time
import zipfile

import pytest
import requests

from server import ADMIN, GOLDEN, READER, Server

TASK = "/v1/classify/pairs"
QUESTION = {"inputs": "the cat sat"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def target():
    """Tokens for all, and little patience."""
    options = ["--read-timeout", "1s", "--max-connections", "40", "--max-upload", "8MiB"]
    with Server("--default-task", "pairs", *options, closed=True) as running:
        root = running.folder / "data"
        (running.folder / "secret.jsonl").write_text('{"text": "a secret", "label": "x"}\n')
        (root / "link.jsonl").symlink_to(running.folder / "secret.jsonl")
        (root / "away").symlink_to("/etc")
        adapter = root / "adapter"
        adapter.mkdir()
        for file in (GOLDEN / "adapters/bert-pairs-qv").iterdir():
            (adapter / file.name).write_bytes(file.read_bytes())
        (adapter / "config.json").unlink()
        outside = running.folder / "adapters/pairs/student/config.json"
        (adapter / "config.json").symlink_to(outside)
        yield running


@pytest.fixture(autouse=True)
def survives(target):
    before = target.resident_bytes()
    yield
    assert target.is_alive(), target.read_log()
    answer = call(target, "POST", TASK, json=QUESTION)
    assert answer.status_code == 200, answer.text
    assert "panicked" not in target.read_log()
    assert target.resident_bytes() - before < 96 * MIB


def call(target, method, path, token=ADMIN, **arguments):
    headers = {"Authorization": f"Bearer {token}"} | arguments.pop("headers", {})
    url = target.url + path
    return requests.request(method, url, headers=headers, timeout=60, **arguments)


def refused(answer, status, sentence=""):
    assert answer.status_code == status, answer.text
    assert sentence in answer.text, answer.text
    assert len(answer.text) < 5_000, "the answer gives the attack back"
    return answer


def connect(target):
    stream = socket.create_connection((target.host, target.port), timeout=30)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def raw(target, request):
    """What comes back for these bytes, until the server closes, after --read-timeout at the latest."""
    with connect(target) as stream:
        try:
            stream.sendall(request)
        except OSError:
            pass
        answer = b""
        try:
            while chunk := stream.recv(65536):
                answer += chunk
        except OSError:
            pass
        return answer


def head(path="/healthz", method="GET", *lines):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def status(answer):
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None


class TestPaths:
    OUTSIDE = [
        "../secret.jsonl",
        "/etc/passwd",
        "link.jsonl",
        "away/passwd",
        "adapter/../../secret.jsonl",
        "./././../secret.jsonl",
        "//etc/passwd",
        "file:///etc/passwd",
        "secret.jsonl\0.txt",
        "..\\secret.jsonl",
        "~/secret.jsonl",
        "a/" * 5_000,
    ]

    @pytest.mark.parametrize("path", OUTSIDE, ids=range(len(OUTSIDE)))
    def test_data_outside_of_the_root_is_not_there(self, target, path):
        body = {"task": "stolen", "data": {"train": {"path": path}}}
        answer = call(target, "POST", "/admin/distill", json=body)
        assert answer.status_code == 422, answer.text
        assert "secret" not in answer.json()["detail"].replace(path, "")
        for field in ({"model": path}, {"model": "bert-base", "adapter": path}):
            body = {"task": "stolen", "data": {"train": {"rows": []}}, "teacher": field}
            refused(call(target, "POST", "/admin/distill", json=body), 422)

    @pytest.mark.parametrize("path", ["away", "adapter", "..", "/", "."])
    def test_adapters_with_links_that_lead_out_are_not_there(self, target, path):
        body = {"task": "stolen", "path": path}
        refused(call(target, "POST", "/admin/adapters", json=body), 422)

    @pytest.mark.parametrize(
        "path",
        [
            "/docs/../../../../etc/passwd",
            "/docs/..%2f..%2f..%2fetc/passwd",
            "/docs/%2e%2e/%2e%2e/etc/passwd",
            "/v1/tasks/..%2f..%2fetc%2fpasswd",
            "/v1/tasks/%00",
            "/v1/tasks/%ff%fe",
            "/admin/tasks/..%2f..%2f/versions",
            "/admin/jobs/..%2f..%2fkdlora.db",
            "/v2/models/..%2f../infer",
        ],
    )
    def test_addresses_lead_nowhere(self, target, path):
        answer = raw(target, head(path, "GET", f"Authorization: Bearer {ADMIN}", "Connection: close"))
        assert status(answer) in (400, 404, 405), answer
        assert b"root:" not in answer

    @pytest.mark.parametrize("task", ["../evil", "a/b", "", "A", "-", "a" * 1_000, "a\r\nX: y", "é"])
    def test_task_names_never_become_paths(self, target, task):
        files = form_of_adapter(task)
        answer = call(target, "POST", "/admin/adapters", files=files)
        assert answer.status_code == 422, answer.text
        assert not (target.folder / "evil").exists()


def golden(name):
    return (GOLDEN / "adapters/bert-pairs-qv" / name).read_bytes()


def form_of_adapter(task="new", promote=False, **replaced):
    files = {
        "adapter_config.json": golden("adapter_config.json"),
        "adapter_model.safetensors": golden("adapter_model.safetensors"),
        "config.json": golden("config.json"),
    } | replaced
    spec = json.dumps({"task": task, "promote": promote})
    parts = [("spec", (None, spec))]
    return parts + [(name, (name, content)) for name, content in files.items()]


def archive(entries, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in entries:
            file.writestr(name, content)
    return buffer.getvalue()


def upload(target, content, task="new"):
    files = [("spec", (None, json.dumps({"task": task}))), ("archive", ("a.zip", content))]
    return call(target, "POST", "/admin/adapters", files=files)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestUploads:
    @pytest.fixture(autouse=True)
    def leaves_nothing(self, target):
        jobs = target.folder / "state" / "jobs"
        before = files_below(jobs)
        yield
        assert files_below(jobs) == before

    def test_a_good_archive_is_taken(self, target):
        names = ["adapter_config.json", "adapter_model.safetensors", "config.json"]
        entries = [(f"mine/{name}", golden(name)) for name in names]
        answer = upload(target, archive([*entries, ("mine/README.md", b"hello")]), "archived")
        assert answer.status_code == 201, answer.text

    def test_a_bomb_does_not_go_off(self, target):
        zeros = bytes(200 * MIB)
        bomb = archive([("config.json", zeros)])
        assert len(bomb) < MIB
        refused(upload(target, bomb), 413, "unpacks to more than")

    def test_a_bomb_in_an_entry_that_nobody_wants_is_not_unpacked(self, target):
        started = time.monotonic()
        bomb = archive([("weights.bin", bytes(200 * MIB)), ("config.json", b"{}")])
        refused(upload(target, bomb), 422)
        assert time.monotonic() - started < 10

    @pytest.mark.parametrize(
        "name",
        ["../config.json", "/etc/config.json", "a/../../config.json", "..\\config.json", "C:\\config.json"],
    )
    def test_entries_cannot_get_out(self, target, name):
        refused(upload(target, archive([(name, b"{}")])), 422)
        assert not (target.folder / "state/jobs/config.json").exists()

    def test_an_entry_that_is_a_link_is_no_link(self, target):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            link = zipfile.ZipInfo("config.json")
            link.external_attr = 0o120777 << 16
            file.writestr(link, "/etc/passwd")
        answer = refused(upload(target, buffer.getvalue()), 422)
        assert "root:" not in answer.text

    def test_thousands_of_entries(self, target):
        entries = [(f"{number}", b"") for number in range(5_000)]
        refused(upload(target, archive(entries)), 422, "more than 1000 entries")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\xff" * 100, b"PK\x05\x06" + bytes(18)])
    def test_broken_archives(self, target, content):
        refused(upload(target, content), 422)

    def test_an_upload_over_the_limit(self, target):
        files = form_of_adapter(**{"adapter_model.safetensors": bytes(9 * MIB)})
        refused(call(target, "POST", "/admin/adapters", files=files), 413)

    @pytest.mark.parametrize(
        "name", ["../../evil.jsonl", "/etc/evil.jsonl", "evil.sh", "..", "\0.jsonl", "a" * 5_000 + ".jsonl"]
    )
    def test_names_of_files_never_become_paths(self, target, name):
        rows = b'{"text": "a", "label": "x"}\n'
        files = [("spec", (None, json.dumps({"task": "new"}))), ("train", (name, rows))]
        answer = call(target, "POST", "/admin/distill", files=files)
        assert answer.status_code in (202, 422), answer.text
        if answer.status_code == 202:
            call(target, "DELETE", answer.headers["location"])
        assert not list(target.folder.rglob("evil*"))

    @pytest.mark.parametrize(
        "parts",
        [
            [("spec", (None, "{}")), ("spec", (None, "{}"))],
            [("spec", (None, "{}")), ("../../etc", (None, "x"))],
            [("config.json", ("config.json", b"{}"))],
            [("spec", (None, "not json"))],
            [("spec", (None, "[" * 100_000))],
            [(f"part-{number}", (None, "x")) for number in range(2_000)],
        ],
    )
    def test_strange_forms(self, target, parts):
        answer = call(target, "POST", "/admin/adapters", files=parts)
        assert answer.status_code in (400, 422), answer.text

    @pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 5_000])
    def test_strange_boundaries(self, target, kind):
        headers = {"Content-Type": kind}
        answer = call(target, "POST", "/admin/adapters", data=b"--x\r\n", headers=headers)
        assert answer.status_code in (400, 422), answer.text


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class TestAdapters:
    """Files of adapters that are made to hurt whoever reads them."""

    def tensor(self, **fields):
        return {"base_model.model.classifier.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | fields}

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x00",
            struct.pack("<Q", 2**64 - 1) + b"{}",
            struct.pack("<Q", 2**40) + b"{}",
            safetensors(b"{" * 100_000),
            safetensors(b'{"a":' * 100_000),
            safetensors(b"{" + b" " * (4 * MIB) + b"}"),
            safetensors(b"\xff\xfe{}"),
            safetensors({}),
            safetensors({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
            safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [2**64, 2**65]}}),
            safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, bytes(8)),
            safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
            safetensors({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
            safetensors(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                },
                bytes(12),
            ),
            safetensors({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(50_000)}),
            safetensors({"__metadata__": {"format": "x" * MIB}}),
        ],
        ids=range(17),
    )
    def test_weights(self, target, content):
        files = form_of_adapter(**{"adapter_model.safetensors": content})
        refused(call(target, "POST", "/admin/adapters", files=files), 422)

    @pytest.mark.parametrize(
        "change",
        [
            {"id2label": {str(n): f"label {n}" for n in range(200_000)}},
            {"id2label": {"0": "x" * MIB, "1": "y"}},
            {"id2label": {"-1": "x", "18446744073709551616": "y"}},
            {"id2label": {"0": "same", "1": "same"}},
            {"id2label": {}},
            {"id2label": []},
            {"problem_type": "x" * 100_000},
        ],
        ids=range(7),
    )
    def test_labels(self, target, change):
        config = json.dumps(json.loads(golden("config.json")) | change)
        files = form_of_adapter(**{"config.json": config.encode()})
        answer = call(target, "POST", "/admin/adapters", files=files)
        assert answer.status_code in (201, 422), answer.text[:1_000]

    @pytest.mark.parametrize(
        "change",
        [
            {"r": 2**31},
            {"r": 0},
            {"r": -1},
            {"lora_alpha": 1e308},
            {"lora_alpha": "NaN"},
            {"target_modules": "(a+)+$"},
            {"target_modules": "(.*a){30}x"},
            {"target_modules": "(?=" * 2_000},
            {"target_modules": ["x" * 100_000]},
            {"target_modules": [str(n) for n in range(100_000)]},
            {"rank_pattern": {"(.*a){25}": 2**40}},
            {"rank_pattern": {rf"(?=(\w+\.?)+!)a{n}": 4 for n in range(1_000)}},
            {"alpha_pattern": {rf"(?:(a|\1)+)+\1{n}": 4 for n in range(1_000)}},
            {"target_modules": r"(?:\w{900}){900}"},
            {"layers_to_transform": [2**60]},
            {"base_model_name_or_path": "../../../../etc/passwd"},
            {"auto_mapping": {"base_model_class": "os.system"}},
        ],
        ids=range(17),
    )
    def test_descriptions(self, target, change):
        started = time.monotonic()
        config = json.dumps(json.loads(golden("adapter_config.json")) | change)
        files = form_of_adapter(**{"adapter_config.json": config.encode()})
        answer = call(target, "POST", "/admin/adapters", files=files)
        assert answer.status_code in (201, 422), answer.text[:1_000]
        assert time.monotonic() - started < 20

    def test_a_pickle_is_not_opened(self, target):
        files = form_of_adapter(**{"adapter_model.safetensors": b"\x80\x04cos\nsystem\n(S'id'\ntR."})
        refused(call(target, "POST", "/admin/adapters", files=files), 422)


class TestHeads:
    def test_many_headers(self, target):
        lines = [f"X-{number}: x" for number in range(5_000)]
        assert status(raw(target, head("/healthz", "GET", *lines))) == 431

    def test_a_long_header(self, target):
        assert status(raw(target, head("/healthz", "GET", "X: " + "x" * MIB))) == 431

    def test_a_long_address(self, target):
        assert status(raw(target, head("/" + "x" * MIB))) in (414, 431)

    def test_an_endless_line_without_an_end(self, target):
        answer = raw(target, b"GET /" + b"x" * (2 * MIB))
        assert status(answer) in (None, 400, 414, 431)

    @pytest.mark.parametrize(
        "request_bytes",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /healthz HTTP/9.9\r\n\r\n",
            b"\0" * 1_000,
            b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: a\r\n X: folded\r\n\r\n",
            b"GET /a\rb HTTP/1.1\r\nHost: a\r\n\r\n",
            b"G\xffT /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
        ],
        ids=range(8),
    )
    def test_what_is_not_http(self, target, request_bytes):
        assert status(raw(target, request_bytes)) in (None, 400, 505)

    @pytest.mark.parametrize(
        "lines",
        [
            ["Content-Length: 5", "Transfer-Encoding: chunked"],
            ["Content-Length: 5", "Content-Length: 6"],
            ["Content-Length: -1"],
            ["Content-Length: 99999999999999999999999"],
            ["Content-Length: 5, 6"],
            ["Transfer-Encoding: chunked, identity"],
            ["Transfer-Encoding: xchunked"],
            ["Transfer-Encoding : chunked"],
        ],
        ids=range(8),
    )
    def test_smuggled_requests(self, target, lines):
        inner = head("/healthz")
        body = b"0\r\n\r\n" + inner
        lines = [*lines, f"Authorization: Bearer {READER}", "Content-Type: application/json"]
        answer = raw(target, head(TASK, "POST", *lines) + body)
        assert status(answer) != 200, answer
        assert answer.count(b"HTTP/1.1 200") <= 1, answer

    @pytest.mark.parametrize("size", [b"ffffffffffffffff", b"fffffffffffffffff", b"-1", b"x"])
    def test_chunks_of_impossible_size(self, target, size):
        lines = ["Transfer-Encoding: chunked", f"Authorization: Bearer {READER}"]
        lines += ["Content-Type: application/json", "Connection: close"]
        answer = raw(target, head(TASK, "POST", *lines) + size + b"\r\nx\r\n")
        # The longest size is one; its bytes are waited for as for those of any body that stops.
        assert status(answer) in (None, 400, 408, 413), answer

    @pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PUT", "PATCH", "OPTIONS", "BREW"])
    def test_other_methods(self, target, method):
        lines = [f"Authorization: Bearer {ADMIN}", "Connection: close"]
        assert status(raw(target, head("/admin/jobs", method, *lines))) in (400, 404, 405)

    def test_ends_of_lines_do_not_get_into_answers_or_logs(self, target):
        path = "/v1/tasks/a%0d%0aX-Injected:%20yes%0d%0a%0d%0a<script>"
        answer = requests.get(target.url + path, headers={"Authorization": f"Bearer {READER}"})
        assert "X-Injected" not in answer.headers and answer.status_code == 404
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"] == "application/problem+json"
        identity = "x" * 10_000
        path = "/admin/tasks/none%0a%1b[31mforged/rollback"
        call(target, "POST", path, headers={"X-Request-Id": identity})
        audit = [line for line in target.read_log().splitlines() if "audit" in line]
        assert "\x1b[31mforged" not in audit[-1] and "rollback" in audit[-1]
        assert len(audit[-1]) < 2_000


class TestSlowClients:
    def attack(self, target, start, drip, count=39, seconds=4):
        """Opens `count` connections that begin with `start` and go on with `drip` at a time."""
        streams = [connect(target) for _ in range(count)]
        for stream in streams:
            stream.sendall(start)
        stop = threading.Event()

        def go_on():
            while not stop.wait(0.2):
                for stream in streams:
                    try:
                        stream.sendall(drip)
                    except OSError:
                        pass

        thread = threading.Thread(target=go_on)
        thread.start()
        return streams, stop, thread

    def closed(self, streams, within):
        deadline = time.monotonic() + within
        ends = []
        for stream in streams:
            stream.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                while stream.recv(4096):
                    pass
                ends.append("closed")
            except ConnectionError:
                ends.append("closed")
            except TimeoutError:
                ends.append("open")
        return ends

    def test_heads_that_come_byte_by_byte(self, target):
        start = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: "
        streams, stop, thread = self.attack(target, start, b"a")
        try:
            # All places are taken but one; when it is taken too, others wait for a second at most.
            assert requests.get(f"{target.url}/healthz", timeout=10).status_code == 200
            assert set(self.closed(streams, 10)) == {"closed"}
        finally:
            stop.set()
            thread.join()

    def test_connections_that_say_nothing(self, target):
        streams = [connect(target) for _ in range(120)]
        assert requests.get(f"{target.url}/healthz", timeout=20).status_code == 200
        assert set(self.closed(streams, 20)) == {"closed"}

    def test_a_body_that_stops(self, target):
        lines = ["Content-Length: 1000", "Content-Type: application/json"]
        lines += [f"Authorization: Bearer {READER}", "Connection: close"]
        with connect(target) as stream:
            stream.sendall(head(TASK, "POST", *lines) + b'{"inputs":')
            answer = stream.recv(65536)
        assert status(answer) == 408, answer

    def test_an_upload_that_stops(self, target):
        lines = ["Content-Length: 1000", "Content-Type: multipart/form-data; boundary=x"]
        lines += [f"Authorization: Bearer {ADMIN}", "Connection: close"]
        start = b'--x\r\nContent-Disposition: form-data; name="spec"\r\n\r\n{'
        with connect(target) as stream:
            stream.sendall(head("/admin/adapters", "POST", *lines) + start)
            answer = stream.recv(65536)
        assert status(answer) == 408, answer

    def test_nobody_waits_for_the_body_of_somebody_without_a_token(self, target):
        lines = ["Content-Length: 8000000", "Content-Type: multipart/form-data; boundary=x"]
        with connect(target) as stream:
            stream.sendall(head("/admin/adapters", "POST", *lines))
            started = time.monotonic()
            assert status(stream.recv(65536)) == 401
            assert time.monotonic() - started < 1


class TestBodies:
    DEEP = 100_000

    @pytest.mark.parametrize(
        "path",
        [
            TASK,
            "/predict",
            "/tasks/pairs",
            "/v2/models/pairs/infer",
            "/admin/distill",
            "/admin/adapters",
            "/admin/tasks/pairs/promote",
            "/admin/tasks/pairs/mode",
        ],
    )
    @pytest.mark.parametrize("shape", ["[", '{"inputs":', '{"a":['])
    def test_deep_json(self, target, path, shape):
        body = shape * self.DEEP
        headers = {"Content-Type": "application/json"}
        answer = call(target, "POST", path, data=body, headers=headers)
        assert answer.status_code in (400, 413, 422), answer.text[:500]

    @pytest.mark.parametrize("number", ["1e400", "-1e400", "18446744073709551616", "-1", "0.5", "1E-400", "0" * 100 + "1", "9" * 100_000])
    @pytest.mark.parametrize("field", ["top_k", "version", "timeout_ms"])
    def test_numbers_out_of_all_proportion(self, target, field, number):
        body = f'{{"inputs": "a", "{field}": {number}}}'
        headers = {"Content-Type": "application/json"}
        answer = call(target, "POST", TASK, data=body, headers=headers)
        assert answer.status_code in (400, 422), answer.text[:500]

    @pytest.mark.parametrize("body", [{"top_k": 2**64 - 1}, {"timeout_ms": 2**64 - 1}])
    def test_the_largest_numbers(self, target, body):
        assert call(target, "POST", TASK, json=QUESTION | body).status_code == 200

    @pytest.mark.parametrize(
        "change",
        [
            {"training": {"epochs": 2**63}},
            {"training": {"batch_size": 0}},
            {"training": {"max_length": 2**62}},
            {"training": {"learning_rate": 1e308}},
            {"training": {"temperature": 0}},
            {"lora": {"r": 2**40}},
            {"lora": {"alpha": -1e308}},
            {"gate": {"keep": 1e300}},
        ],
        ids=range(8),
    )
    def test_a_pass_out_of_all_proportion(self, target, change):
        rows = [{"text": f"the cat {word}", "label": word} for word in ["sat", "one"] * 20]
        body = {"task": "huge", "data": {"train": {"rows": rows}}} | change
        answer = call(target, "POST", "/admin/distill", json=body)
        assert answer.status_code in (202, 422), answer.text
        if answer.status_code == 202:
            assert call(target, "DELETE", answer.headers["location"]).status_code in (200, 409)

    @pytest.mark.parametrize("version", [0, 2**63 - 1, 2**63, 2**64 - 1])
    def test_versions_that_cannot_be(self, target, version):
        answer = call(target, "POST", "/admin/tasks/pairs/promote", json={"version": version})
        assert answer.status_code == 404, answer.text
        path = f"/v2/models/pairs/versions/{version}/ready"
        assert call(target, "GET", path).status_code == 409

    @pytest.mark.parametrize("body", [b'{"inputs": "\xff"}', b'\xef\xbb\xbf{"inputs": "a"}', b'{"inputs": "\xed\xa0\x80"}', '{"inputs": "a"}'.encode("utf-16"), b'{"inputs": "\\ud800"}', b'{"inputs": "a\x00"}'])
    def test_bytes_that_are_not_utf_8(self, target, body):
        headers = {"Content-Type": "application/json"}
        refused(call(target, "POST", TASK, data=body, headers=headers), 400)

    @pytest.mark.parametrize("text", ["\0", "\u202e" * 100, "a" + "\u0301" * 50_000, "\U0010ffff" * 20_000, "[MASK][CLS][SEP]" * 1_000, "\ufeff", "𝕒" * 50_000, "a" * 100_000, " a" * 50_000])
    def test_texts_that_are_made_to_hurt(self, target, text):
        started = time.monotonic()
        answer = call(target, "POST", TASK, json={"inputs": text})
        assert answer.status_code in (200, 422), answer.text[:500]
        assert time.monotonic() - started < 20

    def test_a_key_twice(self, target):
        headers = {"Content-Type": "application/json"}
        for path in (TASK, "/predict", "/tasks/pairs"):
            body = '{"inputs": "a", "inputs": "b"}'
            refused(call(target, "POST", path, data=body, headers=headers), 422, "duplicate field")
        body = '{"version": 9, "version": 1}'
        answer = call(target, "POST", "/admin/tasks/pairs/promote", data=body, headers=headers)
        refused(answer, 422, "duplicate field")

    def test_a_million_empty_inputs(self, target):
        body = b'{"inputs": [' + b'"",' * 600_000 + b'""]}'
        headers = {"Content-Type": "application/json"}
        refused(call(target, "POST", TASK, data=body, headers=headers), 413)

    def test_a_body_over_the_limit_with_and_without_its_length(self, target):
        body = b'{"inputs": "' + b"a" * (3 * MIB) + b'"}'
        headers = {"Content-Type": "application/json"}
        refused(call(target, "POST", TASK, data=body, headers=headers), 413)
        chunks = (body[place : place + 65536] for place in range(0, len(body), 65536))
        refused(call(target, "POST", TASK, data=chunks, headers=headers), 413)

    @pytest.mark.parametrize("path", [TASK, "/predict", "/tasks/pairs", "/v2/models/pairs/infer", "/admin/distill", "/admin/adapters", "/admin/tasks/pairs/promote"])
    def test_compressed_bodies_are_unpacked_to_the_limit_only(self, target, path):
        bomb = gzip.compress(b'{"inputs": "' + b" " * (100 * MIB) + b'"}')
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        refused(call(target, "POST", path, data=bomb, headers=headers), 413)

    @pytest.mark.parametrize("path", ["/admin/distill", "/admin/adapters"])
    def test_compressed_forms_are_unpacked_to_the_limit_only(self, target, path):
        part = b'--x\r\nContent-Disposition: form-data; name="train"; filename="a.csv"\r\n\r\n'
        if path == "/admin/adapters":
            part = part.replace(b"train", b"archive")
        bomb = gzip.compress(part + b"a" * (9 * MIB) + b"\r\n--x--\r\n")
        headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"}
        refused(call(target, "POST", path, data=bomb, headers=headers), 413)

    @pytest.mark.parametrize(
        "length, body",
        [("99999999999999999999", b"{}"), ("10", b"{}"), ("-1", b"{}"), ("é", b"{}"), ("0", b""), ("2", b"{}" + b"\xff" * 100)],
    )
    def test_lengths_of_json_that_lie(self, target, length, body):
        headers = {"Inference-Header-Content-Length": length.encode()}
        answer = call(target, "POST", "/v2/models/pairs/infer", data=body, headers=headers)
        assert answer.status_code in (400, 422), answer.text

    @pytest.mark.parametrize("size", [0, 1, 4, 2**31, 2**64 - 1])
    def test_tensors_that_lie(self, target, size):
        tensor = {"name": "text", "shape": [2**64 - 1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
        text = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        body = text + struct.pack("<I", 2**32 - 1)
        answer = call(target, "POST", "/v2/models/pairs/infer", data=body, headers=headers)
        refused(answer, 422)


class TestTokens:
    def test_the_time_does_not_tell_how_near_a_guess_is(self, target):
        """Hashes are compared, in constant time, so that there is nothing to be seen; what is
        asserted is that nothing stands out of the noise of a socket on a busy machine."""
        near, far = ADMIN[:-1] + "X", "X" + ADMIN[1:]
        times = {near: [], far: []}
        with requests.Session() as session:
            for round_number in range(600):
                for guess in (near, far) if round_number % 2 else (far, near):
                    headers = {"Authorization": f"Bearer {guess}"}
                    started = time.perf_counter()
                    answer = session.get(f"{target.url}/admin/jobs", headers=headers)
                    times[guess].append(time.perf_counter() - started)
                    assert answer.status_code in (401, 429)
        medians = {guess: statistics.median(taken) for guess, taken in times.items()}
        difference = abs(medians[near] - medians[far])
        print(f"medians {medians[near] * 1e6:.0f} and {medians[far] * 1e6:.0f} µs")
        assert difference < 0.5 * medians[far]

    def test_guessing_ends_and_shuts_nobody_out(self, target):
        codes = [call(target, "GET", "/admin/jobs", token=f"guess-{n}").status_code for n in range(60)]
        assert codes[-1] == 429 and set(codes) <= {401, 429}
        answer = call(target, "GET", "/admin/jobs", token="guess")
        assert int(answer.headers["retry-after"]) >= 1
        assert call(target, "GET", "/admin/jobs").status_code == 200

    def test_a_reader_changes_nothing(self, target):
        for method, path in [
            ("GET", "/admin/jobs"),
            ("POST", "/admin/distill"),
            ("POST", "/admin/adapters"),
            ("POST", "/admin/tasks/pairs/promote"),
            ("DELETE", "/admin/jobs/x"),
        ]:
            assert call(target, method, path, token=READER).status_code == 403

    def test_nothing_is_told_without_a_token(self, target):
        document = requests.get(f"{target.url}/openapi.json").json()
        open_paths = {"/healthz", "/readyz", "/health", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
        for path, item in document["paths"].items():
            for method, operation in item.items():
                answer = requests.request(method, target.url + path.replace("{", "").replace("}", ""))
                is_open = path in open_paths or operation.get("security") == [{}]
                expected = 200 if is_open else 401
                assert answer.status_code == expected, (method, path, answer.text)

    @pytest.mark.parametrize("value", ["Bearer", "Bearer  ", "Basic eDp5", "Bearer " + "x" * 20_000, "Bearer a b", "bearer\t" + ADMIN])
    def test_strange_authorizations(self, target, value):
        answer = requests.get(f"{target.url}/v1/tasks", headers={"Authorization": value})
        assert answer.status_code in (401, 429)

    def test_tokens_are_not_in_the_log(self, target):
        assert ADMIN not in target.read_log() and READER not in target.read_log()

    def test_a_token_is_withdrawn_without_a_restart(self):
        with Server(closed=True) as server:
            assert call(server, "GET", "/v1/tasks", token=READER).status_code == 200
            other = server.folder / "others"
            other.write_text("roy:another-token-for-the-tests\n")
            other.rename(server.folder / "readers")
            deadline = time.monotonic() + 10
            while call(server, "GET", "/v1/tasks", token=READER).status_code != 401:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            answer = call(server, "GET", "/v1/tasks", token="another-token-for-the-tests")
            assert answer.status_code == 200


class TestRates:
    def test_each_token_has_a_rate_and_size_of_its_own(self):
        with Server("--rate-limit", "5/m", closed=True) as server:
            with open(server.folder / "readers", "a") as file:
                file.write("rob:a-second-reader-for-the-tests rate=2/m max-body=40\n")
            codes = [call(server, "GET", "/v1/tasks", token=READER).status_code for _ in range(8)]
            assert codes == [200] * 5 + [429] * 3
            time.sleep(0.6)
            rob = "a-second-reader-for-the-tests"
            body = {"inputs": "the cat sat on the mat all day long"}
            assert call(server, "POST", TASK, token=rob, json=body).status_code == 413
            answer = call(server, "POST", TASK, token=rob, json={"inputs": "a"})
            assert answer.status_code == 200
            answer = call(server, "POST", TASK, token=rob, json={"inputs": "a"})
            assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 30
            assert requests.get(f"{server.url}/healthz").status_code == 200

    def test_without_tokens_each_address_has_a_rate(self):
        with Server("--rate-limit", "3/m") as server:
            codes = [requests.get(f"{server.url}/v1/tasks").status_code for _ in range(5)]
            assert codes == [200] * 3 + [429] * 2


class TestPages:
    """Pages of other origins in a browser on the machine of a server without tokens."""

    def test_they_change_nothing(self):
        with Server() as server:
            port = server.port
            evil = {"Origin": "https://evil.example"}
            rebound = {"Host": f"evil.example:{port}"}
            others = [{"Origin": "null"}, {"Origin": "http://localhost:3000"}]
            others += [{"Origin": server.url, "Sec-Fetch-Site": site} for site in ("cross-site", "same-site")]
            for headers in (evil, rebound, *others):
                answer = requests.post(
                    f"{server.url}/admin/tasks/pairs/rollback", headers=headers, timeout=10
                )
                assert answer.status_code == 403
            text = {"Content-Type": "text/plain"}
            answer = requests.post(f"{server.url}{TASK}", data='{"inputs": "a"}', headers=text)
            assert answer.status_code == 415
            answer = requests.options(
                f"{server.url}{TASK}", headers=evil | {"Access-Control-Request-Method": "POST"}
            )
            assert "access-control-allow-origin" not in answer.headers

    def test_names_that_are_pointed_at_the_machine_read_nothing(self):
        with Server() as server:
            rebound = {"Host": f"evil.example:{server.port}"}
            for path in ("/v1/tasks", "/metrics", "/v2/models/pairs"):
                assert requests.get(server.url + path, headers=rebound).status_code == 403
                assert requests.get(server.url + path).status_code == 200
            answer = requests.post(f"{server.url}{TASK}", json=QUESTION, headers=rebound)
            assert answer.status_code == 403

    def test_proxies_open_nothing(self):
        with Server() as server:
            for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via"):
                for method, path in [("GET", "/admin/jobs"), ("DELETE", "/admin/tasks/pairs")]:
                    answer = requests.request(method, server.url + path, headers={name: "203.0.113.9"})
                    assert answer.status_code == 403, (name, path)
            assert requests.get(f"{server.url}/admin/jobs").status_code == 200

    def test_only_the_origins_that_are_named_may(self):
        with Server("--cors-origin", "https://good.example") as server:
            ask = {"Access-Control-Request-Method": "POST"}
            good = requests.options(f"{server.url}{TASK}", headers=ask | {"Origin": "https://good.example"})
            assert good.headers["access-control-allow-origin"] == "https://good.example"
            evil = requests.options(f"{server.url}{TASK}", headers=ask | {"Origin": "https://evil.example"})
            assert "access-control-allow-origin" not in evil.headers
            answer = requests.post(
                f"{server.url}/admin/tasks/pairs/rollback", headers={"Origin": "https://good.example"}
            )
            assert answer.status_code == 403


class TestAudit:
    def test_every_act_is_written_down(self, target):
        call(target, "POST", "/admin/tasks/pairs/promote", json={"version": 1})
        call(target, "POST", "/admin/tasks/pairs/promote", json={"version": 77})
        call(target, "POST", "/admin/tasks/pairs/promote", token=READER, json={"version": 1})
        lines = [line for line in target.read_log().splitlines() if "audit" in line][-3:]
        for line, parts in zip(
            lines,
            [
                ["ada", "127.0.0.1", "POST", "/admin/tasks/pairs/promote", "status=200"],
                ["ada", "status=404", "unknown-version"],
                ["ray", "status=403", "forbidden"],
            ],
        ):
            for part in parts:
                assert part in line, (part, line)
        files = form_of_adapter("audited", promote=True)
        assert call(target, "POST", "/admin/adapters", files=files).status_code == 201
        history = call(target, "GET", "/admin/tasks/audited/versions").json()["history"]
        assert [entry["actor"] for entry in history] == ["ada"]
