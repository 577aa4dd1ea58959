"""What `data_tools.inspect` looks into, opened alike: a shard of ours, a dataset folder, a shard of Megatron-LM's."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np

from data_tools.corpus import parts_folder
from data_tools.dataset import MANIFEST, DatasetManifest, is_dataset, open_dataset
from data_tools.documents import open_documents
from data_tools.index import Index, read_index
from data_tools.shards import Manifest, ShardError, ShardPaths, open_shard
from data_tools.tokenizer import Tokenizer

CHUNK_DOCUMENTS = 1 << 20


class Kind(Enum):
    """What the path names."""

    SHARD = "shard"
    DATASET = "dataset folder"
    MEGATRON = "shard without a manifest, as Megatron-LM's preprocess_data writes"


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of a shard from number `first` on: tokens and source of each, both (documents,) integer."""

    first: int
    lengths: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True)
class ShardView:
    """A shard's documents. Their sources are `source`, or where this is None what the document table says."""

    name: str
    bin: Path
    index: Index
    source: int | None = 0
    table: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index.document_indices) - 1

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return self.bin.stat().st_size // self.index.dtype.itemsize

    def chunk(self, first: int, end: int) -> Chunk:
        """The documents from `first` to before `end`; in a shard of Megatron's each may be several sequences."""
        bounds = self.index.document_indices[first : end + 1]
        ends = np.cumsum(self.index.sequence_lengths[bounds[0] : bounds[-1]], dtype=np.int64)
        lengths = np.diff(np.concatenate([[0], ends])[bounds - bounds[0]])
        if self.source is None and self.table is not None:
            return Chunk(first, lengths, np.array(self.table["set"][first:end]))
        return Chunk(first, lengths, np.full(len(lengths), self.source or 0, np.uint16))

    def chunks(self) -> Iterator[Chunk]:
        """All documents, so many at a time that memory stays small."""
        for first in range(0, len(self), CHUNK_DOCUMENTS):
            yield self.chunk(first, min(first + CHUNK_DOCUMENTS, len(self)))

    def read(self, document: int, count: int) -> np.ndarray:
        """`count` ids from a document's start on, those of the documents after it included."""
        sequence = int(self.index.document_indices[document])
        if count == 0 or sequence == len(self.index.sequence_pointers):
            return np.empty(0, self.index.dtype)
        offset = int(self.index.sequence_pointers[sequence])
        return np.memmap(self.bin, self.index.dtype, "r", offset, (count,))


@dataclass(frozen=True)
class Contents:
    """Opened: shards of documents that belong to sources, which `source_names` numbers.

    `text_bytes` of each source and the tokenizer are None where nothing is known of them; `input_files` are those that
    a shard of ours was made from.
    """

    path: str
    kind: Kind
    dtype: np.dtype
    tokenizer: Tokenizer | None
    source_names: list[str]
    text_bytes: list[int] | None
    shards: list[ShardView]
    notes: list[str]
    input_files: list[str]

    def locate(self, number: int) -> tuple[ShardView, int]:
        """The shard of a document counted through all shards, and its number there."""
        for shard in self.shards:
            if number < len(shard):
                return shard, number
            number -= len(shard)
        raise IndexError(number)


def open_contents(path: str, tokenizer: str | None = None) -> Contents:
    """Open whatever the path names.

    Args:
        tokenizer: a SentencePiece file, or `mistral`, for a shard of Megatron's, which has none.

    Raises:
        ShardError: there is nothing, it is unfinished, or its files do not agree; or it has a tokenizer of its own.
        TokenizerError: the tokenizer can't be used.
    """
    kind = find_kind(path)
    if kind is Kind.MEGATRON:
        return _megatron(path, tokenizer)
    if tokenizer is not None:
        raise ShardError(f"{path} has a tokenizer of its own; leave out --tokenizer {tokenizer}")
    return _dataset(path) if kind is Kind.DATASET else _shard(path)


def find_kind(path: str) -> Kind:
    """What the path names. A shard of ours without its manifest is unfinished, and not taken for one of Megatron's."""
    if is_dataset(path):
        return Kind.DATASET
    paths = ShardPaths.of(path)
    ours = paths.manifest.exists() or paths.documents.exists() or parts_folder(path).exists()
    return Kind.MEGATRON if not ours and paths.bin.is_file() and paths.idx.is_file() else Kind.SHARD


def _shard(prefix: str) -> Contents:
    paths, manifest = ShardPaths.of(prefix), Manifest.read(ShardPaths.of(prefix).manifest)
    shard = open_shard(prefix)
    table = open_documents(paths.documents)
    if len(table) != len(shard):
        raise ShardError(f"{paths.documents}: {len(table)} documents, the shard has {len(shard)}")
    names = sorted(manifest.sets)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in manifest.bad.items())
    unusable = f"{sum(manifest.bad.values()):,} unusable records{f' ({kinds})' if kinds else ''}"
    return Contents(
        prefix,
        Kind.SHARD,
        shard.dtype,
        replace(Tokenizer.load(paths.tokenizer), name=manifest.tokenizer.name),
        names,
        [manifest.sets[name].text_bytes for name in names],
        [ShardView(Path(prefix).name, paths.bin, read_index(paths.idx), None, table)],
        [
            f"made from {len(manifest.sources):,} source files",
            f"left out: {manifest.empty_documents:,} empty documents, {unusable}",
        ],
        [source.path for source in manifest.sources],
    )


def _dataset(folder: str) -> Contents:
    manifest, dataset = DatasetManifest.read(Path(folder, MANIFEST)), open_dataset(folder)
    shards = [
        ShardView(files.bin.stem, files.bin, _index(files.idx), number)
        for number, source in enumerate(dataset.sources)
        for files in source.shards
    ]
    rule = manifest.rule
    asked = "all tokens" if rule.tokens is None else f"{rule.tokens:,} tokens asked for"
    notes = [f"digest {manifest.digest}", f"{asked}, seed {rule.seed}, shards of {rule.shard_tokens:,} tokens"]
    for what in ("duplicates", "overlap"):
        dropped = [getattr(source, what) for source in manifest.sources]
        documents, tokens = (sum(getattr(each, key) for each in dropped) for key in ("documents", "tokens"))
        notes.append(f"left out as {what}: {documents:,} documents, {tokens:,} tokens")
    return Contents(
        folder,
        Kind.DATASET,
        dataset.dtype,
        replace(Tokenizer.load(dataset.tokenizer_path), name=manifest.tokenizer.name),
        [source.name for source in manifest.sources],
        [source.text_bytes for source in manifest.sources],
        shards,
        notes,
        [],
    )


def _megatron(prefix: str, tokenizer: str | None) -> Contents:
    paths = ShardPaths.of(prefix)
    index = _index(paths.idx)
    if index.dtype.kind not in "iu":
        raise ShardError(f"{paths.idx}: tokens of type {index.dtype}; only integers are token ids")
    bounds, sequences = index.document_indices, len(index.sequence_lengths)
    if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != sequences:
        raise ShardError(f"{paths.idx}: its documents are not those of its {sequences} sequences")
    size = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype.itemsize if sequences else 0
    if (found := paths.bin.stat().st_size) != size:
        raise ShardError(f"{paths.bin} has {found} bytes; the sequences of its .idx take {size}")
    shard = ShardView(Path(prefix).name, paths.bin, index)
    loaded = None if tokenizer is None else Tokenizer.load(tokenizer)
    notes = [f"{Kind.MEGATRON.value}: {sequences:,} sequences"]
    return Contents(prefix, Kind.MEGATRON, index.dtype, loaded, ["all"], None, [shard], notes, [])


def _index(path: Path) -> Index:
    try:
        return read_index(path)
    except ValueError as error:
        raise ShardError(str(error)) from error
