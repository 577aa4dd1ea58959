"""A worker's job: from one input file one part, a shard with a marker of what it was made of."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.files import sha256_file, write_durably
from data_tools.readers import BadLine, read_documents
from data_tools.shards import FORMAT_VERSION, Counts, ShardPaths, SourceFile
from data_tools.tokenizer import Tokenizer, TokenizerError


class TooManyBadLines(Exception):
    """More bad lines than allowed; ``lines`` holds ``file:line: reason`` of those seen."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines)
        self.lines = lines


@dataclass(frozen=True)
class PartJob:
    """One input file, where its part goes, and the tokenizer and limit that it is made with."""

    source: Path
    prefix: Path
    tokenizer: str
    tokenizer_sha256: str
    skip_bad: int


@dataclass(frozen=True)
class Part:
    """What a finished part was made of and holds; on disk as ``PREFIX.done.json``, written last."""

    format_version: int
    source: SourceFile
    tokenizer_sha256: str
    sets: dict[str, Counts]
    empty_documents: int
    bad_lines: list[str]


def marker_path(prefix: Path) -> Path:
    """The file whose presence says that a part is finished."""
    return Path(f"{prefix}.done.json")


def make_part(job: PartJob, advance: Callable[[int], None]) -> tuple[Part, bool]:
    """Make the part, or find it finished by an earlier run; the flag says that it was found.

    Args:
        advance: hears how many more bytes of the file, as it lies on the disk, have been read.

    Raises:
        TooManyBadLines: the file has more than ``job.skip_bad``.
        TokenizerError: the tokenizer's file is not what it was when the command started.
        Whatever ``advance`` raises; the part is then not finished.
    """
    if (found := _finished_part(job, advance)) is not None:
        return found, True
    marker_path(job.prefix).unlink(missing_ok=True)
    part = _write_part(job, advance)
    write_durably(marker_path(job.prefix), orjson.dumps(part, option=orjson.OPT_INDENT_2))
    return part, False


def _finished_part(job: PartJob, advance: Callable[[int], None]) -> Part | None:
    try:
        part = TypeAdapter(Part).validate_json(marker_path(job.prefix).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    size = job.source.stat().st_size
    if (part.format_version, part.tokenizer_sha256, part.source.size) != (
        FORMAT_VERSION,
        job.tokenizer_sha256,
        size,
    ):
        return None
    if part.source.sha256 != sha256_file(job.source, advance):
        advance(-size)  # it will be read again
        return None
    return part


def _write_part(job: PartJob, advance: Callable[[int], None]) -> Part:
    # Takes seconds to import where the worker pool has not done so.
    from data_tools.indexed import ShardWriter, token_dtype

    tokenizer = _load_tokenizer(job.tokenizer, job.tokenizer_sha256)
    digest, size = hashlib.sha256(), 0
    sets: dict[str, Counts] = {}
    empty, bad = 0, list[str]()

    def on_bytes(chunk: bytes) -> None:
        nonlocal size
        digest.update(chunk)
        size += len(chunk)
        advance(len(chunk))

    with ShardWriter(ShardPaths.of(job.prefix), token_dtype(tokenizer.vocab_size)) as writer:
        for item in read_documents(job.source, on_bytes):
            if isinstance(item, BadLine):
                bad.append(str(item))
                if len(bad) > job.skip_bad:
                    raise TooManyBadLines(bad)
            elif not item.text:
                empty += 1
            else:
                ids = [*tokenizer.encode(item.text), tokenizer.eos_id]
                writer.add(ids)
                counted = Counts(documents=1, tokens=len(ids), text_bytes=len(item.text.encode()))
                sets[item.set_name] = sets.get(item.set_name, Counts()) + counted
    source = SourceFile(str(job.source), size, digest.hexdigest())
    return Part(FORMAT_VERSION, source, tokenizer.sha256, sets, empty, bad)


@lru_cache(maxsize=1)
def _load_tokenizer(source: str, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(source)
    if tokenizer.sha256 != sha256:
        raise TokenizerError(f"{source}: the file changed while it was in use")
    return tokenizer
