"""Gated linear attention (arXiv 2312.06635): a matrix of state per head, whose rows decay by gates of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from kernels.gla import gla
from longhorn_layers.config import GLAConfig
from longhorn_layers.norm import HeadNorm

HEAD_NORM_EPS = 1e-5


@dataclass
class GLAState:
    """What a sequence leaves behind in one layer."""

    matrix: Tensor  # (batch, n_head, key_dim, value_dim), fp32


class GLAMixer(nn.Module):
    """(batch, seqlen, d_model) → (batch, seqlen, d_model): RMSNorm per head of q·S, gated by silu(g).

    The number of heads is read off the activations, so that a tensor-parallel plan may keep some on each rank. Raises
    ValueError where keys or values don't divide among the heads.
    """

    def __init__(self, config: GLAConfig, d_model: int, residual_writes: int) -> None:
        super().__init__()
        keys, values = _width(config, d_model, "expand_k"), _width(config, d_model, "expand_v")
        self.key_dim, self.value_dim = keys // config.n_head, values // config.n_head  # of a head
        self.gate_normalizer = config.gate_normalizer
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.g_proj = nn.Linear(d_model, values, bias=False)
        self.decay_down = nn.Linear(d_model, config.gate_rank, bias=False)
        self.decay_up = nn.Linear(config.gate_rank, keys, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(keys))  # added in fp32: sums of decays over time amplify rounding
        self.norm = HeadNorm(self.value_dim, HEAD_NORM_EPS)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.div_(residual_writes**0.5)

    def forward(self, hidden: Tensor, *, cu_seqlens: Tensor | None = None, state: GLAState | None = None) -> Tensor:
        q, k, decay = (
            x.unflatten(-1, (-1, self.key_dim))
            for x in (self.q_proj(hidden), self.k_proj(hidden), self._log_decay(hidden))
        )
        v = self.v_proj(hidden).unflatten(-1, (-1, self.value_dim))
        if state is None:
            y = gla(q, k, v, decay, cu_seqlens=cu_seqlens)
        else:
            y, final = gla(q, k, v, decay, initial_state=state.matrix, return_final_state=True)
            state.matrix.copy_(final)
        return self.out_proj(self.norm(y).flatten(-2) * silu(self.g_proj(hidden)))

    def _log_decay(self, hidden: Tensor) -> Tensor:
        """(batch, seqlen, keys) ≤ 0, fp32: the logarithm of what a step leaves of the state."""
        logits = self.decay_up(self.decay_down(hidden))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.decay_bias
        return logsigmoid(logits) / self.gate_normalizer

    def new_state(self, batch_size: int) -> GLAState:
        """Zeros on the parameters' device."""
        dtype = torch.promote_types(self.decay_bias.dtype, torch.float32)
        heads = len(self.decay_bias) // self.key_dim
        return GLAState(self.decay_bias.new_zeros(batch_size, heads, self.key_dim, self.value_dim, dtype=dtype))


def _width(config: GLAConfig, d_model: int, key: str) -> int:
    width = round(getattr(config, key) * d_model)
    if width % config.n_head:
        raise ValueError(
            f"model.mixer.{key} × model.d_model = {width} must be a multiple of model.mixer.n_head={config.n_head}"
        )
    return width
