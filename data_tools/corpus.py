"""A tokenized corpus: the finished parts of `PREFIX.parts/`, or the shard that they were merged into, opened alike."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.files import write_durably
from data_tools.index import token_dtype
from data_tools.parts import Part, PartPaths
from data_tools.shards import FORMAT_VERSION, Manifest, ShardError, ShardPaths, TokenizerRecord, first_problem
from data_tools.tokenizer import Tokenizer

MISSING_SHOWN = 5


@dataclass(frozen=True)
class InputFile:
    """An input file: its part's name, its path as given, and its size."""

    name: str
    path: str
    size: int


@dataclass(frozen=True)
class Inputs:
    """What the parts of a folder are to be: `PREFIX.parts/inputs.json`, written before any part."""

    format_version: int
    tokenizer: TokenizerRecord
    files: list[InputFile]

    @classmethod
    def of(cls, files: Iterable[Path], tokenizer: Tokenizer) -> Self:
        """The plan for these files, in this order."""
        inputs = [InputFile(part_name(path), str(path), path.stat().st_size) for path in files]
        return cls(FORMAT_VERSION, tokenizer.record, inputs)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The folder's plan, None where there is none; ShardError for a broken one."""
        path = folder / "inputs.json"
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise ShardError(f"{path}: {first_problem(error)}; delete {folder} and run again") from error

    def write(self, folder: Path) -> None:
        """Write whole or not at all."""
        write_durably(folder / "inputs.json", orjson.dumps(self, option=orjson.OPT_INDENT_2))


@dataclass(frozen=True)
class Piece:
    """A run of documents: tokens, table, and the names that the table's `set` counts in."""

    name: str
    bin: Path
    documents: Path
    set_names: list[str]
    document_count: int
    tokens: int
    source: str  # the input file, or the shard


@dataclass(frozen=True)
class Corpus:
    """Documents as they were tokenized, in the order of the input."""

    tokenizer: TokenizerRecord
    tokenizer_bytes: bytes
    dtype: np.dtype
    pieces: list[Piece]


def parts_folder(prefix: str | Path) -> Path:
    """Where the parts of a prefix lie."""
    return Path(f"{prefix}.parts")


def part_name(path: Path) -> str:
    """The part of an input file: by path, not by position, so that a file added to a folder shifts no others."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def open_corpus(prefix: str | Path) -> Corpus:
    """Open what `data_tools.tokenize` made of PREFIX, merged or in parts.

    Raises:
        ShardError: there is neither, a part is not finished (with how many are missing, and which), or a file has
            another size than its documents.
    """
    if ShardPaths.of(prefix).manifest.is_file():
        return _open_merged(prefix)
    folder = parts_folder(prefix)
    inputs = Inputs.read(folder)
    if inputs is None:
        missing = f"neither {ShardPaths.of(prefix).manifest} nor {folder / 'inputs.json'} is there"
        raise ShardError(f"{prefix}: {missing}; make them with `python -m data_tools.tokenize`")
    return corpus_of(finished_parts(inputs, folder), inputs, folder)


def corpus_of(parts: Iterable[Part], inputs: Inputs, folder: Path) -> Corpus:
    """The corpus that a folder's finished parts make; ShardError for a file of another size than its documents."""
    dtype = token_dtype(inputs.tokenizer.vocab_size)
    pieces = []
    for file, part in zip(inputs.files, parts, strict=True):
        paths = PartPaths.of(folder / file.name)
        names = list(part.sets)
        pieces.append(Piece(file.name, paths.bin, paths.documents, names, part.documents, part.tokens, file.path))
    return _checked(Corpus(inputs.tokenizer, (folder / "tokenizer.model").read_bytes(), dtype, pieces))


def finished_parts(inputs: Inputs, folder: Path) -> list[Part]:
    """Each input file's part; ShardError where some are not finished."""
    found = [Part.read(folder / file.name) for file in inputs.files]
    fits = [part is not None and _is_of(part, file, inputs) for part, file in zip(found, inputs.files, strict=True)]
    parts = [part for part, fit in zip(found, fits, strict=True) if part is not None and fit]
    if len(parts) < len(inputs.files):
        missing = [file.path for file, fit in zip(inputs.files, fits, strict=True) if not fit]
        shown = ", ".join(missing[:MISSING_SHOWN])
        raise ShardError(
            f"{folder}: {len(inputs.files) - len(parts)} of {len(inputs.files)} parts are not finished "
            f"({shown}{', …' if len(missing) > MISSING_SHOWN else ''}); run data_tools.tokenize again"
        )
    return parts


def _is_of(part: Part, file: InputFile, inputs: Inputs) -> bool:
    """Whether a part was made of this file as it was when the parts were begun, by this code and tokenizer."""
    made = (part.format_version, part.source.size, part.tokenizer_sha256)
    return made == (inputs.format_version, file.size, inputs.tokenizer.sha256) and made[0] == FORMAT_VERSION


def _open_merged(prefix: str | Path) -> Corpus:
    paths, manifest = ShardPaths.of(prefix), Manifest.read(ShardPaths.of(prefix).manifest)
    dtype = np.dtype(manifest.dtype)
    names, path = list(manifest.sets), str(paths.bin)
    piece = Piece(paths.bin.stem, paths.bin, paths.documents, names, manifest.documents, manifest.tokens, path)
    return _checked(Corpus(manifest.tokenizer, paths.tokenizer.read_bytes(), dtype, [piece]))


def _checked(corpus: Corpus) -> Corpus:
    for piece in corpus.pieces:
        found = piece.bin.stat().st_size if piece.bin.is_file() else -1
        if found != (size := piece.tokens * corpus.dtype.itemsize):
            raise ShardError(f"{piece.bin}: {found} bytes where {size} should be; run data_tools.tokenize again")
        if not piece.documents.is_file():
            raise ShardError(f"{piece.documents} is missing; run data_tools.tokenize again")
    return corpus
