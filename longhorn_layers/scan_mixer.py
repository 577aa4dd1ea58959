"""The block that Longhorn and Mamba share: projections and a short convolution around a scan.

Its shape is Mamba-1's (arXiv 2312.00752, figure 3), which the Longhorn paper keeps (arXiv 2407.14207, figure 1). A
mixer says only how it scans.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from longhorn_layers.config import ScanMixerConfig

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of a scan: u, dt, left, right, z


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
class ScanState:
    """What a sequence leaves behind in one layer."""

    conv: Tensor  # (batch, d_inner, d_conv − 1), the last inputs of the convolution, oldest first
    scan: Tensor  # (batch, d_inner, d_state), fp32


class ScanMixer(nn.Module, ABC):
    """(batch, seqlen, d_model) → (batch, seqlen, d_model).

    Sizes inside are read off the activations, never from the config, so that a tensor-parallel plan may swap
    submodules and slice parameters without this code knowing.
    """

    def __init__(self, config: ScanMixerConfig, d_model: int, residual_writes: int) -> None:
        super().__init__()
        d_inner, dt_rank = config.expand * d_model, config.resolved_dt_rank(d_model)
        self.dt_rank, self.d_state = dt_rank, config.d_state
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)  # rows: x, then z
        self.conv = CausalConv1d(d_inner, config.d_conv)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * config.d_state, bias=False)  # dt_low and the scan's two vectors
        self.dt_head = nn.Linear(dt_rank, d_inner, bias=False)
        # Apart from dt_head: it is added in fp32 inside the scan (folded into a bf16 matmul it moves eps by 3%).
        self.dt_bias = nn.Parameter(torch.zeros(d_inner))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.div_(residual_writes**0.5)

    @abstractmethod
    def scan(
        self,
        inputs: Inputs,
        *,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        """(u, dt, left, right, z) → (batch, seqlen, d_inner), gated; `state`, where given, is updated in place.

        u, dt, z: (batch, seqlen, d_inner); left, right: (batch, seqlen, d_state), what x_proj gives after dt_low;
        state: (batch, d_inner, d_state).
        """

    @abstractmethod
    def step(self, state: Tensor, inputs: Inputs) -> Tensor:
        """`scan` of one token: without the axis of time, `state` updated in place."""

    def forward(self, hidden: Tensor, *, cu_seqlens: Tensor | None = None, state: ScanState | None = None) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        u = self.conv(x, cu_seqlens=cu_seqlens, state=None if state is None else state.conv)
        dt_low, left, right = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        inputs = (u, self.dt_head(dt_low), left, right, z)
        if state is None:
            y = self.scan(inputs, cu_seqlens=cu_seqlens)
        elif u.shape[1] == 1:
            y = self.step(state.scan, tuple(t.squeeze(1) for t in inputs)).unsqueeze(1)
        else:
            y = self.scan(inputs, state=state.scan)
        return self.out_proj(y)

    def new_state(self, batch_size: int) -> ScanState:
        """Zeros on the parameters' device; the convolution's inputs are kept in fp32 too."""
        channels, width = self.conv.weight.shape
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        return ScanState(
            self.D.new_zeros(batch_size, channels, width - 1, dtype=dtype),
            self.D.new_zeros(batch_size, channels, self.d_state, dtype=dtype),
        )
