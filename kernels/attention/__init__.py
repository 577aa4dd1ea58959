"""Causal softmax attention (arXiv 1706.03762), over a cache and over packed documents."""

from torch import Tensor

from kernels.attention.flash import attention_flash, fits, is_installed
from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_sdpa
from kernels.scan.checks import check_cu_seqlens, check_shape

__all__ = ["BACKENDS", "attention"]

BACKENDS = ("auto", "reference", "sdpa", "flash")


def attention(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`softmax(q kᵀ · head_dim^-½) v` of each head, where no query sees a later key.

    The last query is of the same token as the last key: seqlen_k − seqlen keys come before (a cache).
    Differentiable in q, k and v.

    Args:
        q: (batch, seqlen, n_head, head_dim).
        k, v: (batch, seqlen_k, n_head, head_dim), seqlen_k ≥ seqlen, in q's dtype.
        cu_seqlens: int32 (n_seq + 1,): bounds of documents packed into a batch of 1, which don't see each other;
            first 0, last seqlen; seqlen_k = seqlen.
        backend: "reference" (all scores at once), "sdpa" (torch's own kernels), "flash" (flash-attn, for bf16 and
            fp16 on a GPU), or "auto": flash where it is installed and for such tensors, sdpa elsewhere. On a GPU
            only flash takes `cu_seqlens` without waiting for its values.

    Returns:
        out like q.

    Raises:
        ValueError: a shape, a dtype, a device, `backend` or `cu_seqlens` that does not fit.
        ImportError: backend "flash" where flash-attn is not installed.
    """
    _check(q, k, v, cu_seqlens)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return attention_reference(q, k, v, cu_seqlens)
    if backend == "flash" or (backend == "auto" and fits(q) and is_installed()):
        return attention_flash(q, k, v, cu_seqlens)
    return attention_sdpa(q, k, v, cu_seqlens)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, seqlen, n_head, head_dim), got shape {tuple(tensor.shape)}")
    batch, seqlen, n_head, head_dim = q.shape
    seqlen_k = k.shape[1]
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, (batch, seqlen_k, n_head, head_dim), q, "q")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype, {q.dtype}, got {tensor.dtype}")
    if seqlen_k < seqlen:
        raise ValueError(f"k must be at least as long as q, {seqlen} tokens, got {seqlen_k}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q, "q")
        if seqlen_k != seqlen:
            raise ValueError(f"with cu_seqlens k must be as long as q, {seqlen} tokens, got {seqlen_k}")
