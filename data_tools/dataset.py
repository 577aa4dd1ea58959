"""What training reads: a dataset folder made by `data_tools.subset`, or a plain shard, opened alike.

A dataset folder holds `dataset.json`, written last, a copy of the tokenizer, and for each source (`redpajama_set_name`)
its documents in shuffled order, cut into shards of Megatron's format.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import orjson

from data_tools.files import write_durably
from data_tools.shards import Manifest, ShardFiles, ShardPaths, TokenType, check_sizes, check_version, read_json
from data_tools.tokenizer import TokenizerRecord

DATASET_VERSION = 1
MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.model"
PLAIN_SOURCE = "all"


@dataclass(frozen=True)
class Rule:
    """What the documents were chosen by; with the corpus's texts it determines every byte of the folder.

    `tokens` is None where all were taken. `shares` are the sources' parts of the tokens asked for.
    """

    tokens: int | None
    seed: int
    shares: dict[str, float]
    shard_tokens: int
    excluded: str | None  # digest of the documents that were left out wherever they were found


@dataclass(frozen=True)
class Dropped:
    """Documents and tokens left out."""

    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class ShardRecord:
    """One shard of a source: NAME.bin and NAME.idx in the folder."""

    name: str
    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """A source's documents in the dataset, and those left out as duplicates or as in an excluded corpus, too."""

    name: str
    digest: str  # of its documents, as the dataset's
    documents: int
    tokens: int
    text_bytes: int
    duplicates: Dropped
    overlap: Dropped
    shards: list[ShardRecord]


@dataclass(frozen=True)
class DatasetManifest:
    """`dataset.json`. Nothing in it depends on files, their names, or the machine: equal texts give equal bytes."""

    format_version: int
    digest: str  # of the set of documents: see data_tools/selection.py
    rule: Rule
    tokenizer: TokenizerRecord
    dtype: TokenType
    documents: int
    tokens: int
    sources: list[SourceRecord]

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_durably(path, orjson.dumps(self, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check types and version; ShardError names the file and what is wrong."""
        manifest = read_json(cls, path, "make it with `python -m data_tools.subset`")
        check_version(path, manifest.format_version, DATASET_VERSION)
        return manifest


@dataclass(frozen=True)
class Source:
    """What is drawn from with one weight: shards whose documents lie end to end."""

    name: str
    documents: int
    tokens: int
    shards: tuple[ShardFiles, ...]


@dataclass(frozen=True)
class Dataset:
    """An opened dataset; `digest` changes with any token or document."""

    path: Path
    digest: str
    tokenizer: TokenizerRecord
    tokenizer_path: Path
    dtype: np.dtype
    sources: tuple[Source, ...]

    @property
    def documents(self) -> int:
        """Of all sources."""
        return sum(source.documents for source in self.sources)

    @property
    def tokens(self) -> int:
        """Of all sources."""
        return sum(source.tokens for source in self.sources)


def is_dataset(path: str | Path) -> bool:
    """Whether this names a dataset folder, finished or not, and not a shard's prefix."""
    return Path(path).is_dir() and not ShardPaths.of(path).manifest.is_file()


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset folder, or a plain shard by its prefix as one source "all".

    Raises:
        ShardError: no such thing, a broken manifest, or files that are missing or of other sizes than it says.
    """
    dataset = _folder(Path(path)) if is_dataset(path) else _plain(Path(path))
    for source in dataset.sources:
        for shard in source.shards:
            check_sizes(shard, dataset.dtype)
    return dataset


def _folder(path: Path) -> Dataset:
    manifest = DatasetManifest.read(path / MANIFEST)
    content = hashlib.sha256(manifest.digest.encode())
    sources = []
    for record in manifest.sources:
        files = []
        for shard in record.shards:
            content.update(f"{record.name}\0{shard.bin_sha256}{shard.idx_sha256}".encode())
            base = path / shard.name
            files.append(ShardFiles(Path(f"{base}.bin"), Path(f"{base}.idx"), shard.documents, shard.tokens))
        sources.append(Source(record.name, record.documents, record.tokens, tuple(files)))
    tokenizer_path = path / TOKENIZER
    return Dataset(
        path, content.hexdigest(), manifest.tokenizer, tokenizer_path, np.dtype(manifest.dtype), tuple(sources)
    )


def _plain(prefix: Path) -> Dataset:
    paths, manifest = ShardPaths.of(prefix), Manifest.read(ShardPaths.of(prefix).manifest)
    files = ShardFiles(paths.bin, paths.idx, manifest.documents, manifest.tokens)
    source = Source(PLAIN_SOURCE, manifest.documents, manifest.tokens, (files,))
    digest = hashlib.sha256(f"{manifest.bin_sha256}{manifest.idx_sha256}".encode()).hexdigest()
    return Dataset(prefix, digest, manifest.tokenizer, paths.tokenizer, np.dtype(manifest.dtype), (source,))
