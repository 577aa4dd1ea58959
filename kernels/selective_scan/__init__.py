"""Mamba-1's recurrence (arXiv 2312.00752): the maths, the backends and their costs are in README.md beside this."""

from torch import Tensor

from kernels.scan.checks import check_shape, check_tensors, choose_backend
from kernels.selective_scan.cpu import cpu_scan
from kernels.selective_scan.reference import selective_scan_reference
from kernels.selective_scan.step import selective_step

__all__ = ["selective_scan", "selective_scan_reference", "selective_step"]


def selective_scan(
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
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Walk Mamba-1's selective recurrence over time and read it out.

    delta = softplus(dt + dt_bias);  S = exp(delta·A)·S + delta·u·B;  out = (S·C + D·u)·silu(z)

    Args:
        u, dt, z: (batch, seqlen, d_inner): input, step size before its bias, gate (None: no gate). Views with
            any strides over batch and time are read in place while channels are contiguous.
        A: (d_inner, d_state): rates, negative in Mamba (−exp(A_log)); fp32 whatever u is.
        B, C: (batch, seqlen, d_state): input and output projections.
        D, dt_bias: (d_inner,): skip weight and step-size bias (None: 0); fp32 whatever u is.
        initial_state: (batch or n_seq, d_inner, d_state) (None: 0).
        cu_seqlens: int32 (n_seq + 1,): bounds of documents packed into a batch of 1; first 0, last seqlen. The
            state starts anew at each, and no gradient crosses them.
        backend: "reference", "cpu", "triton", or "auto": triton on a GPU, cpu elsewhere.

    Returns:
        out (batch, seqlen, d_inner) in u's dtype; with `return_final_state`, also the state after the last step
        (batch or n_seq, d_inner, d_state), fp64 for fp64 u, else fp32. Both are differentiable in every input.

    Raises:
        ValueError: a shape, a device, `backend` or `cu_seqlens` that does not fit.
    """
    backend = choose_backend(backend, u)
    d_state = B.shape[-1]
    check_tensors(
        *(u, d_state, cu_seqlens),
        streams={"dt": dt, "z": z},
        rows={"B": B, "C": C},
        vectors={"D": D, "dt_bias": dt_bias},
        initial_state=initial_state,
    )
    check_shape("A", A, (u.shape[2], d_state), u)
    if backend == "reference":
        out, state = selective_scan_reference(
            *(u, dt, A, B, C), D=D, dt_bias=dt_bias, z=z, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
    else:
        scan = cpu_scan
        if backend == "triton":  # imported late: a CPU run needs no triton
            from kernels.selective_scan.triton import triton_scan as scan
        out, state = scan(u, dt, A, B, C, D, dt_bias, z, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out
