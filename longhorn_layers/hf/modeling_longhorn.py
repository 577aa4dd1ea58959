"""Longhorn language model for transformers (arXiv 2407.14207), in plain PyTorch.

Shapes: B batch, L tokens, C hidden_size, D intermediate_size (channels of a mixer), N state_size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_longhorn import LonghornConfig

# Tokens between the states that the scan keeps for its backward pass; the others are recomputed.
SCAN_CHUNK = 64


@dataclass
class LonghornOutput(ModelOutput):
    """last_hidden_state: (B, L, C) fp32. cache_params: the state after the last token.
    hidden_states: see `output_hidden_states` in LonghornModel.forward."""

    last_hidden_state: Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LonghornCausalLMOutput(ModelOutput):
    """loss: mean over the labels that are not -100. logits: (B, L, vocab_size) fp32.
    The rest as in LonghornOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def widen(x: Tensor) -> Tensor:
    """x in at least fp32: what the residual stream, the norms and the state are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    """scan_chunk over any length; for a backward pass, a state is kept per chunk, not per token."""
    walk: Callable[..., tuple[Tensor, Tensor]] = scan_chunk
    if torch.is_grad_enabled() and u.shape[1] > SCAN_CHUNK:
        walk = partial(checkpoint, scan_chunk, use_reentrant=False, preserve_rng_state=False)
    outputs = []
    for inputs in zip(*(x.split(SCAN_CHUNK, 1) for x in (u, eps, k, q)), strict=True):
        y, state = walk(*inputs, state, exact)
        outputs.append(y)
    return torch.cat(outputs, 1), state


class LonghornRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size), normalised in fp32 or better and returned so."""
        return F.rms_norm(widen(x), self.weight.shape, widen(self.weight), self.eps)


class LonghornConv(nn.Module):
    """Causal convolution of each channel by itself: weight (D, taps), the last for the newest."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, earlier: Tensor | None) -> Tensor:
        """x: (B, D, L); earlier: (B, D, taps) before it, or None for zeros. Returns (B, D, L)."""
        channels, taps = self.weight.shape
        window = F.pad(x, (taps - 1, 0)) if earlier is None else torch.cat((earlier, x), -1)
        outputs = F.conv1d(window, self.weight.unsqueeze(1), self.bias, groups=channels)
        return outputs[..., -x.shape[-1] :]


class LonghornMixer(nn.Module):
    def __init__(self, config: LonghornConfig, layer_index: int) -> None:
        super().__init__()
        inner, rank = config.intermediate_size, config.time_step_rank
        assert rank is not None, "the configuration fills it in"
        self.layer_index = layer_index
        self.split_sizes = (rank, config.state_size, config.state_size)
        self.exact = config.update_rule == "exact"
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv = LonghornConv(inner, config.conv_kernel)
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        self.dt_head = nn.Linear(rank, inner, bias=False)
        # Apart from dt_head: in bf16, adding it inside the projection moves eps by percents.
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """x: (B, L, C) of any dtype; mask: (B, L, 1) bool, False at padding.

        Returns (B, L, C) in the weights' dtype. `cache`, where given, is read and updated.
        """
        x, z = self.in_proj(x.to(self.conv.weight.dtype)).chunk(2, -1)
        if mask is not None:
            x = x * mask
        earlier, state = self._read(cache)
        columns = x.transpose(1, 2)
        x = F.silu(self.conv(columns, earlier)).transpose(1, 2)
        if cache is not None:
            taps = self.conv.weight.shape[1]
            cache.update_conv_state(columns.detach(), self.layer_index, conv_kernel_size=taps)

        dt, k, q = self.x_proj(x).split(self.split_sizes, -1)
        u, k, q = widen(x), widen(k), widen(q)
        eps = self._step_size(dt, k)
        if mask is not None:
            eps = eps * mask  # padding leaves the state as it was
        if state is None:
            state = u.new_zeros(u.shape[0], k.shape[-1], u.shape[-1])
        y, state = longhorn_scan(u, eps, k, q, state, self.exact)
        if cache is not None:
            cache.update_recurrent_state(state.detach(), self.layer_index)
        y = (y + widen(self.D) * u) * F.silu(widen(z))
        return self.out_proj(y.to(x.dtype))

    def _step_size(self, dt: Tensor, k: Tensor) -> Tensor:
        """eps = beta / (1 + beta |k|^2) where beta = sigmoid(dt_head(dt) + dt_bias): (B, L, D)."""
        logit = widen(self.dt_head(dt)) + widen(self.dt_bias)
        inverse_beta = 1 + torch.exp(-logit.clamp(min=-80))  # e^80 is still finite in fp32
        return 1 / (inverse_beta + k.square().sum(-1, keepdim=True))

    def _read(self, cache: Cache | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """This layer's last convolution inputs (B, D, taps) and its state (B, N, D), if any."""
        if cache is None or not cache.has_previous_state(self.layer_index):
            return None, None
        layer: Any = cache.layers[self.layer_index]
        return layer.conv_states[0], layer.recurrent_states[0]


class LonghornBlock(GradientCheckpointingLayer):
    def __init__(self, config: LonghornConfig, layer_index: int) -> None:
        super().__init__()
        self.norm = LonghornRMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = LonghornMixer(config, layer_index)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        return x + self.mixer(self.norm(x), mask, cache)


class LonghornPreTrainedModel(PreTrainedModel):
    config_class = LonghornConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["LonghornBlock"]
    _keep_in_fp32_modules_strict = ["norm", "mixer.D", "mixer.dt_bias"]
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted generation would

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | LonghornConv):
            bound = module.weight[0].numel() ** -0.5  # PyTorch's default for Linear and Conv1d
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, LonghornMixer):
            nn.init.zeros_(module.dt_bias)
            nn.init.ones_(module.D)
            bound = (module.out_proj.in_features * self.config.num_hidden_layers) ** -0.5
            nn.init.uniform_(module.out_proj.weight, -bound, bound)
        else:
            super()._init_weights(module)  # embedding N(0, 0.02), norms 1


class LonghornModel(LonghornPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: LonghornConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(LonghornBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = LonghornRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LonghornOutput:
        """input_ids: (B, L) int64, or inputs_embeds: (B, L, C).

        attention_mask: (B, at least L), 0 at padding; the last L columns are these tokens'. Padding
            on the left does not change what follows it.
        cache_params: a cache that this model returned, to go on from; pass the new tokens alone. It
            is updated in place and holds no gradient history.
        output_hidden_states: also return the input of every block and the normalised output of the
            last one, each (B, L, C) fp32.

        Raises ValueError unless exactly one input is given, and for a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = widen(self.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        mask = self._token_mask(attention_mask, x)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.gradient_checkpointing:
            use_cache = False  # recomputing a block would advance its state twice
        if not use_cache:
            cache_params = None
        elif cache_params is None:
            cache_params = DynamicCache(config=self.config)

        hidden_states = []
        for block in self.blocks:
            hidden_states.append(x)
            x = block(x, mask, cache_params)
        x = self.norm(x)
        return LonghornOutput(
            last_hidden_state=x,
            cache_params=cache_params,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )

    @staticmethod
    def _token_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
        if attention_mask is None:
            return None
        batch, seqlen, _ = x.shape
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seqlen:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, must be ({batch}, {seqlen}), "
                "with more columns where there are earlier tokens"
            )
        return attention_mask[:, -seqlen:, None].to(torch.bool)


class LonghornForCausalLM(LonghornPreTrainedModel, GenerationMixin):
    """LonghornModel and a language-modelling head, tied to the embedding where the config says."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: LonghornConfig) -> None:
        super().__init__(config)
        self.model = LonghornModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() would pass a cache as past_key_values and ask it for a length, which a state
        # has not. LonghornModel makes one at the first step, handed on as cache_params.
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LonghornCausalLMOutput:
        """As LonghornModel.forward, and:

        labels: (B, L) int64, the input_ids themselves (they are shifted here); -100 is not scored.
        logits_to_keep: only compute the last so many logits (0: all), or those at these positions.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, keep].to(self.lm_head.weight.dtype)
        logits = widen(self.lm_head(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LonghornCausalLMOutput(
            loss=loss,
            logits=logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
        )
