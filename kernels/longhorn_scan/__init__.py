"""Longhorn's recurrence (arXiv 2407.14207): the maths, the backends and their costs are in README.md beside this."""

from torch import Tensor

from kernels.longhorn_scan.cpu import cpu_scan
from kernels.longhorn_scan.reference import UPDATES, longhorn_scan_reference
from kernels.longhorn_scan.step import longhorn_step
from kernels.scan.checks import BACKENDS, check_tensors, choose_backend

__all__ = ["BACKENDS", "UPDATES", "longhorn_scan", "longhorn_scan_reference", "longhorn_step"]


def longhorn_scan(
    u: Tensor,
    dt: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    update: str = "diagonal",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Walk the online associative-recall recurrence over time and read it out.

    eps = beta / (1 + beta·Σk²), beta = sigmoid(dt + dt_bias)
    diagonal:  S += eps·k·(u − k·S)          exact:  S += eps·k·(u − Σ_n k·S)
    out = (S·q + D·u)·silu(z)

    Args:
        u, dt, z: (batch, seqlen, d_inner): input, step size before its bias, gate (None: no gate). Views with
            any strides over batch and time are read in place while channels are contiguous.
        q, k: (batch, seqlen, d_state): query and key.
        D, dt_bias: (d_inner,): skip weight and step-size bias (None: 0); fp32 whatever u is.
        initial_state: (batch or n_seq, d_inner, d_state) (None: 0).
        cu_seqlens: int32 (n_seq + 1,): bounds of documents packed into a batch of 1; first 0, last seqlen. The
            state starts anew at each, and no gradient crosses them.
        update: "diagonal" (the paper's and the default) or "exact" (the minimiser with no approximation).
        backend: "reference", "cpu", "triton", or "auto": triton on a GPU, cpu elsewhere.

    Returns:
        out (batch, seqlen, d_inner) in u's dtype; with `return_final_state`, also the state after the last step
        (batch or n_seq, d_inner, d_state), fp64 for fp64 u, else fp32. Both are differentiable in every input.

    Raises:
        ValueError: a shape, a device, `update`, `backend` or `cu_seqlens` that does not fit.
    """
    if update not in UPDATES:
        raise ValueError(f"update must be one of {UPDATES}, got {update!r}")
    backend = choose_backend(backend, u)
    check_tensors(
        *(u, k.shape[-1], cu_seqlens),
        streams={"dt": dt, "z": z},
        rows={"q": q, "k": k},
        vectors={"D": D, "dt_bias": dt_bias},
        initial_state=initial_state,
    )
    if backend == "reference":
        out, state = longhorn_scan_reference(
            *(u, dt, q, k),
            D=D,
            dt_bias=dt_bias,
            z=z,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            update=update,
        )
    else:
        scan = cpu_scan
        if backend == "triton":  # imported late: a CPU run needs no triton
            from kernels.longhorn_scan.triton import triton_scan as scan
        out, state = scan(u, dt, q, k, D, dt_bias, z, initial_state, cu_seqlens, update)
    return (out, state) if return_final_state else out
