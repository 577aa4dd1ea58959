"""The document table beside a tokenized corpus: `NAME.documents.npy`, a row for each document of `NAME.bin`.

It holds what choosing, deduplicating and counting documents needs, so that neither reads any text: 30 bytes a
document, some 18 GB for SlimPajama's 590 million.
"""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.files import new_file

DOCUMENT = np.dtype(
    [
        ("hash_high", "<u8"),  # the first 16 bytes of sha256(text as UTF-8), read as big-endian numbers:
        ("hash_low", "<u8"),  # with 6e8 documents two different texts collide with a chance of 5e-22
        ("tokens", "<u4"),  # EOS included
        ("text_bytes", "<u4"),
        ("set", "<u2"),  # which of the sorted set names
        ("line", "<u4"),  # in its input file, from 1
    ]
)
MOST_SETS = (1 << 16) - 1  # numbers of two bytes; subsets need one for themselves
ROWS_HELD = 4096
CHARACTERS_HELD = 1 << 20


def text_hash(text: str) -> tuple[int, int, int]:
    """`hash_high`, `hash_low` and `text_bytes` of a text; a long one is not held as UTF-8, too."""
    digest, size = hashlib.sha256(), 0
    for start in range(0, len(text), CHARACTERS_HELD):
        utf8 = text[start : start + CHARACTERS_HELD].encode()
        digest.update(utf8)
        size += len(utf8)
    high, low = struct.unpack_from(">QQ", digest.digest())
    return high, low, size


def open_documents(path: Path) -> np.ndarray:
    """The table, mapped read-only; ValueError names a file that is none."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a document table: {error}") from error
    if table.dtype != DOCUMENT or table.ndim != 1:
        raise ValueError(f"{path}: not a document table: an array of {table.dtype}, {table.ndim} dimensions")
    return table


def write_header(stream: BinaryIO, rows: int) -> None:
    """A `.npy` header for so many rows; numpy leaves room for the count to grow, to write it again in place."""
    description = {"descr": np.lib.format.dtype_to_descr(DOCUMENT), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(stream, description)


class DocumentWriter:
    """Appends rows to a table; see :func:`write_documents`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._rows = stream, 0
        self._held: list[tuple[int, int, int, int, int, int]] = []
        self._sets: dict[str, int] = {}
        write_header(stream, 0)
        self._start = stream.tell()

    def add(self, text: str, tokens: int, set_name: str, line: int) -> int:
        """Append a document of `tokens` tokens (EOS included); returns its bytes of text."""
        number = self._sets.setdefault(set_name, len(self._sets))
        if number == MOST_SETS:
            raise ValueError(f"line {line}: more than {MOST_SETS} set names; is redpajama_set_name a name of sets?")
        high, low, text_bytes = text_hash(text)
        self._held.append((high, low, tokens, text_bytes, number, line))
        if len(self._held) == ROWS_HELD:
            self._flush()
        return text_bytes

    def _flush(self) -> None:
        self._stream.write(np.array(self._held, DOCUMENT).tobytes())
        self._rows += len(self._held)
        self._held.clear()

    def finish(self) -> None:
        """Write the row count, and make of each set's number its place among the sorted names."""
        self._flush()
        self._stream.seek(0)
        write_header(self._stream, self._rows)
        numbers = {name: number for number, name in enumerate(sorted(self._sets))}
        place = np.array([numbers[name] for name in self._sets], np.uint16)
        for row in range(0, self._rows, ROWS_HELD):
            position = self._start + row * DOCUMENT.itemsize
            self._stream.seek(position)
            rows = np.frombuffer(self._stream.read(ROWS_HELD * DOCUMENT.itemsize), DOCUMENT).copy()
            rows["set"] = place[rows["set"]]
            self._stream.seek(position)
            self._stream.write(rows.tobytes())


@contextmanager
def write_documents(path: Path) -> Iterator[DocumentWriter]:
    """A writer of the table `path`, which appears whole where the body ends well."""
    with new_file(path) as temporary, open(temporary, "w+b") as stream:
        writer = DocumentWriter(stream)
        yield writer
        writer.finish()
