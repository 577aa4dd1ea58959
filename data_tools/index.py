"""Megatron's `.idx`, read and written in bounded memory and without Megatron.

megatron-core's own builder keeps every length in a Python list and makes the pointers in a Python loop: tens of GB and
minutes for 590 million documents; and importing it imports torch. Layout (all little-endian): `MMIDIDX\\0\\0`, version
u64 = 1, token type u8, sequences u64, entries of the document list u64; then int32 lengths and int64 byte offsets of
the sequences, and the int64 document list: the first sequence of each document, and the end.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.files import new_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in TYPES.items()}
CHUNK = 1 << 20


@dataclass(frozen=True)
class Index:
    """A `.idx`: the token type, each sequence's length and byte offset, and the sequence each document starts with."""

    dtype: np.dtype
    sequence_lengths: np.ndarray  # (sequences,) int32
    sequence_pointers: np.ndarray  # (sequences,) int64
    document_indices: np.ndarray  # (documents + 1,) int64


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of a stored token: uint16 below 65,500 pieces, else int32 (the format has no uint32)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def index_bytes(documents: int) -> int:
    """Size of the `.idx` of so many documents of one sequence each."""
    return HEADER.size + documents * (4 + 8) + (documents + 1) * 8


def read_index(path: Path) -> Index:
    """Map a `.idx`; ValueError names a file that is none, or cut."""
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path}: not a Megatron index: only {len(header)} bytes")
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != MAGIC or version != 1 or code not in TYPES:
        raise ValueError(f"{path}: not a Megatron index of version 1")
    size = HEADER.size + 12 * sequences + 8 * documents
    # A multimodal index ends with a byte for each sequence; text has none.
    if (found := path.stat().st_size) not in (size, size + sequences):
        raise ValueError(f"{path}: {sequences} sequences and {documents} documents take {size} bytes; it has {found}")
    mapped = np.memmap(path, np.uint8, "r")
    parts = np.split(mapped[HEADER.size : size], [4 * sequences, 12 * sequences])
    lengths, pointers, document_indices = (p.view(t) for p, t in zip(parts, ("<i4", "<i8", "<i8"), strict=True))
    return Index(TYPES[code], lengths, pointers, document_indices)


def misplaced_sequence(index: Index, shortest: int = 0) -> int | None:
    """The first sequence that does not begin where the one before it ends, or has fewer tokens than `shortest`."""
    end = 0
    for first in range(0, len(index.sequence_lengths), CHUNK):
        lengths = index.sequence_lengths[first : first + CHUNK]
        ends = end + np.cumsum(lengths, dtype=np.int64)
        starts = (ends - lengths) * index.dtype.itemsize
        wrong = np.flatnonzero((lengths < shortest) | (index.sequence_pointers[first : first + CHUNK] != starts))
        if len(wrong):
            return first + int(wrong[0])
        end = int(ends[-1])
    return None


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write the `.idx` of documents of one sequence each, whole or not at all.

    Args:
        dtype: the tokens' type, as in the `.bin`.
        lengths: tokens of each document, (documents,) of any integer type; may be mapped, as only parts are held.
    """
    itemsize, count = np.dtype(dtype).itemsize, len(lengths)
    with new_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, CODES[np.dtype(dtype)], count, count + 1))
        chunks = range(0, count, CHUNK)
        for start in chunks:
            stream.write(lengths[start : start + CHUNK].astype("<i4").tobytes())
        end = 0
        for start in chunks:
            ends = end + np.cumsum(lengths[start : start + CHUNK], dtype="<i8")
            stream.write((np.concatenate([[end], ends[:-1]]) * itemsize).astype("<i8").tobytes())
            end = ends[-1]
        for start in range(0, count + 1, CHUNK):
            stream.write(np.arange(start, min(start + CHUNK, count + 1), dtype="<i8").tobytes())
