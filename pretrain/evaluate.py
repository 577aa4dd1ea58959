"""Command: a model's perplexity at several contexts and its loss by position, as tables, JSON, CSV and plots.

    python -m pretrain.evaluate runs/125m --data data/slimpajama/validation --contexts 2048,4096
    python -m pretrain.evaluate runs/* --data … --contexts … --output comparison --paper
    python -m pretrain.evaluate runs/*/evaluation/*/perplexity.json --output comparison

The shard's documents, end to end with their EOS, are cut into windows that do not overlap; the model starts anew at
each and every target is scored, the same targets at every context. The same again for only those documents that are at
least as long as the largest context, where what is far back can matter. Several models are drawn into one plot, too. A
model that was measured with the same settings before is not measured again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_tools.dataset import Dataset, open_dataset
from data_tools.tokenizer import Tokenizer
from longhorn_layers.model import LanguageModel
from pretrain import downstream
from pretrain.checkpoint import CheckpointError, LoadedModel
from pretrain.evaluation.comparison import labelled, show_comparison, write_comparison
from pretrain.evaluation.documents import DocumentSet, document_sets
from pretrain.evaluation.losses import BATCH_TOKENS, CHUNK_TOKENS, EvaluationError, by_position, evaluate_contexts
from pretrain.evaluation.published import PAPER
from pretrain.evaluation.report import RESULT, Report, SetResult
from pretrain.evaluation.source import COMPARED_TOKENS, matching_tokenizer, provenance, results_folder
from pretrain.evaluation.text_bytes import count_text_bytes
from pretrain.hf.folder import load_any
from pretrain.provenance import code_commit
from pretrain.shard_reader import ShardChanged


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


def evaluate_sets(
    model: LanguageModel,
    sets: Sequence[DocumentSet],
    tokenizer: Tokenizer,
    contexts: Sequence[int],
    batch_tokens: int,
    chunk: int,
) -> list[SetResult]:
    """Evaluate each set at each context, with a progress bar on stderr."""
    work = sum(len(documents.stream) - 1 for documents in sets) * len(contexts)
    columns = (TextColumn("{task.description}"), BarColumn(), _TokensPerSecond(), TimeRemainingColumn())
    results = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("evaluating", total=work)
        for documents in sets:
            found = evaluate_contexts(
                model,
                documents.stream,
                contexts,
                batch_tokens=batch_tokens,
                chunk=chunk,
                on_tokens=lambda count: progress.advance(bar, count),
            )
            text_bytes = count_text_bytes(documents.stream, tokenizer)
            results.append(SetResult(documents.name, documents.documents, text_bytes, found, by_position(found)))
    return results


def settings(parsed: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """What decides the numbers besides the weights."""
    return {
        "data": {
            "prefix": parsed.data,
            "digest": dataset.digest,
            "documents": dataset.documents,
            "tokens": dataset.tokens,
        },
        "tokenizer": asdict(dataset.tokenizer),
        "contexts": parsed.contexts,
        "max_tokens": parsed.max_tokens,
        "chunk": parsed.chunk,
        "batch_tokens": parsed.batch_tokens,
        "device": parsed.device,
        "torch": str(torch.__version__),
        "commit": code_commit(),
    }


class Evaluation:
    """What was asked for of each model. Raises ValueError for text or tasks that can't be had, before one is read."""

    def __init__(self, parsed: argparse.Namespace, console: Console) -> None:
        self.parsed, self.console = parsed, console
        self.dataset = open_dataset(parsed.data) if parsed.data else None
        self.sets = document_sets(self.dataset, parsed.contexts, parsed.max_tokens) if self.dataset else []
        self.tasks = downstream.load_tasks(parsed.tasks, parsed.task_dir) if parsed.tasks else []

    def run(self, source: Path, output: Path | None = None) -> Report | None:
        """Do it with one model; returns its report where it was given text to score."""
        loaded = load_any(source, torch.device(self.parsed.device))
        output = output or results_folder(loaded)
        report = None
        if self.dataset is not None:
            report = self._measure(loaded, self.dataset, output)
            written = report.write(output, PAPER if self.parsed.paper else ())
            report.show(self.console)
            if len(self.sets) == 1:
                self._say(f"no long documents: none fills a context of {self.parsed.contexts[-1]:,} tokens by itself")
            self._say_paths(written)
        if self.tasks:
            downstream.run(loaded, self.tasks, self.parsed, output, self.console)
        return report

    def _measure(self, loaded: LoadedModel, dataset: Dataset, output: Path) -> Report:
        """The report that lies in `output` if it was made of the same model with the same settings, else a new one."""
        parsed = self.parsed
        tokenizer = matching_tokenizer(loaded, dataset, self.sets[0].stream[:COMPARED_TOKENS].tolist())
        made_of = provenance(loaded) | settings(parsed, dataset)
        earlier = _earlier(output / RESULT)
        if earlier and earlier.made_of | {"commit": None} == made_of | {"commit": None}:
            self._say(f"{output / RESULT}: measured before, by commit {earlier.made_of.get('commit', 'unknown')}")
            return earlier
        output.mkdir(parents=True, exist_ok=True)  # what can't be written shows before the work
        found = evaluate_sets(loaded.model, self.sets, tokenizer, parsed.contexts, parsed.batch_tokens, parsed.chunk)
        return Report(made_of, found)

    def compare(self, reports: Sequence[Report]) -> None:
        """Write and print the comparison of several models."""
        models = labelled(reports)
        written = write_comparison(models, self.parsed.output, PAPER if self.parsed.paper else ())
        show_comparison(models, self.console)
        self._say_paths(written)

    def _say_paths(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._say(str(path))

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _earlier(path: Path) -> Report | None:
    try:
        return Report.read(path)
    except (EvaluationError, OSError):  # an older format's, or none
        return None


def evaluate(parsed: argparse.Namespace, console: Console) -> None:
    """What the command does, from its arguments to its files."""
    earlier = {source: Report.read(source) for source in parsed.source if source.is_file()}
    evaluation = Evaluation(parsed, console)
    if len(parsed.source) == 1 and not earlier:
        evaluation.run(parsed.source[0], parsed.output)
        return
    found = [earlier.get(source) or evaluation.run(source) for source in parsed.source]
    if reports := [report for report in found if report is not None]:
        evaluation.compare(reports)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _contexts(text: str) -> list[int]:
    """Shortest first, each once."""
    try:
        return sorted({_positive(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write tokens like 2048,4096,8192") from error


def _parser() -> argparse.ArgumentParser:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = (
        "a run's folder (its newest checkpoint), a checkpoint's, one that transformers reads, or an earlier result's "
        f"{RESULT}"
    )
    outputs = (
        "of one model: where its results go (default: evaluation/step_… in its run, evaluation in a folder for "
        "transformers); of several, each has its results there, and the comparison goes here"
    )
    parser.add_argument("source", type=Path, nargs="+", help=sources)
    parser.add_argument("--output", type=Path, metavar="DIR", help=outputs)
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: %(default)s")
    text = parser.add_argument_group("perplexity")
    text.add_argument("--data", metavar="PREFIX", help="validation shard or dataset")
    text.add_argument("--contexts", type=_contexts, metavar="N,N,…", help="in tokens; each must divide the largest")
    text.add_argument("--max-tokens", type=_positive, metavar="N", help="score at most so many of each set")
    text.add_argument("--paper", action="store_true", help="draw the paper's 1.3B curves, too")
    for name, default, what in (
        ("--batch-tokens", BATCH_TOKENS, "in one forward pass"),
        ("--chunk", CHUNK_TOKENS, "tokens of a window in one forward pass"),
    ):
        text.add_argument(name, type=_positive, default=default, metavar="N", help=f"{what}: %(default)s")
    downstream.add_arguments(parser)
    return parser


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    results = [source for source in parsed.source if source.is_file()]
    if bool(parsed.data) != bool(parsed.contexts):
        parser.error("--data and --contexts belong together")
    if len(results) < len(parsed.source) and not (parsed.data or parsed.tasks):
        parser.error("nothing to do: give --data and --contexts, or --tasks")
    compares = bool(results) or (parsed.data and len(parsed.source) > 1)
    if compares and parsed.output is None:
        parser.error("several models are compared: give --output for where to")
    if parsed.output is not None and len(parsed.source) > 1 and not compares:
        parser.error("--output: results of tasks go to each model's own place; leave it out")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with the reason on stderr."""
    parsed = _arguments(arguments)
    try:
        evaluate(parsed, Console())
    except (ValueError, OSError, CheckpointError, ShardChanged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
