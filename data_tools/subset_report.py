"""What a subset was made of and what was left out, for people: `report.json`, and the table that the command prints.

Unlike `dataset.json` it names the inputs, so it differs where they are laid out differently.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.documents import open_documents
from data_tools.duplicates import RECORD, UNIQUE
from data_tools.files import write_durably
from data_tools.selection import Selection, SourceChoice
from data_tools.shards import Counts, ShardError, first_problem
from data_tools.shuffle import RUN_ROW
from data_tools.spans import Span
from data_tools.subset_plan import PlanRecord

NAME = "report.json"
HEADINGS = (
    *("source", "unique documents", "tokens", "share", "quota", "taken documents", "tokens", "shards"),
    *("duplicate documents", "tokens", "excluded documents", "tokens"),
)
INDEX_BYTES = 20  # of a shard's .idx, a document


@dataclass(frozen=True)
class Location:
    """A document: its input file (of a merged shard the `.bin`), its number in that from 0, and its line from 1."""

    file: str
    document: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}, document {self.document} (line {self.line})"


@dataclass(frozen=True)
class Example:
    """A document that was left out, and the equal one for which it was."""

    dropped: Location
    equals: Location


@dataclass(frozen=True)
class Report:
    """The plan, what came of it for each source, and examples of documents that were left out."""

    plan: PlanRecord
    digest: str
    excluded: str | None
    sources: list[SourceChoice]
    duplicates: list[Example]
    overlap: list[Example]

    @classmethod
    def of(cls, plan: PlanRecord, selection: Selection, groups: Sequence[list[Span]]) -> Self:
        """Of a selection among the groups' documents."""
        spans = [span for group in groups for span in group]
        starts = [span.number for span in spans]

        def location(number: int) -> Location:
            span = spans[bisect_right(starts, number) - 1]
            row = span.first + number - span.number
            return Location(span.piece.source, row, int(open_documents(span.piece.documents)["line"][row]))

        duplicates, overlap = (
            [Example(location(dropped), location(equal)) for dropped, equal in pairs]
            for pairs in (selection.duplicates, selection.overlap)
        )
        return cls(plan, selection.digest, selection.excluded, selection.sources, duplicates, overlap)

    def write(self, folder: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_durably(folder / NAME, orjson.dumps(self, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What was written; ShardError where it is missing or broken."""
        path = folder / NAME
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ShardError(f"{path} is missing") from error
        except ValidationError as error:
            raise ShardError(f"{path}: {first_problem(error)}") from error

    @property
    def taken(self) -> Counts:
        """Of all sources."""
        return sum((source.taken for source in self.sources), start=Counts())

    def table(self) -> list[str]:
        """A line for each source, and one for all, under a line of headings."""
        rows = [_row(source) for source in self.sources]
        total = [sum(column) for column in zip(*(row[1:] for row in rows), strict=True)]
        cells = [list(HEADINGS), *([_cell(value) for value in row] for row in [*rows, ["all", *total]])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return ["  ".join(map(str.rjust, row, widths)) for row in cells]

    def disk_bytes(self, itemsize: int) -> int:
        """The most that is on the disk at once beside the inputs: runs and shards, or the work of choosing."""
        documents = sum(corpus.documents for corpus in [*self.plan.inputs, *self.plan.excluded])
        taken = self.taken
        shuffling = 2 * taken.tokens * itemsize + taken.documents * (RUN_ROW.itemsize + INDEX_BYTES)
        return max(shuffling, documents * (RECORD.itemsize + UNIQUE.itemsize))


def _row(source: SourceChoice) -> list[str | int | float]:
    unique, taken, duplicates, overlap = source.unique, source.taken, source.duplicates, source.overlap
    return [
        source.name,
        *(unique.documents, unique.tokens),
        source.share,
        source.quota,
        *(taken.documents, taken.tokens),
        len(source.shards),
        *(duplicates.documents, duplicates.tokens),
        *(overlap.documents, overlap.tokens),
    ]


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.2%}"
