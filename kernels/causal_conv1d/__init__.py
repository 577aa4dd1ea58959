"""Depthwise causal convolution over time, with its decoding step. Both are public ops."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels.causal_conv1d.cpu import causal_conv1d_cpu, causal_conv1d_step_cpu
from kernels.causal_conv1d.reference import causal_conv1d_reference, causal_conv1d_step_reference
from kernels.scan.checks import check_indices

__all__ = ["BACKENDS", "causal_conv1d", "causal_conv1d_step"]

BACKENDS = ("auto", "reference", "cpu", "triton")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Literal["auto", "reference", "cpu", "triton"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`out[b, t, d] = act(bias[d] + Σ_k weight[d, k]·x[b, t - d_conv + 1 + k, d])`.

    Differentiable in x, weight, bias and initial_state, from out and from the final state. Sums
    are fp32 (fp64 for fp64 x), whatever x's dtype.

    Args:
        x: (batch, seqlen, d_inner). A view is fine: nothing is copied where channels are adjacent,
            as in one half of `in_proj`'s output.
        weight: (d_inner, d_conv), nn.Conv1d's squeezed; `weight[:, -1]` meets the current token.
        bias: (d_inner,).
        activation: "silu" or None.
        initial_state: (batch or n_seq, d_inner, d_conv - 1), the last inputs before each sequence,
            oldest first; zeros if None. Converted to x's dtype.
        return_final_state: also return the state after the last token, in initial_state's shape
            and x's dtype: the initial_state of what follows.
        cu_seqlens: int [n_seq + 1], 0 first and seqlen last: documents packed into one row
            (batch = 1), between which nothing flows. An empty document keeps its state. On a GPU
            the values are not checked: to read them would be to wait for it.
        backend: "reference" (plain torch, any device), "cpu" (C++), "triton" (GPUs, d_conv up to
            8), or "auto": triton on a GPU, cpu on the CPU, reference elsewhere and for fp64 on a GPU.

    Returns:
        out (batch, seqlen, d_inner) in x's dtype, or (out, final_state).

    Raises:
        ValueError: for shapes, cu_seqlens, activation or backend that don't fit, by name.
        TypeError: for fp64 x and backend "triton".
    """
    _check_operands(x, weight, bias, activation, dims=3)
    engine = _resolve(backend, x)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        n_seq = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        _check_shape("initial_state", initial_state, (n_seq, x.shape[2], weight.shape[1] - 1))
        initial_state = initial_state.to(x.dtype)
    operands, silu = (x, weight, bias, initial_state), activation == "silu"
    if engine == "triton":  # imported late: a CPU run needs no triton
        from kernels.causal_conv1d.triton import causal_conv1d_triton

        return causal_conv1d_triton(*operands, cu_seqlens, silu, return_final_state)
    run = causal_conv1d_cpu if engine == "cpu" else causal_conv1d_reference
    out, final_state = run(*operands, None if cu_seqlens is None else cu_seqlens.tolist(), silu)
    return (out, final_state) if return_final_state else out


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `causal_conv1d` per row: the state moves on in place. No gradients.

    On a GPU one kernel (plain torch for fp64), which a CUDA graph may hold; on a CPU C++ where `causal_conv1d` is.

    Args:
        state: (n_states, d_inner, d_conv - 1) as `causal_conv1d` returns it, with any strides;
            n_states = batch unless state_indices is given.
        x: (batch, d_inner).
        weight, bias, activation: as in `causal_conv1d`.
        state_indices: int (batch,), the row of `state` that each row of x belongs to, each at most
            once; -1: none, and that row of the output is zero.

    Returns:
        out (batch, d_inner) in x's dtype.

    Raises:
        ValueError: for shapes, an activation or (on a CPU) an index that don't fit, by name.
    """
    _check_operands(x, weight, bias, activation, dims=2)
    n_states = x.shape[0] if state_indices is None else state.shape[0]
    _check_shape("state", state, (n_states, x.shape[1], weight.shape[1] - 1))
    if state_indices is not None:
        _check_shape("state_indices", state_indices, x.shape[:1])
    if x.is_cuda and x.dtype != torch.float64:
        from kernels.causal_conv1d.triton import causal_conv1d_step_triton

        return causal_conv1d_step_triton(state, x, weight, bias, state_indices, activation == "silu")
    check_indices(state_indices, n_states)
    run = causal_conv1d_step_cpu if x.device.type == "cpu" else causal_conv1d_step_reference
    return run(state, x, weight, bias, state_indices, activation == "silu")


def _resolve(backend: str, x: Tensor) -> str:
    """The backend's name, none of them "auto"; ValueError if it is unknown or x is not where it runs."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    if backend == "auto":
        if x.device.type == "cpu":
            return "cpu"
        return "triton" if x.is_cuda and x.dtype != torch.float64 else "reference"
    if backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, x is on {x.device}")
    return backend


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *, dims: int) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', not {activation!r}")
    if x.dim() != dims or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point with {dims} dimensions, d_inner last; it is {x.dtype} of shape {tuple(x.shape)}"
        )
    if weight.dim() != 2 or weight.shape[0] != x.shape[-1] or weight.shape[1] < 1:
        raise ValueError(f"weight must be (d_inner, d_conv) = ({x.shape[-1]}, ≥ 1), not {tuple(weight.shape)}")
    if bias is not None:
        _check_shape("bias", bias, x.shape[-1:])


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    batch, seqlen, _ = x.shape
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int (n_seq + 1,), not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens packs documents into a batch of 1, x has batch {batch}")
    if cu_seqlens.is_cuda:
        return  # reading the values would wait for the GPU at every layer
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != seqlen or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to seqlen = {seqlen}, not be {bounds}")
