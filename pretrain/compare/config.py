"""What is compared: a YAML file of its own, with `a.b=c` on the command line over it, like a training config."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from longhorn_layers.model import count_parameters
from pretrain.config import Config, ConfigError, config_to_dict, load_config, merge, read_layers

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # of a model: a folder's name too
# What must not differ, or the curves would not be of the same tokens. Models may differ in all else.
SHARED = (
    *("data", "eval", "train.global_batch_size", "train.precision"),
    *("optim.warmup_fraction", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps", "optim.clip"),
)


@dataclass
class ModelEntry:
    """One model: a training config and `a.b=c` overrides of it."""

    config: str = ""  # "": the comparison's
    overrides: list[str] = field(default_factory=list)


@dataclass
class CompareConfig:
    """A comparison. Each model is trained briefly at each learning rate, then fully at its best, once for each seed."""

    run_dir: str = "runs/compare"
    config: str = ""  # a training config, for models that name none
    overrides: list[str] = field(default_factory=list)  # of every model's config
    models: dict[str, ModelEntry] = field(default_factory=dict)
    reference: str = ""  # whom the others are compared with; "": the first model
    total_tokens: int = 0  # of each full training
    learning_rates: list[float] = field(default_factory=list)  # the same for each model
    lr_tokens: int = 0  # of each training of the grid, its schedule as long
    seeds: list[int] = field(default_factory=list)  # a seed is one data order; the grid has the first
    validations: int = 30  # points on each curve of a full training
    contexts: list[int] = field(default_factory=list)  # of the perplexities, in tokens
    evaluated_tokens: int | None = None  # of each document set; None: all
    parameter_tolerance: float = 0.02  # by which a model's parameters may differ from the reference's
    workers: int = 1  # trainings at a time
    gpus_per_run: int = 0  # 0: each on the CPU, in one process; n: n processes with a GPU each


@dataclass(frozen=True)
class Comparison:
    """A checked comparison; `bases` are the models' training configs, `parameters` their sizes."""

    config: CompareConfig
    bases: dict[str, Config]
    parameters: dict[str, int]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def reference(self) -> str:
        return self.config.reference or next(iter(self.bases))

    @property
    def others(self) -> list[str]:
        return [name for name in self.bases if name != self.reference]

    @property
    def base(self) -> Config:
        """The reference's, for what all share."""
        return self.bases[self.reference]

    def training_config(self, model: str) -> tuple[str, list[str]]:
        """The YAML file that a model is trained by, and the overrides that every run of it has."""
        entry = self.config.models[model]
        return entry.config or self.config.config, [*self.config.overrides, *entry.overrides]


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read the YAML file, apply the overrides, read every model's config, check everything.

    Raises ConfigError, naming file, key or model and what would be right, and FileNotFoundError.
    """
    merged: Any = OmegaConf.structured(CompareConfig)
    for source, layer in read_layers(path, overrides):
        merged = merge(merged, layer, source)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, CompareConfig)
    _validate(config)
    return _with_models(config)


def _validate(config: CompareConfig) -> None:
    least = {"total_tokens": 1, "lr_tokens": 1, "validations": 2, "workers": 1, "gpus_per_run": 0}
    for key, minimum in least.items():
        if (value := getattr(config, key)) < minimum:
            raise ConfigError(f"{key} must be at least {minimum}, got {value}")
    for key in ("learning_rates", "seeds", "contexts"):
        values = getattr(config, key)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key} must be a list of one or more, each once; got {values}")
    if bad := [rate for rate in config.learning_rates if not 0 < rate < math.inf]:
        raise ConfigError(f"learning_rates: {bad[0]} is no learning rate")
    if bad := [c for c in config.contexts if c < 1 or max(config.contexts) % c]:
        raise ConfigError(f"contexts: {bad[0]} does not divide the largest, {max(config.contexts)}")
    if config.evaluated_tokens is not None and config.evaluated_tokens < max(config.contexts):
        raise ConfigError(
            f"evaluated_tokens={config.evaluated_tokens} is below the largest of contexts={config.contexts}"
        )
    if config.lr_tokens > config.total_tokens:
        raise ConfigError(f"lr_tokens={config.lr_tokens} is above total_tokens={config.total_tokens}")
    if config.parameter_tolerance < 0:
        raise ConfigError(f"parameter_tolerance must be at least 0, got {config.parameter_tolerance}")
    if len(config.models) < 2:
        raise ConfigError(f"models: a comparison has two or more, got {len(config.models)}")
    for name in config.models:
        if not NAME.fullmatch(name):
            raise ConfigError(f"models: {name!r} can't name a folder; use letters, digits and . _ + -")
    if config.reference and config.reference not in config.models:
        raise ConfigError(f"reference: {config.reference!r} is not one of {', '.join(config.models)}")


def _with_models(config: CompareConfig) -> Comparison:
    bases = {}
    for name, entry in config.models.items():
        if not (path := entry.config or config.config):
            raise ConfigError(f"models.{name}.config is not set, nor is config: which training config is it?")
        try:
            bases[name] = load_config(path, [*config.overrides, *entry.overrides])
        except (ConfigError, FileNotFoundError) as error:
            raise ConfigError(f"models.{name}: {error}") from error
    comparison = Comparison(config, bases, {name: count_parameters(base.model) for name, base in bases.items()})
    _check_shared(comparison)
    _check_sizes(comparison)
    return comparison


def _check_shared(comparison: Comparison) -> None:
    """Raise ConfigError where curves would not be over the same tokens, or not be measured on the same ones."""
    if not comparison.base.data.valid:
        raise ConfigError("data.valid is not set: there is nothing to measure the loss on")
    ours = OmegaConf.create(config_to_dict(comparison.base))
    for name in comparison.others:
        theirs = OmegaConf.create(config_to_dict(comparison.bases[name]))
        for key in SHARED:
            own, other = OmegaConf.select(ours, key), OmegaConf.select(theirs, key)
            if own != other:
                raise ConfigError(
                    f"models.{name}: {key} is {other}, {comparison.reference}'s is {own}: models are compared on the "
                    "same batches; set it in `overrides`, which is for all"
                )
        optim, reference = comparison.bases[name].optim, comparison.base.optim
        if not math.isclose(optim.min_lr / optim.lr, reference.min_lr / reference.lr):
            raise ConfigError(
                f"models.{name}: its learning rate falls to {optim.min_lr / optim.lr:.3g} of the highest, "
                f"{comparison.reference}'s to {reference.min_lr / reference.lr:.3g}: set optim.min_lr in `overrides`"
            )


def _check_sizes(comparison: Comparison) -> None:
    wanted, tolerance = comparison.parameters[comparison.reference], comparison.config.parameter_tolerance
    for name, count in comparison.parameters.items():
        if abs(count / wanted - 1) > tolerance:
            raise ConfigError(
                f"models.{name} has {count:,} parameters, {count / wanted - 1:+.1%} of {comparison.reference}'s "
                f"{wanted:,}; parameter_tolerance is {tolerance:.1%}: change its model.d_ff or model.n_layer"
            )
