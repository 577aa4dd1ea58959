"""A worker's job: from one input file one part, a run of tokens and a document table, with a marker written last."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Self

import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.documents import DocumentWriter, open_documents, write_documents
from data_tools.encoder import Encoder
from data_tools.files import new_file, sha256_file, write_durably
from data_tools.quarantine import Quarantine, quarantine_path
from data_tools.readers import BadLine, Document, read_documents
from data_tools.shards import FORMAT_VERSION, Counts, SourceFile
from data_tools.tokenizer import Tokenizer, TokenizerError


class BadInput(ValueError):
    """A record that can't be used, where no folder for such was given; the message names file, line and reason."""


@dataclass(frozen=True)
class PartPaths:
    """A part's files."""

    bin: Path
    documents: Path
    marker: Path

    @classmethod
    def of(cls, prefix: Path) -> Self:
        """Paths by appending to `FOLDER/NAME`."""
        return cls(*(Path(f"{prefix}.{end}") for end in ("bin", "documents.npy", "done.json")))


@dataclass(frozen=True)
class PartJob:
    """One input file, where its part goes, and the tokenizer that it is made with."""

    source: Path
    prefix: Path
    tokenizer: str
    tokenizer_sha256: str
    bad_dir: Path | None  # where unusable records go; None: the first one is an error


@dataclass(frozen=True)
class Part:
    """What a finished part was made of and holds; on disk as `NAME.done.json`."""

    format_version: int
    source: SourceFile
    source_state: tuple[int, int, int]  # inode, times of the last change to content and to anything: no copy has these
    tokenizer_sha256: str
    sets: dict[str, Counts]  # by name, sorted: the document table's numbers
    empty_documents: int
    bad: dict[str, int]  # unusable records by kind

    @property
    def documents(self) -> int:
        """Documents with text."""
        return sum(counts.documents for counts in self.sets.values())

    @property
    def tokens(self) -> int:
        """Tokens, EOS included."""
        return sum(counts.tokens for counts in self.sets.values())

    @classmethod
    def read(cls, prefix: Path) -> Self | None:
        """The part's marker; None where there is none, or a broken one."""
        try:
            return TypeAdapter(cls).validate_json(PartPaths.of(prefix).marker.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def remove_leftovers(jobs: Sequence[PartJob], folder: Path) -> None:
    """Remove what a killed run left of these parts; once a run, since the folder may hold files by the 100,000."""
    names = {job.prefix.name for job in jobs}
    for path in folder.glob("*.tmp*"):
        if path.name.partition(".")[0] in names:
            path.unlink(missing_ok=True)


def make_part(job: PartJob, advance: Callable[[int], None]) -> tuple[Part, bool]:
    """Make the part, or find it finished by an earlier run; the flag says that it was found.

    Args:
        advance: hears how many more bytes of the file, as it lies on the disk, have been dealt with.

    Raises:
        BadInput: an unusable record, and `job.bad_dir` is None.
        ValueError: the file changed while it was read.
        TokenizerError: the tokenizer's file is not what it was when the command started.
        Whatever `advance` raises; the part is then not finished.
    """
    if (found := _finished_part(job, advance)) is not None:
        return found, True
    paths = PartPaths.of(job.prefix)
    paths.marker.unlink(missing_ok=True)
    part = _write_part(job, paths, advance)
    write_durably(paths.marker, orjson.dumps(part, option=orjson.OPT_INDENT_2))
    return part, False


def _finished_part(job: PartJob, advance: Callable[[int], None]) -> Part | None:
    part, size = Part.read(job.prefix), job.source.stat().st_size
    if part is None or (part.format_version, part.tokenizer_sha256, part.source.size) != (
        FORMAT_VERSION,
        job.tokenizer_sha256,
        size,
    ):
        return None
    if part.bad and job.bad_dir is None:
        return None  # made by a run that was told to set them aside; this one is to stop at them
    if part.bad and job.bad_dir and not quarantine_path(job.bad_dir, job.prefix.name).is_file():
        return None  # set aside in another folder
    if not _whole(job, part):
        return None
    if part.source.path == str(job.source) and part.source_state == _state(job.source.stat()):
        advance(size)
    elif part.source.sha256 != sha256_file(job.source, advance):
        advance(-size)  # it will be read again
        return None
    return part


def _whole(job: PartJob, part: Part) -> bool:
    """Whether the files of a finished part are there with their sizes: a disk may have lost one."""
    paths, itemsize = PartPaths.of(job.prefix), _load_encoder(job.tokenizer, job.tokenizer_sha256).dtype.itemsize
    try:
        return (
            paths.bin.stat().st_size == part.tokens * itemsize
            and len(open_documents(paths.documents)) == part.documents
        )
    except (FileNotFoundError, ValueError):
        return False


def _write_part(job: PartJob, paths: PartPaths, advance: Callable[[int], None]) -> Part:
    source, before = _Source(job.source, advance), job.source.stat()
    encoder = _load_encoder(job.tokenizer, job.tokenizer_sha256)
    counts = _Tally()
    with (
        Quarantine(job.bad_dir, job.prefix.name) as quarantine,
        write_documents(paths.documents) as table,
        new_file(paths.bin) as temporary,
        open(temporary, "wb") as tokens,
    ):
        for item in read_documents(job.source, source.on_bytes):
            if isinstance(item, BadLine):
                if job.bad_dir is None:
                    raise BadInput(f"{item}; --bad-dir DIR sets such records aside and goes on")
                quarantine.add(item)
                counts.bad[item.kind] = counts.bad.get(item.kind, 0) + 1
            elif not item.text:
                counts.empty_documents += 1
            else:
                counts.add(item.set_name, *_write_document(item, encoder, tokens, table))
        source.check_unchanged(before)
    made_of = SourceFile(str(job.source), source.size, source.digest.hexdigest())
    sets, bad = dict(sorted(counts.sets.items())), dict(sorted(counts.bad.items()))
    state = _state(before)
    return Part(FORMAT_VERSION, made_of, state, job.tokenizer_sha256, sets, counts.empty_documents, bad)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _write_document(item: Document, encoder: Encoder, stream: BinaryIO, table: DocumentWriter) -> tuple[int, int]:
    """Append a document; returns its tokens, EOS included, and its bytes of text."""
    written = sum(stream.write(ids) for ids in encoder.slices(item.text)) + stream.write(encoder.eos)
    tokens = written // encoder.dtype.itemsize
    return tokens, table.add(item.text, tokens, item.set_name, item.line)


class _Source:
    """Hashes the input as it is read, and notices when it is another file than at the start."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self.path, self.size, self.digest = path, 0, hashlib.sha256()
        self._advance = advance

    def on_bytes(self, chunk: bytes) -> None:
        self.digest.update(chunk)
        self.size += len(chunk)
        self._advance(len(chunk))

    def check_unchanged(self, before: os.stat_result) -> None:
        if _state(self.path.stat()) != _state(before) or self.size != before.st_size:
            raise ValueError(f"{self.path}: changed while it was read; run again when nothing writes to it")


class _Tally:
    def __init__(self) -> None:
        self.sets: dict[str, Counts] = {}
        self.bad: dict[str, int] = {}
        self.empty_documents = 0

    def add(self, set_name: str, tokens: int, text_bytes: int) -> None:
        self.sets[set_name] = self.sets.get(set_name, Counts()) + Counts(1, tokens, text_bytes)


@lru_cache(maxsize=1)
def _load_encoder(source: str, sha256: str) -> Encoder:
    tokenizer = Tokenizer.load(source)
    if tokenizer.sha256 != sha256:
        raise TokenizerError(f"{source}: the file changed while it was in use")
    return Encoder(tokenizer)
