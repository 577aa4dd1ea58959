"""The Longhorn authors' checkpoints (github.com/Cranial-XIX/longhorn): config.json and pytorch_model.bin."""

from pathlib import Path
from typing import Any

import orjson

from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.hf import ConversionError
from pretrain.hf.folder import CONFIG, PICKLED, read_pickled
from pretrain.hf.layouts import Layout, backbone_names, by_table

LAYOUT = Layout(by_table(backbone_names(embedding="embedding", dt="dt_head")))
NORM_EPS = 1e-5  # in their code, not in their config
SIZES = ("d_model", "n_layer", "vocab_size")
MIXER_SIZES = ("d_state", "d_conv", "expand", "dt_rank")  # of ssm_cfg; the defaults are ours
# Fields and what our layers compute, which is also what a file means that leaves them out.
FIXED: dict[str, Any] = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
FIXED_MIXER: dict[str, Any] = {"conv_bias": True, "bias": False}
# How a layer starts, or which code runs it: nothing to a trained one in fp32.
FREE = ("residual_in_fp32", "fused_add_norm")
FREE_MIXER = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path")
# Their script writes d_state beside ssm_cfg, too.
OTHERS = ("ssm_cfg", "pad_vocab_size_multiple", "tie_embeddings", "d_state")
PAD_MULTIPLE = 8  # where the file does not say


def load_official(folder: Path) -> LanguageModel:
    """Their model as ours, fp32 in host memory, with our padding of the vocabulary instead of theirs.

    Raises ConversionError for a missing, damaged or unsafe file, a config whose layers are not ours, and weights of
    other names, shapes or dtypes than it describes.
    """
    config, rows = read_official_config(folder / CONFIG)
    path = folder / PICKLED
    return LAYOUT.read(read_pickled(path), config, path, rows)


def read_official_config(path: Path) -> tuple[ModelConfig, int]:
    """The model, and the rows of its padded vocabulary. Raises ConversionError naming the field."""
    try:
        values = orjson.loads(path.read_bytes())
        mixer = values.get("ssm_cfg") or {}
        _refuse_others(values, FIXED, (*SIZES, *FREE, *OTHERS))
        _refuse_others(mixer, FIXED_MIXER, (*MIXER_SIZES, *FREE_MIXER))
        layer: dict[str, Any] = {name: _count(mixer, name) for name in MIXER_SIZES if mixer.get(name, "auto") != "auto"}
        if values.get("d_state", layer.get("d_state")) != layer.get("d_state"):
            raise ConversionError(f"d_state is {values['d_state']}, but ssm_cfg.d_state is {layer.get('d_state')}")
        sizes = {name: _count(values, name) for name in SIZES}
        multiple = _count({"pad_vocab_size_multiple": PAD_MULTIPLE, **values}, "pad_vocab_size_multiple")
    except (OSError, ValueError, AttributeError, TypeError) as error:  # ValueError: JSON's errors, and ours
        raise ConversionError(f"{path}: {error}") from error
    tied = bool(values.get("tie_embeddings", True))
    config = ModelConfig(LonghornConfig(**layer), norm_eps=NORM_EPS, tie_embeddings=tied, **sizes)
    return config, -(-config.vocab_size // multiple) * multiple


def _refuse_others(values: dict[str, Any], fixed: dict[str, Any], free: tuple[str, ...]) -> None:
    for name, value in values.items():
        if name in fixed and value != fixed[name]:
            raise ConversionError(f"{name} is {value!r}; ours can only be {fixed[name]!r}")
        if name not in fixed and name not in free:
            raise ConversionError(f"unknown field {name!r}; known are {', '.join(sorted((*fixed, *free)))}")


def _count(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise ConversionError(f"{name} must be a whole number above 0, is {value!r}")
    return value
