"""The Longhorn mixer (arXiv 2407.14207): online associative recall between Mamba's projections."""

from typing import Any

from torch import Tensor

from kernels.longhorn_scan import longhorn_scan, longhorn_step
from longhorn_layers.config import LonghornConfig
from longhorn_layers.scan_mixer import Inputs, ScanMixer


class LonghornMixer(ScanMixer):
    """x_proj's rows are dt_low, k, q; dt_bias starts at 0, so that beta starts at 0.5, and D at 1 (DESIGN §2)."""

    def __init__(self, config: LonghornConfig, d_model: int, residual_writes: int) -> None:
        super().__init__(config, d_model, residual_writes)
        self.update = config.update

    def scan(self, inputs: Inputs, *, cu_seqlens: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        u, dt, k, q, z = inputs
        if state is None:
            return longhorn_scan(u, dt, q, k, z=z, cu_seqlens=cu_seqlens, **self._options)
        y, final = longhorn_scan(u, dt, q, k, z=z, initial_state=state, return_final_state=True, **self._options)
        state.copy_(final)
        return y

    def step(self, state: Tensor, inputs: Inputs) -> Tensor:
        u, dt, k, q, z = inputs
        return longhorn_step(state, u, dt, q, k, z=z, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"D": self.D, "dt_bias": self.dt_bias, "update": self.update}
