"""Command: how fast text becomes tokens, beside the tokenizer's own speed, and what SlimPajama would take.

    python -m pretrain.benchmarks.corpus --output /tmp/bench_corpus
    python -m pretrain.benchmarks.tokenize --corpus /tmp/bench_corpus --tokenizer mistral --workers 2

Measured on one core, in turns: the bare loop `for text in texts: processor.encode(text)`, and our encoder, both new and
after it has seen as much other text; every id is compared. Then `python -m data_tools.tokenize` as a user runs it, from
compressed files to the finished shard, with one worker and with several; and on one document of 200 MB.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import zstandard
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_tools.encoder import Encoder
from data_tools.shards import Manifest, ShardPaths
from data_tools.tokenizer import Tokenizer, TokenizerError, resolve_tokenizer
from kernels.benchmarks.record import hardware_slug, provenance, write_json
from pretrain.benchmarks import RESULTS
from pretrain.benchmarks.process_tree import CommandFailed, Usage, run_measured

SUFFIX = ".jsonl.zst"
ENCODERS = {"bare": "bare loop", "new": "our encoder, new", "used": "our encoder, used"}
SLIMPAJAMA_TOKENS = 627e9
SLIMPAJAMA_DOCUMENTS = 590e6
DOCUMENT_BYTES = 30 + 20  # a document's row of the table, and its place in the index


@dataclass(frozen=True)
class Speed:
    """Text to tokens in so many seconds of wall clock on so many cores."""

    seconds: float
    text_bytes: int
    tokens: int
    cores: int = 1

    @property
    def megabytes_per_second(self) -> float:
        """Of text, as UTF-8."""
        return self.text_bytes / 1e6 / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """On all cores."""
        return self.tokens / self.seconds

    def record(self) -> dict[str, float]:
        """Its numbers for the JSON."""
        return {
            **asdict(self),
            "megabytes_per_second": self.megabytes_per_second,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_core": self.tokens_per_second / self.cores,
        }


def corpus_texts(corpus: Path) -> Iterator[str]:
    """The documents of a folder's `.jsonl.zst` files, in the order of their paths."""
    files = sorted(corpus.rglob(f"*{SUFFIX}"))
    if not files:
        raise ValueError(f"--corpus {corpus}: no {SUFFIX} file there; make one with pretrain.benchmarks.corpus")
    for path in files:
        for line in zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).splitlines():
            yield orjson.loads(line)["text"]


def take(texts: Iterator[str], size: float) -> list[str]:
    """The next texts, of so many bytes; ValueError where there are fewer."""
    taken = []
    while size > 0:
        if (text := next(texts, None)) is None:
            raise ValueError(f"the corpus is {size / 1e6:.1f} MB too small; ask for less text")
        taken.append(text)
        size -= len(text.encode())
    return taken


def compare_encoders(tokenizer: Tokenizer, texts: list[str], before: list[str], repeats: int) -> dict[str, list[Speed]]:
    """The bare loop and our encoder in turns, `repeats` of each; AssertionError where an id differs.

    Our encoder looks up what it has seen, so it is measured both new and after the texts `before`: a worker goes on
    through thousands of files.
    """
    tokens = same_ids(tokenizer, texts)
    text_bytes = sum(len(text.encode()) for text in texts)
    speeds: dict[str, list[Speed]] = {name: [] for name in ENCODERS}
    for _ in range(repeats):
        new, used = Encoder(tokenizer), Encoder(tokenizer)
        for text in before:
            used.encode(text)
        encoders: list[Callable[[str], Any]] = [tokenizer.processor.encode, new.encode, used.encode]
        for name, encode in zip(ENCODERS, encoders, strict=True):
            started = time.perf_counter()
            for text in texts:
                encode(text)
            speeds[name].append(Speed(time.perf_counter() - started, text_bytes, tokens))
    return speeds


def same_ids(tokenizer: Tokenizer, texts: list[str]) -> int:
    """How many ids the texts have, EOS not counted; AssertionError where the encoders differ."""
    encoder, total = Encoder(tokenizer), 0
    for text in texts:
        ids = tokenizer.processor.encode(text)
        found = np.frombuffer(encoder.encode(text), encoder.dtype)
        assert np.array_equal(found, ids), f"other ids than SentencePiece's for the text {text[:200]!r}"
        total += len(ids)
    return total


def run_command(source: Path, tokenizer: Path, folder: Path, workers: int) -> tuple[Speed, Usage, Manifest]:
    """Tokenize the files below a folder with the command; the shard is deleted."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        prefix = Path(output, "shard")
        options = ("--tokenizer", str(tokenizer), "--output", str(prefix), "--workers", str(workers))
        pattern = str(source / "**" / f"*{SUFFIX}")
        usage = run_measured([sys.executable, "-m", "data_tools.tokenize", "--input", pattern, *options])
        manifest = Manifest.read(ShardPaths.of(prefix).manifest)
    return Speed(usage.seconds, manifest.text_bytes, manifest.tokens, workers), usage, manifest


def run_long_document(
    texts: Iterator[str], size: float, tokenizer: Path, folder: Path
) -> tuple[Speed, Usage, Manifest]:
    """Tokenize one document of so many bytes, made of the corpus's texts."""
    with tempfile.TemporaryDirectory(dir=folder) as source:
        record = orjson.dumps({"text": "\n\n".join(take(texts, size)), "meta": {}})
        Path(source, f"one{SUFFIX}").write_bytes(zstandard.compress(record))
        del record
        return run_command(Path(source), tokenizer, folder, workers=1)


def extrapolation(speed: Speed, token_bytes: int) -> dict[str, float]:
    """What as many tokens as SlimPajama has would take, at this speed per core."""
    return {
        "tokens": SLIMPAJAMA_TOKENS,
        "core_hours": SLIMPAJAMA_TOKENS / (speed.tokens_per_second / speed.cores) / 3600,
        "shard_bytes": SLIMPAJAMA_TOKENS * token_bytes + SLIMPAJAMA_DOCUMENTS * DOCUMENT_BYTES,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is recorded."""
    path, tokenizer = resolve_tokenizer(options.tokenizer), Tokenizer.load(options.tokenizer)
    texts = corpus_texts(options.corpus)
    sample, before = (take(texts, options.sample_mb * 1e6) for _ in range(2))
    encoders = compare_encoders(tokenizer, sample, before, options.repeats)
    commands = {}
    with tempfile.TemporaryDirectory(prefix="tokenize-benchmark-", dir=options.disk) as folder:
        for workers in sorted({1, options.workers}):
            speed, usage, manifest = run_command(options.corpus, path, Path(folder), workers)
            commands[f"workers_{workers}"] = speed.record() | asdict(usage)
        size = options.document_mb * 1e6
        long, long_usage, _ = run_long_document(corpus_texts(options.corpus), size, path, Path(folder))
    bare = statistics.median(each.seconds for each in encoders["bare"])
    per_core = speed.megabytes_per_second / speed.cores
    return {
        "encoders": {name: [each.record() for each in speeds] for name, speeds in encoders.items()},
        "to_bare": {name: _ratio(encoders["bare"], encoders[name]) for name in ("new", "used")},
        "command": commands,
        "command_per_core_to_bare": per_core / (encoders["bare"][0].text_bytes / 1e6 / bare),
        "long_document": long.record() | asdict(long_usage),
        "slimpajama": extrapolation(speed, np.dtype(manifest.dtype).itemsize),
    }


def _ratio(bare: list[Speed], ours: list[Speed]) -> dict[str, float]:
    ratios = [one.seconds / other.seconds for one, other in zip(bare, ours, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def show(found: dict[str, Any], console: Console) -> None:
    """The table, and the ratios."""
    table = Table("", "MB/s", "tokens/s", "per core", "a process", "all of them", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, title in ENCODERS.items():
        speeds = sorted(found["encoders"][name], key=lambda run: run["seconds"])
        table.add_row(title, *_speed_cells(speeds[len(speeds) // 2]), "", "")
    runs = {f"command on {run['cores']}": run for run in found["command"].values()}
    runs[f"{found['long_document']['text_bytes'] / 1e6:.0f} MB document"] = found["long_document"]
    for title, run in runs.items():
        memory = (f"{run[key] / 1e6:,.0f} MB" for key in ("process_bytes", "total_bytes"))
        table.add_row(title, *_speed_cells(run), *memory)
    console.print(table, highlight=False)
    whole = found["slimpajama"]
    ratios = (
        f"{ENCODERS[name]}: {ratio['median']:.2f} times the bare loop ({ratio['least']:.2f} to {ratio['most']:.2f})"
        for name, ratio in found["to_bare"].items()
    )
    lines = (
        *ratios,
        f"the whole command, per core: {found['command_per_core_to_bare']:.2f} times the bare loop; all ids the same",
        f"{whole['tokens'] / 1e9:.0f}B tokens: {whole['core_hours']:.0f} core-hours, "
        f"{whole['shard_bytes'] / 1e12:.2f} TB; merged into one shard, twice that while it is made",
    )
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


def _speed_cells(run: dict[str, float]) -> list[str]:
    rates = (f"{run[key]:,.0f}" for key in ("tokens_per_second", "tokens_per_second_per_core"))
    return [f"{run['megabytes_per_second']:.1f}", *rates]


def _corpus_description(corpus: Path) -> dict[str, Any]:
    path = corpus / "corpus.json"
    return json.loads(path.read_text()) if path.is_file() else {"folder": str(corpus)}


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 where the command failed, or 2 for arguments that don't fit."""
    options = _parser().parse_args(arguments)
    record = provenance(torch.device("cpu"), "sentencepiece", "zstandard", "orjson")
    try:
        found = measure(options)
    except (TokenizerError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    console = Console()
    show(found, console)
    path = options.output / f"tokenize-{hardware_slug(torch.device('cpu'))}.json"
    tokenizer = Tokenizer.load(options.tokenizer).record
    settings = {"tokenizer": asdict(tokenizer), "corpus": _corpus_description(options.corpus)}
    write_json(path, {**record, **settings, "results": found})
    console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.tokenize", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help=f"a folder of {SUFFIX} files")
    parser.add_argument("--tokenizer", default="mistral", help="a SentencePiece file, or mistral (default)")
    parser.add_argument("--workers", type=int, default=2, help="of the second run of the command (default: 2)")
    parser.add_argument(
        "--sample-mb", type=float, default=40, help="text for the encoders, and as much before (default: 40)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of both encoders (default: 5)")
    parser.add_argument("--document-mb", type=float, default=200, help="the long document (default: 200)")
    parser.add_argument("--disk", type=Path, default=Path("."), help="a folder on the disk to use (default: .)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
