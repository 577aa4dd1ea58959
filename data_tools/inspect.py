"""Command: show what a token shard holds, and check it against its manifest."""

import argparse
import sys

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data_tools.shards import Counts, Manifest, ShardPaths, open_shard, verify_shard
from data_tools.tokenizer import Tokenizer

SAMPLE_TOKENS = 100


def sources_table(manifest: Manifest) -> Table:
    """Documents, tokens and text of each set, and of all."""
    columns = ("documents", "tokens", "share", "text MB", "B/token")
    table = Table("set", *columns, box=SIMPLE, pad_edge=False)
    total = Counts(manifest.documents, manifest.tokens, manifest.text_bytes)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for name, counts in [*manifest.sets.items(), ("all", total)]:
        table.add_row(
            name,
            f"{counts.documents:,}",
            f"{counts.tokens:,}",
            f"{counts.tokens / manifest.tokens:.1%}",
            f"{counts.text_bytes / 1e6:,.2f}",
            f"{counts.text_bytes / counts.tokens:.2f}",
        )
    return table


def summary(manifest: Manifest, lengths: np.ndarray) -> list[str]:
    """Lines on the shard as a whole; ``lengths`` are the documents' tokens, (documents,) int32."""
    tokenizer = manifest.tokenizer
    longest = int(lengths.argmax())
    return [
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype}), "
        f"{len(manifest.sources)} source files",
        f"tokenizer {tokenizer.name}: {tokenizer.vocab_size} pieces, EOS {tokenizer.eos_id}, sha256 {tokenizer.sha256}",
        f"document tokens: median {int(np.median(lengths)):,}, longest {lengths[longest]:,} (document {longest})",
        f"left out: {manifest.empty_documents} empty documents, {len(manifest.bad_lines)} bad lines",
        *manifest.bad_lines,
    ]


def inspect(prefix: str, samples: int, console: Console) -> None:
    """Print the shard's summary, its sets, and the starts of ``samples`` documents spread over it.

    Raises:
        ShardError: the shard is missing, unfinished or cut.
    """
    paths = ShardPaths.of(prefix)
    manifest, dataset = Manifest.read(paths.manifest), open_shard(prefix)
    console.print(
        *summary(manifest, dataset.sequence_lengths),
        sep="\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(sources_table(manifest))
    tokenizer = Tokenizer.load(paths.tokenizer)
    chosen = np.linspace(0, manifest.documents - 1, min(samples, manifest.documents), dtype=int)
    for index in chosen.tolist():
        ids = dataset[index][:SAMPLE_TOKENS].tolist()
        console.rule(f"document {index}, its first {len(ids)} of {dataset.sequence_lengths[index]} tokens")
        console.print(tokenizer.decode(ids), markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 where shard and manifest differ."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.inspect", description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="the shard's path without .bin or .idx")
    parser.add_argument("--verify", action="store_true", help="recompute the hashes and check every token")
    parser.add_argument(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="documents to show the start of (default 1)",
    )
    arguments = parser.parse_args(argv)
    try:
        problems = verify_shard(arguments.prefix) if arguments.verify else []
        if not problems:
            inspect(arguments.prefix, max(arguments.sample, 0), Console())
    except (ValueError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if arguments.verify and not problems:
        print(f"{arguments.prefix}: verified, everything is as the manifest says")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
