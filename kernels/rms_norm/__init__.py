"""RMSNorm (Zhang & Sennrich, 2019, arXiv 1910.07467) with the residual's addition fused in."""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.rms_norm import cpu, reference

__all__ = ["BACKENDS", "rms_norm"]

BACKENDS = ("auto", "reference", "cpu", "triton")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Literal["auto", "reference", "cpu", "triton"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`h / sqrt(mean(h²) + eps) · weight` over the last dimension, with h = x (+ residual).

    The maths is fp32 (fp64 where x or residual is fp64). Differentiable in x, weight and residual;
    for the backward it keeps h and one number a row.

    Args:
        x: (..., d_model).
        weight: (d_model,).
        residual: x's shape, the residual stream before x is added.
        out_dtype: of the normed output; x's dtype if None.
        backend: "reference" (plain torch, any device), "cpu" (C++ for the dtypes it covers, else
            the reference), "triton" (GPUs), or "auto": triton on a GPU, cpu on the CPU, reference
            elsewhere and for fp64 on a GPU.

    Returns:
        out, or with a residual (out, h): h is the residual stream from here on, fp32 (or fp64).

    Raises:
        ValueError: if weight or residual doesn't fit x, or backend isn't known or isn't for its device.
        TypeError: for fp64 and backend "triton".
    """
    if not x.is_floating_point() or weight.shape != x.shape[-1:] or x.dim() == 0:
        raise ValueError(
            "x must be floating point of shape (..., d_model) and weight (d_model,), "
            f"not {x.dtype} {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    wide = x.dtype if residual is None else residual.dtype
    maths = torch.promote_types(torch.promote_types(x.dtype, wide), torch.float32)
    out_dtype = out_dtype or x.dtype
    engine = _engine(backend, x, maths, out_dtype)
    out, hidden = _RMSNorm.apply(x, residual, weight, float(eps), maths, out_dtype, engine)
    return out if residual is None else (out, hidden)


def _engine(backend: str, x: Tensor, maths: torch.dtype, out_dtype: torch.dtype) -> ModuleType:
    """The module whose `forward` and `backward` run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    if backend == "triton" or (backend == "auto" and x.is_cuda and maths == torch.float32):
        from kernels.rms_norm import triton  # late: a CPU run needs no triton

        triton.require(x, maths)
        return triton
    if backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, x is on {x.device}")
    return cpu if backend != "reference" and cpu.supports(x, maths, out_dtype) else reference


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        maths: torch.dtype,
        out_dtype: torch.dtype,
        engine: ModuleType,
    ) -> tuple[Tensor, Tensor | None]:
        out, hidden, rstd = engine.forward(x, residual, weight.to(maths), eps, out_dtype)
        ctx.save_for_backward(x if residual is None else hidden, rstd, weight)
        ctx.engine = engine
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return out, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, carry: Tensor | None) -> tuple:
        hidden, rstd, weight = ctx.saved_tensors
        scale = weight.to(rstd.dtype)
        dx, dresidual, dweight = ctx.engine.backward(dout, carry, hidden, rstd, scale, *ctx.dtypes)
        return dx, dresidual, dweight.to(weight.dtype), *(None,) * 4
