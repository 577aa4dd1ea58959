"""What a run of `data_tools.tokenize` will cost, from a small sample of its input and in a few seconds.

The first megabytes of up to 16 files, spread evenly over the bytes of the input, are read and counted; some of their
texts are tokenized. The rest is proportion: each sampled file stands for a share of the input, taken to hold as much
per stored byte. Whatever the input's size, no more than the sample is read.
"""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from data_tools.archives import peek_content
from data_tools.corpus import parts_folder
from data_tools.documents import DOCUMENT
from data_tools.encoder import Encoder
from data_tools.index import index_bytes
from data_tools.tokenizer import Tokenizer

SAMPLED_FILES = 16
# Of each file: compression gets better over the first megabytes, so that counts from fewer would be too low.
READ_BYTES = 8 << 20
# The line that the sample ends in is read to its end, if that comes so soon: or long documents would be missed.
MOST_READ_BYTES = 32 << 20
TOKENIZED_BYTES = 256 << 10
MARKER_BYTES = 1 << 10  # of a part's marker and its entry in inputs.json


@dataclass(frozen=True)
class Estimate:
    """Files, stored bytes and disk as they are; all else estimated."""

    files: int
    stored_bytes: int
    text_bytes: int
    documents: int
    tokens: int
    core_seconds: float
    workers: int  # as many as can be busy at once
    parts_bytes: int
    merged_bytes: int
    found_bytes: int  # of parts that an earlier run left
    free_bytes: int
    place: Path
    sampled_files: int
    sampled_bytes: int

    @property
    def missing_bytes(self) -> int:
        """Disk that parts and merged shard need beyond what is free; 0 where all is well."""
        still_to_write = max(0, self.parts_bytes - self.found_bytes) + self.merged_bytes
        return max(0, still_to_write - self.free_bytes)

    def lines(self) -> list[str]:
        """A table for people."""
        lines = [f"input      {self.files:,} files, {_size(self.stored_bytes)} as stored"]
        if not self.sampled_files:
            return [*lines, "estimate   none: no document in the files that were looked into"]
        lines += [
            f"estimate   from {_size(self.sampled_bytes)} of text in {self.sampled_files} files:",
            f"  text     {_size(self.text_bytes)}, {self.documents:,} documents",
            f"  tokens   {self.tokens:,}",
            f"  time     {_duration(self.core_seconds / self.workers)} with {self.workers} workers here "
            f"({self.core_seconds / 3600:.2f} core-hours; {_size(self.text_bytes / self.core_seconds)} of text, "
            f"{self.tokens / self.core_seconds:,.0f} tokens a second on each core)",
            f"  disk     {_size(self.parts_bytes)} of parts, and {_size(self.merged_bytes)} beside them to merge; "
            f"{self.place} has {_size(self.free_bytes)} free",
        ]
        if self.missing_bytes:
            lines.append(f"warning: {_size(self.missing_bytes)} too little disk for parts and merged shard")
        return lines


def estimate(files: list[Path], tokenizer: Tokenizer, output: Path, workers: int) -> Estimate:
    """What tokenizing the files into the shard `output` takes.

    Damaged archives and lines that can't be used make the estimate coarser, and are no error. Equal files give equal
    numbers, except for the time and the disk.

    Raises:
        ValueError: a file's kind isn't supported.
        OSError: a file can't be read.
    """
    encoder = Encoder(tokenizer)
    sizes = [path.stat().st_size for path in files]
    spread = [(_sample(files[number], encoder), weight) for number, weight in _spread(sizes)]
    samples = [(sample, weight) for sample, weight in spread if sample.text_bytes]
    text_bytes, documents, tokens, seconds = _totals(samples, sum(sizes))
    bin_and_table = round(tokens) * encoder.dtype.itemsize + round(documents) * DOCUMENT.itemsize
    place = next(folder for folder in output.absolute().parents if folder.is_dir())
    return Estimate(
        files=len(files),
        stored_bytes=sum(sizes),
        text_bytes=round(text_bytes),
        documents=round(documents),
        tokens=round(tokens),
        core_seconds=seconds,
        workers=min(workers, len(files), len(os.sched_getaffinity(0))),
        parts_bytes=bin_and_table + len(files) * MARKER_BYTES,
        merged_bytes=bin_and_table + index_bytes(round(documents)),
        found_bytes=_folder_bytes(parts_folder(output)),
        free_bytes=shutil.disk_usage(place).free,
        place=place,
        sampled_files=len(samples),
        sampled_bytes=sum(sample.text_bytes for sample, _ in samples),
    )


@dataclass(frozen=True)
class _Sample:
    """What the beginning of a file holds, and the processor's seconds to make a part of it."""

    stored_bytes: float
    text_bytes: int = 0
    documents: int = 0
    tokens: float = 0
    seconds: float = 0


def _totals(samples: list[tuple[_Sample, float]], stored_bytes: int) -> list[float]:
    """Text bytes, documents, tokens and seconds of so many stored bytes."""
    if not samples:
        return [0, 0, 0, 0]
    held = np.array([(s.text_bytes, s.documents, s.tokens, s.seconds) for s, _ in samples])
    per_stored_byte = held / np.array([[s.stored_bytes] for s, _ in samples])
    return (stored_bytes * np.average(per_stored_byte, axis=0, weights=[weight for _, weight in samples])).tolist()


def _spread(sizes: list[int]) -> list[tuple[int, float]]:
    """Which files to look into, and for how many bytes each stands: all of few, else evenly over the bytes."""
    if len(sizes) <= SAMPLED_FILES:
        return [(number, size) for number, size in enumerate(sizes) if size]
    ends = np.cumsum(sizes)
    stretch = ends[-1] / SAMPLED_FILES
    middles = (np.arange(SAMPLED_FILES) + 0.5) * stretch
    numbers, times = np.unique(np.searchsorted(ends, middles), return_counts=True)
    return list(zip(numbers.tolist(), (times * stretch).tolist(), strict=True))


def _sample(path: Path, encoder: Encoder) -> _Sample:
    started = time.process_time()
    lines, stored = _first_lines(path)
    texts = list(_texts(lines))
    reading = time.process_time() - started
    sizes = [len(text.encode()) for text in texts]
    # Evenly over the documents, and no more than so much of one.
    shown = [text[:TOKENIZED_BYTES] for text in texts[:: 1 + sum(sizes) // TOKENIZED_BYTES]]
    if not shown:
        return _Sample(stored)
    share = sum(sizes) / sum(len(text.encode()) for text in shown)
    started = time.process_time()
    tokens = sum(len(encoder.encode(text)) for text in shown) // encoder.dtype.itemsize
    tokenizing = time.process_time() - started
    return _Sample(stored, sum(sizes), len(texts), tokens * share + len(texts), reading + tokenizing * share)


def _first_lines(path: Path) -> tuple[list[bytes], float]:
    """A file's first lines, up to the one that ends the sample, and how many of its bytes hold them."""
    content, stored, end = bytearray(), 0, 0
    for piece, position in peek_content(path):
        content += piece
        stored = position
        if len(content) >= READ_BYTES:
            end = content.find(b"\n", max(READ_BYTES, len(content) - len(piece))) + 1
            if end or len(content) >= MOST_READ_BYTES:
                break
    else:
        end = len(content)
    end = end or content.rfind(b"\n") + 1
    return bytes(content[:end]).split(b"\n"), stored * end / max(1, len(content))


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    for line in lines:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(text := record.get("text"), str) and text:
            yield text


def _folder_bytes(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries)
    except FileNotFoundError:
        return 0


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
