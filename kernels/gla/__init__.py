"""Gated linear attention (arXiv 2312.06635): the maths, the backends and their costs are in README.md beside this."""

import torch
from torch import Tensor

from kernels.gla.chunked import gla_chunked
from kernels.gla.fla import gla_fla, is_installed
from kernels.gla.reference import gla_reference
from kernels.scan.checks import check_cu_seqlens, check_shape

__all__ = ["BACKENDS", "gla", "gla_reference"]

BACKENDS = ("auto", "reference", "chunked", "fla")


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention whose state forgets at a rate of its own in every row.

    S = exp(log_decay)[:, None]·S + k vᵀ;  out = d_k^-½ · qᵀ S, for each head

    Args:
        q, k: (batch, seqlen, n_head, d_k).
        v: (batch, seqlen, n_head, d_v).
        log_decay: like q, at most 0 (however small: −inf forgets everything); better fp32 whatever q is.
        initial_state: (batch or n_seq, n_head, d_k, d_v) (None: 0).
        cu_seqlens: int32 (n_seq + 1,): bounds of documents packed into a batch of 1; first 0, last seqlen. The
            state starts anew at each, and no gradient crosses them.
        backend: "reference", "chunked", "fla", or "auto": fla for bf16 and fp16 on a GPU where it is installed,
            chunked elsewhere. A single token is one step of the recurrence on either of them.

    Returns:
        out like v in q's dtype; with `return_final_state`, also the state after the last token
        (batch or n_seq, n_head, d_k, d_v), fp64 for fp64 q, else fp32. Both are differentiable in every input.

    Raises:
        ValueError: a shape, a device, `backend` or `cu_seqlens` that does not fit.
        ImportError: backend "fla" where flash-linear-attention is not installed.
    """
    _check(q, k, v, log_decay, initial_state, cu_seqlens)
    run = _resolve(backend, q)
    if run == "reference" or (q.shape[1] == 1 and cu_seqlens is None):
        out, state = gla_reference(q, k, v, log_decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
    else:
        form = gla_fla if run == "fla" else gla_chunked
        out, state = form(q, k, v, log_decay, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def _resolve(backend: str, q: Tensor) -> str:
    """`backend`, with "auto" resolved for q; ValueError if there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        return "fla" if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and is_installed() else "chunked"
    return backend


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    for name, tensor, last in (("q", q, "d_k"), ("v", v, "d_v")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, seqlen, n_head, {last}), got shape {tuple(tensor.shape)}")
    batch, _, n_head, d_k = q.shape
    d_v = v.shape[3]
    for name, tensor, width in (("k", k, d_k), ("log_decay", log_decay, d_k), ("v", v, d_v)):
        check_shape(name, tensor, (*q.shape[:3], width), q, "q")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q, "q")
    n_seq = batch if cu_seqlens is None else len(cu_seqlens) - 1
    check_shape("initial_state", initial_state, (n_seq, n_head, d_k, d_v), q, "q")
