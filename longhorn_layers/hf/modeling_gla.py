"""GLA language model for transformers (gated linear attention, arXiv 2312.06635), in plain PyTorch.

Shapes: B batch, L tokens, C hidden_size, H heads, K and V a head's keys and values. The cache holds, per layer, the
state (B, H, K, V).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_gla import GLAConfig
from .recurrence import kernels_run, read_states, walk_in_chunks, widen, write_states
from .recurrent_lm import RecurrentForCausalLM, RecurrentModel, RecurrentPreTrainedModel, RecurrentRMSNorm

try:  # of the repository that trains these models; see recurrent_lm.py
    from kernels.gla import gla as fused_gla
except ImportError:
    fused_gla = None  # type: ignore[assignment]

HEAD_NORM_EPS = 1e-5


def gla_chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Walks the recurrence S = exp(log_decay) S + k v^T, y = S^T q over time from `state`.

    q, k, log_decay: (B, L, H, K); v: (B, L, H, V); state: (B, H, K, V). Returns y (B, L, H, V) and the last state.
    Elementwise products and sums rather than matmuls, which autocast or TF32 would round.
    """
    q, k, decay = (x.unsqueeze(-1) for x in (q, k, log_decay.exp()))
    v = v.unsqueeze(-2)
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), decay.unbind(1), strict=True):
        state = torch.addcmul(decay_t * state, k_t, v_t)
        outputs.append((q_t * state).sum(-2))
    return torch.stack(outputs, 1), state


class GLAMixer(nn.Module):
    def __init__(self, config: GLAConfig, layer_index: int) -> None:
        super().__init__()
        size, keys, values = config.hidden_size, config.key_size, config.value_size
        self.layer_index, self.num_heads = layer_index, config.num_heads
        self.gate_normalizer = config.gate_normalizer
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, values, bias=False)
        self.g_proj = nn.Linear(size, values, bias=False)
        self.decay_down = nn.Linear(size, config.gate_rank, bias=False)
        self.decay_up = nn.Linear(config.gate_rank, keys, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(keys))  # added in fp32: sums of decays amplify rounding
        self.norm = RecurrentRMSNorm(values // config.num_heads, HEAD_NORM_EPS)
        self.out_proj = nn.Linear(values, size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """x: (B, L, C); mask: (B, L, 1) bool, False at padding. Returns (B, L, C).

        `cache`, where given, is read and updated.
        """
        q, k, v, log_decay = self.q_proj(x), self.k_proj(x), self.v_proj(x), self._log_decay(x)
        if mask is not None:
            k, log_decay = k * mask, log_decay * mask  # padding leaves the state as it was
        q, k, v, log_decay = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, log_decay))
        _, state = read_states(cache, self.layer_index)
        if fused_gla is not None and kernels_run(x):
            y, state = fused_gla(q, k, v, log_decay, initial_state=state, return_final_state=True)
        else:
            y, state = self._scan(q, k, v, log_decay, state)
        write_states(cache, self.layer_index, None, state)
        y = self.norm(y.to(v.dtype), v.dtype).flatten(-2)
        return self.out_proj(y * F.silu(self.g_proj(x)))

    def _log_decay(self, x: Tensor) -> Tensor:
        """(B, L, H * K) <= 0, fp32: the logarithm of what a step leaves of the state."""
        logits = widen(self.decay_up(self.decay_down(x))) + widen(self.decay_bias)
        return F.logsigmoid(logits) / self.gate_normalizer

    @staticmethod
    def _scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = map(widen, (q, k, v))
        if state is None:
            state = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[-1])
        return walk_in_chunks(gla_chunk, (q * q.shape[-1] ** -0.5, k, v, log_decay), state)


class GLAPreTrainedModel(RecurrentPreTrainedModel):
    config_class = GLAConfig
    mixer_class = GLAMixer
    _keep_in_fp32_modules_strict = ["norm", "mlp_norm", "decay_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GLAMixer):
            nn.init.zeros_(module.decay_bias)


class GLAModel(GLAPreTrainedModel, RecurrentModel):
    """Embedding, blocks and final norm."""


class GLAForCausalLM(GLAPreTrainedModel, RecurrentForCausalLM):
    """GLAModel and a language-modelling head, tied to the embedding where the config says."""

    model_class = GLAModel
