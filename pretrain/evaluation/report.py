"""What came of one model: perplexity.json, its tables and plots."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pretrain.evaluation.figures import draw_perplexity, draw_positions
from pretrain.evaluation.losses import ContextResult, EvaluationError, PositionLoss
from pretrain.evaluation.published import PublishedCurve
from pretrain.report_files import write_files

RESULT = "perplexity.json"
REQUIRED = ("checkpoint", "step", "consumed_tokens", "training_context", "data", "tokenizer")


@dataclass(frozen=True)
class SetResult:
    """What came of a document set; `text_bytes` is what the scored targets are as text."""

    name: str
    documents: int
    text_bytes: int
    contexts: list[ContextResult]
    positions: list[PositionLoss]

    @property
    def title(self) -> str:
        return f"{self.name} ({self.documents:,} documents)"

    @property
    def points(self) -> list[tuple[int, float]]:
        """(context, perplexity), to draw."""
        return [(result.context, result.perplexity) for result in self.contexts]

    def rows(self) -> list[dict[str, float]]:
        """A row per context; `ratio` is its perplexity over the smallest context's."""
        return [
            {
                "context": result.context,
                "perplexity": result.perplexity,
                "loss": result.loss,
                "bits_per_byte": result.bits_per_byte(self.text_bytes),
                "ratio": result.perplexity / self.contexts[0].perplexity,
                "tokens": result.tokens,
            }
            for result in self.contexts
        ]


@dataclass(frozen=True)
class Report:
    """The content of perplexity.json: what the numbers were made of, and the numbers."""

    made_of: dict[str, Any]
    sets: list[SetResult]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises EvaluationError for a file that is none, OSError for one that can't be read."""
        try:
            values = orjson.loads(path.read_bytes())
            sets = [_read_set(described) for described in values.pop("sets")]
            found = {name: values[name] for name in REQUIRED}
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} is no {RESULT} of `python -m pretrain.evaluate`: {error!r}") from error
        return cls(values | found, sets)

    @property
    def name(self) -> str:
        """Of the run, or of the folder for transformers."""
        path = Path(self.made_of["checkpoint"])
        return path.parents[1].name if path.parent.name == "checkpoints" else path.name

    @property
    def title(self) -> str:
        trained = "{step:,} steps, {consumed_tokens:,} tokens".format_map(self.made_of)
        return f"{self.name}: {trained}" if self.made_of["step"] else self.name

    @property
    def training_contexts(self) -> set[int]:
        """The context that it was trained at, as a set of one; none where that isn't known."""
        return {self.made_of["training_context"]} - {None}

    def rows(self) -> list[dict[str, Any]]:
        """All sets' contexts: the lines of perplexity.csv."""
        return [{"documents": found.name} | row for found in self.sets for row in found.rows()]

    def position_rows(self) -> list[dict[str, Any]]:
        """All sets' positions: the lines of positions.csv."""
        return [{"documents": found.name} | asdict(position) for found in self.sets for position in found.positions]

    def to_json(self) -> dict[str, Any]:
        """`made_of`, and a list of `sets`."""
        sets = [
            {"name": s.name, "documents": s.documents, "text_bytes": s.text_bytes}
            | {"contexts": s.rows(), "positions": [asdict(position) for position in s.positions]}
            for s in self.sets
        ]
        return self.made_of | {"sets": sets}

    def write(self, output: Path, references: Sequence[PublishedCurve] = ()) -> list[Path]:
        """Write perplexity.{json,csv,png} and positions.{csv,png}, each whole or not at all; inf and NaN as null."""
        perplexities = {"": {found.title: found.points for found in self.sets}}
        positions = {"": {found.title: found.positions for found in self.sets}}
        contents = {
            RESULT: json_bytes(self.to_json()),
            "perplexity.csv": csv_bytes(self.rows()),
            "perplexity.png": draw_perplexity(perplexities, self.training_contexts, self.title, references),
            "positions.csv": csv_bytes(self.position_rows()),
            "positions.png": draw_positions(positions, self.training_contexts, self.title),
        }
        return write_files(output, contents)

    def show(self, console: Console) -> None:
        """Print the table: ruled on a terminal, bare columns elsewhere."""
        smallest = self.sets[0].contexts[0].context
        table = Table("documents", box=SIMPLE_HEAD if console.is_terminal else None)
        for name in ("context", "perplexity", "loss", "bits/byte", f"ratio to {smallest:,}"):
            table.add_column(name, justify="right")
        for found in self.sets:
            for row in found.rows():
                numbers = (f"{row[key]:.4f}" for key in ("perplexity", "loss", "bits_per_byte", "ratio"))
                table.add_row(found.name, f"{row['context']:,}", *numbers)
            table.add_section()
        console.print(table, highlight=False)


def _read_set(values: Mapping[str, Any]) -> SetResult:
    contexts = [
        ContextResult(row["context"], row["tokens"], number(row["loss"]) * row["tokens"]) for row in values["contexts"]
    ]
    positions = [
        PositionLoss(**row | {name: number(row[name]) for name in ("loss", "standard_error")})
        for row in values.get("positions", ())
    ]
    return SetResult(values["name"], values["documents"], values["text_bytes"], contexts, positions)


def number(value: float | None) -> float:
    return float("nan") if value is None else value  # what JSON has no number for


def json_bytes(values: Any) -> bytes:
    """Indented; inf and NaN as null."""
    return orjson.dumps(values, option=orjson.OPT_INDENT_2)


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """With a header of the first row's keys."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()
