"""What is compared: models × tasks × widths × learning rates × seeds, each a cell that is trained by itself."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
from omegaconf import OmegaConf

from longhorn_layers.config import ModelConfig
from longhorn_layers.model import count_parameters
from longhorn_layers.registry import MIXERS
from pretrain.config import ConfigError, merge, read_layers
from pretrain.mqar.task import TaskConfig, check_room

POSITIVE = ("n_layer", "train_examples", "test_examples", "epochs")
LISTS = ("models", "tasks", "widths", "learning_rates", "seeds")


@dataclass
class TrainingConfig:
    """How each model is trained; examples, epochs and widths as in the code of Arora et al. (see mqar_paper.yaml)."""

    n_layer: int = 2
    vocab_size: int = 8192
    embedding_std: float = 0.02  # at init. More tells tokens apart from the first step on, and recall is found sooner
    power: float = 0.01  # of the law that places the queries; see pretrain/mqar/task.py
    train_examples: int = 100_000
    test_examples: int = 3_000
    epochs: int = 64  # at most: a model that answers well enough is done
    stop_accuracy: float = 0.99  # after an epoch, on the test examples
    warmup_fraction: float = 0.0  # of all steps, linear; then a cosine to 0
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # of the global gradient norm


@dataclass
class MqarConfig:
    """A grid. `models` has a mixer's config by the label that tables and plots show."""

    output: str = "runs/mqar"
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: list[TaskConfig] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)  # d_model
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class Cell:
    """One model to train: everything that its result depends on, but code and machine."""

    label: str
    mixer: dict[str, Any]
    task: TaskConfig
    width: int
    learning_rate: float
    seed: int
    training: TrainingConfig

    @cached_property
    def key(self) -> str:
        """The name of its result: another for any other settings."""
        content = orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS)
        return f"{self.label}-{hashlib.sha256(content).hexdigest()[:12]}"

    @property
    def title(self) -> str:
        place = f"{self.task.seqlen} tokens, {self.task.pairs} pairs, width {self.width}"
        return f"{self.label}, {place}, lr {self.learning_rate:g}, seed {self.seed}"

    @property
    def cost(self) -> float:
        """Grows as the cell's time may: for the estimate of what is left."""
        return self.task.seqlen * self.width * self.training.train_examples * self.training.epochs

    def model_config(self) -> ModelConfig:
        """Raises ConfigError for a mixer that the config misspells."""
        return ModelConfig(
            mixer=_mixer(self.label, self.mixer),
            vocab_size=self.training.vocab_size,
            d_model=self.width,
            n_layer=self.training.n_layer,
        )


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> MqarConfig:
    """A YAML file, then `a.b=c` overrides; every value checked. Raises ConfigError and FileNotFoundError."""
    merged = OmegaConf.structured(MqarConfig)
    for source, layer in read_layers(path, overrides):
        merged = merge(merged, layer, source)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, MqarConfig)
    _validate(config)
    return config


def cells(config: MqarConfig) -> list[Cell]:
    """All of the grid, the short first: tasks, widths and seeds outside, so that models are compared early."""
    return [
        Cell(label, dict(mixer), task, width, rate, seed, config.training)
        for task in config.tasks
        for width in config.widths
        for seed in config.seeds
        for label, mixer in config.models.items()
        for rate in config.learning_rates
    ]


def _mixer(label: str, options: dict[str, Any]) -> Any:
    name = options.get("name")
    if name not in MIXERS:
        raise ConfigError(f"models.{label}.name: {name!r} is not one of {sorted(MIXERS)}")
    merged = merge(OmegaConf.structured(MIXERS[name].config), OmegaConf.create(options), f"models.{label}")
    return OmegaConf.to_object(merged)


def _validate(config: MqarConfig) -> None:
    training = config.training
    for name in LISTS:
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: nothing to train")
    places = {"tasks": [(task.seqlen, task.pairs) for task in config.tasks]}
    places |= {name: getattr(config, name) for name in ("widths", "learning_rates", "seeds")}
    for name, values in places.items():
        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"{name} has {twice[0]} twice: each is one row of the table, or one seed of it")
    for name in POSITIVE:
        if (value := getattr(training, name)) < 1:
            raise ConfigError(f"training.{name} must be at least 1, got {value}")
    for name in ("weight_decay", "power"):
        if (value := getattr(training, name)) < 0:
            raise ConfigError(f"training.{name} must be at least 0, got {value}")
    if training.clip <= 0:
        raise ConfigError(f"training.clip must be above 0, got {training.clip}")
    if not 0 < training.stop_accuracy <= 1:
        raise ConfigError(f"training.stop_accuracy must be in (0, 1], got {training.stop_accuracy}")
    if training.embedding_std <= 0:
        raise ConfigError(f"training.embedding_std must be above 0, got {training.embedding_std}")
    if not 0 <= training.warmup_fraction < 1:
        raise ConfigError(f"training.warmup_fraction must be in [0, 1), got {training.warmup_fraction}")
    if bad := [rate for rate in config.learning_rates if rate <= 0]:
        raise ConfigError(f"learning_rates must be above 0, got {bad[0]}")
    for i, task in enumerate(config.tasks):
        _check_task(f"tasks[{i}]", task, training)
    for cell in {(cell.label, cell.width): cell for cell in cells(config)}.values():
        try:
            count_parameters(cell.model_config())  # builds it on the meta device: a size that doesn't fit is found now
        except ConfigError:
            raise
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"models.{cell.label} at width {cell.width}: {error}") from error


def _check_task(key: str, task: TaskConfig, training: TrainingConfig) -> None:
    if not 1 <= task.batch_size <= training.train_examples:
        raise ConfigError(
            f"{key}.batch_size must be from 1 to training.train_examples={training.train_examples}, "
            f"got {task.batch_size}"
        )
    try:
        check_room(task, training.vocab_size)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
