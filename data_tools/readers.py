"""Stream documents from SlimPajama-shaped files: one JSON object a line, plain, gzip or zstd.

Nothing here holds more than a chunk and a line in memory. A line that can't be used comes out as a
:class:`BadLine`, in its place, so that the caller decides how many are too many.
"""

import glob
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
import zstandard

from data_tools.files import CHUNK_BYTES

UNLABELLED = "unlabelled"
DAMAGE = (EOFError, zlib.error, zstandard.ZstdError)
# The widest window the format allows: archives made with `zstd --long=31` open too.
MAX_ZSTD_WINDOW = 1 << 31


@dataclass(frozen=True, slots=True)
class Document:
    """A document: its text, its set (``meta.redpajama_set_name``) and its line, from 1."""

    text: str
    set_name: str
    line: int


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that can't be used, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()


def _gzip() -> _Decompressor:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


DECOMPRESSORS: dict[str, Callable[[], _Decompressor] | None] = {
    ".jsonl": None,
    ".jsonl.gz": _gzip,
    ".jsonl.zst": _zstd,
}


def file_kind(path: Path) -> str:
    """The supported suffix of a file's name; ValueError names a file that has none."""
    for suffix in DECOMPRESSORS:
        if path.name.endswith(suffix):
            return suffix
    raise ValueError(f"{path}: not a kind of file that can be read; use one of {', '.join(DECOMPRESSORS)}")


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Files that match the globs, sorted and each once; ValueError names a glob without any."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = {path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file()}
        if not matches:
            raise ValueError(f"--input {pattern!r} matches no file")
        found |= matches
    for path in found:
        file_kind(path)
    return sorted(found)


def read_documents(
    path: Path, on_bytes: Callable[[bytes], object] = lambda chunk: None
) -> Iterator[Document | BadLine]:
    """Yield a file's documents and bad lines in order.

    Args:
        path: a ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst`` file. Archives of several gzip members
            or zstd frames (as parallel compressors write) are read whole. Blank lines are passed
            over.
        on_bytes: hears every chunk as it lies on the disk (for a hash, for progress).

    Raises:
        ValueError: the name has another suffix.
        OSError: the file can't be read. A damaged archive is a :class:`BadLine`, and ends the file.
    """
    number = 0
    try:
        for number, line in enumerate(_lines(_content(path, on_bytes)), start=1):
            if line and not line.isspace():
                yield _parse(path, number, line)
    except DAMAGE as error:
        yield BadLine(str(path), number + 1, f"damaged archive: {error}")


def _content(path: Path, on_bytes: Callable[[bytes], object]) -> Iterator[bytes]:
    decompressor = DECOMPRESSORS[file_kind(path)]
    with open(path, "rb") as stream:
        raw = _tapped(iter(lambda: stream.read(CHUNK_BYTES), b""), on_bytes)
        try:
            yield from raw if decompressor is None else _decompressed(raw, decompressor)
        except DAMAGE:
            for _ in raw:  # so that on_bytes hears the whole file: a hash of half of it would match nothing
                pass
            raise


def _tapped(chunks: Iterable[bytes], on_bytes: Callable[[bytes], object]) -> Iterator[bytes]:
    for chunk in chunks:
        on_bytes(chunk)
        yield chunk


def _decompressed(chunks: Iterable[bytes], new: Callable[[], _Decompressor]) -> Iterator[bytes]:
    # zstandard's own stream reader takes the end of a truncated file for the end of the data, so
    # the frames are followed by hand: a frame that has begun must end. An empty file holds no frame
    # and counts as truncated.
    frame: _Decompressor | None = new()
    for chunk in chunks:
        while chunk:
            frame = frame or new()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("truncated: the file ends inside a compressed frame")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    head: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        head.append(first)
        if rest:
            yield b"".join(head)
            yield from rest[:-1]
            head = [rest[-1]]
    if tail := b"".join(head):
        yield tail


def _parse(path: Path, number: int, line: bytes) -> Document | BadLine:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadLine(str(path), number, _why_not_json(line, error))
    if not isinstance(record, dict):
        return BadLine(str(path), number, f"a JSON {type(record).__name__}, not an object with a `text`")
    text = record.get("text")
    if not isinstance(text, str):
        found = f"`text` is {type(text).__name__}, not a string" if "text" in record else "no `text`"
        return BadLine(str(path), number, found)
    return Document(text, _set_name(record), number)


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as fault:
        return f"invalid UTF-8 at byte {fault.start} of the line"
    return f"broken JSON at character {error.pos}: {error.msg}"


def _set_name(record: dict[str, Any]) -> str:
    meta = record.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else UNLABELLED
