"""The oracle: Mamba-1's recurrence as a plain loop over time, differentiated by autograd."""

from functools import partial

import torch
from torch import Tensor

from kernels.scan.reference import skip_and_gate, walk_documents


def step_size(dt: Tensor) -> Tensor:
    """delta = softplus(dt) = ln(1 + e^dt), to full precision at both ends; fp32 or fp64."""
    return torch.logaddexp(dt, torch.zeros_like(dt))  # F.softplus returns dt itself from 20 on


def update_state(state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """One step of the recurrence.

    state: (..., d_inner, d_state); u, delta: (..., d_inner); A: (d_inner, d_state); B: (..., d_state). Returns the
    new state.
    """
    return torch.exp(delta.unsqueeze(-1) * A) * state + (delta * u).unsqueeze(-1) * B.unsqueeze(-2)


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`'s contract without the checks; always returns (out, final state)."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    uf, x, Af, Bf, Cf = (t.to(dtype) for t in (u, dt, A, B, C))
    if dt_bias is not None:
        x = x + dt_bias.to(dtype)

    y, state = walk_documents(partial(_walk, A=Af), (uf, step_size(x), Bf, Cf), initial_state, cu_seqlens)
    return skip_and_gate(y, uf, D, z).to(u.dtype), state


def _walk(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, state: Tensor | None, A: Tensor) -> tuple[Tensor, Tensor]:
    if state is None:
        state = u.new_zeros(len(u), *A.shape)
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(*(t.unbind(1) for t in (u, delta, B, C)), strict=True):
        state = update_state(state, u_t, delta_t, A, B_t)
        outputs.append((state * C_t.unsqueeze(-2)).sum(-1))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(u)), state
