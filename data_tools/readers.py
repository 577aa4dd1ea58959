"""Stream documents from SlimPajama-shaped files: one JSON object a line, plain, gzip or zstd.

A line that can't be used comes out as a :class:`BadLine`, in its place, so that the caller decides
how many are too many. Every line that isn't blank comes out as one or the other. What is held is a
piece of the file and one line, whatever the file's size.
"""

import glob
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import orjson

from data_tools.archives import DamagedArchive, file_kind, read_content

UNLABELLED = "unlabelled"
MAX_LINE_BYTES = 1 << 30
# How much of a line that is too long a bad line shows.
SHOWN_BYTES = 1 << 10

BadKind = Literal[
    "broken JSON",
    "invalid UTF-8",
    "not an object",
    "no text",
    "text not a string",
    "line too long",
    "damaged archive",
]


@dataclass(frozen=True, slots=True)
class Document:
    """A document: its text, its set (``meta.redpajama_set_name``) and its line, from 1."""

    text: str
    set_name: str
    line: int


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that can't be used: what is wrong with it, in a word and in full, and its bytes.

    ``raw`` is the line as it is in the file, without its line end; of a line that is too long its
    beginning; and of a damaged archive what was left of a line that had begun.
    """

    path: str
    line: int
    kind: BadKind
    reason: str
    raw: bytes

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Files that match the globs, sorted and each once, by any path; ValueError names a glob without any."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        # A file's own name is no glob, whatever is in it: a shell may have expanded one.
        names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = [path for name in names if (path := Path(name)).is_file()]
        if not matches:
            raise ValueError(f"--input {pattern!r} matches no file")
        for path in matches:
            found.setdefault(os.path.realpath(path), path)
    for path in found.values():
        file_kind(path)
    return sorted(found.values())


def read_documents(
    path: Path,
    on_bytes: Callable[[bytes], object] = lambda chunk: None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Document | BadLine]:
    """Yield a file's documents and bad lines in order.

    Passed over: blank lines (only ASCII whitespace), a byte order mark that begins the file, a CR
    before a line end. The last line may lack its line end.

    Texts come out exactly as they are, also empty, of whitespace only, or with NULs in them. Where
    a key is there twice the last one counts; a number too large for 64 bits is none of our concern.

    Bad lines are, besides what is plainly no object with a ``text``: NaN, Infinity and numbers
    beyond a double's range, which JSON doesn't have; an escape that is half of a surrogate pair,
    for which UTF-8 has no bytes; more than 1024 levels of nesting; a byte order mark further on;
    and a raw NUL or other control character, which JSON wants escaped.

    Args:
        path: a ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst`` file. Archives of several gzip members
            or zstd frames (as parallel compressors write) are read whole.
        on_bytes: hears every chunk as it lies on the disk (for a hash, for progress).
        max_line_bytes: a longer line is bad, and not held.

    Raises:
        ValueError: the name has another suffix.
        OSError: the file can't be read. A damaged archive is a :class:`BadLine`, and ends the file:
            where the next sound frame begins can't be told. Before it come the whole lines of the
            frames before a corrupted one, or all whole lines of a truncated file.
    """
    lines = _Lines(max_line_bytes)
    parse = partial(_parse, str(path), max_line_bytes)
    try:
        # By way of map, since a loop variable here would hold the line while its document is worked on.
        yield from filter(None, map(parse, count(1), lines.split(read_content(path, on_bytes))))
    except DamagedArchive as error:
        unfinished = lines.unfinished
        raw = bytes(unfinished[:SHOWN_BYTES] if len(unfinished) > max_line_bytes else unfinished)
        yield BadLine(str(path), lines.finished + 1, "damaged archive", f"damaged archive: {error}", raw)


class _Lines:
    """Cuts content into lines; of a line longer than ``max_bytes`` one byte more than these is kept."""

    def __init__(self, max_bytes: int) -> None:
        self.finished = 0
        self.unfinished = bytearray()
        self._max_bytes = max_bytes

    def split(self, pieces: Iterable[bytes]) -> Iterator[bytes | bytearray]:
        for piece in pieces:
            first, *rest = piece.split(b"\n")
            self._append(first)
            if rest:
                yield self._finish()
                for line in rest[:-1]:
                    self.finished += 1
                    yield line
                self._append(rest[-1])
        if self.unfinished:
            yield self._finish()

    def _append(self, part: bytes) -> None:
        room = self._max_bytes + 1 - len(self.unfinished)
        self.unfinished += part if len(part) <= room else part[:room]

    def _finish(self) -> bytearray:
        line, self.unfinished = self.unfinished, bytearray()
        self.finished += 1
        return line


def _parse(path: str, max_bytes: int, number: int, line: bytes | bytearray) -> Document | BadLine | None:
    if len(line) > max_bytes:
        reason = f"line too long: more than {max_bytes} bytes"
        return BadLine(path, number, "line too long", reason, bytes(line[:SHOWN_BYTES]))
    content = line[len(BOM_UTF8) :] if number == 1 and line.startswith(BOM_UTF8) else line
    if not content or content.isspace():
        return None
    try:
        record = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        return BadLine(path, number, *_why_not_json(content, error), bytes(line))
    if not isinstance(record, dict):
        reason = f"a JSON {type(record).__name__}, not an object with a `text`"
        return BadLine(path, number, "not an object", reason, bytes(line))
    if "text" not in record:
        return BadLine(path, number, "no text", "no `text`", bytes(line))
    if not isinstance(text := record["text"], str):
        reason = f"`text` is {type(text).__name__}, not a string"
        return BadLine(path, number, "text not a string", reason, bytes(line))
    return Document(text, _set_name(record), number)


def _why_not_json(line: bytes | bytearray, error: orjson.JSONDecodeError) -> tuple[BadKind, str]:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as fault:
        return "invalid UTF-8", f"invalid UTF-8 at byte {fault.start} of the line"
    return "broken JSON", f"broken JSON at character {error.pos}: {error.msg}"


def _set_name(record: dict[str, Any]) -> str:
    meta = record.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else UNLABELLED
