"""What a subset is to be made of: opened corpora that fit together, and the record that a later run compares with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from data_tools.corpus import Corpus, Piece, open_corpus
from data_tools.dataset import DATASET_VERSION
from data_tools.selection import Request
from data_tools.shards import ShardError
from data_tools.spans import Span, cut_groups, source_names
from data_tools.tokenizer import TokenizerRecord


@dataclass(frozen=True)
class Sizes:
    """How many documents, and tokens, a process holds at once; the result does not depend on them."""

    group_documents: int = 1 << 21
    bucket_documents: int = 1 << 21
    run_tokens: int = 1 << 28


DEFAULT_SIZES = Sizes()


@dataclass(frozen=True)
class CorpusRecord:
    """An input: its prefix, what it holds, and a fingerprint of its files' names, sizes and times."""

    prefix: str
    pieces: int
    documents: int
    tokens: int
    fingerprint: str

    @classmethod
    def of(cls, prefix: str, corpus: Corpus) -> Self:
        """Of an opened corpus."""
        digest = hashlib.sha256()
        for piece in corpus.pieces:
            times = [path.stat().st_mtime_ns for path in (piece.bin, piece.documents)]
            digest.update(f"{piece.name} {piece.document_count} {piece.tokens} {times}\n".encode())
        documents = sum(piece.document_count for piece in corpus.pieces)
        tokens = sum(piece.tokens for piece in corpus.pieces)
        return cls(prefix, len(corpus.pieces), documents, tokens, digest.hexdigest())


@dataclass(frozen=True)
class PlanRecord:
    """All that the result depends on."""

    format_version: int
    request: Request
    inputs: list[CorpusRecord]
    excluded: list[CorpusRecord]

    def difference(self, there: "PlanRecord") -> str | None:
        """The first thing in which the record of what is there differs, None where nothing does."""
        for name, value in vars(self.request).items():
            if (other := getattr(there.request, name)) != value:
                return f"--{name.replace('_', '-')} {_shown(other)} there, {_shown(value)} now"
        for option, mine, theirs in (
            ("--input", self.inputs, there.inputs),
            ("--exclude", self.excluded, there.excluded),
        ):
            # By what they hold: the same corpora by other paths, or in another order, give the same.
            if sorted(corpus.fingerprint for corpus in mine) != sorted(corpus.fingerprint for corpus in theirs):
                before = " ".join(corpus.prefix for corpus in theirs)
                return f"{option} {before or 'of nothing'} there, or these were written anew since"
        if self.format_version != there.format_version:
            return f"format_version {there.format_version} there, {self.format_version} now"
        return None


def _shown(value: object) -> object:
    return {"None": "all", "{}": "as they are"}.get(str(value), value)


@dataclass(frozen=True)
class Plan:
    """Opened inputs, what to choose of them, and the folder to write."""

    record: PlanRecord
    tokenizer: TokenizerRecord
    tokenizer_bytes: bytes
    dtype: np.dtype
    pieces: list[Piece]
    excluded: list[Piece]
    output: Path

    @classmethod
    def of(cls, inputs: Sequence[str], exclude: Sequence[str], request: Request, output: Path) -> Self:
        """Open the corpora; ShardError where one is unfinished, or they were made by different tokenizers."""
        for option, prefixes in (("--input", inputs), ("--exclude", exclude)):
            if twice := [prefix for prefix in prefixes if prefixes.count(prefix) > 1]:
                raise ShardError(f"{option} {twice[0]} is given twice")
        corpora, excluded = ([open_corpus(prefix) for prefix in prefixes] for prefixes in (inputs, exclude))
        for prefix, corpus in zip(inputs, corpora, strict=True):
            if corpus.tokenizer.sha256 != corpora[0].tokenizer.sha256:
                raise ShardError(f"--input {prefix}: made with another tokenizer than {inputs[0]}")
        records = (
            [CorpusRecord.of(*pair) for pair in zip(prefixes, opened, strict=True)]
            for prefixes, opened in ((inputs, corpora), (exclude, excluded))
        )
        return cls(
            PlanRecord(DATASET_VERSION, request, *records),
            min((corpus.tokenizer for corpus in corpora), key=lambda tokenizer: tokenizer.name),
            corpora[0].tokenizer_bytes,
            corpora[0].dtype,
            [piece for corpus in corpora for piece in corpus.pieces],
            [piece for corpus in excluded for piece in corpus.pieces],
            output.resolve(),
        )

    @property
    def work(self) -> Path:
        """The folder of what is not finished."""
        return self.output.with_name(f"{self.output.name}.work")

    @property
    def sources(self) -> list[str]:
        """The sources' names, by number from 1."""
        return source_names(self.pieces)

    def groups(self, size: int) -> list[list[Span]]:
        """The documents of the inputs in groups of up to `size`."""
        return cut_groups(self.pieces, self.sources, size)

    def all_groups(self, size: int) -> list[list[Span]]:
        """These groups, and then those of the documents to exclude, whose numbers follow the inputs'."""
        excluded = cut_groups(self.excluded, None, size, sum(piece.document_count for piece in self.pieces))
        return [*self.groups(size), *excluded]
