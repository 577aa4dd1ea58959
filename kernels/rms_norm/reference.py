"""RMSNorm's forward and backward in plain torch, for any device and dtype."""

import torch
from torch import Tensor


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> (out, x + residual or None, 1 / rms of each row); the maths and the last two are in weight's dtype."""
    hidden = x.to(weight.dtype)
    if residual is not None:
        hidden = hidden + residual
    rstd = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    out = (hidden * rstd * weight).to(out_dtype)
    return out, None if residual is None else hidden, rstd.squeeze(-1)


def backward(
    dout: Tensor,
    carry: Tensor | None,
    hidden: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> the gradient of x + residual in x's dtype and in the residual's (None without one), and that of weight.

    `carry`: the gradient that reaches hidden past the norm, or None.
    """
    scale = rstd.unsqueeze(-1)
    normed, dout = hidden.to(weight.dtype) * scale, dout.to(weight.dtype)
    dnormed = dout * weight
    dhidden = scale * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    if carry is not None:
        dhidden = dhidden + carry
    dresidual = None if residual_dtype is None else dhidden.to(residual_dtype)
    return dhidden.to(x_dtype), dresidual, (dout * normed).reshape(-1, len(weight)).sum(0)
