"""The chunked form in torch: matmuls within chunks of time, then a walk from chunk to chunk (README.md: the maths).

Legend: G = n_chunks·n_head chunks of C tokens, d_k and d_v wide. A block is 1, 2, 4 … C tokens in a row.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gla.layout import Layout, Walk
from kernels.gla.within import Within
from kernels.scan.cpu import computed_dtype


def gla_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`gla`'s contract after its checks; always returns (out, final state)."""
    dtype, layout = computed_dtype(q), Layout.of(q, cu_seqlens)
    if initial_state is None:
        n_seq = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = q.new_zeros(n_seq, *q.shape[2:], v.shape[3])
    scaled = q.to(dtype) * q.shape[3] ** -0.5
    chunks = [layout.split(t) for t in (scaled, k.to(dtype), v.to(dtype), log_decay.to(dtype))]
    decay = chunks.pop().exp()  # what a chunk is filled up with, keeps the state: e⁰
    out, state = _Chunked.apply(*chunks, decay, initial_state.to(dtype), layout.walks)
    return layout.join(out).to(q.dtype), state


class _Chunked(torch.autograd.Function):
    """q, k, decay (n_chunks, n_head, C, d_k), v (…, d_v) → out, final state.

    The backward is given these and a state per chunk; what lies within a chunk it computes again.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor, walks: list[Walk]
    ):
        per_chunk = (*v.shape[:2], *initial_state.shape[2:])
        with torch.autocast(q.device.type, enabled=False):  # it would round the matmuls
            within, values = Within.of(*(t.flatten(0, 1) for t in (q, k, decay))), v.flatten(0, 1)
            added = (within.k.mT @ values).view(per_chunk)
            total = within.total.view(*per_chunk[:3], 1)
            before, state = _carry(initial_state, total, added, walks)
            out = (within.q @ before.flatten(0, 1)).baddbmm_(within.scores, values)
        ctx.save_for_backward(q, k, v, decay, before)
        ctx.walks, ctx.n_seq = walks, len(initial_state)
        ctx.set_materialize_grads(False)
        return out.view(v.shape), state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dstate: Tensor | None):  # type: ignore[no-untyped-def]
        q, k, v, decay, before = ctx.saved_tensors
        walks: list[Walk] = ctx.walks
        dout = torch.zeros_like(v) if dout is None else dout.contiguous()
        if dstate is None:
            dstate = before.new_zeros(ctx.n_seq, *before.shape[1:])
        with torch.autocast(q.device.type, enabled=False):
            within, values = Within.of(*(t.flatten(0, 1) for t in (q, k, decay))), v.flatten(0, 1)
            douts = dout.flatten(0, 1)
            read = (within.q.mT @ douts).view(before.shape)
            total = within.total.view(*before.shape[:3], 1)
            back = (Walk(walk.rows, walk.chunks[::-1]) for walk in walks)
            after, dinitial = _carry(dstate, total, read, back)
            dtotal = (after * before).sum(3).flatten(0, 1)
            before, after = before.flatten(0, 1), after.flatten(0, 1)
            dv = (within.k @ after).baddbmm_(within.scores.mT, douts)
            dq, dk, ddecay = within.backward(
                dq=douts @ before.mT, dk=values @ after.mT, dtotal=dtotal, dscores=douts @ values.mT
            )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), ddecay.view(q.shape), dinitial, None


def _carry(state: Tensor, total: Tensor, added: Tensor, walks: Iterable[Walk]) -> tuple[Tensor, Tensor]:
    """state ← total·state + added from chunk to chunk: the states met on the way, and where each sequence ends."""
    met, end = torch.empty_like(added), state.clone()
    for walk in walks:
        current = state[walk.rows]
        for chunk in walk.chunks:
            met[chunk] = current
            current = torch.addcmul(added[chunk], total[chunk], current)
        end[walk.rows] = current
    return met, end
