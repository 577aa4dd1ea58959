"""The oracle: gated linear attention as a plain loop over time, differentiated by autograd."""

import torch
from torch import Tensor

from kernels.scan.cpu import computed_dtype
from kernels.scan.reference import walk_documents


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gla`'s contract without the checks; always returns (out, final state)."""
    dtype = computed_dtype(q)
    streams = (q.to(dtype) * q.shape[3] ** -0.5, k.to(dtype), v.to(dtype), log_decay.to(dtype).exp())
    out, state = walk_documents(_walk, streams, initial_state, cu_seqlens)
    return out.to(q.dtype), state


def _walk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products and sums rather than matmuls, which autocast would round."""
    state = v.new_zeros(len(q), *k.shape[2:], v.shape[3]) if state is None else state.to(v.dtype)
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(*(t.unbind(1) for t in (q, k, v, decay)), strict=True):
        state = decay_t.unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append((q_t.unsqueeze(-1) * state).sum(-2))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state
