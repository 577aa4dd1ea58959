"""Command: perplexity of a checkpoint at several contexts, as a table, JSON, CSV and a plot.

    python -m pretrain.evaluate runs/125m --data data/slimpajama/validation --contexts 2048,4096

The shard's documents, end to end with their EOS, are cut into windows that do not overlap; the
model starts anew at each and every target is scored, the same targets at every context. The same
again for only those documents that are at least as long as the largest context, where what is far
back can matter.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sentencepiece import SentencePieceProcessor

from data_tools.dataset import open_dataset
from data_tools.files import write_durably
from data_tools.tokenizer import Tokenizer
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import CheckpointError, LoadedModel, load_model, step_name
from pretrain.data import document_lengths, token_stream, windows
from pretrain.perplexity_plot import draw_perplexity

BATCH_TOKENS = 16_384  # in one forward pass
CHUNK_TOKENS = 2_048  # of a window in one forward pass
COUNTED_TOKENS = 1 << 24  # whose bytes are counted at a time


class EvaluationError(ValueError):
    """What was asked can't be evaluated; the message says what could."""


@dataclass(frozen=True)
class ContextResult:
    """One context: `tokens` targets were scored, and `nats` is the float64 sum of their losses."""

    context: int
    tokens: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.loss, dtype=torch.float64).exp().item()  # inf, where math.exp raises

    def bits_per_byte(self, text_bytes: int) -> float:
        """`text_bytes`: how much text the targets are (see `count_text_bytes`); NaN for none."""
        return self.nats / math.log(2) / text_bytes if text_bytes else math.nan


@torch.inference_mode()
def evaluate_contexts(
    model: LanguageModel,
    stream: np.ndarray,
    contexts: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    chunk: int = CHUNK_TOKENS,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[ContextResult]:
    """The model's loss on a token stream, cut into windows of each context, shortest first.

    Windows don't overlap, the state is reset at each, and every target is scored (DESIGN §4). A
    window is walked in chunks with the state carried over, so that memory depends on `batch_tokens`
    and not on the context; several windows are batched.

    Args:
        stream: (tokens,) ids of any integer type; a memory map is read window by window.
        contexts: in tokens; each must divide the largest.
        batch_tokens: in one forward pass, over all windows of the batch; at least one chunk's.
        chunk: tokens of a window in one forward pass.
        on_tokens: hears how many tokens were scored, after each forward pass.

    Raises:
        EvaluationError: the stream is shorter than the largest context and its last target, or a
            context doesn't divide the largest.
    """
    scored = count_targets(len(stream), contexts)
    results = []
    for context in sorted(set(contexts)):
        rows = max(1, batch_tokens // min(context, chunk))
        nats = torch.zeros((), dtype=torch.float64)
        for first in range(0, scored // context, rows):
            batch = range(first, min(first + rows, scored // context))
            nats += _window_losses(model, *windows(stream, context, batch), chunk, on_tokens)
        results.append(ContextResult(context, scored, nats.item()))
    return results


def _window_losses(
    model: LanguageModel,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    chunk: int,
    on_tokens: Callable[[int], None],
) -> torch.Tensor:
    """The losses' float64 sum over windows (batch, context), on the CPU."""
    device = model.embedding.weight.device
    state = model.new_state(len(input_ids))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for ids, following in zip(input_ids.split(chunk, 1), targets.split(chunk, 1), strict=True):
        losses = model(ids.to(device), following.to(device), state=state, reduction="none")
        nats += losses.sum(dtype=torch.float64)
        on_tokens(losses.numel())
    return nats.cpu()


def count_targets(stream_tokens: int, contexts: Sequence[int]) -> int:
    """How many tokens are scored: all but the first, cut to a multiple of the largest context.

    Raises EvaluationError where that is none, or the contexts would not score the same targets.
    """
    largest = max(contexts)
    for context in contexts:
        if context < 1 or largest % context:
            raise EvaluationError(
                f"context {context} does not divide the largest, {largest}: the same tokens could not be scored at both"
            )
    if stream_tokens <= largest:
        raise EvaluationError(
            f"{stream_tokens:,} tokens are too few for a context of {largest:,} tokens and the target after them"
        )
    return (stream_tokens - 1) // largest * largest


def count_text_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that tokens[1:] stand for; tokens[0] only says what is before them.

    A byte piece is one byte, control pieces (EOS) are none, and others are what they spell, "▁"
    being a space; but the space that SentencePiece puts in front of a document is no part of its
    text. For a tokenizer that doesn't normalise, all documents together thus have the manifest's
    `text_bytes`; for one that does, the bytes of the normalised text.
    """
    pieces = range(tokenizer.vocab_size)
    sizes = np.array([_piece_bytes(tokenizer.processor, piece) for piece in pieces])
    spaced = np.array([tokenizer.processor.id_to_piece(piece).startswith("▁") for piece in pieces])
    prefixed = spaced[tokenizer.encode("a")[0]]  # whether the tokenizer puts that space
    total = 0
    for start in range(0, len(tokens) - 1, COUNTED_TOKENS):
        part = tokens[start : start + COUNTED_TOKENS + 1]
        total += int(sizes[part[1:]].sum())
        if prefixed:
            total -= int(np.count_nonzero(spaced[part[1:]] & (part[:-1] == tokenizer.eos_id)))
    return total


def _piece_bytes(processor: SentencePieceProcessor, piece: int) -> int:
    if processor.is_control(piece) or processor.is_unused(piece):
        return 0
    if processor.is_byte(piece):
        return 1
    if processor.is_unknown(piece):  # its text is lost; it decodes to a placeholder
        return len(processor.decode([piece]).encode())
    return len(processor.id_to_piece(piece).replace("▁", " ").encode())


# ---- the command -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentSet:
    """Documents to score: `stream` is their tokens end to end, cut behind the last target."""

    name: str
    documents: int
    stream: np.ndarray


@dataclass(frozen=True)
class SetResult:
    """What came of a document set; `text_bytes` is what the scored targets are as text."""

    name: str
    documents: int
    text_bytes: int
    contexts: list[ContextResult]

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


def document_sets(prefix: str, contexts: Sequence[int], max_tokens: int | None) -> list[DocumentSet]:
    """All documents of a shard and, where they fill the largest context, the long ones alone.

    Raises:
        EvaluationError: the shard, or `max_tokens` of it, is shorter than the largest context.
        ShardError: no finished shard has this prefix.
    """
    dataset = open_dataset(prefix)
    stream, lengths = token_stream(dataset), document_lengths(dataset)
    try:
        everything = _cut("all", len(lengths), stream, contexts, max_tokens)
    except EvaluationError as error:
        raise EvaluationError(f"{prefix}: {error}") from error
    ends = np.cumsum(lengths, dtype=np.int64)
    long = np.flatnonzero(lengths >= max(contexts))
    if not len(long):
        return [everything]
    joined = np.concatenate([stream[ends[i] - lengths[i] : ends[i]] for i in long])
    if len(joined) <= max(contexts):  # one document, exactly as long: its last token has no target
        return [everything]
    return [
        everything,
        _cut(f"≥ {max(contexts):,} tokens", len(long), joined, contexts, max_tokens),
    ]


def _cut(name: str, documents: int, stream: np.ndarray, contexts: Sequence[int], max_tokens: int | None) -> DocumentSet:
    if max_tokens is not None:
        stream = stream[: max_tokens + 1]
    return DocumentSet(name, documents, stream[: count_targets(len(stream), contexts) + 1])


def matching_tokenizer(loaded: LoadedModel, prefix: str) -> Tokenizer:
    """The shard's tokenizer. Raises EvaluationError if the checkpoint was trained with another."""
    dataset = open_dataset(prefix)
    tokenizer, trained = Tokenizer.load(dataset.tokenizer_path), loaded.tokenizer["sha256"]
    for path, found in ((dataset.path, dataset.tokenizer.sha256), (dataset.tokenizer_path, tokenizer.sha256)):
        if found != trained:
            raise EvaluationError(
                f"{path}: the tokenizer has sha256 {found}, but {loaded.path} was trained with "
                f"{loaded.tokenizer['name']}, {trained}; tokenize the text with that one"
            )
    return tokenizer


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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _TokensPerSecond(),
        TimeRemainingColumn(),
    )
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
            results.append(SetResult(documents.name, documents.documents, text_bytes, found))
    return results


def provenance(loaded: LoadedModel, prefix: str, parsed: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were made of."""
    dataset = open_dataset(prefix)
    return {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "consumed_tokens": loaded.consumed_tokens,
        "training_context": loaded.config.data.seqlen,
        "tokenizer": loaded.tokenizer,
        "data": {
            "prefix": prefix,
            "digest": dataset.digest,
            "documents": dataset.documents,
            "tokens": dataset.tokens,
        },
        "max_tokens": parsed.max_tokens,
        "chunk": parsed.chunk,
        "batch_tokens": parsed.batch_tokens,
        "device": parsed.device,
        "dtype": str(loaded.model.embedding.weight.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def write_report(output: Path, sets: Sequence[SetResult], made_of: dict[str, Any]) -> list[Path]:
    """Write perplexity.json (inf and NaN as null), .csv and .png, each whole or not at all."""
    rows = [{"documents": found.name} | row for found in sets for row in found.rows()]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    described = [
        {"name": s.name, "documents": s.documents, "text_bytes": s.text_bytes, "contexts": s.rows()} for s in sets
    ]
    points = {f"{s.name} ({s.documents:,} documents)": [(r.context, r.perplexity) for r in s.contexts] for s in sets}
    title = f"step {made_of['step']:,}, {made_of['consumed_tokens']:,} tokens"
    contents = {
        "perplexity.json": orjson.dumps(made_of | {"sets": described}, option=orjson.OPT_INDENT_2),
        "perplexity.csv": table.getvalue().encode(),
        "perplexity.png": draw_perplexity(points, made_of["training_context"], title),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_durably(output / name, content)
    return [output / name for name in contents]


def show(sets: Sequence[SetResult], console: Console) -> None:
    """Print the table: ruled on a terminal, bare columns elsewhere."""
    smallest = sets[0].contexts[0].context
    table = Table("documents", box=SIMPLE_HEAD if console.is_terminal else None)
    for name in ("context", "perplexity", "loss", "bits/byte", f"ratio to {smallest:,}"):
        table.add_column(name, justify="right")
    for found in sets:
        for row in found.rows():
            numbers = (f"{row[key]:.4f}" for key in ("perplexity", "loss", "bits_per_byte", "ratio"))
            table.add_row(found.name, f"{row['context']:,}", *numbers)
        table.add_section()
    console.print(table, highlight=False)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _contexts(text: str) -> list[int]:
    try:
        return [_positive(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write tokens like 2048,4096,8192") from error


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint's")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="validation shard")
    parser.add_argument(
        "--contexts",
        required=True,
        type=_contexts,
        metavar="N,N,…",
        help="in tokens; each must divide the largest",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: evaluation/step_… in the checkpoint's run",
    )
    parser.add_argument(
        "--batch-tokens",
        type=_positive,
        default=BATCH_TOKENS,
        metavar="N",
        help="in one forward pass: %(default)s",
    )
    parser.add_argument(
        "--chunk",
        type=_positive,
        default=CHUNK_TOKENS,
        metavar="N",
        help="tokens of a window in one forward pass: %(default)s",
    )
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="score at most so many of each set")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: %(default)s")
    return parser.parse_args(arguments)


def evaluate(parsed: argparse.Namespace, console: Console) -> None:
    """What the command does, from its arguments to its files."""
    sets = document_sets(parsed.data, parsed.contexts, parsed.max_tokens)  # refuses before a model is read
    loaded = load_model(parsed.checkpoint, torch.device(parsed.device))
    tokenizer = matching_tokenizer(loaded, parsed.data)
    contexts = sorted(set(parsed.contexts))
    results = evaluate_sets(loaded.model, sets, tokenizer, contexts, parsed.batch_tokens, parsed.chunk)
    run_dir = loaded.path.parent.parent
    output = parsed.output or run_dir / "evaluation" / step_name(loaded.step)
    written = write_report(output, results, provenance(loaded, parsed.data, parsed))
    show(results, console)
    if len(results) == 1:
        longest = f"no long documents: none fills a context of {contexts[-1]:,} tokens by itself"
        console.print(longest, highlight=False, soft_wrap=True)
    for path in written:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with the reason on stderr."""
    parsed = _arguments(arguments)
    try:
        evaluate(parsed, Console())
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
