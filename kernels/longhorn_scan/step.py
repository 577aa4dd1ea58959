"""One step of the recurrence for decoding: a token per row, the state updated in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.longhorn_scan.reference import step_size, update_state


@torch.no_grad()
def longhorn_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    state_indices: Tensor | None = None,
    update: str = "diagonal",
) -> Tensor:
    """Advance `state` by one token per row, in place, and return out.

    state: (rows, d_inner, d_state) fp32 (fp64 for fp64 u); u, dt, z: (batch, d_inner); q, k: (batch, d_state);
    D, dt_bias: (d_inner,). state_indices, int (batch,): the row of `state` that each token belongs to, each row
    at most once; −1 stands for no row (a padded slot of a serving batch): its out is 0 and no state changes.
    Without it, token i belongs to row i. Returns out (batch, d_inner) in u's dtype. Not differentiable.
    """
    rows = state if state_indices is None else state[state_indices.clamp(min=0)]
    dtype = state.dtype
    uf, x, qf, kf = (t.to(dtype) for t in (u, dt, q, k))
    if dt_bias is not None:
        x = x + dt_bias.to(dtype)
    rows = update_state(rows, uf, step_size(x, kf), kf, update)
    y = (rows * qf.unsqueeze(-2)).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * uf
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if state_indices is None:
        state.copy_(rows)
    else:
        active = state_indices >= 0
        state[state_indices[active]] = rows[active]
        y = y.masked_fill(~active.unsqueeze(-1), 0)
    return y.to(u.dtype)
