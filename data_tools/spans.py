"""All documents of several corpora under consecutive numbers, cut into groups that one process can hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.corpus import Piece
from data_tools.documents import MOST_SETS, open_documents
from data_tools.shards import ShardError

EXCLUDED = 0  # the source of the documents that are only there to be left out; it sorts before all others


@dataclass(frozen=True)
class Span:
    """Consecutive documents of a piece.

    `number` is the first one's among all documents; `sources` gives for each of the piece's sets its source's number.
    """

    piece: Piece
    first: int
    count: int
    number: int
    sources: tuple[int, ...]

    def rows(self) -> np.ndarray:
        """The span's part of the document table; ShardError for a table that is not the piece's."""
        table = open_documents(self.piece.documents)
        rows = np.array(table[self.first : self.first + self.count])
        if len(table) != self.piece.document_count or (len(rows) and rows["set"].max() >= len(self.sources)):
            raise ShardError(
                f"{self.piece.documents}: not the table of {self.piece.bin}; run data_tools.tokenize again"
            )
        return rows

    def source_numbers(self, rows: np.ndarray) -> np.ndarray:
        """The source of each row, (rows,) uint16."""
        return np.array(self.sources, np.uint16)[rows["set"]]


def source_names(pieces: Iterable[Piece]) -> list[str]:
    """The pieces' sets, sorted: the sources, whose numbers count from 1."""
    names = sorted({name for piece in pieces for name in piece.set_names})
    if len(names) > MOST_SETS:
        raise ShardError(f"{len(names)} sources, and there may be {MOST_SETS}; is redpajama_set_name a name of sets?")
    return names


def cut_groups(pieces: Sequence[Piece], names: list[str] | None, size: int, number: int = 0) -> list[list[Span]]:
    """The pieces' documents in groups of up to `size`.

    Args:
        names: the sources; None for documents to exclude.
        number: of the first document.
    """
    numbers = {name: place for place, name in enumerate(names or [], 1)}
    groups: list[list[Span]] = []
    room = 0
    for piece in pieces:
        sources = tuple(EXCLUDED if names is None else numbers[name] for name in piece.set_names)
        first = 0
        while first < piece.document_count:
            if not room:
                groups.append([])
                room = size
            count = min(room, piece.document_count - first)
            groups[-1].append(Span(piece, first, count, number, sources))
            first, number, room = first + count, number + count, room - count
    return groups
