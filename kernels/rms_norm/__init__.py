"""RMSNorm (Zhang & Sennrich, 2019, arXiv 1910.07467) with the residual's addition fused in."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.rms_norm import cpu, reference

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`h / sqrt(mean(h²) + eps) · weight` over the last dimension, with h = x (+ residual).

    The maths is fp32 (fp64 where x or residual is fp64). Differentiable in x, weight and residual;
    for the backward it keeps h and one number a row.

    Args:
        x: (..., d_model).
        weight: (d_model,).
        residual: x's shape, the residual stream before x is added.
        out_dtype: of the normed output; x's dtype if None.

    Returns:
        out, or with a residual (out, h): h is the residual stream from here on, fp32 (or fp64).

    Raises:
        ValueError: if weight or residual doesn't fit x.
    """
    if not x.is_floating_point() or weight.shape != x.shape[-1:] or x.dim() == 0:
        raise ValueError(
            "x must be floating point of shape (..., d_model) and weight (d_model,), "
            f"not {x.dtype} {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    out, hidden = _RMSNorm.apply(x, residual, weight, eps, out_dtype or x.dtype)
    return out if residual is None else (out, hidden)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        wide = x if residual is None else residual
        maths = torch.promote_types(torch.promote_types(x.dtype, wide.dtype), torch.float32)
        engine = cpu if cpu.supports(x, maths, out_dtype) else reference
        stream = None if residual is None else residual.to(maths)
        out, hidden, rstd = engine.forward(x, stream, weight.to(maths), float(eps), out_dtype)
        ctx.save_for_backward(x if residual is None else hidden, rstd, weight)
        ctx.engine, ctx.dtypes = engine, (x.dtype, wide.dtype)
        return out, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, carry: Tensor | None) -> tuple:
        hidden, rstd, weight = ctx.saved_tensors
        scale = weight.to(rstd.dtype)
        dhidden, dweight = ctx.engine.backward(dout, carry, hidden, rstd, scale)
        x_dtype, residual_dtype = ctx.dtypes
        dresidual = dhidden.to(residual_dtype) if ctx.needs_input_grad[1] else None
        return dhidden.to(x_dtype), dresidual, dweight.to(weight.dtype), None, None
