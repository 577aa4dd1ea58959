"""Find equal documents among any number, in bounded memory: split all by ranges of their key, then sort each range.

Equal texts have equal keys and so meet in one bucket. A bucket keeps the first of each set of equal documents, in the
order of the sources' numbers, unless that is a document to exclude.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.files import new_file
from data_tools.jobs import Workers, run_jobs
from data_tools.places import buckets, keys
from data_tools.spans import EXCLUDED, Span

RECORD = np.dtype(
    [
        ("hash_high", "<u8"),
        ("hash_low", "<u8"),
        ("number", "<u8"),
        ("tokens", "<u4"),
        ("text_bytes", "<u4"),
        ("source", "<u2"),
    ]
)
# What is left, by source and then by place; the hash as in the text's sha256.
UNIQUE = np.dtype([("hash", [("high", ">u8"), ("low", ">u8")]), ("tokens", "<u4"), ("text_bytes", "<u4")])
NUMBER = np.dtype("<u8")
KINDS = ("unique", "duplicates", "overlap")
MEASURES = ("documents", "tokens", "text_bytes")
EXAMPLES = 20  # of duplicates and of overlap, a bucket


@dataclass(frozen=True)
class PartitionJob:
    """A group of documents to split into buckets, one after the other in one file."""

    spans: list[Span]
    seed: int
    buckets: int
    output: Path


@dataclass(frozen=True)
class Partition:
    """A file of records by bucket: bucket b is records `starts[b]` … `starts[b + 1] − 1`; and each span's tokens."""

    path: Path
    starts: np.ndarray
    span_tokens: list[int]


@dataclass(frozen=True)
class BucketJob:
    """Slices of partitions (file, first record, records) that make up a bucket, and where its results go."""

    slices: list[tuple[Path, int, int]]
    seed: int
    sources: int
    unique: Path
    dropped: Path


@dataclass(frozen=True)
class Bucket:
    """A bucket's result.

    `counts` is (kinds, sources, measures) int64; `unique` is a file of `UNIQUE`, `dropped` one of the sorted numbers of
    documents that are duplicates or excluded; the examples are pairs (dropped, the equal one) of numbers.
    """

    unique: Path
    dropped: Path
    counts: np.ndarray
    duplicates: list[tuple[int, int]]
    overlap: list[tuple[int, int]]


def find_duplicates(
    groups: Sequence[list[Span]], seed: int, sources: int, bucket_size: int, folder: Path, workers: Workers
) -> tuple[list[Bucket], list[list[int]]]:
    """Buckets by ascending key, of some `bucket_size` documents each; and the tokens of each span of each group."""
    documents = sum(span.count for spans in groups for span in spans)
    count = min(max(1, -(-documents // bucket_size)), 1 << 16)
    partitioning = [PartitionJob(spans, seed, count, folder / f"group-{g:06d}") for g, spans in enumerate(groups)]
    size = documents * RECORD.itemsize
    partitions = run_jobs("reading the document tables", size, _partition, partitioning, workers)
    finding = []
    for bucket in range(count):
        bounds = [(p.path, int(p.starts[bucket]), int(p.starts[bucket + 1])) for p in partitions]
        slices = [(path, first, end - first) for path, first, end in bounds if first < end]
        outputs = (folder / f"bucket-{bucket:05d}.{kind}" for kind in ("unique", "dropped"))
        finding.append(BucketJob(slices, seed, sources, *outputs))
    found = run_jobs("finding duplicates", size, _find_in_bucket, finding, workers)
    for partition in partitions:
        partition.path.unlink()
    return found, [partition.span_tokens for partition in partitions]


def _partition(job: PartitionJob, advance: Callable[[int], None]) -> Partition:
    parts = [_records(span) for span in job.spans]
    records = np.concatenate(parts)
    bucket = buckets(keys(records["hash_high"], job.seed), job.buckets)
    write_array(job.output, records[np.argsort(bucket, kind="stable")])
    starts = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=job.buckets))])
    advance(records.nbytes)
    return Partition(job.output, starts, [int(part["tokens"].sum(dtype=np.int64)) for part in parts])


def _records(span: Span) -> np.ndarray:
    rows = span.rows()
    records = np.empty(len(rows), RECORD)
    for field in ("hash_high", "hash_low", "tokens", "text_bytes"):
        records[field] = rows[field]
    records["number"] = np.arange(span.number, span.number + span.count)
    records["source"] = span.source_numbers(rows)
    return records


def _find_in_bucket(job: BucketJob, advance: Callable[[int], None]) -> Bucket:
    records = _sorted(_read_slices(job.slices), job.seed)
    first, source = _first_of_equal(records), records["source"]
    kept = first == np.arange(len(records))
    overlap = (source != EXCLUDED) & (source[first] == EXCLUDED)
    duplicate = (source != EXCLUDED) & ~kept & ~overlap
    unique = records[kept]
    _write_unique(job.unique, unique)
    write_array(job.dropped, np.sort(records["number"][overlap | duplicate]))
    advance(records.nbytes)
    counts = [_count(chosen, job.sources) for chosen in (unique, records[duplicate], records[overlap])]
    return Bucket(
        job.unique,
        job.dropped,
        np.stack(counts),
        _examples(records["number"], first, duplicate),
        _examples(records["number"], first, overlap),
    )


def _read_slices(slices: list[tuple[Path, int, int]]) -> np.ndarray:
    parts = [np.fromfile(path, RECORD, count, offset=first * RECORD.itemsize) for path, first, count in slices]
    return np.concatenate(parts) if parts else np.empty(0, RECORD)


def _sorted(records: np.ndarray, seed: int) -> np.ndarray:
    """By key, hash_low, source and number."""
    key = keys(records["hash_high"], seed)
    order = np.argsort(key)
    key = key[order]
    # Few keys occur twice: only those records need the other three columns.
    twice = np.zeros(len(key), bool)
    twice[1:] = key[1:] == key[:-1]
    twice[:-1] |= twice[1:]
    tied = records[order[twice]]
    order[twice] = order[twice][np.lexsort((tied["number"], tied["source"], tied["hash_low"], key[twice]))]
    return records[order]


def _first_of_equal(records: np.ndarray) -> np.ndarray:
    """For each record the position of the first with its hash."""
    new = np.ones(len(records), bool)
    for field in ("hash_high", "hash_low"):
        new[1:] &= records[field][1:] == records[field][:-1]
    new[1:] = ~new[1:]
    return np.maximum.accumulate(np.where(new, np.arange(len(records)), 0))


def _write_unique(path: Path, records: np.ndarray) -> None:
    records = records[np.argsort(records["source"], kind="stable")]
    unique = np.empty(len(records), UNIQUE)
    unique["hash"]["high"], unique["hash"]["low"] = records["hash_high"], records["hash_low"]
    unique["tokens"], unique["text_bytes"] = records["tokens"], records["text_bytes"]
    write_array(path, unique)


def _count(records: np.ndarray, sources: int) -> np.ndarray:
    """Documents, tokens and bytes of text by source, (sources, 3) int64."""
    source = records["source"]
    weights = (None, records["tokens"], records["text_bytes"])  # sums are exact: below 2^53
    return np.stack([np.bincount(source, weight, sources) for weight in weights], axis=1).astype(np.int64)


def _examples(number: np.ndarray, first: np.ndarray, chosen: np.ndarray) -> list[tuple[int, int]]:
    positions = np.flatnonzero(chosen)[:EXAMPLES]
    return list(zip(number[positions].tolist(), number[first[positions]].tolist(), strict=True))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write the array's bytes, whole or not at all (numpy's own writers do not say that a disk is full)."""
    with new_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(np.ascontiguousarray(array).view(np.uint8).data)
