"""Root-mean-square norms (arXiv 1910.07467), their maths and weights in fp32."""

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Over the last axis of the residual stream."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(
        self, residual: Tensor, update: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """(norm of `residual + update` in out_dtype (None: residual's), residual + update), in one pass over memory."""
        out_dtype = out_dtype or residual.dtype
        if update is None:
            return rms_norm(residual, self.weight, eps=self.eps, out_dtype=out_dtype), residual
        return rms_norm(update, self.weight, eps=self.eps, residual=residual, out_dtype=out_dtype)


class HeadNorm(nn.Module):
    """Over each head's channels, with one weight for all heads."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, head_dim) → the same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps)
