"""A token shard on disk: ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.manifest.json`` and
``PREFIX.tokenizer.model``.

``.bin`` and ``.idx`` are megatron-core's IndexedDataset, one document a sequence, EOS at the end of
each, and readable by Megatron-LM and gpt-neox. The manifest says what they were made of; a shard
without one is not finished.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.files import sha256_file, write_durably

if TYPE_CHECKING:
    from data_tools.indexed import IndexedDataset

FORMAT_VERSION = 1
# Magic, version, type, two counts and the first document's start; then a length, a pointer and an
# end for each document.
INDEX_HEADER_BYTES = 9 + 8 + 1 + 8 + 8 + 8
INDEX_DOCUMENT_BYTES = 4 + 8 + 8
VERIFY_TOKENS = 1 << 24
TokenType = Literal["uint16", "int32"]


class ShardError(ValueError):
    """A shard is missing, unfinished or inconsistent; the message names the file."""


@dataclass(frozen=True)
class ShardPaths:
    """The four files of a prefix."""

    bin: Path
    idx: Path
    manifest: Path
    tokenizer: Path

    @classmethod
    def of(cls, prefix: str | Path) -> Self:
        """Paths by appending to the prefix, which may itself hold dots."""
        ends = ("bin", "idx", "manifest.json", "tokenizer.model")
        return cls(*(Path(f"{prefix}.{end}") for end in ends))


@dataclass(frozen=True)
class SourceFile:
    """An input file: path as it was given, size in bytes as it lies on disk, and its content's
    hash.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the ids."""

    name: str
    sha256: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class Counts:
    """Documents, tokens (EOS included) and UTF-8 bytes of text."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
        )


@dataclass(frozen=True)
class Manifest:
    """What a shard holds and what it was made of. Equal inputs and tokenizer give an equal
    manifest.
    """

    format_version: int
    documents: int
    tokens: int
    text_bytes: int
    sets: dict[str, Counts]
    empty_documents: int
    bad_lines: list[str]
    dtype: TokenType
    tokenizer: TokenizerRecord
    bin_sha256: str
    idx_sha256: str
    sources: list[SourceFile]

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_durably(path, orjson.dumps(self, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check types and version.

        Raises:
            ShardError: no such file, broken JSON, a missing or mistyped key, or another format
                version.
        """
        try:
            manifest = TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ShardError(
                f"{path} does not exist: no finished shard has this prefix; "
                "make one with `python -m data_tools.tokenize --output PREFIX`"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise ShardError(f"{path}: {key}: {first['msg']}") from error
        if manifest.format_version != FORMAT_VERSION:
            raise ShardError(f"{path}: format_version {manifest.format_version}, this code reads {FORMAT_VERSION}")
        return manifest


def open_shard(prefix: str | Path) -> "IndexedDataset":
    """Open a finished shard: item i is document i's ids, read-only (tokens,) of its ``dtype``.

    Raises:
        ShardError: no manifest, a missing or cut ``.bin`` or ``.idx``, or other counts than the
            manifest's.
    """
    paths, manifest = ShardPaths.of(prefix), Manifest.read(ShardPaths.of(prefix).manifest)
    # Sizes first: on a cut file megatron-core fails with an assertion, and again in its destructor.
    sizes = {
        paths.bin: manifest.tokens * np.dtype(manifest.dtype).itemsize,
        paths.idx: INDEX_HEADER_BYTES + manifest.documents * INDEX_DOCUMENT_BYTES,
    }
    described = f"{manifest.documents} documents and {manifest.tokens} tokens"
    for path, size in sizes.items():
        if not path.is_file():
            raise ShardError(f"{path} is missing beside its manifest; run data_tools.tokenize again")
        if (found := path.stat().st_size) != size:
            raise ShardError(f"{path} has {found} bytes; the manifest's {described} take {size}")
    # Importing it takes seconds, and reading a manifest must not cost them.
    from data_tools.indexed import IndexedDataset

    try:
        dataset = IndexedDataset(str(prefix))
    except (AssertionError, ValueError) as error:
        raise ShardError(f"{paths.idx}: not a readable index: {error}") from error
    tokens, dtype = int(dataset.sequence_lengths.sum()), np.dtype(dataset.index.dtype).name
    if (tokens, dtype) != (manifest.tokens, manifest.dtype):
        raise ShardError(
            f"{paths.idx}: an index of {tokens} tokens of {dtype}; "
            f"the manifest says {manifest.tokens} of {manifest.dtype}"
        )
    return dataset


def verify_shard(prefix: str | Path) -> list[str]:
    """Read a whole shard and compare it with its manifest; returns what differs, nothing for a
    sound shard.

    Checked: the hashes of ``.bin``, ``.idx`` and the tokenizer, the counts, that every id is a
    piece of the vocabulary, and that EOS stands at the end of every document and nowhere else.

    Raises:
        ShardError: there is no readable manifest to compare with.
    """
    paths, manifest = ShardPaths.of(prefix), Manifest.read(ShardPaths.of(prefix).manifest)
    hashes = {
        paths.bin: manifest.bin_sha256,
        paths.idx: manifest.idx_sha256,
        paths.tokenizer: manifest.tokenizer.sha256,
    }
    problems = [problem for path, sha256 in hashes.items() if (problem := _hash_problem(path, sha256))]
    try:
        dataset = open_shard(prefix)
    except ShardError as error:
        return [*problems, str(error)]
    return problems + _token_problems(dataset, manifest)


def _hash_problem(path: Path, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    found = sha256_file(path)
    return None if found == sha256 else f"{path}: sha256 is {found}, the manifest says {sha256}"


def _token_problems(dataset: "IndexedDataset", manifest: Manifest) -> list[str]:
    vocab_size, eos_id = manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id
    tokens = np.memmap(f"{dataset.path_prefix}.bin", dtype=dataset.index.dtype, mode="r")
    # int32 covers the stored types (uint16 and int32), and so finds negative ids too.
    outside = eos_count = 0
    for start in range(0, len(tokens), VERIFY_TOKENS):
        chunk = tokens[start : start + VERIFY_TOKENS].astype(np.int32)
        outside += int(((chunk < 0) | (chunk >= vocab_size)).sum())
        eos_count += int((chunk == eos_id).sum())
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64) - 1
    unended = np.flatnonzero(tokens[ends] != eos_id)
    problems = []
    if outside:
        problems.append(f"{outside} token ids are outside the vocabulary of {vocab_size}")
    if len(unended):
        problems.append(f"{len(unended)} documents do not end with EOS ({eos_id}), the first is {unended[0]}")
    if eos_count != manifest.documents:
        problems.append(f"EOS ({eos_id}) occurs {eos_count} times in {manifest.documents} documents")
    return problems
