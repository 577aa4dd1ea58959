"""The trainings and evaluations of a comparison: their commands, their folders, and what is done of them."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from data_tools.dataset import open_dataset
from pretrain import checkpoint
from pretrain.compare.config import Comparison
from pretrain.compare.curves import Curve, read_curve
from pretrain.compare.pool import Task, TaskFailed
from pretrain.config import Config, ConfigError, config_to_dict, flattened, load_config
from pretrain.evaluation.losses import EvaluationError
from pretrain.evaluation.report import RESULT, Report
from pretrain.evaluation.source import fingerprint
from pretrain.status import read_status

DIVERGED = "not_finite"  # status.json's word for a run whose losses stayed without a finite value
# What a run is made of: a finished one whose config differs here is another comparison's.
IDENTITY = (
    *("model", "data", "optim", "eval"),
    *("train.total_tokens", "train.global_batch_size", "train.seed", "train.precision"),
)


@dataclass(frozen=True)
class Run:
    """One training: `name` is its folder under the comparison's; `file` and `overrides` give its config."""

    name: str
    model: str
    lr: float
    seed: int
    file: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def tokens(self) -> int:
        """Trained on: whole steps."""
        return self.config.total_steps * self.config.tokens_per_step

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists()

    @property
    def diverged(self) -> bool:
        return not self.done and read_status(self.folder).get("reason") == DIVERGED

    def curve(self) -> Curve:
        """Raises TaskFailed where a validation loss is not finite: nothing can be compared with that."""
        curve = read_curve(self.folder, self.config.tokens_per_step)
        if not all(map(math.isfinite, curve.losses)):
            raise TaskFailed(f"{self.folder}: a validation loss is not finite (see its metrics.jsonl)")
        return curve

    def progress(self) -> float:
        """Part of its steps that a running training has done, by the last whole line of its metrics."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().split(b"\n")[:-1]
            return min(1.0, orjson.loads(lines[-1])["step"] / self.config.total_steps)
        except (OSError, IndexError, orjson.JSONDecodeError):
            return 0.0

    def failure(self) -> str:
        """Why a training that ended is not done, in status.json's words."""
        if (self.folder / "STOP").exists():
            return f"it was stopped; to go on, remove {self.folder / 'STOP'}"
        status = read_status(self.folder)
        return f"{status.get('reason', 'no status')}: {status.get('detail') or 'no more is known'}"


def grid_runs(comparison: Comparison) -> list[Run]:
    """Short trainings: each model at each learning rate, with the first seed."""
    config = comparison.config
    return [
        _run(comparison, f"runs/lr/{model}/{lr:g}", model, lr, config.seeds[0], config.lr_tokens, validations=1)
        for model in comparison.bases
        for lr in config.learning_rates
    ]


def full_runs(comparison: Comparison, rates: Mapping[str, float]) -> list[Run]:
    """The trainings that are compared: each model at its rate, with each seed."""
    config = comparison.config
    return [
        _run(
            comparison,
            f"runs/full/{model}/seed_{seed}",
            model,
            rates[model],
            seed,
            config.total_tokens,
            config.validations,
        )
        for seed in config.seeds
        for model in comparison.bases
    ]


def _run(comparison: Comparison, name: str, model: str, lr: float, seed: int, tokens: int, validations: int) -> Run:
    base = comparison.bases[model]
    file, overrides = comparison.training_config(model)
    steps = -(-tokens // base.tokens_per_step)
    overrides = [
        *overrides,
        f"run_dir={comparison.run_dir / name}",
        f"train.total_tokens={tokens}",
        f"train.seed={seed}",
        f"optim.lr={lr!r}",
        f"optim.min_lr={lr * base.optim.min_lr / base.optim.lr!r}",
        f"eval.interval={max(1, steps // validations)}",
        "log.wandb=disabled",
    ]
    return Run(name, model, lr, seed, file, tuple(overrides), load_config(file, overrides))


def choose_rates(runs: list[Run]) -> dict[str, float]:
    """By model, the learning rate with the lowest final validation loss of the grid.

    Raises ConfigError for a model that diverged at every rate.
    """
    found: dict[str, dict[float, float]] = {}
    for run in runs:
        found.setdefault(run.model, {})[run.lr] = grid_loss(run)
    for model, losses in found.items():
        if not math.isfinite(min(losses.values())):
            raise ConfigError(f"learning_rates: {model} diverged at each of {list(losses)}; take lower ones")
    return {model: min(losses, key=losses.__getitem__) for model, losses in found.items()}


def grid_loss(run: Run) -> float:
    """The final validation loss; infinite for a training that diverged."""
    return math.inf if run.diverged else read_curve(run.folder, run.config.tokens_per_step).final


def at_edge(rate: float, rates: list[float]) -> bool:
    """Whether a better rate may lie outside the grid."""
    return rate in (min(rates), max(rates))


def training_task(run: Run, comparison: Comparison, seconds: float) -> Task:
    """`seconds`: how long it takes alone, about. A training of the grid may diverge: that is a result."""
    gpus, grid = comparison.config.gpus_per_run, run.name.startswith("runs/lr/")
    launcher = ("torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "-m") if gpus > 1 else ()
    return Task(
        name=run.name,
        command=(sys.executable, "-m", *launcher, "pretrain.train", run.file, *run.overrides),
        log=comparison.run_dir / "logs" / f"{run.name.replace('/', '-')}.log",
        seconds=seconds,
        complete=lambda: run.done or (grid and run.diverged),
        progress=run.progress,
        failure=run.failure,
    )


def evaluation_folder(run: Run, comparison: Comparison) -> Path:
    return comparison.run_dir / "evaluation" / run.name.removeprefix("runs/full/")


def evaluation_task(run: Run, comparison: Comparison, seconds: float) -> Task:
    """Perplexity of a finished full training at each context."""
    config, folder = comparison.config, evaluation_folder(run, comparison)
    options = ["--data", run.config.data.valid, "--contexts", ",".join(map(str, sorted(config.contexts)))]
    if config.evaluated_tokens is not None:
        options += ["--max-tokens", str(config.evaluated_tokens)]
    log = comparison.run_dir / "logs" / f"evaluate-{run.name.replace('/', '-')}.log"
    return Task(
        name=f"evaluation of {run.name}",
        command=(sys.executable, "-m", "pretrain.evaluate", str(run.folder), *options, "--output", str(folder)),
        log=log,
        seconds=seconds,
        complete=lambda: _evaluated(folder / RESULT, run, comparison),
        progress=lambda: 0.0,
        failure=lambda: "see its log",
    )


def _evaluated(path: Path, run: Run, comparison: Comparison) -> bool:
    """Whether the file is of these very weights, these contexts and this data."""
    try:
        found = Report.read(path)
    except (FileNotFoundError, EvaluationError):
        return False
    config, made_of = comparison.config, found.made_of
    contexts = [result.context for result in found.sets[0].contexts]
    same = contexts == sorted(config.contexts) and made_of["max_tokens"] == config.evaluated_tokens
    digest = open_dataset(run.config.data.valid).digest
    weights = fingerprint(checkpoint.resolve(run.folder))
    return same and made_of["fingerprint"] == weights and made_of["data"]["digest"] == digest


def check_leftovers(runs: list[Run]) -> None:
    """Raise ConfigError for a folder that holds a training of another config, or of other data."""
    for run in runs:
        saved = run.folder / "config.yaml"
        if not saved.exists():
            continue
        if changed := _changed(config_to_dict(load_config(saved)), config_to_dict(run.config)):
            raise ConfigError(
                f"{run.folder} was trained with another config ({changed}); set another run_dir, or remove that folder"
            )
        newest = checkpoint.newest(run.folder)
        trained_on = newest and checkpoint.read_manifest(newest).identity["data"]["train_digest"]
        if trained_on and trained_on != open_dataset(run.config.data.train).digest:
            raise ConfigError(
                f"{run.folder} was trained on other data than {run.config.data.train} has now; set another run_dir, "
                "or remove that folder"
            )


def _changed(saved: dict[str, object], now: dict[str, object]) -> str:
    """The first key of IDENTITY that differs, as "key: saved, now value"; "" where none does."""
    before, after = flattened(saved), flattened(now)
    for key in sorted(before.keys() | after.keys()):
        if key.startswith(IDENTITY) and before.get(key) != after.get(key):
            return f"{key}: {before.get(key)}, now {after.get(key)}"
    return ""
