"""Several models' reports in one: a table, and plots with a line for each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pretrain.evaluation.figures import draw_perplexity, draw_positions
from pretrain.evaluation.published import PublishedCurve
from pretrain.evaluation.report import Report, SetResult, csv_bytes, json_bytes
from pretrain.report_files import write_files


def labelled(reports: Sequence[Report]) -> dict[str, Report]:
    """By the shortest of the models' names, their steps too, or their folders' paths that tells them apart."""
    paths = [str(report.made_of["checkpoint"]) for report in reports]
    names = [report.name for report in reports]
    with_steps = [f"{report.name}, step {report.made_of['step']:,}" for report in reports]
    choices = (labels for labels in (names, with_steps, paths) if len(set(labels)) == len(reports))
    numbered = [f"{path} ({i})" for i, path in enumerate(paths, 1)]
    return dict(zip(next(choices, numbered), reports, strict=True))


def differences(reports: Sequence[Report]) -> Iterator[str]:
    """Why perplexities don't stand against each other, if they don't."""
    if len({report.made_of["data"]["digest"] for report in reports}) > 1:
        yield "the models were scored on different data"
    if len({(report.made_of["tokenizer"] or {}).get("sha256") for report in reports}) > 1:
        yield "the tokenizers differ: compare bits per byte, not perplexity per token"
    if len({tuple((s.name, s.contexts[0].tokens) for s in report.sets) for report in reports}) > 1:
        yield "the models were scored on different numbers of tokens"


def write_comparison(
    models: Mapping[str, Report], output: Path, references: Sequence[PublishedCurve] = ()
) -> list[Path]:
    """Write comparison.{json,csv,png} and comparison_positions.png; returns their paths.

    A panel of a plot is a document set, a line in it a model; models that lack a set are left out of its panel.
    """
    reports = list(models.values())
    notes = list(differences(reports))
    by_set = {f"documents: {name}": found for name, found in _by_set(models).items()}
    perplexities = {name: {label: s.points for label, s in found.items()} for name, found in by_set.items()}
    positions = {name: {label: s.positions for label, s in found.items()} for name, found in by_set.items()}
    trained = {context for report in reports for context in report.training_contexts}
    title = "; ".join(notes) or "the same targets for every model"
    values = {
        "notes": notes,
        "models": [{"label": label} | report.to_json() for label, report in models.items()],
        "references": list(_reference_rows(references)),
    }
    contents = {
        "comparison.json": json_bytes(values),
        "comparison.csv": csv_bytes([*_rows(models), *_reference_rows(references)]),
        "comparison.png": draw_perplexity(perplexities, trained, title, references),
        "comparison_positions.png": draw_positions(positions, trained, title),
    }
    return write_files(output, contents)


def _by_set(models: Mapping[str, Report]) -> dict[str, dict[str, SetResult]]:
    """By set's name, by label: in the order in which they come."""
    found: dict[str, dict[str, SetResult]] = {}
    for label, report in models.items():
        for result in report.sets:
            found.setdefault(result.name, {})[label] = result
    return found


def _rows(models: Mapping[str, Report]) -> list[dict[str, Any]]:
    return [{"model": label} | row for label, report in models.items() for row in report.rows()]


def _reference_rows(references: Sequence[PublishedCurve]) -> Iterator[dict[str, Any]]:
    for curve in references:
        for context, perplexity in curve.points:
            yield {"model": curve.title, "context": context, "perplexity": perplexity}


def show_comparison(models: Mapping[str, Report], console: Console) -> None:
    """Print the perplexities, a line a model and a column a context."""
    contexts = sorted({result.context for r in models.values() for s in r.sets for result in s.contexts})
    table = Table("documents", "perplexity at", box=SIMPLE_HEAD if console.is_terminal else None)
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for name, found in _by_set(models).items():
        for label, result in found.items():
            points = dict(result.points)
            numbers = [f"{points[context]:.4f}" if context in points else "" for context in contexts]
            table.add_row(name, label, *numbers)
        table.add_section()
    console.print(table, highlight=False)
    for note in differences(list(models.values())):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
