"""What each mixer is in transformers: its class there, its config both ways, and where its parameters are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from longhorn_layers.config import ModelConfig, ScanMixerConfig
from longhorn_layers.hf.configuration_gla import GLAConfig
from longhorn_layers.hf.configuration_longhorn import LonghornConfig
from longhorn_layers.hf.modeling_gla import GLAForCausalLM
from longhorn_layers.hf.modeling_longhorn import LonghornForCausalLM
from longhorn_layers.model import LanguageModel
from longhorn_layers.registry import MIXERS
from pretrain.hf import ConversionError
from pretrain.hf.layouts import Layout, backbone_names, by_table, canonical, llama_names, shipped_name

DEFAULT_CONTEXT = 2048
COMMON = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "tie_embeddings": "tie_word_embeddings",
}
SHIPPED = {"norm_eps": "norm_eps", "d_ff": "mlp_size"}
SCAN = {
    "mixer.d_state": "state_size",
    "mixer.d_conv": "conv_kernel",
    "mixer.expand": "expand",
    "mixer.dt_rank": "time_step_rank",
}


def _nothing(config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Format:
    """A mixer's model in transformers.

    fields: of our config → of theirs, beside `COMMON`. fixed: fields of theirs that our layers leave no choice in.
    further: fields of theirs that follow from others of ours; `read_further`: the way back, which refuses what we lack.
    kept_fp32: parts of the names of parameters that are fp32 in files of any dtype.
    shipped: an export holds the class's code; else transformers has it.
    """

    mixer: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    layout: Layout
    fields: Mapping[str, str]
    kept_fp32: tuple[str, ...]
    shipped: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    further: Callable[[ModelConfig], dict[str, Any]] = _nothing
    read_further: Callable[[Any], dict[str, Any]] = _nothing

    def file_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Of a parameter by their name, in files whose matrices are `dtype`."""
        return torch.float32 if any(part in name for part in self.kept_fp32) else dtype

    def config(self, ours: ModelConfig, **others: Any) -> PreTrainedConfig:
        """Their config. Raises ConversionError for a SwiGLU that they have no place for, or need."""
        if bool(ours.d_ff) != ("d_ff" in self.fields) and not self.shipped:
            raise ConversionError(
                f"model.d_ff={ours.d_ff}: transformers' {self.config_class.model_type} has "
                f"{'no SwiGLU' if ours.d_ff else 'one in each layer'}, so the model can't be written as one"
            )
        values = {theirs: _get(ours, key) for key, theirs in {**COMMON, **self.fields}.items()}
        return self.config_class(**values, **self.fixed, **self.further(ours), **others)

    def model_config(self, theirs: PreTrainedConfig, source: Path) -> ModelConfig:
        """Our config of their model. Raises ConversionError for what our layers can't compute, naming the field."""
        for name, value in self.fixed.items():
            if getattr(theirs, name) != value:
                raise ConversionError(f"{source}: {name} is {getattr(theirs, name)!r}; ours can only be {value!r}")
        values = {key: getattr(theirs, name) for key, name in {**COMMON, **self.fields}.items()}
        try:
            values |= self.read_further(theirs)
        except ConversionError as error:
            raise ConversionError(f"{source}: {error}") from None
        own = {key: value for key, value in values.items() if "." not in key}
        mixer = {key.removeprefix("mixer."): value for key, value in values.items() if "." in key}
        return canonical(ModelConfig(MIXERS[self.mixer].config(**mixer), **own))


def _get(config: ModelConfig, key: str) -> Any:
    mixer = config.mixer
    if key == "mixer.dt_rank" and isinstance(mixer, ScanMixerConfig):
        return mixer.resolved_dt_rank(config.d_model)
    return getattr(mixer, key.removeprefix("mixer.")) if "." in key else getattr(config, key)


def _llama_further(ours: ModelConfig) -> dict[str, Any]:
    mixer: Any = ours.mixer
    heads = ours.d_model // mixer.head_dim
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope_theta},
    }


def _read_llama_further(theirs: LlamaConfig) -> dict[str, Any]:
    heads, rope = theirs.num_attention_heads, dict(theirs.rope_parameters or {})
    if theirs.num_key_value_heads != heads:
        raise ConversionError(
            f"num_key_value_heads is {theirs.num_key_value_heads}; ours can only be {heads}, one a head"
        )
    if heads * (theirs.head_dim or 0) != theirs.hidden_size:
        raise ConversionError(f"{heads} heads of {theirs.head_dim} do not make hidden_size={theirs.hidden_size}")
    if rope.pop("rope_type", "default") != "default" or rope.keys() != {"rope_theta"}:
        raise ConversionError(f"rope_parameters are {theirs.rope_parameters}; ours has plain rotary positions")
    return {"mixer.rope_theta": float(rope["rope_theta"])}


FORMATS = (
    Format(
        "longhorn",
        LonghornConfig,
        LonghornForCausalLM,
        Layout(shipped_name),
        {**SCAN, **SHIPPED, "mixer.update": "update_rule"},
        kept_fp32=tuple(LonghornForCausalLM._keep_in_fp32_modules_strict),
        shipped=True,
    ),
    Format(
        "mamba",
        MambaConfig,
        MambaForCausalLM,
        Layout(by_table(backbone_names(embedding="embeddings", dt="dt_proj"))),
        {**SCAN, "norm_eps": "layer_norm_epsilon"},
        kept_fp32=("norm", "A_log", "mixer.D", "dt_proj.bias"),
        fixed={"use_bias": False, "use_conv_bias": True, "hidden_act": "silu"},
    ),
    Format(
        "gla",
        GLAConfig,
        GLAForCausalLM,
        Layout(shipped_name),
        {
            **SHIPPED,
            "mixer.n_head": "num_heads",
            **{f"mixer.{name}": name for name in ("expand_k", "expand_v", "gate_rank", "gate_normalizer")},
        },
        kept_fp32=tuple(GLAForCausalLM._keep_in_fp32_modules_strict),
        shipped=True,
    ),
    Format(
        "attention",
        LlamaConfig,
        LlamaForCausalLM,
        Layout(by_table(llama_names()), ignored=("rotary_emb.inv_freq",)),
        {"d_ff": "intermediate_size", "norm_eps": "rms_norm_eps", "mixer.head_dim": "head_dim"},
        kept_fp32=("norm",),
        fixed={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
        further=_llama_further,
        read_further=_read_llama_further,
    ),
)


def format_of(config: ModelConfig) -> Format:
    """Raises ConversionError for a mixer that transformers has no class for, and we ship no code of."""
    for found in FORMATS:
        if found.mixer == config.mixer.name:
            return found
    known = ", ".join(repr(found.mixer) for found in FORMATS)
    raise ConversionError(f"model.mixer.name: {config.mixer.name!r} has no code for transformers; {known} have")


def to_hf_model(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast | None,
    dtype: torch.dtype,
    context: int = DEFAULT_CONTEXT,
) -> PreTrainedModel:
    """The same model in transformers' class, or the one that exports ship, on the model's device, in eval mode.

    It shares the memory of weights whose dtype stays. `tokenizer` gives the ids of special tokens; `context` is the
    length that LLaMA's config says it was made for. Raises ConversionError as `format_of` and `Format.config` do.
    """
    format = format_of(model.config)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    limit = {"max_position_embeddings": context} if format.config_class is LlamaConfig else {}
    config = format.config(model.config, **special, **limit)
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        exported = format.model_class(config)
    written = format.layout.write(model)
    weights = {name: weight.to(format.file_dtype(name, dtype)).contiguous() for name, weight in written.items()}
    exported.load_state_dict(weights, assign=True, strict=not model.config.tie_embeddings)
    exported.tie_weights()
    _compute_buffers(exported, model.embedding.weight.device)
    return exported.eval()


def _compute_buffers(exported: PreTrainedModel, device: torch.device) -> None:
    """Those that a constructor computes, which the meta device kept no numbers of."""
    for name, module in list(exported.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            exported.set_submodule(name, type(module)(exported.config).to(device))


def read_config(folder: Path) -> tuple[Format, ModelConfig]:
    """What a folder's config.json describes. Raises ConversionError for a model that is none of ours."""
    path = folder / "config.json"
    try:
        model_type = orjson.loads(path.read_bytes()).get("model_type")
    except (OSError, orjson.JSONDecodeError, AttributeError) as error:
        raise ConversionError(f"{path}: {error}") from error
    for format in FORMATS:
        if format.config_class.model_type == model_type:
            try:
                theirs = format.config_class.from_pretrained(folder)
            except Exception as error:  # its validators raise what they like
                raise ConversionError(f"{path}: {error}") from error
            return format, format.model_config(theirs, path)
    known = ", ".join(format.config_class.model_type for format in FORMATS)
    raise ConversionError(f"{path}: model_type is {model_type!r}; known are {known}")
