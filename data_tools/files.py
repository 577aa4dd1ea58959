"""Hashing, and writes that are either whole on disk or not there."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def unchanged_since(path: Path, marker: Path) -> bool:
    """Whether a file is surely the one that it was when the marker was written.

    By the time of the last change to the file or its name, which no copying tool can set back; both on one file system.
    """
    now, then = path.stat(), marker.stat()
    return now.st_dev == then.st_dev and now.st_ctime_ns < then.st_ctime_ns


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


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write `path` under: renamed durably where the body ends well, removed where it does not.

    An OSError of a write, which names no file, is raised again with the path: a full disk is somebody's to mend.
    """
    # A number of its own: processes of two machines, or containers, may have the same.
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        replace_durably(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)  # a full disk should not hold half a file, too


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)
