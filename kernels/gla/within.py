"""What happens within chunks: which token reads how much of which, by joining neighbouring blocks, two by two.

Legend: G chunks of C tokens, d_k wide; a block is s = 1, 2, 4 … tokens of a chunk, C / s of them. README.md: the maths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Join:
    """Pairs of blocks of `size` tokens, N in all chunks, before they are joined.

    later, earlier (N, s, d_k): q of the later block, decayed since its start; k of the earlier, decayed until its end.
    first, second (N, 1, d_k): the whole decay of either.
    """

    size: int
    later: Tensor
    earlier: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Within:
    """scores (G, C, C): how much of v_j token i reads, 0 for j > i; q, k (G, C, d_k): decayed since the chunk's start,
    until its end; total (G, d_k): the chunk's decay."""

    inputs: tuple[Tensor, Tensor, Tensor]
    scores: Tensor
    q: Tensor
    k: Tensor
    total: Tensor
    joins: list[_Join]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, decay: Tensor) -> "Within":
        """q, k, decay: (G, C, d_k), C a power of two. Only products of decays are made: nothing can overflow."""
        (chunks, length, d_k), inputs = q.shape, (q, k, decay)
        scores = q.new_zeros(chunks, length, length)
        scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(2))
        q, k, total = q * decay, k.clone(), decay.reshape(-1, 1, d_k)
        joins, size = [], 1
        while size < length:
            later, earlier = _pairs(q, size)[:, 1], _pairs(k, size)[:, 0]
            first, second = total.unflatten(0, (-1, 2)).unbind(1)
            across = _across(scores, size)
            across.copy_((later @ earlier.mT).view(across.shape))
            joins.append(_Join(size, later.clone(), earlier.clone(), first, second))
            later *= first
            earlier *= second
            total, size = first * second, 2 * size
        return cls(inputs, scores, q, k, total.view(chunks, d_k), joins)

    def backward(self, dscores: Tensor, dq: Tensor, dk: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and decay, given those of the results; dq and dk are overwritten."""
        q, k, decay = self.inputs
        dtotal = dtotal.unsqueeze(1)
        for join in reversed(self.joins):
            dlater, dearlier = _pairs(dq, join.size)[:, 1], _pairs(dk, join.size)[:, 0]
            dacross = _across(dscores, join.size).reshape(-1, join.size, join.size)
            dfirst = (dlater * join.later).sum(1, keepdim=True).addcmul_(dtotal, join.second)
            dsecond = (dearlier * join.earlier).sum(1, keepdim=True).addcmul_(dtotal, join.first)
            dlater.mul_(join.first).add_(_product(dacross, join.earlier))
            dearlier.mul_(join.second).add_(_product(dacross.mT, join.later))
            dtotal = torch.stack([dfirst, dsecond], 1).flatten(0, 1)
        ddiagonal = dscores.diagonal(dim1=1, dim2=2).unsqueeze(2)
        ddecay = (dq * q).add_(dtotal.view(q.shape))
        return (dq * decay).addcmul_(ddiagonal, k), dk.addcmul_(ddiagonal, q), ddecay


def _product(scores: Tensor, rows: Tensor) -> Tensor:
    """scores @ rows, (N, s, s) and (N, s, d_k): as thousands of matmuls, blocks of one and two tokens would be slow."""
    if scores.shape[2] <= 2:
        return (scores.unsqueeze(3) * rows.unsqueeze(1)).sum(2)
    return scores @ rows


def _pairs(x: Tensor, size: int) -> Tensor:
    """(G, C, d_k) → a view (N, 2, s, d_k): neighbouring blocks, the earlier first."""
    return x.view(-1, 2, size, x.shape[2])


def _across(scores: Tensor, size: int) -> Tensor:
    """The part (G, C / 2s, s, s) of the scores (G, C, C) where later blocks read their neighbours: a view."""
    chunks, length, _ = scores.shape
    pairs = length // (2 * size)
    blocks = scores.view(chunks, pairs, 2, size, pairs, 2, size)[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
