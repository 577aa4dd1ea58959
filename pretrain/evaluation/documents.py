"""Which tokens of a dataset are scored: all documents end to end, and the long ones alone, read as they are needed."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_tools.dataset import Dataset
from data_tools.index import read_index
from data_tools.shards import ShardFiles
from pretrain.evaluation.losses import EvaluationError, TokenStream, count_targets
from pretrain.shard_reader import ShardFilesReader


@dataclass(frozen=True)
class Span:
    """Tokens `start` … `start` + `tokens` − 1 of a shard's `.bin`."""

    path: Path
    start: int
    tokens: int


class SpanStream:
    """Spans end to end, cut to `tokens`; a slice is read from the files when it is asked for."""

    def __init__(self, files: ShardFilesReader, spans: Sequence[Span], tokens: int) -> None:
        self._files, self._spans, self._tokens = files, spans, tokens
        self._ends = list(accumulate(span.tokens for span in spans))

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """A copy of tokens [start:stop]; raises ShardChanged where a file was cut."""
        start, stop, _ = part.indices(self._tokens)
        out = np.empty(max(0, stop - start), self._files.dtype)
        filled, number = 0, bisect_right(self._ends, start)
        while filled < len(out):
            span = self._spans[number]
            skipped = start + filled - (self._ends[number] - span.tokens)
            count = min(span.tokens - skipped, len(out) - filled)
            self._files.read(span.path, span.start + skipped, out[filled : filled + count])
            filled, number = filled + count, number + 1
        return out


@dataclass(frozen=True)
class DocumentSet:
    """Documents to score: `stream` is their tokens end to end, cut behind the last target.

    documents: how many begin in what is read of them.
    """

    name: str
    documents: int
    stream: TokenStream


def document_sets(dataset: Dataset, contexts: Sequence[int], max_tokens: int | None) -> list[DocumentSet]:
    """All documents of a dataset and, where they fill the largest context, the long ones alone.

    Args:
        max_tokens: score at most so many of each set; of a dataset with several sources, each gives its share.

    Raises EvaluationError where the dataset, or `max_tokens` of it, is shorter than the largest context.
    """
    largest = max(contexts)
    shards = [list(source.shards) for source in dataset.sources]
    indices = {shard.bin: shard.idx for source in shards for shard in source}
    everything = [[Span(shard.bin, 0, shard.tokens) for shard in source] for source in shards]
    try:
        sets = [_cut(dataset, "all", partial(_beginning_in, indices), everything, contexts, max_tokens)]
    except EvaluationError as error:
        raise EvaluationError(f"{dataset.path}: {error}") from error
    long = [[span for shard in source for span in _long_documents(shard, largest)] for source in shards]
    # One document that is exactly as long fills none: its last token has no target.
    if sum(span.tokens for source in long for span in source) > largest:
        name = f"≥ {largest:,} tokens"
        sets.append(_cut(dataset, name, lambda span: 1, long, contexts, max_tokens))
    return sets


def _long_documents(shard: ShardFiles, least: int) -> Iterator[Span]:
    index = read_index(shard.idx)
    for i in np.flatnonzero(index.sequence_lengths >= least):
        yield Span(shard.bin, int(index.sequence_pointers[i]) // index.dtype.itemsize, int(index.sequence_lengths[i]))


def _beginning_in(indices: Mapping[Path, Path], span: Span) -> int:
    index = read_index(indices[span.path])
    first = index.sequence_pointers[index.document_indices[:-1]] // index.dtype.itemsize
    return int(np.searchsorted(first, span.start + span.tokens) - np.searchsorted(first, span.start))


def _cut(
    dataset: Dataset,
    name: str,
    count_documents: Callable[[Span], int],
    sources: list[list[Span]],
    contexts: Sequence[int],
    max_tokens: int | None,
) -> DocumentSet:
    spans = list(_shares(sources, None if max_tokens is None else max_tokens + 1))
    tokens = count_targets(sum(span.tokens for span in spans), contexts) + 1
    files = ShardFilesReader((shard for source in dataset.sources for shard in source.shards), dataset.dtype)
    return DocumentSet(name, sum(map(count_documents, spans)), SpanStream(files, spans, tokens))


def _shares(sources: list[list[Span]], most: int | None) -> Iterator[Span]:
    """About each source's share of `most` tokens, from its beginning; all of them where there are no more."""
    sizes = [sum(span.tokens for span in source) for source in sources]
    total = sum(sizes)
    wanted = total if most is None else min(most, total)
    taken = 0
    for source, upto in zip(sources, accumulate(sizes), strict=True):
        left = wanted * upto // total - taken
        taken += left
        for span in source:
            if here := min(left, span.tokens):
                yield Span(span.path, span.start, here)
            left -= here
