"""The content of plain, gzip and zstd files: in pieces of bounded size, as far as it can be trusted.

A wrong bit may show itself only in the checksum at the end of its frame (gzip calls it a member),
long after the text that it spoiled. So a frame is held back until its end has been seen. One with too
much content to hold is decompressed twice: to its end, then to be handed out.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

from data_tools.files import CHUNK_BYTES

# The widest window the format allows: archives made with `zstd --long=31` open too.
MAX_ZSTD_WINDOW = 1 << 31
# A frame's content that is held back; SlimPajama's files are mostly smaller.
HELD_BYTES = 1 << 26


class DamagedArchive(Exception):
    """A compressed file has content that can't be had; the message says why, and at which byte."""


class TruncatedArchive(DamagedArchive):
    """The file ends inside a frame; as far as it goes, it shows no fault."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: memoryview, /) -> bytes: ...


def _zstd() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()


def _gzip() -> _Decompressor:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


class _Format(NamedTuple):
    new: Callable[[], _Decompressor]  # for one frame
    slice_bytes: int  # decompressed at once; chosen so that what comes of it is 32 MiB at most


FORMATS: dict[str, _Format | None] = {
    ".jsonl": None,
    ".jsonl.gz": _Format(_gzip, 1 << 15),  # a byte stands for 1032 at most
    ".jsonl.zst": _Format(_zstd, 1 << 10),  # 4 bytes can stand for 128 KiB
}


def file_kind(path: Path) -> str:
    """The supported suffix of a file's name; ValueError names a file that has none."""
    for suffix in FORMATS:
        if path.name.endswith(suffix):
            return suffix
    raise ValueError(f"{path}: not a kind of file that can be read; use one of {', '.join(FORMATS)}")


def read_content(path: Path, on_bytes: Callable[[bytes], object]) -> Iterator[bytes]:
    """Yield a file's content, decompressed, in pieces of 32 MiB at most.

    Args:
        on_bytes: hears every chunk once as it lies on the disk, also past damage: a hash of half of
            the file would match nothing.

    Raises:
        DamagedArchive: after the last piece that can be trusted. These are the frames before a
            corrupted one; or all that a truncated file holds.
        ValueError: the name has a suffix that isn't supported.
        OSError: the file can't be read.
    """
    form = FORMATS[file_kind(path)]
    with open(path, "rb") as stream:
        chunks = _chunks(stream, on_bytes)
        try:
            yield from chunks if form is None else _trusted(_frames(chunks, form), partial(_check_frame, path, form))
        except DamagedArchive:
            for _ in chunks:
                pass
            raise


def peek_content(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield a file's content in pieces as soon as they can be had, each with its end's place in the file.

    It isn't checked, and ends without a word where the file is damaged: for estimates.
    """
    form = FORMATS[file_kind(path)]
    with open(path, "rb") as stream, suppress(DamagedArchive):
        if form is None:
            yield from ((chunk, stream.tell()) for chunk in _chunks(stream))
        else:
            yield from ((piece.content, piece.position) for piece in _frames(_chunks(stream), form))


class _Piece(NamedTuple):
    content: bytes
    begin: int  # of its frame in the file
    position: int  # in the file, of what comes next
    ends: bool  # the frame


def _trusted(pieces: Iterable[_Piece], check_frame: Callable[[int], None]) -> Iterator[bytes]:
    held, size, checked = deque[bytes](), 0, False
    try:
        for content, begin, _, ends in pieces:
            held.append(content)
            size += len(content)
            if size > HELD_BYTES and not checked:
                check_frame(begin)
                checked = True
            while held and (ends or checked):
                yield held.popleft()
            if ends:
                size, checked = 0, False
    except TruncatedArchive:
        while held:
            yield held.popleft()
        raise


def _check_frame(path: Path, form: _Format, begin: int) -> None:
    """Raise DamagedArchive if the frame that begins at this byte is corrupted."""
    with open(path, "rb") as stream, suppress(TruncatedArchive):
        stream.seek(begin)
        for piece in _frames(_chunks(stream), form, begin):
            if piece.ends:
                return


def _frames(chunks: Iterable[bytes], form: _Format, position: int = 0) -> Iterator[_Piece]:
    """Yield the content's pieces; the first chunk begins at this position in the file.

    zstandard's own stream reader takes the end of a truncated file for the end of the data, so the
    frames are followed by hand: a frame that has begun must end. An empty file holds no frame and
    counts as truncated.
    """
    frame: _Decompressor | None = form.new()
    begin = position
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            if frame is None:
                frame, begin = form.new(), position
            given = rest[: form.slice_bytes]
            try:
                content = frame.decompress(given)
            except (zlib.error, zstandard.ZstdError) as error:
                where = f"found before byte {position + len(given)}, in the frame that begins at byte {begin}"
                raise DamagedArchive(f"{error} ({where})") from error
            used = len(given) - len(frame.unused_data)
            position, rest = position + used, rest[used:]
            if content or frame.eof:
                yield _Piece(content, begin, position, frame.eof)
            frame = None if frame.eof else frame
    if frame is not None:
        raise TruncatedArchive(
            f"truncated: the file ends at byte {position}, inside the compressed frame that begins at byte {begin}"
        )


def _chunks(stream: BinaryIO, on_bytes: Callable[[bytes], object] = lambda chunk: None) -> Iterator[bytes]:
    while chunk := _read(stream):
        on_bytes(chunk)
        yield chunk


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(CHUNK_BYTES)
    except OSError as error:  # which doesn't say of which file
        raise OSError(error.errno, error.strerror, stream.name) from error
