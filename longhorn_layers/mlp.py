"""The SwiGLU feed-forward layer (arXiv 2002.05202) of LLaMA and of GLA."""

import torch
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """(…, d_model) → (…, d_model): down(silu(gate(x)) · up(x))."""

    def __init__(self, d_model: int, d_ff: int, residual_writes: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        with torch.no_grad():
            self.down_proj.weight.div_(residual_writes**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
