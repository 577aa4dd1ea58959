"""Bring chosen documents into their order, in bounded memory: one pass deals them out to runs, one gathers each shard.

A run holds some documents of one group of the input, by shard. A shard takes its part of each run, sorts it by place,
and is done. So tokens are read and written twice, in long stretches, and a process holds one run or one shard.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
from pydantic import TypeAdapter

from data_tools.dataset import ShardRecord
from data_tools.duplicates import NUMBER, write_array
from data_tools.files import new_file, sha256_file, write_durably
from data_tools.index import write_index
from data_tools.jobs import Workers, run_jobs
from data_tools.places import PLACE, keys, places
from data_tools.shards import ShardError
from data_tools.spans import Span

RUN_ROW = np.dtype([("place", PLACE), ("tokens", "<u4")])
CHOSEN = np.dtype([("place", PLACE), ("tokens", "<u4"), ("shard", "<u4"), ("stretch", "<u4"), ("start", "<u8")])
READ_BYTES = 1 << 23  # documents that begin within so many bytes are read at once, with what lies between them
WRITE_DOCUMENTS = 1 << 10


@dataclass(frozen=True)
class Stretch:
    """A span and where its tokens are in the piece's `.bin`."""

    span: Span
    first_token: int
    tokens: int


@dataclass(frozen=True)
class Bounds:
    """A source's shards: the first one's number, the places of their first documents, the last document's place."""

    shard: int
    starts: list[bytes]
    last: bytes


@dataclass(frozen=True)
class Target:
    """A shard to make: its name, and the documents and tokens that it must come to."""

    name: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Assignment:
    """Which documents go to which shard: `bounds` by source number, and the files of numbers that don't count."""

    seed: int
    bounds: list[Bounds | None]
    dropped: list[Path]
    targets: list[Target]


@dataclass(frozen=True)
class RunsJob:
    """A group of documents to deal out to runs of about `run_tokens` tokens, at a prefix."""

    stretches: list[Stretch]
    assignment: Assignment
    run_tokens: int
    itemsize: int
    prefix: Path

    def run(self, number: int) -> Path:
        """A run's table; its tokens lie beside it."""
        return Path(f"{self.prefix}-{number:03d}.rows")


@dataclass(frozen=True)
class ShardJob:
    """A shard to gather from runs; `parts` says what of each: first document, documents, first token, tokens."""

    target: Target
    runs: list[Path]
    parts: np.ndarray
    dtype: np.dtype
    folder: Path
    marker: Path


def shuffle(
    groups: Sequence[list[Stretch]],
    assignment: Assignment,
    run_tokens: int,
    dtype: np.dtype,
    work: Path,
    folder: Path,
    workers: Workers,
) -> list[ShardRecord]:
    """Write the shards into `folder`; what an earlier call finished, as `work` says, is not done again.

    Raises:
        ShardError: the input is not what it was when the documents were chosen.
        OSError: the disk is full, say.
    """
    itemsize = dtype.itemsize
    dealing = [
        RunsJob(group, assignment, run_tokens, itemsize, work / f"run-{g:06d}") for g, group in enumerate(groups)
    ]
    size = sum(stretch.tokens for group in groups for stretch in group) * itemsize
    counts = run_jobs("dealing documents out to runs", size, _write_runs, dealing, workers)
    runs = [job.run(number) for job, count in zip(dealing, counts, strict=True) for number in range(len(count))]
    parts = _parts(np.concatenate(counts))
    gathering = [
        ShardJob(target, runs, parts[:, shard], dtype, folder, work / f"{target.name}.json")
        for shard, target in enumerate(assignment.targets)
    ]
    size = sum(target.tokens for target in assignment.targets) * itemsize
    return run_jobs("gathering shards", size, _write_shard, gathering, workers)


def _parts(counts: np.ndarray) -> np.ndarray:
    """From (runs, shards, 2) documents and tokens: (runs, shards, 4) as in a ShardJob."""
    starts = np.cumsum(counts, axis=1) - counts
    return np.stack([starts[..., 0], counts[..., 0], starts[..., 1], counts[..., 1]], axis=-1)


def _write_runs(job: RunsJob, advance: Callable[[int], None]) -> np.ndarray:
    """Write the group's runs, or find them written; returns (runs, shards, 2): documents and tokens for each shard."""
    marker = Path(f"{job.prefix}.done")
    if not marker.exists():
        chosen = _chosen(job)
        run = (np.cumsum(chosen["tokens"], dtype=np.int64) - chosen["tokens"]) // job.run_tokens
        edges = [*np.flatnonzero(np.diff(run, prepend=-1)).tolist(), len(run)]
        counts = [_write_run(job, chosen[start:end], job.run(n)) for n, (start, end) in enumerate(pairwise(edges))]
        write_array(marker, np.array(counts, np.int64))
    advance(sum(stretch.tokens for stretch in job.stretches) * job.itemsize)
    return np.fromfile(marker, np.int64).reshape(-1, len(job.assignment.targets), 2)


def _chosen(job: RunsJob) -> np.ndarray:
    """The group's chosen documents, as `CHOSEN`, in the order of the input."""
    first, last = job.stretches[0].span, job.stretches[-1].span  # a group's documents are numbered end to end
    dropped = _dropped(first.number, last.number + last.count, job.assignment.dropped)
    return np.concatenate([_chosen_of(job, number, dropped) for number in range(len(job.stretches))])


def _chosen_of(job: RunsJob, number: int, dropped: np.ndarray) -> np.ndarray:
    stretch, assignment = job.stretches[number], job.assignment
    rows = stretch.span.rows()
    if rows["tokens"].sum(dtype=np.int64) != stretch.tokens:
        raise ShardError(f"{stretch.span.piece.documents}: changed since the documents were chosen")
    chosen = np.zeros(len(rows), CHOSEN)
    chosen["place"] = places(keys(rows["hash_high"], assignment.seed), rows["hash_low"])
    chosen["tokens"] = rows["tokens"]
    chosen["stretch"] = number
    chosen["start"] = stretch.first_token + np.cumsum(rows["tokens"], dtype=np.int64) - rows["tokens"]
    taken = np.zeros(len(rows), bool)
    source = stretch.span.source_numbers(rows)
    for of in np.unique(source).tolist():
        if (bounds := assignment.bounds[of]) is not None:
            own = np.flatnonzero(source == of)
            place = chosen["place"][own]
            taken[own] = place <= bounds.last
            after = np.searchsorted(np.array(bounds.starts, PLACE), place, side="right")
            # Only documents that don't count stand before the first shard's start; they go below.
            chosen["shard"][own] = bounds.shard + after - 1
    within = np.searchsorted(dropped, [stretch.span.number, stretch.span.number + stretch.span.count])
    taken[dropped[slice(*within)] - stretch.span.number] = False
    return chosen[taken]


def _dropped(number: int, end: int, files: list[Path]) -> np.ndarray:
    """Which of the documents `number` … `end` − 1 don't count, ascending."""
    found = []
    for path in files:
        if path.stat().st_size:
            numbers = np.memmap(path, NUMBER, "r")
            within = np.searchsorted(numbers, [number, end])
            found.append(np.array(numbers[slice(*within)], np.int64))
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)


def _write_run(job: RunsJob, chosen: np.ndarray, path: Path) -> np.ndarray:
    data = _read_chosen(job, chosen)
    order = np.argsort(chosen["shard"], kind="stable")
    with new_file(path.with_suffix(".tokens")) as temporary, open(temporary, "wb") as stream:
        for block in _in_order(data, chosen["tokens"], job.itemsize, order):
            stream.write(block)
    rows = np.zeros(len(chosen), RUN_ROW)
    rows["place"], rows["tokens"] = chosen["place"], chosen["tokens"]
    write_array(path, rows[order])
    shards = len(job.assignment.targets)
    tokens = np.bincount(chosen["shard"], chosen["tokens"], shards)  # exact: below 2^53
    return np.stack([np.bincount(chosen["shard"], minlength=shards), tokens.astype(np.int64)], axis=1)


def _read_chosen(job: RunsJob, chosen: np.ndarray) -> memoryview:
    """The chosen documents' tokens, end to end, read from the input in its order."""
    sizes = chosen["tokens"].astype(np.int64) * job.itemsize
    starts = chosen["start"].astype(np.int64) * job.itemsize
    # One buffer, as thousands of small ones would not all be given back to the system.
    data, end = memoryview(bytearray(int(sizes.sum()))), 0
    block = starts // READ_BYTES
    new = np.diff(chosen["stretch"].astype(np.int64), prepend=-1) != 0
    new[1:] |= block[1:] != block[:-1]
    for first, after in pairwise([*np.flatnonzero(new).tolist(), len(chosen)]):
        own, base = slice(first, after), int(starts[first])
        path = job.stretches[chosen["stretch"][first]].span.piece.bin
        read = _read(path, base, int(starts[after - 1] + sizes[after - 1]) - base)
        for start, size in zip((starts[own] - base).tolist(), sizes[own].tolist(), strict=True):
            data[end : end + size] = read[start : start + size]
            end += size
    return data


def _in_order(data: memoryview, tokens: np.ndarray, itemsize: int, order: np.ndarray) -> Iterator[bytes]:
    """Documents that lie end to end in `data`, in another order, a thousand at a time."""
    ends = np.cumsum(tokens, dtype=np.int64) * itemsize
    starts = ends - tokens.astype(np.int64) * itemsize
    for first in range(0, len(order), WRITE_DOCUMENTS):
        some = order[first : first + WRITE_DOCUMENTS]
        yield b"".join(data[a:b] for a, b in zip(starts[some].tolist(), ends[some].tolist(), strict=True))


def _read(path: Path, start: int, size: int) -> memoryview:
    data = bytearray(size)
    with open(path, "rb") as stream:
        stream.seek(start)
        if stream.readinto(data) != size:
            raise ShardError(f"{path}: ends before byte {start + size}; it changed since the documents were chosen")
    return memoryview(data)


def _write_shard(job: ShardJob, advance: Callable[[int], None]) -> ShardRecord:
    """Gather a shard, or find it written."""
    if not job.marker.exists():
        record = _gather(job)
        write_durably(job.marker, orjson.dumps(record))
    advance(job.target.tokens * job.dtype.itemsize)
    return TypeAdapter(ShardRecord).validate_json(job.marker.read_bytes())


def _gather(job: ShardJob) -> ShardRecord:
    rows, data = _read_parts(job)
    order = np.argsort(rows["place"])
    paths = [job.folder / f"{job.target.name}.{end}" for end in ("bin", "idx")]
    digest = hashlib.sha256()
    with new_file(paths[0]) as temporary, open(temporary, "wb") as stream:
        for block in _in_order(data, rows["tokens"], job.dtype.itemsize, order):
            digest.update(block)
            stream.write(block)
    write_index(paths[1], job.dtype, rows["tokens"][order])
    return ShardRecord(
        job.target.name, job.target.documents, job.target.tokens, digest.hexdigest(), sha256_file(paths[1])
    )


def _read_parts(job: ShardJob) -> tuple[np.ndarray, memoryview]:
    """The shard's part of every run, end to end: rows, and the tokens' bytes."""
    target, itemsize = job.target, job.dtype.itemsize
    if (found := job.parts[:, [1, 3]].sum(axis=0).tolist()) != [target.documents, target.tokens]:
        raise ShardError(f"{target.name}: {found} documents and tokens, not the chosen {target}; the input changed")
    rows, data = np.empty(target.documents, RUN_ROW), memoryview(bytearray(target.tokens * itemsize))
    row = byte = 0
    for run, (first, documents, first_token, tokens) in zip(job.runs, job.parts.tolist(), strict=True):
        if documents:
            part = np.fromfile(run, RUN_ROW, documents, offset=first * RUN_ROW.itemsize)
            rows[row : row + documents] = part
            with open(run.with_suffix(".tokens"), "rb") as stream:
                stream.seek(first_token * itemsize)
                stream.readinto(data[byte : byte + tokens * itemsize])
            row, byte = row + documents, byte + tokens * itemsize
    return rows, data
