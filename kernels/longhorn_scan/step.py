"""One step of the recurrence for decoding: a token per row, the state updated in place."""

import torch
from torch import Tensor

from kernels.longhorn_scan.reference import step_size, update_state
from kernels.scan.reference import skip_and_gate
from kernels.scan.step import advance_rows


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
    Without it, token i belongs to row i. Returns out (batch, d_inner) in u's dtype. Not differentiable. On a GPU an
    fp32 state takes one kernel.
    """
    if state.is_cuda and state.dtype == torch.float32:
        from kernels.longhorn_scan.triton import triton_step  # late: a CPU run needs no triton

        return triton_step(state, u, dt, q, k, D, dt_bias, z, state_indices, update)
    uf, x, qf, kf = (t.to(state.dtype) for t in (u, dt, q, k))
    if dt_bias is not None:
        x = x + dt_bias.to(state.dtype)

    def advance(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = update_state(rows, uf, step_size(x, kf), kf, update)
        return rows, skip_and_gate((rows * qf.unsqueeze(-2)).sum(-1), uf, D, z)

    return advance_rows(state, state_indices, advance).to(u.dtype)
