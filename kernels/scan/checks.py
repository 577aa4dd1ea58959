"""What the public scans refuse, in words that name the argument."""

from collections.abc import Mapping

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "cpu", "triton")


def choose_backend(backend: str, u: Tensor) -> str:
    """`backend`, with "auto" resolved for u's device; ValueError if there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        return "triton" if u.is_cuda else "cpu"
    if backend == "cpu" and u.is_cuda:
        raise ValueError(f"backend 'cpu' needs CPU tensors, u is on {u.device}")
    return backend


def check_tensors(
    u: Tensor,
    d_state: int,
    cu_seqlens: Tensor | None,
    *,
    streams: Mapping[str, Tensor | None],
    rows: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor | None],
    initial_state: Tensor | None,
) -> None:
    """ValueError for a tensor of the wrong shape or device, or for `cu_seqlens` that doesn't fit.

    streams: (batch, seqlen, d_inner) like u; rows: (batch, seqlen, d_state); vectors: (d_inner,); all by name.
    """
    if u.dim() != 3:
        raise ValueError(f"u must be (batch, seqlen, d_inner), got shape {tuple(u.shape)}")
    _check_operands(u, d_state, streams, rows, vectors)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, u)
    batch, _, d_inner = u.shape
    n_seq = batch if cu_seqlens is None else len(cu_seqlens) - 1
    check_shape("initial_state", initial_state, (n_seq, d_inner, d_state), u)


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, first: str = "u") -> None:
    """ValueError unless `tensor`, where there is one, has this shape and is on the device of `like` (named `first`)."""
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {first}'s device, {like.device}, got {tensor.device}")


def check_cu_seqlens(cu_seqlens: Tensor, like: Tensor, first: str = "u") -> None:
    """ValueError unless these are bounds of documents in `like`, (1, seqlen, …), named `first`."""
    batch, seqlen = like.shape[:2]
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be int32 (n_seq + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens packs documents into a batch of 1, got batch {batch}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens must be on {first}'s device, {like.device}, got {cu_seqlens.device}")
    if cu_seqlens.is_cuda:
        return  # reading the values would wait for the GPU at every layer
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != seqlen or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to seqlen {seqlen}, got {bounds[:4]}…{bounds[-2:]}")


def check_step(
    state: Tensor,
    u: Tensor,
    d_state: int,
    state_indices: Tensor | None,
    *,
    streams: Mapping[str, Tensor | None],
    rows: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor | None],
) -> None:
    """ValueError for a decode step's tensor of the wrong shape or device, or an index that is no row of `state`.

    streams: (batch, d_inner) like u; rows: (batch, d_state); vectors: (d_inner,); all by name.
    """
    if u.dim() != 2:
        raise ValueError(f"u must be (batch, d_inner), got shape {tuple(u.shape)}")
    _check_operands(u, d_state, streams, rows, vectors)
    batch, d_inner = u.shape
    check_shape("state", state, (batch if state_indices is None else len(state), d_inner, d_state), u)
    check_shape("state_indices", state_indices, (batch,), u)
    check_indices(state_indices, len(state))


def _check_operands(
    u: Tensor,
    d_state: int,
    streams: Mapping[str, Tensor | None],
    rows: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor | None],
) -> None:
    """ValueError for a tensor of another shape than u's (streams), u's with d_state (rows) or (d_inner,) (vectors)."""
    shapes = (streams, u.shape), (rows, (*u.shape[:-1], d_state)), (vectors, u.shape[-1:])
    device = u.device
    for named, shape in shapes:
        for name, tensor in named.items():
            # A call for each would be felt in a token's time: it is left to say what is wrong.
            if tensor is not None and (tensor.shape != shape or tensor.device != device):
                check_shape(name, tensor, tuple(shape), u)


def check_indices(state_indices: Tensor | None, n_states: int) -> None:
    """ValueError for an index of no row of a state; a GPU's are not read: that would wait for it at every layer."""
    if state_indices is None or state_indices.is_cuda:
        return
    if (largest := max(state_indices.tolist(), default=-1)) >= n_states:
        raise ValueError(f"state_indices must be below {n_states}, the rows of state, got {largest}")
