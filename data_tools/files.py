"""Hashing, and writes that are either whole on disk or not there."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 1 << 18


def sha256_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks; ``on_bytes`` hears each chunk's size."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_durably(temporary: Path, final: Path) -> None:
    """Rename a finished file to its name: a power cut leaves the old file or the whole new one."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_bytes(content)
        replace_durably(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk should not hold half a file, too
        raise
