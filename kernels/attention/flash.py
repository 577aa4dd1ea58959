"""flash-attn's CUDA kernels (FlashAttention-2, arXiv 2307.08691)."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

LARGEST_HEAD = 256


@cache
def is_installed() -> bool:
    """Whether flash-attn is; nothing is imported."""
    return find_spec("flash_attn") is not None


def fits(q: Tensor) -> bool:
    """Whether its kernels are for such tensors."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] <= LARGEST_HEAD


def attention_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`attention`'s contract after its checks. flash-attn's `causal` lets the last query see the last key, too.

    Raises:
        ValueError: for tensors that its kernels are not for.
        ImportError: without flash-attn.
    """
    if not fits(q):
        raise ValueError(
            f"backend 'flash' needs bf16 or fp16 on a GPU and head_dim ≤ {LARGEST_HEAD}, "
            f"q is {q.dtype} on {q.device} with head_dim {q.shape[3]}"
        )
    if not is_installed():
        raise ImportError("backend 'flash' needs flash-attn: see requirements-gpu.txt")
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # late: a CPU run needs none of it

    if cu_seqlens is None:
        return flash_attn_func(q, k, v, causal=True)
    seqlen = q.shape[1]  # bounds every document's length: the longest one's would have to be read from the GPU
    packed = (t.squeeze(0) for t in (q, k, v))
    return flash_attn_varlen_func(*packed, cu_seqlens, cu_seqlens, seqlen, seqlen, causal=True).unsqueeze(0)
