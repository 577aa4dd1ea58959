"""Every mixer by name. A new one is a module, a config and a line here (and its plan in pretrain/parallel)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from longhorn_layers.config import LonghornConfig, MixerConfig, ModelConfig
from longhorn_layers.longhorn import LonghornMixer


@dataclass(frozen=True)
class MixerSpec:
    """`build(config, d_model, n_layer)` makes the module for one layer."""

    config: type[MixerConfig]
    build: Callable[..., nn.Module]


MIXERS: dict[str, MixerSpec] = {"longhorn": MixerSpec(LonghornConfig, LonghornMixer)}

# The authors' rule: twice the layers of the transformer of that name. Launch presets hold the same numbers.
SIZES: dict[str, ModelConfig] = {
    "125m": ModelConfig(n_layer=24, d_model=768),
    "350m": ModelConfig(n_layer=48, d_model=1024),
    "1p3b": ModelConfig(n_layer=48, d_model=2048),
}


def build_mixer(config: ModelConfig) -> nn.Module:
    """The mixer of one layer. Raises ValueError for a name that is not registered."""
    name = config.mixer.name
    if name not in MIXERS:
        raise ValueError(f"model.mixer.name: {name!r} is not one of {sorted(MIXERS)}")
    return MIXERS[name].build(config.mixer, config.d_model, config.n_layer)
