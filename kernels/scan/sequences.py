"""Which sequences walk which steps: the rows of a batch, or the documents packed into one row."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 16  # steps between checkpointed states; walk.h knows it too


@dataclass(frozen=True)
class Walk:
    """Sequences that share a span of time, so that torch can walk them together."""

    rows: slice  # of the states
    start: int
    end: int
    first_chunk: int

    def chunks(self, t: int) -> slice:
        """Where these rows' checkpoints at step `t`, a multiple of CHUNK after the start, lie."""
        per_row = -(-(self.end - self.start) // CHUNK)
        chunk = self.first_chunk + (t - self.start) // CHUNK
        return slice(chunk, chunk + per_row * (self.rows.stop - self.rows.start - 1) + 1, per_row)


@dataclass(frozen=True)
class Sequences:
    """Independent walks over time: the rows of a batch, or the documents packed into one row."""

    table: Tensor  # int64 [n_seq, 4]: batch index, first step, steps, first checkpoint
    n_chunks: int
    packed: bool

    @classmethod
    def of(cls, u: Tensor, cu_seqlens: Tensor | None) -> "Sequences":
        if cu_seqlens is None:
            batch = torch.arange(u.shape[0])
            start, length = torch.zeros_like(batch), torch.full_like(batch, u.shape[1])
        else:
            start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
            batch = torch.zeros_like(start)
        chunks = (length + CHUNK - 1) // CHUNK
        table = torch.stack([batch, start, length, chunks.cumsum(0) - chunks], dim=1)
        return cls(table.contiguous(), int(chunks.sum()), cu_seqlens is not None)

    def __len__(self) -> int:
        return len(self.table)

    def walks(self) -> list[Walk]:
        """Each document alone, or all rows of a batch at once."""
        rows = self.table.tolist()
        if not self.packed:
            return [Walk(slice(0, len(rows)), 0, rows[0][2], 0)] if rows else []
        return [Walk(slice(i, i + 1), start, start + length, chunk) for i, (_, start, length, chunk) in enumerate(rows)]
