"""flash-linear-attention's Triton kernels."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def is_installed() -> bool:
    """Whether flash-linear-attention is; nothing is imported."""
    return find_spec("fla") is not None


def fits(q: Tensor) -> bool:
    """Whether its kernels are for such tensors."""
    return q.is_cuda and q.dtype != torch.float64


def gla_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`gla`'s contract after its checks; always returns (out, final state). The states between chunks have q's dtype.

    Raises:
        ValueError: for tensors that are not on a GPU, or float64.
        ImportError: without flash-linear-attention.
    """
    if not fits(q):
        raise ValueError(f"backend 'fla' needs fp32, bf16 or fp16 on a GPU, q is {q.dtype} on {q.device}")
    if not is_installed():
        raise ImportError("backend 'fla' needs flash-linear-attention: see requirements-gpu.txt")
    from fla.ops.gla import chunk_gla  # late: it takes seconds, and a CPU run needs none of it

    state = None if initial_state is None else initial_state.float()
    return chunk_gla(
        *(q, k.to(q.dtype), v.to(q.dtype), log_decay.float()),
        scale=q.shape[3] ** -0.5,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,  # itself and no copy: what is derived from it is kept for the next layer
    )
