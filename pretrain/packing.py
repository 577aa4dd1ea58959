"""What cutting a dataset into windows does to its documents and tokens, for a line at the run's start."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.dataset import Source
from data_tools.index import read_index
from pretrain.shard_reader import windows_of

MOST_DOCUMENTS = 4_000_000  # whose lengths are looked at: a part of a second


@dataclass(frozen=True)
class Packing:
    """Counts over whole sources, and over the documents at their shards' beginnings that were looked at.

    A document is cut where its tokens lie in more than one window; `continued` counts those in later windows than the
    first, where the model has not seen what came before. Nothing is ever padded.
    """

    windows: int
    tokens: int
    dropped: int  # at shards' ends
    documents: int
    seen: int
    seen_tokens: int
    cut: int
    continued: int

    @property
    def line(self) -> str:
        """All of it, to print."""
        sample = f" (of the first {self.seen:,} of {self.documents:,})" if self.seen < self.documents else ""
        return (
            f"{self.windows:,} windows, {self.dropped / self.tokens:.4%} of tokens dropped at shards' ends, 0% padded; "
            f"{self.cut / self.seen:.1%} of documents cut at a window's end{sample}, "
            f"{self.continued / self.seen_tokens:.1%} of tokens in a later window than their document's first"
        )


def measure_packing(sources: Sequence[Source], seqlen: int, most_documents: int = MOST_DOCUMENTS) -> Packing:
    """Exact where the sources have no more documents than `most_documents`, else each shard gives its share of them."""
    shards = [shard for source in sources for shard in source.shards]
    documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
    part = min(1.0, most_documents / max(documents, 1))
    seen = seen_tokens = cut = continued = 0
    for shard in shards:
        lengths = read_index(shard.idx).sequence_lengths[: max(1, int(shard.documents * part))]
        ends = np.cumsum(lengths, dtype=np.int64)
        past = np.maximum(ends - ((ends - lengths) // seqlen + 1) * seqlen, 0)
        seen, seen_tokens = seen + len(lengths), seen_tokens + int(lengths.sum(dtype=np.int64))
        cut, continued = cut + int(np.count_nonzero(past)), continued + int(past.sum())
    windows = sum(windows_of(shard.tokens, seqlen) for shard in shards)
    return Packing(windows, tokens, tokens - windows * seqlen, documents, seen, seen_tokens, cut, continued)
