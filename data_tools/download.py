"""Command: fetch SlimPajama, or part of it, from the Hugging Face hub, and verify it.

A run that broke off goes on where it stopped, in the middle of a file too. A file has its name only once its size and
hash are the repository's; one that was damaged since is fetched again. The folder keeps to the commit that its first
run found (`download.json`). HF_TOKEN is the token to use, HF_ENDPOINT another server.
"""

import argparse
import glob
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event, Lock

from huggingface_hub import HfApi

from data_tools.download_record import Record, RemoteFile, Verified
from data_tools.download_transfer import Backoff, FetchError, Transfer, fetch_record, partial_path, received
from data_tools.lock import lock
from data_tools.progress import BytesProgress

REPOSITORY = "cerebras/SlimPajama-627B"
REVISION = "main"
MAX_WORKERS = 64  # the library's session has 100 connections


class FilesProgress(BytesProgress):
    """Bytes and files done, told by several threads."""

    def __init__(self, verb: str, files: int, total: int) -> None:
        super().__init__(f"{verb}, 0 of {files} files", total)
        self.received = 0
        self._verb, self._files, self._finished, self._lock = verb, files, 0, Lock()

    def receive(self, count: int) -> None:
        """So many bytes came in, or were thrown away."""
        with self._lock:
            self.received += max(count, 0)
            self.advance(count)

    def finish(self, read: int = 0) -> None:
        """One file is done, after so many bytes were read from the disk."""
        with self._lock:
            self._finished += 1
            self.describe(f"{self._verb}, {self._finished} of {self._files} files")
            self.advance(read)


@dataclass(frozen=True)
class Plan:
    """The chosen files, and those of them that are not known to be whole."""

    folder: Path
    record: Record
    files: list[RemoteFile]
    pending: list[RemoteFile]

    @cached_property
    def missing_bytes(self) -> int:
        """What is still to receive, if the files that have the right size turn out to be whole."""
        return sum(file.size - self._there(file) for file in self.pending)

    def _there(self, file: RemoteFile) -> int:
        final = self.folder / file.path
        if final.is_file() and final.stat().st_size == file.size:
            return file.size
        return received(file, partial_path(final))

    def check_disk(self) -> None:
        """OSError where the disk has no room for the rest."""
        free = shutil.disk_usage(self.folder).free
        if free < self.missing_bytes:
            raise OSError(f"{self.folder}: {_size(self.missing_bytes)} to fetch, and {_size(free)} free on the disk")


@dataclass(frozen=True)
class Outcome:
    """What a run did: bytes received, and what is wrong with the files that could not be had."""

    received: int
    problems: list[str]


def download(plan: Plan, api: HfApi, backoff: Backoff, workers: int) -> Outcome:
    """Fetch the plan's pending files; one that can't be had does not keep the others.

    Raises:
        OSError: a disk is full, say.
    """
    verified, stop = Verified(plan.folder), Event()
    # Made before any file: which chunks were asked for, --verify sees from the folders.
    for split, chunk in {file.place for file in plan.files}:
        (plan.folder / split / f"chunk{chunk}").mkdir(parents=True, exist_ok=True)
    total = sum(file.size - received(file, partial_path(plan.folder / file.path)) for file in plan.pending)
    with FilesProgress("downloading", len(plan.pending), total) as progress:
        transfer = Transfer(api, plan.record, backoff, progress.receive, stop)

        def bring(file: RemoteFile) -> str | None:
            final, read = plan.folder / file.path, 0
            try:
                if final.exists() and file.damage(final) is None:
                    read = file.size
                else:
                    final.unlink(missing_ok=True)
                    transfer.fetch(file, final)
            except FetchError as error:
                return str(error)
            verified.add(file)
            progress.finish(read)
            return None

        problems = _problems(bring, plan.pending, workers, stop)
    return Outcome(progress.received, problems)


def verify(folder: Path, files: list[RemoteFile], workers: int) -> list[str]:
    """Hash the files that are there; returns what is wrong, damaged files and missing ones.

    A damaged file stays, and the next download fetches it again.
    """
    verified = Verified(folder)
    with FilesProgress("verifying", len(files), sum(file.size for file in files)) as progress:

        def check(file: RemoteFile) -> str | None:
            path = folder / file.path
            problem = None
            if not path.is_file():
                problem = f"{file.path}: missing"
            elif damage := file.damage(path):
                verified.remove(file)
                problem = f"{file.path}: damaged: {damage}"
            progress.finish(file.size)
            return problem

        return _problems(check, files, workers, Event())


def _problems(
    work: Callable[[RemoteFile], str | None], files: list[RemoteFile], workers: int, stop: Event
) -> list[str]:
    """Do the work on every file in threads; what it says, in the files' order."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, file) for file in files]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [problem for future in futures if (problem := future.result())]


def _record(arguments: argparse.Namespace, api: HfApi, backoff: Backoff) -> Record:
    """The folder's record, or a new one of the hub's; ValueError where the folder holds something else."""
    folder = arguments.output
    record = Record.read(folder)
    if record is None:
        if arguments.verify:
            raise ValueError(f"{folder}: no download.json; nothing was downloaded there")
        return fetch_record(api, arguments.repo or REPOSITORY, arguments.revision or REVISION, backoff)
    same_repository = arguments.repo in (None, record.repository)
    if not (same_repository and arguments.revision in (None, record.revision, record.commit)):
        asked = " ".join(filter(None, (arguments.repo, arguments.revision)))
        raise ValueError(
            f"{folder} holds {_named(record)}, its {record.revision!r} at the first run; {asked!r} is something else, "
            "and one folder does not mix them: give another --output"
        )
    return record


def _plan(folder: Path, record: Record, arguments: argparse.Namespace) -> Plan:
    files, verified = record.select(arguments.split, arguments.chunks), Verified(folder)
    return Plan(folder, record, files, [file for file in files if not verified.holds(file)])


def _verify(folder: Path, record: Record, arguments: argparse.Namespace) -> int:
    files = record.select(arguments.split, arguments.chunks)
    if arguments.split is None and arguments.chunks is None:
        files = [file for file in files if (folder / file.path).parent.is_dir()]  # of the chunks ever asked for
    problems = verify(folder, files, arguments.workers)
    for problem in problems:
        print(problem)
    print(f"{folder}: {len(files) - len(problems)} of {len(files)} files are those of {_named(record)}")
    if problems:
        print("the same command without --verify fetches the others", file=sys.stderr)
    return 1 if problems else 0


def _dry_run(plan: Plan) -> int:
    for file in plan.pending:
        print(f"{file.size:>15,}  {file.path}")
    existing = next(path for path in (plan.folder, *plan.folder.absolute().parents) if path.exists())
    print(_summary(plan), f"{_size(shutil.disk_usage(existing).free)} free on the disk", sep="; ")
    return 0


def _download(record: Record, arguments: argparse.Namespace, api: HfApi, backoff: Backoff) -> int:
    folder: Path = arguments.output
    record.select(arguments.split, arguments.chunks)  # a wrong choice leaves no folder behind
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "download.lock"):
        begun = Record.read(folder)
        if begun is None:
            record.write(folder)
        elif begun != record:
            raise ValueError(f"{folder}: another run has begun there just now; run again")
        plan = _plan(folder, record, arguments)
        print(_summary(plan), flush=True)
        plan.check_disk()
        started = time.perf_counter()
        outcome = download(plan, api, backoff, arguments.workers)
    print(_report(plan, outcome, time.perf_counter() - started))
    for problem in outcome.problems:
        print(f"error: {problem}", file=sys.stderr)
    if outcome.problems:
        print(f"{len(outcome.problems)} files are not there; run the same command again to go on", file=sys.stderr)
    return 1 if outcome.problems else 0


def _summary(plan: Plan) -> str:
    here = len(plan.files) - len(plan.pending)
    return (
        f"{_named(plan.record)}: {len(plan.files)} files chosen, {_size(sum(file.size for file in plan.files))}; "
        f"{here} are there; {len(plan.pending)} to fetch or check, {_size(plan.missing_bytes)} to receive"
    )


def _report(plan: Plan, outcome: Outcome, seconds: float) -> str:
    lines = [
        f"{plan.folder}: {len(plan.files) - len(outcome.problems)} of {len(plan.files)} files are there and verified; "
        f"received {_size(outcome.received)} in {seconds:.1f} s, {outcome.received / seconds / 1e6:.1f} MB/s"
    ]
    if not outcome.problems:
        for split in sorted({file.place[0] for file in plan.files}):
            globs = " ".join(shlex.quote(pattern) for pattern in _globs(plan, split))
            lines.append(f"next: python -m data_tools.tokenize --input {globs} …")
    return "\n".join(lines)


def _globs(plan: Plan, split: str) -> list[str]:
    """Globs for a split's chosen files: one where it is all of the split."""
    folder = f"{glob.escape(str(plan.folder))}/{split}"
    chunks = sorted({file.place[1] for file in plan.files if file.place[0] == split})
    if chunks == plan.record.chunks[split]:
        return [f"{folder}/chunk*/*.jsonl.zst"]
    return [f"{folder}/chunk{chunk}/*.jsonl.zst" for chunk in chunks]


def _named(record: Record) -> str:
    return f"{record.repository} at {record.commit}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _chunk_numbers(text: str) -> list[int]:
    """From `1-3,7`; ArgumentTypeError says how it is written."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise argparse.ArgumentTypeError(f"{text!r}: write chunks like 1-3,7")
        numbers.update(range(int(first), int(last) + 1))
    return sorted(numbers)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.download", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="files go to DIR/SPLIT/chunkN/")
    parser.add_argument("--repo", help=f"dataset on the hub (default: {REPOSITORY}; later: what DIR holds)")
    parser.add_argument("--revision", help=f"branch, tag or commit (default: {REVISION}; later: what DIR holds)")
    parser.add_argument("--split", nargs="+", metavar="NAME", help="train, validation, test (default: all)")
    parser.add_argument("--chunks", type=_chunk_numbers, metavar="1-3,7", help="chunks of each split (default: all)")
    parser.add_argument("--workers", type=int, default=8, help="files at a time (default: 8)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="list what is to fetch, with bytes, and end")
    mode.add_argument("--verify", action="store_true", help="hash what DIR holds and fetch nothing; needs no network")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.workers <= MAX_WORKERS:
        parser.error(f"--workers {arguments.workers}: must be 1 to {MAX_WORKERS}")
    return arguments


def main(argv: list[str] | None = None, api: HfApi | None = None, backoff: Backoff | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    arguments = _arguments(argv)
    api, backoff = api or HfApi(), backoff or Backoff()
    try:
        record = _record(arguments, api, backoff)
        if arguments.verify:
            return _verify(arguments.output, record, arguments)
        if arguments.dry_run:
            return _dry_run(_plan(arguments.output, record, arguments))
        return _download(record, arguments, api, backoff)
    except (ValueError, OSError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
