"""What the references of both scans do around their recurrence."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def walk_documents(
    walk: Callable[..., tuple[Tensor, Tensor]],
    streams: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`walk(*streams, initial state or None) -> (read-out, final state)` over a batch, or over each document.

    streams: (batch, seqlen, …) each; `cu_seqlens` bounds the documents.
    """
    if cu_seqlens is None:
        return walk(*streams, initial_state)
    walked = []
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        initial = None if initial_state is None else initial_state[i : i + 1]
        walked.append(walk(*(t[:, start:end] for t in streams), initial))
    return torch.cat([y for y, _ in walked], dim=1), torch.cat([state for _, state in walked])


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D·u)·silu(z), in y's dtype; u must have it too."""
    if D is not None:
        y = y + D.to(y.dtype) * u
    return y if z is None else y * F.silu(z.to(y.dtype))
