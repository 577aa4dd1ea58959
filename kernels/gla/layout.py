"""How sequences are cut into chunks of time, so that all chunks are one batch of matmuls."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

LONGEST_CHUNK = 64


@dataclass(frozen=True)
class Walk:
    """Sequences that go from chunk to chunk together: their rows of the states, and the chunks of each step."""

    rows: slice
    chunks: list[slice]


@dataclass(frozen=True)
class Layout:
    """Every sequence as whole chunks of `size` tokens, a power of two, the last filled up with zeros.

    place: int64 (batch·seqlen,): where each token lies in the chunks laid end to end; None where nothing is filled up.
    """

    batch: int
    seqlen: int
    size: int
    n_chunks: int
    walks: list[Walk]
    place: Tensor | None

    @classmethod
    def of(cls, q: Tensor, cu_seqlens: Tensor | None) -> "Layout":
        """Rows of a batch walk side by side, packed documents one after the other."""
        batch, seqlen = q.shape[:2]
        bounds = [row * seqlen for row in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        size = _chunk_size(max(lengths, default=1))
        first = [0, *accumulate(-(-length // size) for length in lengths)]  # chunk of each sequence
        if cu_seqlens is None:
            per_row = -(-seqlen // size)
            walks = [Walk(slice(0, batch), [slice(i, None, per_row) for i in range(per_row)])]
        else:
            walks = [Walk(slice(i, i + 1), _one_by_one(*chunks)) for i, chunks in enumerate(pairwise(first))]
        place = None
        if any(length % size for length in lengths):
            shifts = torch.tensor([chunk * size - start for chunk, start in zip(first, bounds, strict=True)][:-1])
            place = torch.arange(batch * seqlen) + shifts.repeat_interleave(torch.tensor(lengths))
            place = place.to(q.device)
        return cls(batch, seqlen, size, first[-1], walks, place)

    def split(self, x: Tensor) -> Tensor:
        """(batch, seqlen, n_head, d) → contiguous (n_chunks, n_head, size, d)."""
        tokens, inner = x.flatten(0, 1), x.shape[2:]
        if self.place is not None:
            tokens = x.new_zeros(self.n_chunks * self.size, *inner).index_copy(0, self.place, tokens)
        return tokens.reshape(self.n_chunks, self.size, *inner).transpose(1, 2).contiguous()

    def join(self, chunks: Tensor) -> Tensor:
        """Undo `split`."""
        tokens = chunks.transpose(1, 2).flatten(0, 1)
        if self.place is not None:
            tokens = tokens[self.place]
        return tokens.unflatten(0, (self.batch, self.seqlen))


def _chunk_size(longest: int) -> int:
    return min(LONGEST_CHUNK, 1 << max(longest - 1, 0).bit_length())


def _one_by_one(first: int, end: int) -> list[slice]:
    return [slice(i, i + 1) for i in range(first, end)]
