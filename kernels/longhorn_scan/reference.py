"""The oracle: Longhorn's recurrence as a plain loop over time, differentiated by autograd."""

from functools import partial

import torch
from torch import Tensor

from kernels.scan.reference import skip_and_gate, walk_documents

UPDATES = ("diagonal", "exact")
MIN_DT = -80.0  # below it sigmoid(dt) is 0 in fp32 for all purposes, and exp(-dt) would overflow to inf


def step_size(dt: Tensor, k: Tensor) -> Tensor:
    """eps = beta / (1 + beta·Σk²) with beta = sigmoid(dt), as 1 / (1 + e^-dt + Σk²).

    dt: (..., d_inner), k: (..., d_state), both fp32 or fp64. dt is clamped at −80, where the gradient is 0.
    """
    return 1 / (1 + torch.exp(-dt.clamp(min=MIN_DT)) + k.square().sum(-1, keepdim=True))


def update_state(state: Tensor, u: Tensor, eps: Tensor, k: Tensor, update: str) -> Tensor:
    """One step of the recurrence in delta form (DESIGN §2), the form that is accurate in fp32.

    state: (..., d_inner, d_state); u, eps: (..., d_inner); k: (..., d_state). Returns the new state.
    """
    k = k.unsqueeze(-2)
    if update == "diagonal":  # paper, eq. 9: the rank-one term replaced by its diagonal
        residual = u.unsqueeze(-1) - state * k
    else:  # "exact": the minimiser itself
        residual = (u - (state * k).sum(-1)).unsqueeze(-1)
    return state + eps.unsqueeze(-1) * k * residual


def longhorn_scan_reference(
    u: Tensor,
    dt: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    update: str = "diagonal",
) -> tuple[Tensor, Tensor]:
    """`longhorn_scan`'s contract without the checks; always returns (out, final state)."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    uf, x, qf, kf = (t.to(dtype) for t in (u, dt, q, k))
    if dt_bias is not None:
        x = x + dt_bias.to(dtype)
    eps = step_size(x, kf)

    y, state = walk_documents(partial(_walk, update=update), (uf, eps, qf, kf), initial_state, cu_seqlens)
    y = skip_and_gate(y, uf, D, z)
    return y.to(u.dtype), state


def _walk(u: Tensor, eps: Tensor, q: Tensor, k: Tensor, state: Tensor | None, update: str) -> tuple[Tensor, Tensor]:
    if state is None:
        state = u.new_zeros(u.shape[0], u.shape[2], k.shape[2])
    outputs = []
    for u_t, eps_t, q_t, k_t in zip(u.unbind(1), eps.unbind(1), q.unbind(1), k.unbind(1), strict=True):
        state = update_state(state, u_t, eps_t, k_t, update)
        outputs.append((state * q_t.unsqueeze(-2)).sum(-1))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(u)), state
