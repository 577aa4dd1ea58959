"""What recurrent language models have in common in transformers: everything but the mixer and the configuration.

Shapes: B batch, L tokens, C hidden_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .recurrence import kernels_run, widen

try:  # of the repository that trains these models; transformers demands no package that is imported in a `try`
    from kernels.rms_norm import rms_norm as fused_rms_norm
except ImportError:  # it is not here; there is also another package of the name, without these
    fused_rms_norm = None  # type: ignore[assignment]


@dataclass
class RecurrentOutput(ModelOutput):
    """last_hidden_state: (B, L, C) fp32. cache_params: the state after the last token.
    hidden_states: see `output_hidden_states` in RecurrentModel.forward."""

    last_hidden_state: Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RecurrentCausalLMOutput(ModelOutput):
    """loss: mean over the labels that are not -100. logits: (B, L, vocab_size) fp32.
    The rest as in RecurrentOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class RecurrentRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x: (B, L, ..., size), normalised in fp32 or better and returned in `dtype`."""
        if fused_rms_norm is not None and kernels_run(x):
            out = fused_rms_norm(x, self.weight, eps=self.eps, out_dtype=dtype)
            assert isinstance(out, Tensor)  # a pair only with a residual
            return out
        return F.rms_norm(widen(x), self.weight.shape, widen(self.weight), self.eps).to(dtype)


class RecurrentMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RecurrentBlock(GradientCheckpointingLayer):
    """A norm and a mixer, `mixer(x, mask, cache)` with x (B, L, C), mask (B, L, 1) bool or None, False at padding; and,
    where the configuration has one, a norm and an MLP."""

    def __init__(self, config: Any, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = RecurrentRMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = mixer
        self.mlp: RecurrentMLP | None = None
        if config.mlp_size:
            self.mlp_norm = RecurrentRMSNorm(config.hidden_size, config.norm_eps)
            self.mlp = RecurrentMLP(config.hidden_size, config.mlp_size)
        writers = [mixer.out_proj] if self.mlp is None else [mixer.out_proj, self.mlp.down_proj]
        for writer in writers:  # of the residual stream: each adds less at first the more there are
            writer.residual_writes = len(writers) * config.num_hidden_layers

    def forward(self, x: Tensor, dtype: torch.dtype, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """x: the residual stream (B, L, C), fp32; dtype: of the weights. `cache` is read and updated."""
        x = x + self.mixer(self.norm(x, dtype), mask, cache)
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x, dtype))
        return x


class RecurrentPreTrainedModel(PreTrainedModel):
    """A subclass names its configuration and `mixer_class`, built as `mixer_class(config, layer_index)`."""

    mixer_class: type[nn.Module]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["RecurrentBlock"]
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted generation would

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            bound = (module.in_features * getattr(module, "residual_writes", 1)) ** -0.5  # PyTorch's default with 1
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            super()._init_weights(module)  # embedding N(0, 0.02), norms 1


class RecurrentModel(RecurrentPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        mixers = (self.mixer_class(config, index) for index in range(config.num_hidden_layers))
        self.blocks = nn.ModuleList(RecurrentBlock(config, mixer) for mixer in mixers)
        self.norm = RecurrentRMSNorm(config.hidden_size, config.norm_eps)
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
    ) -> RecurrentOutput:
        """input_ids: (B, L) int64, or inputs_embeds: (B, L, C).

        attention_mask: (B, at least L), 0 at padding; the last L columns are these tokens'. Padding
            on the left does not change what follows it.
        cache_params: a cache that this model returned, to go on from; pass the new tokens alone. It
            is updated in place and holds no gradient history.
        output_hidden_states: also return the input of every block and the normalised output of the
            last one, each (B, L, C) fp32.

        Raises ValueError unless exactly one input is given, for a mask of another shape, and for `past_key_values`:
        transformers' name for what is `cache_params` here would otherwise be passed over.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError("this model goes on from a state: pass it as cache_params, not as past_key_values")
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
        dtype = self.embedding.weight.dtype
        for block in self.blocks:
            hidden_states.append(x)
            x = block(x, dtype, mask, cache_params)
        x = self.norm(x, x.dtype)
        return RecurrentOutput(
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


class RecurrentForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """A `model_class` and a language-modelling head, tied to the embedding where the configuration says."""

    model_class: type[RecurrentModel]
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
    ) -> RecurrentCausalLMOutput:
        """As RecurrentModel.forward, and:

        labels: (B, L) int64, the input_ids themselves (they are shifted here); -100 is not scored.
        logits_to_keep: only compute the last so many logits (0: all), or those at these positions.
        """
        outputs = self.model(
            input_ids,
            past_key_values=kwargs.pop("past_key_values", None),
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
        return RecurrentCausalLMOutput(
            loss=loss,
            logits=logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
        )

    # ---- what `generate` asks ----

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() would pass a cache as past_key_values and ask it for a length, which a state
        # has not. RecurrentModel makes one at the first step, handed on as cache_params.
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,  # generate() asks this signature whether a prompt may be embeddings
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and inputs.get("cache_params") is not None:
            inputs["attention_mask"] = None  # a generated token is no padding
        return inputs

    def _prefill(  # type: ignore[override]
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> RecurrentCausalLMOutput:
        """The forward pass over the prompt, `prefill_chunk_size` tokens at a time where that is set.

        transformers' own chunks ask the cache for a length. Raises ValueError for chunks without a cache, and for
        guidance with one: its second text would go on from a `past_key_values`, which a state is not.
        """
        if generation_config.guidance_scale not in (None, 1) and model_kwargs.get("use_cache"):
            raise ValueError("guidance_scale needs use_cache=False with a recurrent model")
        size = generation_config.prefill_chunk_size
        if size is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)  # type: ignore[misc]
        if not model_kwargs.get("use_cache"):
            raise ValueError("prefill_chunk_size needs use_cache=True: each chunk goes on from the state before it")
        embeds = model_kwargs.get("inputs_embeds")
        name, prompt = ("input_ids", input_ids) if embeds is None else ("inputs_embeds", embeds)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("cache_params")
        to_come = prompt.shape[1]
        for chunk in prompt.split(size, 1):
            to_come -= chunk.shape[1]
            outputs = self(
                **{name: chunk},
                attention_mask=None if mask is None else mask[:, : mask.shape[1] - to_come],
                cache_params=cache,
                use_cache=True,
                output_hidden_states=model_kwargs.get("output_hidden_states"),
                logits_to_keep=1,
                return_dict=True,
            )
            cache = outputs.cache_params
        return outputs
