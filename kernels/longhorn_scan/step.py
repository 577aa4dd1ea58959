"""One step of the recurrence for decoding: a token per row, the state updated in place."""

from typing import TypeVar

import torch
from torch import Tensor

from kernels.longhorn_scan import cpu_cpp
from kernels.longhorn_scan.reference import UPDATES, step_size, update_state
from kernels.scan.checks import check_step
from kernels.scan.cpu import computed_dtype, stored_dtype
from kernels.scan.reference import skip_and_gate
from kernels.scan.step import advance_rows

Maybe = TypeVar("Maybe", Tensor, Tensor | None)


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
    Without it, token i belongs to row i. Returns out (batch, d_inner) in u's dtype. Not differentiable. One kernel
    for an fp32 state on a GPU, and on a CPU where a compiler is found; any strides of the state will do.

    Raises ValueError for shapes, an index or an update that don't fit, by name (on a GPU indices are not read).
    """
    if update not in UPDATES:
        raise ValueError(f"update must be one of {UPDATES}, got {update!r}")
    check_step(
        state,
        u,
        k.shape[-1],
        state_indices,
        streams={"dt": dt, "z": z},
        rows={"q": q, "k": k},
        vectors={"D": D, "dt_bias": dt_bias},
    )
    if state.is_cuda and state.dtype == torch.float32:
        from kernels.longhorn_scan.triton import triton_step  # late: a CPU run needs no triton

        return triton_step(state, u, dt, q, k, D, dt_bias, z, state_indices, update)
    if u.device.type == "cpu" and state.dtype == computed_dtype(u) and cpu_cpp.available():
        stored = stored_dtype(u, dt, q, k, z)
        return _to(
            cpu_cpp.step(
                state,
                u=_to(u, stored),
                dt=_to(dt, stored),
                q=_to(q, stored),
                k=_to(k, stored),
                D=_to(D, state.dtype),
                dt_bias=_to(dt_bias, state.dtype),
                z=_to(z, stored),
                state_indices=state_indices,
                exact=update == "exact",
            ),
            u.dtype,
        )
    return _torch_step(state, u, dt, q, k, D, dt_bias, z, state_indices, update)


@torch.no_grad()
def _torch_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    q: Tensor,
    k: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state_indices: Tensor | None,
    update: str,
) -> Tensor:
    uf, x, qf, kf = (t.to(state.dtype) for t in (u, dt, q, k))
    if dt_bias is not None:
        x = x + dt_bias.to(state.dtype)

    def advance(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = update_state(rows, uf, step_size(x, kf), kf, update)
        return rows, skip_and_gate((rows * qf.unsqueeze(-2)).sum(-1), uf, D, z)

    return advance_rows(state, state_indices, advance).to(u.dtype)


def _to(tensor: Maybe, dtype: torch.dtype) -> Maybe:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)  # `to` alone takes a µs
