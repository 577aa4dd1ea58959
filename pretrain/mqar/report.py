"""What a grid came to: for each model, task and width the best learning rate, as a table, JSON and a plot."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from matplotlib.figure import Figure

from pretrain.mqar.config import Cell
from pretrain.mqar.train import CellResult
from pretrain.report_files import png_bytes, write_files


@dataclass(frozen=True)
class Row:
    """One model at one task and width, at the learning rate that was best there on average over the seeds."""

    label: str
    seqlen: int
    pairs: int
    width: int
    learning_rate: float
    accuracies: list[float]  # by seed
    epochs: float  # mean over the seeds
    parameters: int
    state_numbers: int

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Between the best and the worst seed."""
        return max(self.accuracies) - min(self.accuracies)


def summarize(results: Iterable[tuple[Cell, CellResult]]) -> list[Row]:
    """Rows in the order in which their cells first come. Rates that not all seeds were trained at lose to others."""
    by_place: dict[tuple[str, int, int, int], dict[float, list[CellResult]]] = {}
    for cell, result in results:
        place = (cell.label, cell.task.seqlen, cell.task.pairs, cell.width)
        by_place.setdefault(place, {}).setdefault(cell.learning_rate, []).append(result)
    rows = []
    for (label, seqlen, pairs, width), by_rate in by_place.items():
        rate, best = max(by_rate.items(), key=lambda item: (len(item[1]), statistics.fmean(_accuracies(item[1]))))
        rows.append(
            Row(
                *(label, seqlen, pairs, width, rate),
                accuracies=_accuracies(best),
                epochs=statistics.fmean(result.epochs for result in best),
                parameters=best[0].parameters,
                state_numbers=best[0].state_numbers,
            )
        )
    return rows


def _accuracies(results: Sequence[CellResult]) -> list[float]:
    return [result.accuracy for result in results]


def write_report(
    output: Path, results: Sequence[tuple[Cell, CellResult]], cells: int, provenance: dict[str, Any]
) -> list[Path]:
    """results.json (every cell), table.md and accuracy.png; returns their paths. `cells`: how many the grid has."""
    rows = summarize(results)
    everything = {
        "provenance": provenance,
        "trained_by": sorted({f"{result.commit} on {result.hardware}" for _, result in results}),
        "cells": cells,
        "rows": [asdict(row) for row in rows],
        "results": [asdict(result) for _, result in results],
    }
    contents = {
        "results.json": orjson.dumps(everything, option=orjson.OPT_INDENT_2),
        "table.md": table(rows, len(results), cells).encode(),
        "accuracy.png": draw(rows),
    }
    return write_files(output, contents)


def table(rows: Sequence[Row], done: int, cells: int) -> str:
    """Markdown: a line for each model and width of a task, and one above that says what it holds."""
    seeds = max((len(row.accuracies) for row in rows), default=0)
    lines = [
        f"{done} of {cells} cells. Accuracy at the best learning rate, mean of {seeds} seed{'s' * (seeds != 1)} "
        "(± half of what lies between the best and the worst); state: numbers that a sequence leaves in all layers.",
        "",
        "| tokens | pairs | width | model | accuracy | lr | epochs | parameters | state |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row.seqlen, row.pairs, row.width)):  # stable: models keep their order
        spread = f" ± {row.spread / 2:.3f}" if len(row.accuracies) > 1 else ""
        lines.append(
            f"| {row.seqlen} | {row.pairs} | {row.width} | {row.label} | {row.accuracy:.3f}{spread} "
            f"| {row.learning_rate:g} | {row.epochs:.1f} | {row.parameters:,} | {row.state_numbers:,} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy over width, a panel for each task, a line for each model, a bar from worst to best seed."""
    tasks = sorted({(row.seqlen, row.pairs) for row in rows})
    figure = Figure(figsize=(3.2 * len(tasks) + 1.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        here = [row for row in rows if (row.seqlen, row.pairs) == task]
        for label in dict.fromkeys(row.label for row in rows):
            _line(axes, label, sorted((row for row in here if row.label == label), key=lambda row: row.width))
        widths = sorted({row.width for row in here})
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, labels=map(str, widths))
        axes.minorticks_off()
        axes.set(title=f"{task[0]} tokens, {task[1]} pairs", xlabel="width (d_model)", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend()
    return png_bytes(figure)


def _line(axes: Any, label: str, rows: Sequence[Row]) -> None:
    means = [row.accuracy for row in rows]
    below = [row.accuracy - min(row.accuracies) for row in rows]
    above = [max(row.accuracies) - row.accuracy for row in rows]
    axes.errorbar([row.width for row in rows], means, yerr=[below, above], marker="o", capsize=3, label=label)
