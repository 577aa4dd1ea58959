"""Downloads from a local server with the hub's layout, that breaks off, lies, refuses and stops in the middle."""

import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from data_tools.download import main
from data_tools.download_record import Record, RemoteFile
from data_tools.download_transfer import Backoff, Stopped, Transfer, fetch_record
from data_tools.readers import find_files

ROOT = Path(__file__).parents[2]
REPOSITORY = "cerebras/SlimPajama-627B"
FIRST, SECOND = "1" * 40, "2" * 40
SIZE = 600_000
BIG = "train/chunk1/example_train_0.jsonl.zst"
PAGE = 3
DEADLINE = 60.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer that has a file's bytes."""

    status: int = 0  # an error instead
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None  # the connection breaks
    short_body: int | None = None  # a whole answer of fewer bytes
    extra: int = 0  # bytes more than the file has
    corrupt: bool = False
    whole: bool = False  # the range is ignored
    hold: Event | None = None  # after `drop_after` bytes, until it is set


@dataclass(frozen=True)
class Answer:
    path: str
    range: str | None
    sent: int


class Hub(ThreadingHTTPServer):
    """One dataset repository at two commits; files of 1000 bytes and more are in LFS, and so on another path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        draw = random.Random(5)
        names = [f"train/chunk{chunk}/example_train_{n}" for chunk in (1, 2, 3, 10) for n in (0, 1)]
        names += [f"validation/chunk{chunk}/example_holdout_0" for chunk in (1, 2)]
        old = {f"{name}.jsonl.zst": draw.randbytes(40_000) for name in names}
        old |= {BIG: draw.randbytes(SIZE), "validation/chunk2/example_holdout_0.jsonl.zst": b"not in LFS"}
        old |= {"README.md": b"text", "train/chunk1/.hidden.jsonl.zst": b"", "../chunk1/out.jsonl.zst": b"out"}
        self.commits = {FIRST: old, SECOND: {path: content[::-1] for path, content in old.items()}}
        self.revisions = {"main": FIRST, FIRST: FIRST, SECOND: SECOND}
        self.token = ""
        self.faults: dict[str, list[Fault]] = {}
        self.answers: list[Answer] = []
        self.requests: list[str] = []
        self.forgotten = 0  # answers held until the deadline

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        """The data files at the first commit."""
        return {p: c for p, c in self.commits[FIRST].items() if re.match(r"(train|validation)/chunk\d+/\w", p)}

    def of(self, path: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.path == path]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no matter for the tests' output."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(path)
        if path.startswith("/cdn/"):
            _, _, commit, name = path.split("/", 3)
            # A token that leaked to another host; an encoding that takes the ranges from the server.
            if "Authorization" in self.headers or self.headers["Accept-Encoding"] != "identity":
                return self.answer(400, b"", {})
            return self.send_file(name, self.server.commits[commit][name], {})
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if (begin := f"/api/datasets/{REPOSITORY}/revision/") and path.startswith(begin):
            return self.send_revision(path.removeprefix(begin))
        if (begin := f"/api/datasets/{REPOSITORY}/tree/") and path.startswith(begin):
            return self.send_tree(path.removeprefix(begin), int(parse_qs(url.query).get("cursor", ["0"])[0]))
        if (begin := f"/datasets/{REPOSITORY}/resolve/") and path.startswith(begin):
            return self.resolve(*path.removeprefix(begin).split("/", 1))
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_revision(self, revision: str) -> None:
        if faults := self.server.faults.get("revision"):
            return self.answer(faults.pop(0).status, b"", {})
        if revision not in self.server.revisions:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self.answer(200, json.dumps({"id": REPOSITORY, "sha": self.server.revisions[revision]}).encode(), {})

    def send_tree(self, commit: str, start: int) -> None:
        contents = sorted(self.server.commits[commit].items())
        entries = [entry(path, content) for path, content in contents[start : start + PAGE]]
        entries.append({"type": "directory", "path": "train", "oid": "0" * 40})
        more = {"Link": f'<{self.server.url}{urlsplit(self.path).path}?cursor={start + PAGE}>; rel="next"'}
        self.answer(200, json.dumps(entries).encode(), more if start + PAGE < len(contents) else {})

    def resolve(self, commit: str, path: str) -> None:
        content = self.server.commits[commit][path]
        about = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if len(content) < 1000:
            return self.send_file(path, content, about)
        storage = f"http://localhost:{self.server.server_port}/cdn"
        moved = {"Location": f"{storage}/{commit}/{path}", "X-Linked-Size": str(len(content))}
        return self.answer(302, b"", about | moved)

    def send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        faults = self.server.faults.get(path)
        fault = faults.pop(0) if faults else Fault()
        asked = self.headers["Range"]
        if fault.status:
            self.server.answers.append(Answer(path, asked, 0))
            return self.answer(fault.status, b"", fault.headers)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and not fault.whole else 0
        if start >= len(content) > 0:
            return self.answer(416, b"", {})
        body = content[start:]
        if asked and not fault.whole:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if fault.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        body += bytes(fault.extra)
        if fault.short_body is not None:
            body = body[: fault.short_body]
        sent = body if fault.drop_after is None else body[: fault.drop_after]
        # Noted first: a client that has the last byte may look at once.
        self.server.answers.append(Answer(path, asked, len(sent)))
        self.answer(206 if "Content-Range" in headers else 200, sent, headers, len(body))
        if fault.hold:
            self.wfile.flush()
            self.server.forgotten += not fault.hold.wait(DEADLINE)
        if len(sent) < len(body):
            self.close_connection = True
        return None

    def answer(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def entry(path: str, content: bytes) -> dict:
    """A file as the hub's listing has it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if len(content) < 1000:
        return {"type": "file", "path": path, "size": len(content), "oid": blob}
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": path, "size": len(content), "oid": "f" * 40, "lfs": lfs}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Callable[..., int]:
    """The command in this process, without the waits."""

    def download(*arguments: str, retries: int = 3, token: str | None = None) -> int:
        api = HfApi(endpoint=hub.url, token=token)
        return main(["--output", f"{tmp_path}/data", *arguments], api, Backoff(first=0, retries=retries))

    return download


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in the folder, apart from the three files about it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("download.")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def finished(folder: Path) -> list[Path]:
    return list(folder.rglob("*.jsonl.zst"))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def test_everything_comes_once_and_whole(hub, run, data, capsys):
    assert run() == 0

    assert len(hub.files) == 10
    assert contents(data) == hub.files
    assert sorted(answer.path for answer in hub.answers) == sorted(hub.files)
    record = Record.read(data)
    assert record is not None
    assert (record.repository, record.revision, record.commit) == (REPOSITORY, "main", FIRST)
    output = capsys.readouterr().out
    received = sum(map(len, hub.files.values())) / 1e6
    assert "10 of 10 files are there and verified" in output and f"received {received:.1f} MB in" in output
    globs = [glob for one in re.findall(r"--input (.*) …", output) for glob in shlex.split(one)]
    assert globs == [f"{data}/train/chunk*/*.jsonl.zst", f"{data}/validation/chunk*/*.jsonl.zst"]
    assert find_files(globs) == sorted(data / path for path in hub.files)
    assert not (data.parent / "chunk1").exists()  # where `../chunk1/` would lead


def test_a_second_run_asks_nothing_of_the_server(hub, run, data):
    run()
    asked = len(hub.requests)

    assert run() == 0

    assert len(hub.requests) == asked


def test_split_and_chunks_choose(hub, run, data, capsys):
    assert run("--split", "train", "--chunks", "1-2,10") == 0

    chosen = {f"train/chunk{chunk}/example_train_{n}.jsonl.zst" for chunk in (1, 2, 10) for n in (0, 1)}
    assert contents(data).keys() == chosen
    globs = shlex.split(re.findall(r"--input (.*) …", capsys.readouterr().out)[0])
    assert {path.relative_to(data).as_posix() for path in find_files(globs)} == chosen

    assert run("--split", "validation") == 0  # more of the same commit
    assert contents(data).keys() == chosen | {path for path in hub.files if path.startswith("validation")}

    assert run() == 0
    capsys.readouterr()
    assert run("--split", "train", "--chunks", "1-2,10") == 0  # no other file is meant, though they are all there
    globs = shlex.split(re.findall(r"--input (.*) …", capsys.readouterr().out)[0])
    assert {path.relative_to(data).as_posix() for path in find_files(globs)} == chosen


@pytest.mark.parametrize(
    ("arguments", "lacking"),
    [
        (["--split", "trian"], "no split 'trian'"),
        (
            ["--split", "train", "validation", "--chunks", "2-4"],
            "no train/chunk4, no validation/chunk3, no validation/",
        ),
        (["--chunks", "10"], "no validation/chunk10"),
    ],
)
def test_a_choice_that_is_not_there_names_what_is(run, data, capsys, arguments, lacking):
    assert run(*arguments) == 1

    error = capsys.readouterr().err
    assert lacking in error
    assert "train: chunks 1, 2, 3, 10; validation: chunks 1, 2" in error
    assert not data.exists()


@pytest.mark.parametrize("chunks", ["", "3-1", "1,,2", "a", "1-2-3", "-1"])
def test_chunks_that_are_no_numbers_are_refused(run, capsys, chunks):
    with pytest.raises(SystemExit) as exit_:
        run(f"--chunks={chunks}")
    assert exit_.value.code == 2
    assert "write chunks like 1-3,7" in capsys.readouterr().err


def test_a_dropped_connection_goes_on_where_it_broke(hub, run, data):
    hub.faults[BIG] = [Fault(drop_after=250_000), Fault(drop_after=250_000)]

    assert run() == 0

    assert contents(data) == hub.files
    first, second, third = hub.of(BIG)
    assert first.range is None
    offsets = [int(answer.range.removeprefix("bytes=").removesuffix("-")) for answer in (second, third)]
    assert offsets == [250_000, 500_000]
    assert sum(answer.sent for answer in hub.of(BIG)) == SIZE


def test_more_breaks_than_retries_do_while_each_brings_something(hub, run, data):
    hub.faults[BIG] = [Fault(drop_after=50_000)] * 10

    assert run(retries=2) == 0

    assert contents(data) == hub.files
    assert len(hub.of(BIG)) == 11


def test_a_body_cut_short_goes_on_where_it_ended(hub, run, data):
    hub.faults[BIG] = [Fault(short_body=400_000)]

    assert run() == 0

    assert contents(data) == hub.files
    assert [answer.range for answer in hub.of(BIG)] == [None, "bytes=400000-"]


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub, run, data):
    hub.faults[BIG] = [Fault(drop_after=250_000), Fault(whole=True)]

    assert run() == 0

    assert contents(data) == hub.files
    assert [answer.sent for answer in hub.of(BIG)] == [250_000, SIZE]


def test_breaks_at_the_same_place_end_the_retries(hub, run, capsys):
    hub.faults[BIG] = [Fault(whole=True, drop_after=100_000)] * 3

    assert run(retries=2) == 1

    assert len(hub.of(BIG)) == 3
    assert f"error: {BIG}: RemoteProtocolError: peer closed connection" in capsys.readouterr().err


def test_a_body_that_goes_on_and_on_is_not_read_to_its_end(hub, run, data, capsys):
    hub.faults[BIG] = [Fault(extra=4_000_000)]

    assert run() == 0

    assert contents(data) == hub.files
    assert [answer.range for answer in hub.of(BIG)] == [None, None]
    megabytes = re.search(r"received ([\d.]+) MB in", capsys.readouterr().out)
    assert megabytes and 1.5 <= float(megabytes[1]) < 2  # one file twice, and the piece that was too much


def test_wrong_bytes_are_fetched_again_from_the_start(hub, run, data):
    hub.faults[BIG] = [Fault(corrupt=True), Fault(drop_after=300_000), Fault(corrupt=True)]

    assert run() == 0

    assert contents(data) == hub.files
    assert [answer.range for answer in hub.of(BIG)] == [None, None, "bytes=300000-", None]


def test_a_file_that_stays_wrong_does_not_appear_and_does_not_keep_the_others(hub, run, data, capsys):
    hub.faults[BIG] = [Fault(corrupt=True)] * 3
    missing = "train/chunk2/example_train_1.jsonl.zst"
    hub.faults[missing] = [Fault(status=404)]

    assert run(retries=2) == 1

    assert contents(data) == {path: content for path, content in hub.files.items() if path not in (BIG, missing)}
    wrong = hashlib.sha256(bytes([hub.files[BIG][0] ^ 1]) + hub.files[BIG][1:]).hexdigest()
    output = capsys.readouterr()
    assert "8 of 10 files are there" in output.out and "next:" not in output.out
    right = hashlib.sha256(hub.files[BIG]).hexdigest()
    assert f"error: {BIG}: received sha256 {wrong}, should be {right}\n" in output.err
    assert f"error: {missing}: HTTP 404 Not Found" in output.err and len(hub.of(missing)) == 1
    assert "2 files are not there" in output.err
    answered = len(hub.answers)

    assert run() == 0

    assert contents(data) == hub.files
    assert sorted(answer.path for answer in hub.answers[answered:]) == [BIG, missing]


def test_errors_that_pass_are_waited_out(hub, run, data):
    hub.faults[BIG] = [Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}), Fault(status=500)]
    hub.faults["revision"] = [Fault(status=503), Fault(status=502)]

    assert run() == 0

    assert contents(data) == hub.files
    assert len(hub.of(BIG)) == 4


def test_errors_that_stay_end_the_retries(hub, run, capsys):
    hub.faults[BIG] = [Fault(status=503)] * 4

    assert run(retries=3) == 1

    assert len(hub.of(BIG)) == 4
    assert f"error: {BIG}: HTTP 503 Service Unavailable\n" in capsys.readouterr().err


def test_a_connection_that_stalls_is_given_up_and_goes_on(hub, run, data, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    held = Event()
    hub.faults[BIG] = [Fault(drop_after=300_000, hold=held)]

    assert run() == 0
    held.set()

    assert hub.forgotten == 0
    assert contents(data) == hub.files
    assert [answer.range for answer in hub.of(BIG)] == [None, "bytes=300000-"]


def test_waits_double_up_to_a_limit_unless_the_server_says_how_long():
    def refused(status: int, **headers: str) -> HfHubHTTPError:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = httpx2.Request("GET", "http://hub/file")
        return HfHubHTTPError("refused", response=httpx2.Response(status, headers=named, request=request))

    backoff = Backoff(first=1, longest=10)

    assert [backoff.seconds(failures, OSError()) for failures in (1, 2, 3, 4, 5, 50)] == [1, 2, 4, 8, 10, 10]
    assert backoff.seconds(1, refused(503)) == 1
    assert backoff.seconds(1, refused(503, Retry_After="120")) == 120
    assert backoff.seconds(1, refused(429, ratelimit='"resolvers";r=0;t=55')) == 56
    assert backoff.seconds(1, refused(503, ratelimit='"resolvers";r=9;t=55')) == 1


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_goes_on_in_the_middle(hub, run, data, capsys, sign):
    held = Event()
    hub.faults[BIG] = [Fault(drop_after=300_000, hold=held)]
    command = [sys.executable, "-m", "data_tools.download", "--output", str(data), "--workers", "2"]
    environment = os.environ | {"HF_ENDPOINT": hub.url}
    partial = data / f"{BIG}.partial"
    deadline = time.monotonic() + DEADLINE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (partial.exists() and partial.stat().st_size > 200_000 and len(finished(data)) == 9):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            assert run() == 1
            assert f"{data}: another run is writing there" in capsys.readouterr().err
            process.send_signal(sign)
            if sign == signal.SIGINT:
                held.set()  # the worker sees the stop at its next bytes
            error = process.communicate(timeout=DEADLINE)[1]
        finally:
            process.kill()
            held.set()
    assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL)
    if sign == signal.SIGINT:
        assert "interrupted; run the same command again" in error and "Traceback" not in error
    have = partial.stat().st_size
    assert not (data / BIG).exists()

    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=DEADLINE)

    assert contents(data) == hub.files
    assert [answer.range for answer in hub.of(BIG)] == [None, f"bytes={have}-"]
    assert len(hub.answers) == len(hub.files) + 1  # nothing else came twice


def test_a_transfer_stops_between_two_pieces_and_keeps_what_it_has(hub, data):
    data.mkdir()
    api, stop, received = HfApi(endpoint=hub.url), Event(), []
    record = fetch_record(api, REPOSITORY, "main", Backoff(first=0))
    file = next(file for file in record.files if file.path == BIG)

    def receive(count: int) -> None:
        received.append(count)
        stop.set()

    with pytest.raises(Stopped):
        Transfer(api, record, Backoff(first=0), receive, stop).fetch(file, data / "file")

    assert len(received) == 1
    assert (data / "file.partial").read_bytes() == hub.files[BIG][: received[0]]


def test_a_partial_file_of_wrong_bytes_costs_one_more_try(hub, run, data):
    partial = data / f"{BIG}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    other = data / "train/chunk1/example_train_1.jsonl.zst.partial"
    other.write_bytes(b"longer than the file" * 10_000)

    assert run() == 0

    assert contents(data) == hub.files
    assert [answer.range for answer in hub.of(BIG)] == ["bytes=1000-", None]


def test_a_branch_that_moves_changes_nothing_in_a_folder(hub, run, data, capsys):
    run("--split", "validation")
    hub.revisions["main"] = SECOND

    assert run("--revision", "main") == 0

    assert contents(data) == hub.files  # of the first commit


def test_another_revision_or_repository_is_refused(hub, run, data, capsys):
    run("--split", "validation")
    before = contents(data)

    assert run("--revision", SECOND) == 1
    assert run("--repo", "somebody/else") == 1
    assert run("--revision", FIRST, "--split", "validation") == 0

    error = capsys.readouterr().err
    assert f"holds {REPOSITORY} at {FIRST}" in error and f"'{SECOND}' is something else" in error
    assert "'somebody/else' is something else" in error
    assert contents(data) == before


def test_verify_names_damaged_and_missing_files_and_fetches_none(hub, run, data, capsys):
    run("--split", "train", "--chunks", "1-2")
    damaged, cut, missing = BIG, "train/chunk2/example_train_0.jsonl.zst", "train/chunk2/example_train_1.jsonl.zst"
    flip_byte(data / damaged)
    (data / cut).write_bytes(b"cut")
    (data / missing).unlink()
    asked, lying = len(hub.requests), contents(data)
    capsys.readouterr()

    assert run("--verify") == 1

    first, *others, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{damaged}: damaged: sha256 ")
    assert others == [f"{cut}: damaged: 3 bytes, should be 40,000", f"{missing}: missing"]
    assert "1 of 4 files are those of" in last  # chunk 3 was never asked for
    assert (len(hub.requests), contents(data)) == (asked, lying)

    assert run("--split", "train", "--chunks", "1-2") == 0
    assert run("--verify") == 0
    assert [len(hub.of(path)) for path in (damaged, cut, missing)] == [2, 2, 2]


def test_a_file_damaged_since_is_fetched_again_without_being_told(hub, run, data):
    run()
    flip_byte(data / BIG)
    small = data / "validation/chunk2/example_holdout_0.jsonl.zst"
    small.write_bytes(b"not")

    assert run() == 0

    assert contents(data) == hub.files
    assert len(hub.answers) == len(hub.files) + 2


def test_a_damaged_file_that_cannot_be_had_again_does_not_stay(hub, run, data):
    run()
    flip_byte(data / BIG)
    hub.faults[BIG] = [Fault(status=403)]

    assert run() == 1

    assert contents(data) == {path: content for path, content in hub.files.items() if path != BIG}


def test_damage_that_only_verify_sees_is_mended_by_the_next_run(hub, run, data):
    run()
    record = data / "download.verified"
    flip_byte(data / BIG)
    # As if the disk had lost the bit: with the change time that the file had when it was whole.
    lines = [line.split() for line in record.read_text().splitlines()]
    times = {path: str((data / path).stat().st_ctime_ns) for _, path in lines}
    record.write_text("".join(f"{times[path]} {path}\n" for path in times))
    assert run() == 0 and contents(data) != hub.files

    assert run("--verify") == 1
    assert run() == 0

    assert contents(data) == hub.files
    assert len(hub.of(BIG)) == 2


def test_files_of_a_folder_that_was_copied_are_hashed_and_not_fetched(hub, run, data):
    run()
    (data / "download.verified").write_bytes(b"17 train/chu")
    answered = len(hub.answers)

    assert run() == 0

    assert len(hub.answers) == answered
    assert len((data / "download.verified").read_bytes().splitlines()) == len(hub.files)


def test_dry_run_lists_files_and_bytes_and_writes_nothing(hub, run, data, capsys):
    assert run("--dry-run", "--chunks", "1") == 0

    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines[:-1]}
    assert listed == {path: len(content) for path, content in hub.files.items() if "/chunk1/" in path}
    assert "3 files chosen, 0.7 MB; 0 are there; 3 to fetch or check, 0.7 MB to receive" in lines[-1]
    assert not data.exists() and not hub.answers


def test_a_disk_too_small_is_told_before_the_first_byte(hub, run, data, capsys):
    data.mkdir()
    Record(1, REPOSITORY, "main", FIRST, [RemoteFile(BIG, 1 << 60, "sha256", "0" * 64)]).write(data)

    assert run() == 1

    assert "1152921504.61 GB to fetch, and" in capsys.readouterr().err
    assert not hub.requests and not (data / "train").exists()


@pytest.mark.parametrize(("token", "status"), [(None, 0), ("hf_wrong", 1), ("hf_right", 0)])
def test_the_token_goes_to_the_server_and_its_refusal_says_what_to_do(hub, run, data, capsys, token, status):
    hub.token = "hf_right" if token else ""

    assert run(token=token) == status

    error = capsys.readouterr().err
    assert ("HF_TOKEN" in error) == (status == 1)
    if status:
        assert f"dataset {REPOSITORY}: HTTP 401 Unauthorized" in error
        assert not data.exists()


def test_a_repository_or_revision_that_is_not_there_is_named(run, data, capsys):
    assert run("--repo", "nobody/nothing") == 1
    assert run("--revision", "v9") == 1

    first, second = capsys.readouterr().err.splitlines()
    assert "dataset nobody/nothing: HTTP 404 Not Found" in first and "HF_TOKEN" in first
    assert f"dataset {REPOSITORY}: no revision 'v9'" in second
    assert not data.exists()


def test_no_server_is_an_error_that_names_it(tmp_path, capsys):
    with Hub() as gone:
        url = gone.url

    assert main(["--output", str(tmp_path / "data")], HfApi(endpoint=url), Backoff(first=0, retries=1)) == 1

    assert f"error: {url}: dataset {REPOSITORY}: ConnectError" in capsys.readouterr().err


def test_verify_of_no_download_and_a_broken_record_say_so(run, data, capsys):
    assert run("--verify") == 1
    data.mkdir()
    (data / "download.json").write_text('{"format_version": 1}')
    assert run() == 1

    missing, broken = capsys.readouterr().err.splitlines()
    assert "no download.json; nothing was downloaded there" in missing
    assert "download.json: repository: Field required" in broken


def test_a_record_cannot_lead_out_of_the_folder(run, data, capsys):
    data.mkdir()
    Record(1, REPOSITORY, "main", FIRST, [RemoteFile("../chunk1/a.jsonl.zst", 1, "sha256", "0")]).write(data)

    assert run() == 1

    assert "'../chunk1/a.jsonl.zst' is not SPLIT/chunkN/NAME.jsonl.zst" in capsys.readouterr().err
