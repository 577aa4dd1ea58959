"""The run's config: dataclass defaults < one YAML file < `a.b=c` on the command line.

A file may begin with `extends: OTHER.yaml` (a path from its own folder): that one is read first. What names another
mixer than the layers before it starts the mixer's keys anew, as each mixer has its own. Unknown keys and wrong types
are errors that name the key and, for a key, the nearest right one. The resolved config is saved with the run and in
each checkpoint.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from longhorn_layers.config import ModelConfig
from longhorn_layers.registry import MIXERS, build_mixer

COLLECTIVE_TIMEOUT = 1800  # seconds: a rank that waits longer for the others has lost one
LONGEST_STEP_TIMEOUT = 1500  # the watchdog, which says where every rank was, must be the first to end a hang
PRECISIONS = ("autocast", "bf16", "fp32")
WANDB_MODES = ("offline", "online", "disabled")
MINIMA = {
    **{f"model.{name}": 1 for name in ("vocab_size", "d_model", "n_layer")},
    **{f"train.{name}": 1 for name in ("total_tokens", "global_batch_size", "micro_batch_size")},
    "model.d_ff": 0,
    "data.seqlen": 1,
    "parallel.tensor": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "recovery.max_skips": 1,
    "recovery.max_rollbacks": 0,
    "recovery.spike_window": 2,
    "recovery.step_timeout": 1,
    "log.interval": 1,
}


class ConfigError(ValueError):
    """A config that cannot run; the message names the key and what would be right."""


@dataclass
class DataConfig:
    """Dataset folders (made by data_tools.subset), or shards by prefix (made by data_tools.tokenize)."""

    train: str = ""
    valid: str = ""
    seqlen: int = 2048
    reset_at_eos: bool = False  # True: the state starts anew after each EOS; the paper's runs don't
    blend: dict[str, float] = field(default_factory=dict)  # weights by source of `train`; {}: by their tokens


@dataclass
class OptimConfig:
    """AdamW and its cosine schedule, measured in tokens."""

    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_fraction: float = 0.01  # of total_tokens, linear
    weight_decay: float = 0.01  # on matrices only: no decay on biases, norms, D
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # of the global gradient norm


@dataclass
class ParallelConfig:
    """Tensor parallel × ZeRO data parallel; data parallel is what the world size leaves."""

    tensor: int = 1
    zero_stage: int = 1


@dataclass
class TrainConfig:
    """How long, in which batches, in which precision."""

    total_tokens: int = 100_000_000_000
    global_batch_size: int = 1024  # sequences per optimizer step
    micro_batch_size: int = 8  # sequences per forward
    precision: str = "autocast"  # fp32 parameters, bf16 matmuls; "bf16": bf16 matrices, fp32 masters; "fp32"
    activation_checkpointing: bool = False
    seed: int = 1234
    threads: int | None = None  # CPU threads per process; None: torch's choice


@dataclass
class CheckpointConfig:
    """Every `interval` steps, at a stop, and at the end; what is kept is the union of the `keep_` rules."""

    interval: int = 500
    keep_last: int = 3
    keep_every: int = 0  # also those of steps that this divides; 0: none
    keep_best: bool = False  # also the one with the lowest validation loss


@dataclass
class RecoveryConfig:
    """What a run does about steps that go wrong. See pretrain/guard.py and pretrain/watchdog.py."""

    max_skips: int = 5  # steps skipped in a row for a loss or gradient that is not finite (or a spike)
    max_rollbacks: int = 3  # after max_skips, back to the last checkpoint; of a run, before it stops
    spike_sigmas: float | None = None  # a loss so many standard deviations above the mean is a spike; None: none is
    spike_window: int = 128  # of the last so many trained steps' losses
    step_timeout: float = 600.0  # seconds without progress on a rank after which the watchdog ends the job


@dataclass
class EvalConfig:
    """Validation loss during training, at the training context and others."""

    interval: int = 500  # steps; 0: never
    tokens: int = 10_000_000
    contexts: list[int] = field(default_factory=list)  # besides data.seqlen; each of all must divide the largest


@dataclass
class LogConfig:
    interval: int = 10  # steps between progress lines; metrics.jsonl has every step
    wandb: str = "offline"  # or "online", "disabled"
    peak_tflops: float | None = None  # per device, for MFU; None: known GPUs by name, else n/a


@dataclass
class Config:
    """Everything a run is. `run_dir` holds all that it writes."""

    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.seqlen

    @property
    def total_steps(self) -> int:
        """Optimizer steps to at least total_tokens."""
        return -(-self.train.total_tokens // self.tokens_per_step)

    def grad_accum_steps(self, data_parallel: int) -> int:
        """Forward/backward passes per optimizer step on each of `data_parallel` ranks.

        Raises ConfigError where the global batch does not divide, with the nearest ones that do.
        """
        unit, batch = self.train.micro_batch_size * data_parallel, self.train.global_batch_size
        if batch % unit == 0:
            return batch // unit
        below = batch // unit * unit
        nearest = " or ".join(str(n) for n in (below, below + unit) if n)
        raise ConfigError(
            f"train.global_batch_size={batch} is no multiple of train.micro_batch_size × data-parallel ranks "
            f"= {self.train.micro_batch_size} × {data_parallel} = {unit}; nearest that are: {nearest}"
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides, check everything.

    Raises ConfigError (naming file and key) and FileNotFoundError (with the presets that exist).
    """
    layers = read_layers(path, overrides)
    _forget_other_mixers([layer for _, layer in layers])
    merged = _structured(*(layer for _, layer in layers))
    for source, layer in layers:
        merged = merge(merged, layer, source)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    validate(config)
    return config


def read_layers(path: str | Path, overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """(where it is from, keys): the files that `path` extends, `path`, the command line; for `merge`, in this order.

    Raises ConfigError, and FileNotFoundError with the configs that exist.
    """
    path = Path(path)
    if not path.is_file():
        configs = ", ".join(sorted(str(p) for p in Path("launch/configs").glob("*.yaml")))
        raise FileNotFoundError(f"{path}: no such config file; configs here: {configs or 'none'}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r}: an override is written key=value, like train.seed=1")
    layers = _files(path, ())
    try:
        return [*layers, ("command line", OmegaConf.from_dotlist(list(overrides)))]
    except Exception as error:  # YAML's errors share no base class with OmegaConf's
        raise ConfigError(f"command line: {error}") from error


def _files(path: Path, extending: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """The file's content by its name, after that of the files that it extends."""
    if path.resolve() in extending:
        raise ConfigError(f"{path}: extends itself, by way of {' → '.join(map(str, extending))}")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # YAML's errors share no base class with OmegaConf's
        raise ConfigError(f"{path}: not a config: {error}") from error
    base = layer.pop("extends", None) if isinstance(layer, DictConfig) else None
    if base is None:
        return [(str(path), layer)]
    extended = path.parent / str(base)
    if not extended.is_file():
        raise ConfigError(f"{path}: extends {base}, but there is no file {extended}")
    return [*_files(extended, (*extending, path.resolve())), (str(path), layer)]


def _forget_other_mixers(layers: list[Any]) -> None:
    """Drop the mixer's keys of every layer before one that names another mixer."""
    current = ModelConfig().mixer.name
    for place, layer in enumerate(layers):
        name = OmegaConf.select(layer, "model.mixer.name", default=current)
        for earlier in layers[:place] if name != current else []:
            if OmegaConf.select(earlier, "model.mixer") is not None:
                earlier.model.pop("mixer")
        current = name


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`, with the same checks as a file's."""
    layer = OmegaConf.create(values)
    config = OmegaConf.to_object(merge(_structured(layer), layer, "saved config"))
    assert isinstance(config, Config)
    validate(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, for JSON and YAML."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _structured(*layers: Any) -> Any:
    """Defaults, with the mixer config class of the mixer that the layers name."""
    config, name = Config(), ModelConfig().mixer.name
    for layer in layers:
        name = OmegaConf.select(layer, "model.mixer.name", default=name)
    if name not in MIXERS:
        raise ConfigError(f"model.mixer.name: {name!r} is not one of {sorted(MIXERS)}")
    config.model.mixer = MIXERS[name].config()
    return OmegaConf.structured(config)


def merge(base: Any, layer: Any, source: str) -> Any:
    """A structured config with a layer's keys set. Raises ConfigError, naming `source` and the key, for a wrong one."""
    try:
        return OmegaConf.merge(base, layer)
    except ConfigKeyError as error:
        raise ConfigError(f"{source}: unknown key {error.full_key!r}{_suggestion(base, str(error.full_key))}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {error.msg or error}".splitlines()[0]) from None


def _suggestion(base: Any, key: str) -> str:
    known = _leaves(OmegaConf.to_object(base))
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    close = close or [by_leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, n=1)]
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"


def _leaves(node: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for f in fields(node):
        value = getattr(node, f.name)
        names += _leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]
    return names


def validate(config: Config) -> None:
    """Raise ConfigError for values that no run can have; what depends on the machine is checked by the trainer."""
    for key, least in MINIMA.items():
        section, name = key.split(".")
        if (value := getattr(getattr(config, section), name)) < least:
            raise ConfigError(f"{key} must be at least {least}, got {value}")
    _check_mixer(config.model)
    if config.recovery.step_timeout > LONGEST_STEP_TIMEOUT:
        raise ConfigError(
            f"recovery.step_timeout must be at most {LONGEST_STEP_TIMEOUT} (collectives end after "
            f"{COLLECTIVE_TIMEOUT} s), got {config.recovery.step_timeout:g}"
        )
    if config.checkpoint.keep_best and not _validates_when_saving(config):
        raise ConfigError(
            "checkpoint.keep_best=true finds no losses: it needs data.valid, eval.interval above 0, and a "
            f"checkpoint.interval ({config.checkpoint.interval}) that is a multiple of it ({config.eval.interval})"
        )
    sigmas = config.recovery.spike_sigmas
    if sigmas is not None and sigmas <= 0:
        raise ConfigError(f"recovery.spike_sigmas must be above 0, got {sigmas}; null finds no spikes")
    _check_blend(config.data.blend)
    _check_contexts(config)
    _one_of("train.precision", config.train.precision, PRECISIONS)
    _one_of("log.wandb", config.log.wandb, WANDB_MODES)
    _one_of("parallel.zero_stage", config.parallel.zero_stage, (1, 2, 3))
    if not 0 <= config.optim.warmup_fraction < 1:
        raise ConfigError(f"optim.warmup_fraction must be in [0, 1), got {config.optim.warmup_fraction}")
    if config.optim.min_lr > config.optim.lr:
        raise ConfigError(f"optim.min_lr={config.optim.min_lr} is above optim.lr={config.optim.lr}")


def _check_mixer(model: ModelConfig) -> None:
    try:
        with torch.device("meta"):
            build_mixer(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def validation_contexts(config: Config) -> list[int]:
    """What the validation loss is measured at, in tokens, shortest first; the training context is always among them."""
    return sorted({config.data.seqlen, *config.eval.contexts})


def _check_contexts(config: Config) -> None:
    contexts = validation_contexts(config)
    for context in contexts:
        if context < 1 or contexts[-1] % context:
            raise ConfigError(
                f"eval.contexts={config.eval.contexts}: {context} does not divide {contexts[-1]}, the largest (of them "
                f"and data.seqlen={config.data.seqlen}): the same tokens could not be scored at both"
            )


def _check_blend(blend: dict[str, float]) -> None:
    for name, weight in blend.items():
        if not 0 <= weight < math.inf:
            raise ConfigError(f"data.blend.{name} must be a weight of 0 or more, got {weight}")
    if blend and not any(blend.values()):
        raise ConfigError("data.blend: every weight is 0; give a source some, or set data.blend={} for all of them")


def _validates_when_saving(config: Config) -> bool:
    interval = config.eval.interval
    return bool(config.data.valid) and interval > 0 and config.checkpoint.interval % interval == 0


def _one_of(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(map(str, choices))}; got {value}")
