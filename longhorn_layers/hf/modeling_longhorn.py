"""Longhorn language model for transformers (arXiv 2407.14207), in plain PyTorch.

Shapes: B batch, L tokens, C hidden_size, D intermediate_size (channels of a mixer), N state_size, T taps of the
convolution. The cache holds, per layer, the last inputs of the convolution (B, T - 1, D) and the state (B, N, D).
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_longhorn import LonghornConfig
from .recurrence import kernels_run, read_states, walk_in_chunks, widen, write_states
from .recurrent_lm import RecurrentForCausalLM, RecurrentModel, RecurrentPreTrainedModel

try:  # of the repository that trains these models; see recurrent_lm.py
    from kernels import causal_conv1d as conv_kernels
    from kernels import longhorn_scan as scan_kernels
except ImportError:
    conv_kernels = scan_kernels = None  # type: ignore[assignment]


# ---- the convolution: each channel by itself, then SiLU. weight: (D, T), the last tap for the newest input ----


def conv_plain(x: Tensor, weight: Tensor, bias: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
    """x: (B, L, D); earlier: the T - 1 inputs before it, None for zeros. Returns (B, L, D) and its last inputs."""
    (channels, taps), seqlen = weight.shape, x.shape[1]
    window = F.pad(x, (0, 0, taps - 1, 0)) if earlier is None else torch.cat((earlier, x), 1)
    outputs = F.conv1d(window.transpose(1, 2), weight.unsqueeze(1), bias, groups=channels)
    return F.silu(outputs).transpose(1, 2), window[:, seqlen:]


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """conv_plain of one token, x (B, D); `earlier` (B, T - 1, D) moves on in place."""
    window = torch.cat((earlier, x.unsqueeze(1)), 1)
    earlier.copy_(window[:, 1:])
    products = widen(window) * widen(weight).t()
    return F.silu((products.sum(1) + bias).to(x.dtype)), earlier  # rounded where conv1d rounds


def conv_fused(x: Tensor, weight: Tensor, bias: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
    """conv_plain by the kernel."""
    outputs, last = conv_kernels.causal_conv1d(
        x,
        weight,
        bias,
        activation="silu",
        initial_state=None if earlier is None else earlier.transpose(1, 2),
        return_final_state=True,
    )
    return outputs, last.transpose(1, 2)


def conv_step_fused(x: Tensor, weight: Tensor, bias: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """conv_step by the kernel."""
    return conv_kernels.causal_conv1d_step(earlier.transpose(1, 2), x, weight, bias, activation="silu"), earlier


# ---- the recurrence ----


def scan_chunk(u: Tensor, eps: Tensor, k: Tensor, q: Tensor, state: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Walks the recurrence over time from `state`.

    u, eps: (B, L, D); k, q: (B, L, N); state: (B, N, D). Returns y (B, L, D) and the last state.
    Elementwise products and sums rather than matmuls, which autocast or TF32 would round.
    """
    u, eps = u.unsqueeze(2), eps.unsqueeze(2)
    k, q = k.unsqueeze(3), q.unsqueeze(3)
    outputs = []
    for u_t, eps_t, k_t, q_t in zip(u.unbind(1), eps.unbind(1), k.unbind(1), q.unbind(1), strict=True):
        recalled = k_t * state
        if exact:
            recalled = recalled.sum(1, keepdim=True)
        state = torch.addcmul(state, eps_t * k_t, u_t - recalled)
        outputs.append((q_t * state).sum(1))
    return torch.stack(outputs, 1), state


def longhorn_scan(u: Tensor, eps: Tensor, k: Tensor, q: Tensor, state: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """scan_chunk over any length."""
    return walk_in_chunks(partial(scan_chunk, exact=exact), (u, eps, k, q), state)


class LonghornConv(nn.Module):
    """The convolution's parameters; T is `weight.shape[1]`."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))


class LonghornMixer(nn.Module):
    def __init__(self, config: LonghornConfig, layer_index: int) -> None:
        super().__init__()
        inner, rank = config.intermediate_size, config.time_step_rank
        assert rank is not None, "the configuration fills it in"
        self.layer_index = layer_index
        self.split_sizes = (rank, config.state_size, config.state_size)
        self.update_rule = config.update_rule
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv = LonghornConv(inner, config.conv_kernel)
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        self.dt_head = nn.Linear(rank, inner, bias=False)
        # Apart from dt_head: in bf16, adding it inside the projection moves eps by percents.
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """x: (B, L, C); mask: (B, L, 1) bool, False at padding. Returns (B, L, C).

        `cache`, where given, is read and updated.
        """
        earlier, state = read_states(cache, self.layer_index)
        one_token = state is not None and x.shape[1] == 1 and not torch.is_grad_enabled()
        fused = scan_kernels is not None and kernels_run(x, one_token)
        if one_token:  # without the axis of time
            conv, scan = (conv_step_fused, self._step_fused) if fused else (conv_step, self._step)
            x, mask = x.squeeze(1), None if mask is None else mask.squeeze(1)
        else:
            conv, scan = (conv_fused, self._scan_fused) if fused else (conv_plain, self._scan)
        x, z = self.in_proj(x).chunk(2, -1)
        if mask is not None:
            x = x * mask
        x, earlier = conv(x, self.conv.weight, self.conv.bias, earlier)
        dt, k, q = self.x_proj(x).split(self.split_sizes, -1)
        if mask is not None:
            k = k * mask  # with a key of 0 the state stays as it was
        y, state = scan(x, self.dt_head(dt), k, q, z, state)
        write_states(cache, self.layer_index, earlier, state)
        y = self.out_proj(y.to(x.dtype))
        return y.unsqueeze(1) if one_token else y

    # Two ways to compute the same: u, dt, z (B, L, D), k, q (B, L, N), state (B, N, D) fp32 or None -> (y, state).

    def _scan(
        self, u: Tensor, dt: Tensor, k: Tensor, q: Tensor, z: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        u, dt, k, q, z = map(widen, (u, dt, k, q, z))
        inverse_beta = 1 + torch.exp(-(dt + widen(self.dt_bias)).clamp(min=-80))  # e^80 is still finite in fp32
        eps = 1 / (inverse_beta + k.square().sum(-1, keepdim=True))
        if state is None:
            state = u.new_zeros(u.shape[0], k.shape[-1], u.shape[-1])
        y, state = longhorn_scan(u, eps, k, q, state, self.update_rule == "exact")
        return (y + widen(self.D) * u) * F.silu(z), state

    def _scan_fused(
        self, u: Tensor, dt: Tensor, k: Tensor, q: Tensor, z: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last = scan_kernels.longhorn_scan(
            *(u, dt, q, k),
            D=self.D,
            dt_bias=self.dt_bias,
            z=z,
            initial_state=None if state is None else state.transpose(1, 2),
            return_final_state=True,
            update=self.update_rule,
        )
        return y, last.transpose(1, 2)

    # And two for one token: u, dt, z (B, D), k, q (B, N), the state moved on in place -> (y, state).

    def _step(self, u: Tensor, dt: Tensor, k: Tensor, q: Tensor, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        u, dt, k, q, z = map(widen, (u, dt, k, q, z))
        # 1 / (1 / beta + |k|^2). No clamp: where beta is 0 so is eps, and no gradient is asked for.
        inverse_beta = torch.sigmoid_(dt + widen(self.dt_bias)).reciprocal_()
        eps = inverse_beta.add_(k.square().sum(-1, keepdim=True)).reciprocal_()
        k, rows = k.unsqueeze(2), u.unsqueeze(1)
        if self.update_rule == "exact":
            missing = rows - (k * state).sum(1, keepdim=True)
        else:
            missing = torch.addcmul(rows, k, state, value=-1)
        state.addcmul_(eps.unsqueeze(1) * k, missing)
        y = widen(torch.bmm(q.unsqueeze(1), state)).squeeze(1)  # autocast may round this, which stays in no state
        return y.addcmul_(widen(self.D), u).mul_(F.silu(z)), state

    def _step_fused(
        self, u: Tensor, dt: Tensor, k: Tensor, q: Tensor, z: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = scan_kernels.longhorn_step(
            state.transpose(1, 2), u, dt, q, k, D=self.D, dt_bias=self.dt_bias, z=z, update=self.update_rule
        )
        return y, state


class LonghornPreTrainedModel(RecurrentPreTrainedModel):
    config_class = LonghornConfig
    mixer_class = LonghornMixer
    _keep_in_fp32_modules_strict = ["norm", "mlp_norm", "mixer.D", "mixer.dt_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LonghornConv):
            bound = module.weight.shape[1] ** -0.5  # PyTorch's default for Conv1d
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, LonghornMixer):
            nn.init.zeros_(module.dt_bias)
            nn.init.ones_(module.D)


class LonghornModel(LonghornPreTrainedModel, RecurrentModel):
    """Embedding, blocks and final norm."""


class LonghornForCausalLM(LonghornPreTrainedModel, RecurrentForCausalLM):
    """LonghornModel and a language-modelling head, tied to the embedding where the config says."""

    model_class = LonghornModel
