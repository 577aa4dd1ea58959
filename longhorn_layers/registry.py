"""Every mixer by name. A new one is a module, a config and a line here (and its plan in pretrain/parallel)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from longhorn_layers.attention import AttentionMixer
from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, MixerConfig, ModelConfig
from longhorn_layers.gla import GLAMixer
from longhorn_layers.longhorn import LonghornMixer
from longhorn_layers.mamba import MambaMixer


@dataclass(frozen=True)
class MixerSpec:
    """`build(config, d_model, residual_writes)` makes the module for one layer."""

    config: type[MixerConfig]
    build: Callable[..., nn.Module]


MIXERS: dict[str, MixerSpec] = {
    "longhorn": MixerSpec(LonghornConfig, LonghornMixer),
    "mamba": MixerSpec(MambaConfig, MambaMixer),
    "gla": MixerSpec(GLAConfig, GLAMixer),
    "attention": MixerSpec(AttentionConfig, AttentionMixer),
}


def build_mixer(config: ModelConfig) -> nn.Module:
    """The mixer of one layer. Raises ValueError for a name that is not registered, or sizes that don't divide."""
    name = config.mixer.name
    if name not in MIXERS:
        raise ValueError(f"model.mixer.name: {name!r} is not one of {sorted(MIXERS)}")
    return MIXERS[name].build(config.mixer, config.d_model, config.residual_writes)
