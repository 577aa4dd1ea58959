"""Command: show what a token shard or dataset holds, and check it against its manifest."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data_tools.contents import Contents, Kind, ShardView, open_contents
from data_tools.files import write_durably
from data_tools.histograms import MARKS, amount, draw, short_number
from data_tools.shards import ShardError
from data_tools.statistics import Lengths, Place, Survey, rank_frequencies, survey
from data_tools.tokenizer import Tokenizer
from data_tools.verify import verify

SAMPLE_TOKENS = 100
FIRST_TOKENS = 40
FIRST_CHARACTERS = 60
SCANNED_ROWS = 1 << 20
LENGTHS_LEGEND = "lengths in tokens, EOS included; of long documents: tokens, their share of the source's, documents"
FILE_WIDTH = 120  # of tables that go to no terminal
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what documents hold could steer a terminal


def summary(contents: Contents, lengths: Lengths) -> list[str]:
    """Lines on all of it."""
    tokenizer = contents.tokenizer
    known = "unknown (name it with --tokenizer)"
    if tokenizer:
        known = (
            f"{tokenizer.name}: {tokenizer.vocab_size} pieces, EOS {tokenizer.eos_id}, "
            f"BOS {tokenizer.bos_id}, sha256 {tokenizer.sha256}"
        )
    shards = f"{len(contents.shards):,} shards" if contents.kind is Kind.DATASET else "one shard"
    return [
        f"{lengths.documents:,} documents, {lengths.tokens:,} tokens ({contents.dtype.name}), {shards}",
        f"tokenizer {known}",
        *contents.notes,
    ]


def sources_table(contents: Contents, survey: Survey) -> Table:
    """Documents, tokens and, where known, text of each source, and of all."""
    columns = ["documents", "tokens", "share"] + (["text MB", "B/token"] if contents.text_bytes else [])
    table = _table("source", *columns)
    texts = [*contents.text_bytes, sum(contents.text_bytes)] if contents.text_bytes else None
    for row, (name, lengths) in enumerate(_rows(contents, survey)):
        cells = [f"{lengths.documents:,}", f"{lengths.tokens:,}", f"{_share(lengths.tokens, survey.total.tokens):.1%}"]
        if texts:
            cells += [f"{texts[row] / 1e6:,.2f}", f"{_share(texts[row], lengths.tokens):.2f}"]
        table.add_row(name, *cells)
    return table


def lengths_table(contents: Contents, survey: Survey) -> Table:
    """How long the documents are, and what is in long ones: tokens, their share, and documents."""
    table = _table("source", "median", "longest", *(f"in documents ≥ {short_number(mark)}" for mark in MARKS))
    for name, lengths in _rows(contents, survey):
        cells = []
        for mark in MARKS:
            long = lengths.at_least(mark)
            share = _share(long.tokens, lengths.tokens)
            cells.append(f"{amount(long.tokens)} {share:6.1%} {amount(long.documents):>6}")
        table.add_row(name, f"{lengths.median:,}", f"{lengths.longest:,}", *cells)
    return table


def longest_lines(contents: Contents, places: list[Place]) -> list[str]:
    """Where the longest documents are, and how they begin."""
    lines, origins = ["the longest documents:"], Origins(contents)
    for place in places:
        ids = place.shard.read(place.document, min(place.tokens, FIRST_TOKENS))
        begins = " ".join(_text(contents.tokenizer, ids).split())[:FIRST_CHARACTERS]
        found = (f"{place.shard.name}, document {place.document:,}", *origins.of(place.shard, place.document))
        lines.append(f"{place.tokens:>14,}  {contents.source_names[place.source]}: {', '.join(found)}")
        lines.append(f"{'':14}  {begins}")
    return lines


class Origins:
    """The lines that documents of a shard of ours had, and their input files where these can be told.

    A shard's documents lie in the order of its input files, and each file begins anew at a low line. If lines fall as
    often as there are files, less one, they fall at each file's beginning.
    """

    def __init__(self, contents: Contents) -> None:
        self._files = contents.input_files
        self._falls = np.concatenate(
            [np.empty(0, np.int64), *(falls for shard in contents.shards for falls in _falls(shard))]
        )

    def of(self, shard: ShardView, document: int) -> list[str]:
        """`line N`, or `line N of FILE`; nothing where the shard has no document table."""
        if shard.table is None:
            return []
        line = f"line {shard.table['line'][document]}"
        if len(self._falls) + 1 != len(self._files):
            return [line]
        return [f"{line} of {self._files[np.searchsorted(self._falls, document, side='right')]}"]


def _falls(shard: ShardView) -> Iterator[np.ndarray]:
    """Documents with no higher line than the one before."""
    if shard.table is None:
        return
    for first in range(0, len(shard) - 1, SCANNED_ROWS):
        lines = np.array(shard.table["line"][first : first + SCANNED_ROWS + 1])
        yield first + 1 + np.flatnonzero(lines[1:] <= lines[:-1])


def show_samples(contents: Contents, documents: int, samples: int, console: Console) -> None:
    """The starts of some documents, spread over all."""
    for number in np.linspace(0, documents - 1, min(samples, documents), dtype=np.int64).tolist():
        shard, document = contents.locate(number)
        chunk = shard.chunk(document, document + 1)
        length, source = int(chunk.lengths[0]), contents.source_names[int(chunk.sources[0])]
        ids = shard.read(document, min(length, SAMPLE_TOKENS))
        console.rule(f"{shard.name}, document {document} ({source}): the first {len(ids)} of {length} tokens")
        console.print(_text(contents.tokenizer, ids), soft_wrap=True)


def _text(tokenizer: Tokenizer | None, ids: np.ndarray) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    if len(ids) and not (ids.min() >= 0 and ids.max() < tokenizer.vocab_size):
        raise ShardError(f"token id {ids.max()} is outside the tokenizer's {tokenizer.vocab_size} pieces; name another")
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", tokenizer.decode(ids.tolist()))


def _table(*columns: str) -> Table:
    table = Table(*columns, box=SIMPLE, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _rows(contents: Contents, survey: Survey) -> list[tuple[str, Lengths]]:
    rows = [*zip(contents.source_names, survey.lengths, strict=True)]
    return rows if len(rows) == 1 else [*rows, ("all", survey.total)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def inspect(contents: Contents, samples: int, longest: int, console: Console) -> Survey:
    """Print everything but the picture; returns what was found of the lengths."""
    found = survey(contents, longest)
    total = found.total
    console.print(*summary(contents, total), sep="\n", soft_wrap=True)
    console.print(sources_table(contents, found), lengths_table(contents, found))
    console.print(LENGTHS_LEGEND, "", sep="\n", soft_wrap=True)
    if found.longest:
        console.print(*longest_lines(contents, found.longest), sep="\n", soft_wrap=True)
    show_samples(contents, total.documents, samples, console)
    return found


def plot(contents: Contents, found: Survey, path: Path) -> None:
    """Write the picture."""
    documents, tokens = found.total.documents, found.total.tokens
    title = f"{Path(contents.path).name}: {amount(documents)} documents, {amount(tokens)} tokens"
    write_durably(path, draw(contents.source_names, found.lengths, rank_frequencies(contents), title))


def default_plot(contents: Contents) -> Path:
    """Beside the shard, or in the dataset's folder."""
    folder = contents.kind is Kind.DATASET
    return Path(contents.path, "lengths.png") if folder else Path(f"{contents.path}.lengths.png")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.inspect", description=__doc__)
    parser.add_argument(
        "path", metavar="PATH", help="a dataset's folder, or a shard's path without .bin (ours or Megatron-LM's)"
    )
    parser.add_argument("--verify", action="store_true", help="first recompute all hashes and check every token")
    parser.add_argument(
        "--sample", type=int, default=1, metavar="N", help="documents to show the start of (default: 1)"
    )
    parser.add_argument("--longest", type=int, default=5, metavar="N", help="longest documents to list (default: 5)")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="where the picture goes (default: PREFIX.lengths.png, DIR/lengths.png)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="to read a shard of Megatron-LM's with, or `mistral`")
    arguments = parser.parse_args(argv)
    for name in ("sample", "longest"):
        if (value := getattr(arguments, name)) < 0:
            parser.error(f"--{name} {value}: must not be negative")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 where something is wrong with the data."""
    arguments = _arguments(argv)
    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False)  # text is shown as it is
    try:
        if problems := verify(arguments.path, arguments.tokenizer) if arguments.verify else []:
            print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr)
            return 1
        contents = open_contents(arguments.path, arguments.tokenizer)
        found = inspect(contents, arguments.sample, arguments.longest, console)
        if arguments.verify:
            sound = (
                "no manifest; its index and ids are sound" if contents.kind is Kind.MEGATRON else "as the manifest says"
            )
            print(f"{arguments.path}: verified: {sound}")
        picture = arguments.plot or default_plot(contents)
        try:
            plot(contents, found, picture)
        except OSError as error:
            if arguments.plot:
                raise
            print(f"no picture: {error}; --plot names another place", file=sys.stderr)
        else:
            console.print(f"histograms: {picture}", soft_wrap=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
