"""The Longhorn mixer: projections and a short convolution around the scan (arXiv 2407.14207, figure 1)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.longhorn_scan import longhorn_scan, longhorn_step
from longhorn_layers.config import LonghornConfig


class CausalConv1d(nn.Module):
    """Depthwise causal convolution over time; weight (channels, width), initialised like `nn.Conv1d`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """SiLU(conv(x)) for x (batch, seqlen, channels); `state` (batch, channels, width − 1) is updated in place."""
        if state is None:
            return causal_conv1d(x, self.weight, self.bias, activation="silu", cu_seqlens=cu_seqlens)
        if x.shape[1] == 1:
            return causal_conv1d_step(state, x.squeeze(1), self.weight, self.bias, activation="silu").unsqueeze(1)
        out, final = causal_conv1d(
            x, self.weight, self.bias, activation="silu", initial_state=state, return_final_state=True
        )
        state.copy_(final)
        return out


@dataclass
class LonghornState:
    """What a sequence leaves behind in one layer."""

    conv: Tensor  # (batch, d_inner, d_conv − 1), the last inputs of the convolution, oldest first
    scan: Tensor  # (batch, d_inner, d_state), fp32


class LonghornMixer(nn.Module):
    """(batch, seqlen, d_model) → (batch, seqlen, d_model).

    Sizes inside are read off the activations, never from the config, so that a tensor-parallel plan may swap
    submodules and slice parameters without this code knowing.
    """

    def __init__(self, config: LonghornConfig, d_model: int, n_layer: int) -> None:
        super().__init__()
        self.d_inner = config.expand * d_model
        self.dt_rank, self.d_state = config.resolved_dt_rank(d_model), config.d_state
        self.update = config.update
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)  # rows: x, then z
        self.conv = CausalConv1d(self.d_inner, config.d_conv)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)  # dt_low, k, q
        self.dt_head = nn.Linear(self.dt_rank, self.d_inner, bias=False)
        # Apart from dt_head: it is added in fp32 inside the scan (folded into a bf16 matmul it moves eps by 3%).
        self.dt_bias = nn.Parameter(torch.zeros(self.d_inner))  # beta starts at 0.5
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.div_(n_layer**0.5)

    def forward(
        self, hidden: Tensor, *, cu_seqlens: Tensor | None = None, state: LonghornState | None = None
    ) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.conv(x, cu_seqlens=cu_seqlens, state=None if state is None else state.conv)
        dt_low, k, q = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = self._scan(x, self.dt_head(dt_low), q, k, z, cu_seqlens, state)
        return self.out_proj(y)

    def _scan(
        self,
        u: Tensor,
        dt: Tensor,
        q: Tensor,
        k: Tensor,
        z: Tensor,
        cu_seqlens: Tensor | None,
        state: LonghornState | None,
    ) -> Tensor:
        options: dict[str, Any] = {"D": self.D, "dt_bias": self.dt_bias, "update": self.update}
        if state is None:
            return longhorn_scan(u, dt, q, k, z=z, cu_seqlens=cu_seqlens, **options)
        if u.shape[1] == 1:
            u, dt, q, k, z = (t.squeeze(1) for t in (u, dt, q, k, z))
            return longhorn_step(state.scan, u, dt, q, k, z=z, **options).unsqueeze(1)
        y, final = longhorn_scan(u, dt, q, k, z=z, initial_state=state.scan, return_final_state=True, **options)
        state.scan.copy_(final)
        return y

    def new_state(self, batch_size: int) -> LonghornState:
        """Zeros on the parameters' device; the convolution's inputs are kept in fp32 too."""
        channels, width = self.conv.weight.shape
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        return LonghornState(
            self.D.new_zeros(batch_size, channels, width - 1, dtype=dtype),
            self.D.new_zeros(batch_size, channels, self.d_state, dtype=dtype),
        )
