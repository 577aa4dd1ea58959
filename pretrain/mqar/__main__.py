"""Command: multi-query associative recall over a grid of models, tasks and widths.

    python -m pretrain.mqar launch/configs/mqar_cpu.yaml
    python -m pretrain.mqar launch/configs/mqar_paper.yaml --device cuda widths=[64,128] output=runs/mqar-small

Trains each cell of the grid by itself and keeps its result under OUTPUT/cells: the same command goes on where it was
stopped. Then, or when stopped, writes OUTPUT/results.json, table.md and accuracy.png.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kernels.benchmarks.record import provenance
from pretrain.config import ConfigError
from pretrain.mqar.config import Cell, MqarConfig, cells, load_grid
from pretrain.mqar.grid import CellFailed, read_result, train_cells
from pretrain.mqar.report import write_report
from pretrain.mqar.train import CellResult
from pretrain.say import say


class Progress:
    """A line for each finished cell, with the time that the rest may take: at most, as training may stop early."""

    def __init__(self, found: int, waiting: Sequence[Cell]) -> None:
        self._done, self._cells = found, found + len(waiting)
        self._left, self._trained, self._start = sum(cell.cost for cell in waiting), 0.0, time.monotonic()

    def advance(self, cell: Cell, result: CellResult) -> None:
        self._done += 1
        self._left -= cell.cost
        self._trained += cell.cost
        left = (time.monotonic() - self._start) * self._left / self._trained
        end = "diverged" if result.diverged else f"{result.epochs} epoch{'s' * (result.epochs != 1)}"
        say(
            f"[{self._done}/{self._cells}] {cell.title}: accuracy {result.accuracy:.3f}, {end}, "
            f"{result.seconds:.0f} s; {_duration(left)} left"
        )


def run(config: MqarConfig, device: str, workers: int) -> list[Path]:
    """Train what no earlier run has, then report; returns the report's files."""
    output, grid = Path(config.output), cells(config)
    made_of = provenance(torch.device(device)) | {"config": asdict(config)}
    found = {cell.key: result for cell in grid if (result := read_result(output, cell))}
    waiting = [cell for cell in grid if cell.key not in found]
    say(f"{len(grid)} cells, {len(found)} of them trained earlier; results in {output}")
    progress = Progress(len(found), waiting)

    def on_done(cell: Cell, result: CellResult) -> None:
        found[cell.key] = result
        progress.advance(cell, result)

    try:
        train_cells(waiting, output, device, workers, on_done)
    finally:
        done = [(cell, found[cell.key]) for cell in grid if cell.key in found]
        written = write_report(output, done, len(grid), made_of) if done else []
    return written


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.mqar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, like launch/configs/mqar_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time: %(default)s")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: %(default)s")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.workers < 1:
        parser.error("--workers must be at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 with the reason on stderr, or 130 after Ctrl-C."""
    parsed = _arguments(arguments)
    try:
        for path in run(load_grid(parsed.config, parsed.overrides), parsed.device, parsed.workers):
            say(str(path))
    except (ConfigError, CellFailed, OSError, ValueError) as error:
        say(f"error: {error}", problem=True)
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on", problem=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
