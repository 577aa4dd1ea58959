"""A token shard on disk: ``PREFIX.bin``, ``.idx``, ``.documents.npy``, ``.manifest.json`` and ``.tokenizer.model``.

``.bin`` and ``.idx`` are Megatron's indexed dataset, one document a sequence, EOS at the end of each: readable by
Megatron-LM and gpt-neox. The document table holds hashes and sources (``documents.py``). The manifest says what they
were made of; a shard without one is not finished.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.documents import open_documents
from data_tools.files import sha256_file, write_durably
from data_tools.index import index_bytes, misplaced_sequence, read_index
from data_tools.tokenizer import TokenizerRecord

FORMAT_VERSION = 2
VERIFY_TOKENS = 1 << 24
ROWS = 1 << 20  # documents looked at together
TokenType = Literal["uint16", "int32"]
T = TypeVar("T")


def token_type(dtype: np.dtype) -> TokenType:
    """A manifest's name for the type of stored tokens."""
    return "uint16" if dtype == np.uint16 else "int32"


class ShardError(ValueError):
    """A shard is missing, unfinished or inconsistent; the message names the file."""


@dataclass(frozen=True)
class ShardPaths:
    """The five files of a prefix."""

    bin: Path
    idx: Path
    documents: Path
    manifest: Path
    tokenizer: Path

    @classmethod
    def of(cls, prefix: str | Path) -> Self:
        """Paths by appending to the prefix, which may itself hold dots."""
        ends = ("bin", "idx", "documents.npy", "manifest.json", "tokenizer.model")
        return cls(*(Path(f"{prefix}.{end}") for end in ends))


@dataclass(frozen=True)
class SourceFile:
    """An input file: path as it was given, size in bytes as it lies on disk, and its content's hash."""

    path: str
    size: int
    sha256: str


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
    """What a shard holds and what it was made of. Equal inputs and tokenizer give an equal manifest.

    `bad` counts the records that could not be used, by kind; `--bad-dir` has them.
    """

    format_version: int
    documents: int
    tokens: int
    text_bytes: int
    sets: dict[str, Counts]
    empty_documents: int
    bad: dict[str, int]
    dtype: TokenType
    tokenizer: TokenizerRecord
    bin_sha256: str
    idx_sha256: str
    documents_sha256: str
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
        advice = "no finished shard has this prefix; make one with `python -m data_tools.tokenize --output PREFIX`"
        manifest = read_json(cls, path, advice)
        check_version(path, manifest.format_version, FORMAT_VERSION)
        return manifest


def read_json(kind: type[T], path: Path, advice: str) -> T:
    """A dataclass from its JSON; ShardError for no such file (with the advice), broken JSON, a wrong or missing key."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ShardError(f"{path} does not exist: {advice}") from error
    except ValidationError as error:
        raise ShardError(f"{path}: {first_problem(error)}") from error


def check_version(path: Path, found: int, known: int) -> None:
    """ShardError for a file of another format version."""
    if found != known:
        raise ShardError(f"{path}: format_version {found}, this code reads {known}")


def first_problem(error: ValidationError) -> str:
    """The first thing wrong with a JSON file, as `key: what`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"


class Shard:
    """An opened shard: item i is document i's ids, read-only (tokens,) of `dtype`."""

    def __init__(self, paths: ShardPaths) -> None:
        self.index = index = read_index(paths.idx)
        self.dtype = index.dtype
        self.sequence_lengths = index.sequence_lengths
        self._starts = index.sequence_pointers
        self.tokens = np.memmap(paths.bin, self.dtype, "r")

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        start = int(self._starts[document]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[document])]

    def ends_without(self, eos_id: int) -> list[int]:
        """Documents whose last token is another; their places are to be checked before."""
        found: list[int] = []
        for first in range(0, len(self), ROWS):
            starts = self._starts[first : first + ROWS] // self.dtype.itemsize
            last = starts + self.sequence_lengths[first : first + ROWS] - 1
            found += (np.flatnonzero(self.tokens[last] != eos_id) + first).tolist()
        return found


@dataclass(frozen=True)
class ShardFiles:
    """A shard's files, documents and tokens."""

    bin: Path
    idx: Path
    documents: int
    tokens: int


def check_sizes(shard: ShardFiles, dtype: np.dtype) -> None:
    """ShardError where a file of the shard is missing or has not the size of its documents and tokens."""
    sizes = {shard.bin: shard.tokens * dtype.itemsize, shard.idx: index_bytes(shard.documents)}
    for path, size in sizes.items():
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise ShardError(f"{path} is missing beside its manifest; make it again") from None
        if found != size:
            described = f"{shard.documents} documents and {shard.tokens} tokens"
            raise ShardError(f"{path} has {found} bytes; the manifest's {described} take {size}")


def open_shard(prefix: str | Path) -> Shard:
    """Open a finished shard.

    Raises:
        ShardError: no manifest, a missing or cut file, or other counts than the manifest's.
    """
    paths, manifest = ShardPaths.of(prefix), Manifest.read(ShardPaths.of(prefix).manifest)
    files = ShardFiles(paths.bin, paths.idx, manifest.documents, manifest.tokens)
    check_sizes(files, np.dtype(manifest.dtype))
    try:
        shard = Shard(paths)
    except ValueError as error:
        raise ShardError(str(error)) from error
    tokens, dtype = int(shard.sequence_lengths.sum(dtype=np.int64)), shard.dtype.name
    if (tokens, dtype) != (manifest.tokens, manifest.dtype):
        raise ShardError(
            f"{paths.idx}: an index of {tokens} tokens of {dtype}; "
            f"the manifest says {manifest.tokens} of {manifest.dtype}"
        )
    return shard


def verify_shard(prefix: str | Path, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
    """Read a whole shard and compare it with its manifest; returns what differs, nothing for a sound shard.

    Checked: the hashes of all files, the counts, that every id is a piece of the vocabulary, that EOS stands at the
    end of every document and nowhere else, and that the document table has the index's lengths.

    Args:
        on_bytes: hears how many more bytes have been hashed.

    Raises:
        ShardError: there is no readable manifest to compare with.
    """
    paths, manifest = ShardPaths.of(prefix), Manifest.read(ShardPaths.of(prefix).manifest)
    hashes = {
        paths.bin: manifest.bin_sha256,
        paths.idx: manifest.idx_sha256,
        paths.documents: manifest.documents_sha256,
        paths.tokenizer: manifest.tokenizer.sha256,
    }
    problems = [problem for path, sha256 in hashes.items() if (problem := hash_problem(path, sha256, on_bytes))]
    try:
        shard = open_shard(prefix)
    except ShardError as error:
        return [*problems, str(error)]
    problems += token_problems(shard, manifest.tokenizer)
    return problems + _table_problems(paths.documents, shard, manifest)


def hash_problem(path: Path, sha256: str, on_bytes: Callable[[int], None] = lambda count: None) -> str | None:
    """What is wrong with a file that should have this hash."""
    if not path.is_file():
        return f"{path} is missing"
    found = sha256_file(path, on_bytes)
    return None if found == sha256 else f"{path}: sha256 is {found}, the manifest says {sha256}"


def token_problems(shard: Shard, tokenizer: TokenizerRecord) -> list[str]:
    """Documents out of place, ids outside the vocabulary, documents that don't end with EOS, and EOS elsewhere."""
    if (wrong := misplaced_sequence(shard.index, shortest=1)) is not None:
        return [f"document {wrong} of the index is not where the one before it ends"]
    tokens, eos_id = shard.tokens, tokenizer.eos_id
    # int32 covers the stored types (uint16 and int32), and so finds negative ids too.
    outside = eos_count = 0
    for start in range(0, len(tokens), VERIFY_TOKENS):
        chunk = tokens[start : start + VERIFY_TOKENS].astype(np.int32)
        outside += int(((chunk < 0) | (chunk >= tokenizer.vocab_size)).sum())
        eos_count += int((chunk == eos_id).sum())
    problems, unended = [], shard.ends_without(eos_id)
    if outside:
        problems.append(f"{outside} token ids are outside the vocabulary of {tokenizer.vocab_size}")
    if unended:
        problems.append(f"{len(unended)} documents do not end with EOS ({eos_id}), the first is {unended[0]}")
    if eos_count != len(shard):
        problems.append(f"EOS ({eos_id}) occurs {eos_count} times in {len(shard)} documents")
    return problems


def _table_problems(path: Path, shard: Shard, manifest: Manifest) -> list[str]:
    try:
        table = open_documents(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    tokens = np.zeros(len(manifest.sets))  # sums are exact: below 2^53
    for first in range(0, max(len(table), len(shard)), ROWS):
        rows, lengths = table[first : first + ROWS], shard.sequence_lengths[first : first + ROWS]
        if not np.array_equal(rows["tokens"], lengths) or rows["set"].max() >= len(tokens):
            return [f"{path}: other documents or lengths than the index's"]
        tokens += np.bincount(rows["set"], rows["tokens"], len(tokens))
    if tokens.tolist() != [counts.tokens for counts in manifest.sets.values()]:
        return [f"{path}: other tokens per set than the manifest's"]
    return []
