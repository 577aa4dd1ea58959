"""Command: train several models on the same data in the same order, and write one report on them.

    python -m pretrain.compare launch/configs/compare_demo.yaml --plan     what will be run, and nothing else
    python -m pretrain.compare launch/configs/compare_demo.yaml [key=value …]

Speeds are measured side by side, then each model is trained briefly at each learning rate, then fully at its best
rate with each seed, then evaluated at each context. What is done is kept: the same command goes on after Ctrl-C or
a kill, and only writes the report where all is done.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_tools.dataset import Dataset, open_dataset
from data_tools.files import write_durably
from data_tools.shards import ShardError
from kernels.benchmarks.record import hardware_name, provenance
from pretrain.checkpoint import CheckpointError
from pretrain.compare.config import Comparison, load_comparison
from pretrain.compare.pool import Pool, TaskFailed
from pretrain.compare.report import sentence, write_report
from pretrain.compare.results import collect
from pretrain.compare.runs import (
    Run,
    check_leftovers,
    choose_rates,
    evaluation_task,
    full_runs,
    grid_runs,
    training_task,
)
from pretrain.compare.speed import measured_speeds
from pretrain.config import ConfigError
from pretrain.flops import flops_per_token
from pretrain.plan import PlanOptions
from pretrain.say import say

FORWARD = 1 / 3  # of a training step's time
START = 15.0  # seconds until a command is at work
DOCUMENT_SETS = 2  # all, and the long ones


class Work:
    """A comparison under way."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.device = torch.device("cuda" if comparison.config.gpus_per_run else "cpu")
        self.valid = self._checked_data()
        self.speeds: dict[str, Any] = {}
        self._elapsed = comparison.run_dir / "elapsed.json"

    @property
    def elapsed(self) -> float:
        """Seconds that the trainings and evaluations have taken, all sessions together."""
        return orjson.loads(self._elapsed.read_bytes())["seconds"] if self._elapsed.exists() else 0.0

    def run(self, command: str) -> list[Path]:
        """All of it; returns the report's files, report.md first."""
        comparison, grid = self.comparison, grid_runs(self.comparison)
        check_leftovers(grid)
        made_by = provenance(self.device)
        comparison.run_dir.mkdir(parents=True, exist_ok=True)
        self._hold_to_data()
        self.speeds = measured_speeds(comparison.run_dir / "speed.json", comparison.bases, self.device)
        pool = Pool(self._environments(), self._tick)
        rates = dict.fromkeys(
            comparison.bases, comparison.config.learning_rates[0]
        )  # not chosen yet: they take as long
        full_seconds = sum(self._training_seconds(run) for run in full_runs(comparison, rates))
        evaluations = sum(self._evaluation_seconds(run) for run in full_runs(comparison, rates))
        tasks = [training_task(run, comparison, self._training_seconds(run)) for run in grid]
        say(f"learning rates: {len(tasks)} trainings of {comparison.config.lr_tokens:,} tokens")
        pool.run(tasks, full_seconds + evaluations)
        rates = choose_rates(grid)
        for name, rate in rates.items():
            say(f"{name}: learning rate {rate:g}")
        full = full_runs(comparison, rates)
        check_leftovers(full)
        say(f"{len(full)} trainings of {comparison.config.total_tokens:,} tokens")
        pool.run([training_task(run, comparison, self._training_seconds(run)) for run in full], evaluations)
        say(f"{len(full)} evaluations")
        pool.run([evaluation_task(run, comparison, self._evaluation_seconds(run)) for run in full], 0.0)
        results = collect(comparison, grid, full, self.speeds)
        for pair in results.pairs:
            say(sentence(pair, results).replace("**", ""))
        return write_report(comparison, results, self._made_of(made_by, command))

    def _checked_data(self) -> Dataset:
        """The validation data. Raises ShardError or ConfigError for data that the last of all steps could not use."""
        data, largest = self.comparison.base.data, max(self.comparison.config.contexts)
        open_dataset(data.train)
        valid = open_dataset(data.valid)
        if valid.tokens <= largest:
            raise ConfigError(
                f"contexts: {data.valid} has {valid.tokens:,} tokens, too few for a context of {largest:,}"
            )
        return valid

    def _hold_to_data(self) -> None:
        """Raise ConfigError where losses measured so far are of other validation data; note which data it is."""
        note = self.comparison.run_dir / "validation.json"
        if not note.exists():
            write_durably(note, orjson.dumps({"digest": self.valid.digest}))
        elif orjson.loads(note.read_bytes())["digest"] != self.valid.digest:
            raise ConfigError(
                f"{self.comparison.run_dir} measured its losses on other data than {self.comparison.base.data.valid} "
                "has now; set another run_dir, or remove that folder"
            )

    def _environments(self) -> list[dict[str, str]]:
        """Each worker's own GPUs, or none."""
        config = self.comparison.config
        if not config.gpus_per_run:
            threads = str(self.comparison.base.train.threads or 1)
            own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
            return [own] * config.workers
        wanted, found = config.workers * config.gpus_per_run, torch.cuda.device_count()
        if found < wanted:
            raise ConfigError(
                f"workers={config.workers} × gpus_per_run={config.gpus_per_run} are {wanted} GPUs; {found} are here"
            )
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",") if given else [str(number) for number in range(found)]
        firsts = range(0, wanted, config.gpus_per_run)
        return [{"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + config.gpus_per_run])} for first in firsts]

    def _speed(self, model: str) -> float:
        return self.speeds["models"][model]["tokens_per_second"] * max(1, self.comparison.config.gpus_per_run)

    def _training_seconds(self, run: Run) -> float:
        validated = run.config.total_steps / run.config.eval.interval * min(run.config.eval.tokens, self.valid.tokens)
        return START + (run.tokens + FORWARD * validated) / self._speed(run.model)

    def _evaluation_seconds(self, run: Run) -> float:
        config = self.comparison.config
        tokens = min(config.evaluated_tokens or self.valid.tokens, self.valid.tokens)
        one_gpu = self.speeds["models"][run.model]["tokens_per_second"]
        return START + DOCUMENT_SETS * tokens * len(config.contexts) * FORWARD / one_gpu

    def _tick(self, seconds: float) -> None:
        write_durably(self._elapsed, orjson.dumps({"seconds": self.elapsed + seconds}))

    def _made_of(self, made_by: dict[str, Any], command: str) -> dict[str, Any]:
        speed = {key: value for key, value in self.speeds.items() if key != "models"}
        return made_by | {
            "command": command,
            "device_name": hardware_name(self.device),
            "speed": speed,
            "valid_digest": self.valid.digest,
            "elapsed_seconds": self.elapsed,
        }


def show_plan(comparison: Comparison, console: Console) -> None:
    """Print every model's size, and how many runs of how many tokens there are."""
    config, seqlen = comparison.config, comparison.base.data.seqlen
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None)
    for column in ("model", "mixer", "layers × width", "d_ff", "parameters", "FLOPs/token"):
        table.add_column(column, justify="left" if column in ("model", "mixer") else "right")
    tokens = len(config.learning_rates) * config.lr_tokens + len(config.seeds) * config.total_tokens
    total = 0.0
    for name, base in comparison.bases.items():
        model, flops = base.model, flops_per_token(base.model, seqlen)
        total += tokens * flops
        shape, parameters = f"{model.n_layer} × {model.d_model}", f"{comparison.parameters[name]:,}"
        table.add_row(name, model.mixer.name, shape, f"{model.d_ff:,}", parameters, f"{flops / 1e6:,.1f}M")
    console.print(table, highlight=False)
    count = len(comparison.bases)
    grid, full = count * len(config.learning_rates), count * len(config.seeds)
    where = f"with {config.gpus_per_run} GPU(s) each" if config.gpus_per_run else "on the CPU"
    lines = [
        f"{grid:>3} trainings of {config.lr_tokens:,} tokens: learning rates {config.learning_rates}",
        f"{full:>3} trainings of {config.total_tokens:,} tokens: seeds {config.seeds}",
        f"{full:>3} evaluations at contexts {sorted(config.contexts)}",
        f"{count * tokens:,} tokens, {total:.3g} FLOPs in all, {config.workers} training(s) at a time, {where}",
    ]
    if config.gpus_per_run:
        gpu = PlanOptions()
        hours = total / (gpu.peak_tflops * 1e12 * gpu.mfu) / 3600
        each = hours / config.workers / config.gpus_per_run
        reached = f"{gpu.mfu:.0%} of {gpu.peak_tflops:g} TFLOP/s"
        lines.append(f"{hours:,.0f} GPU hours, {each:,.1f} hours on all, if the GPUs reach {reached}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a run failed; 2 for what can't run; 130 where it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, like launch/configs/compare_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like workers=4 seeds=[1,2,3]")
    parser.add_argument("--plan", action="store_true", help="check it all, print what would be run, and end")
    parsed = parser.parse_intermixed_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        comparison = load_comparison(parsed.config, parsed.overrides)
        show_plan(comparison, Console())
        if not parsed.plan:
            command = shlex.join(["python", "-m", "pretrain.compare", parsed.config, *parsed.overrides])
            written = Work(comparison).run(command)
            say(f"report: {written[0]}\n" + "\n".join(f"        {path}" for path in written[1:]))
    except (ConfigError, ShardError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TaskFailed, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
