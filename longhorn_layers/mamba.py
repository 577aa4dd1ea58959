"""The Mamba-1 mixer (arXiv 2312.00752): the selective scan in the block that Longhorn shares."""

import math

import torch
from torch import Tensor, nn

from kernels.selective_scan import selective_scan, selective_step
from longhorn_layers.config import MambaConfig
from longhorn_layers.scan_mixer import Inputs, ScanMixer

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # where the step sizes start (the authors' code)


class MambaMixer(ScanMixer):
    """x_proj's rows are dt_low, B, C. A = −exp(A_log) starts at −1 … −d_state in every channel, D at 1.

    dt_bias starts so that softplus of it is log-uniform between 0.001 and 0.1, as in the authors' code.
    """

    def __init__(self, config: MambaConfig, d_model: int, residual_writes: int) -> None:
        super().__init__(config, d_model, residual_writes)
        channels = self.D.shape[0]
        rates = torch.arange(1, config.d_state + 1, dtype=torch.float32).log()
        self.A_log = nn.Parameter(rates.repeat(channels, 1))
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = torch.empty(channels).uniform_(low, high).exp().clamp(min=DT_FLOOR)
        with torch.no_grad():
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def scan(self, inputs: Inputs, *, cu_seqlens: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        u, dt, B, C, z = inputs
        options = {"D": self.D, "dt_bias": self.dt_bias, "z": z}
        if state is None:
            return selective_scan(u, dt, self._rates(), B, C, cu_seqlens=cu_seqlens, **options)
        y, final = selective_scan(u, dt, self._rates(), B, C, initial_state=state, return_final_state=True, **options)
        state.copy_(final)
        return y

    def step(self, state: Tensor, inputs: Inputs) -> Tensor:
        u, dt, B, C, z = inputs
        return selective_step(state, u, dt, self._rates(), B, C, D=self.D, dt_bias=self.dt_bias, z=z)

    def _rates(self) -> Tensor:
        """A, in fp32 under autocast too: there exp is."""
        return -self.A_log.exp()
