"""A model's loss on a stream of tokens: at each context, and by position in it, in memory that does not grow."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longhorn_layers.model import LanguageModel

BATCH_TOKENS = 16_384  # in one forward pass
CHUNK_TOKENS = 2_048  # of a window in one forward pass


class EvaluationError(ValueError):
    """What was asked can't be evaluated; the message says what could."""


class TokenStream(Protocol):
    """Token ids of any integer type: an array, or something that reads a slice when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class PositionLoss:
    """Targets that had `first` … `last` tokens of their window before them: the mean loss, nats per token.

    `standard_error` is by how much windows differ, as the targets of one are of the same text (NaN of one window).
    """

    first: int
    last: int
    targets: int
    loss: float
    standard_error: float


@dataclass(frozen=True)
class ContextResult:
    """One context: `tokens` targets were scored, `nats` is the float64 sum of their losses.

    `positions` are all targets again by how much of the window stood before them, shortest first.
    """

    context: int
    tokens: int
    nats: float
    positions: tuple[PositionLoss, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def bits_per_byte(self, text_bytes: int) -> float:
        """`text_bytes`: how much text the targets are (see `count_text_bytes`); NaN for none."""
        return self.nats / math.log(2) / text_bytes if text_bytes else math.nan


def perplexity(loss: float) -> float:
    """exp of nats per token; inf where that is too much."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()  # math.exp raises


@torch.inference_mode()
def evaluate_contexts(
    model: LanguageModel,
    stream: TokenStream,
    contexts: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    chunk: int = CHUNK_TOKENS,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[ContextResult]:
    """The model's loss on a token stream, cut into windows of each context, shortest first.

    Windows don't overlap, the state is reset at each, and every target is scored (DESIGN §4). A window is read and
    walked in chunks with the state carried over, several windows at a time: memory depends on `batch_tokens`, and not
    on the context or the stream. (But attention's state is all keys and values of its windows so far: give it a
    `batch_tokens` of one chunk where that is too much.)

    Args:
        stream: (tokens,) ids of any integer type.
        contexts: in tokens; each must divide the largest.
        batch_tokens: in one forward pass, over all windows of the batch; at least one chunk's.
        chunk: tokens of a window in one forward pass.
        on_tokens: hears how many tokens were scored, after each forward pass.

    Raises:
        EvaluationError: the stream is shorter than the largest context and its last target, or a context doesn't
            divide the largest.
    """
    scored = count_targets(len(stream), contexts)
    ends = position_ends(contexts)
    results = []
    for context in sorted(set(contexts)):
        sums = _PositionSums([end for end in ends if end <= context], model.embedding.weight.device)
        rows = max(1, batch_tokens // min(context, chunk))
        for first in range(0, scored // context, rows):
            starts = [i * context for i in range(first, min(first + rows, scored // context))]
            _walk_windows(model, stream, starts, context, chunk, sums, on_tokens)
        results.append(sums.result(context, scored))
    return results


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


def position_ends(contexts: Sequence[int]) -> list[int]:
    """Last position of each bucket: 1, 2, 3, 4, 6, 8, 12 …, two to a doubling, and every context, up to the largest.

    Position n is that of a target with n tokens of its window before it.
    """
    largest = max(contexts)
    ends = {half << octave for half in (2, 3) for octave in range(largest.bit_length())} | {1}
    return sorted({end for end in ends if end < largest} | set(contexts))


def by_position(results: Sequence[ContextResult]) -> list[PositionLoss]:
    """The loss by position over all contexts of one stream, each position of the shortest windows that reach it.

    These are the most windows: a target after n tokens of context is the same question in a longer one.
    """
    found: list[PositionLoss] = []
    for result in sorted(results, key=lambda result: result.context):
        reached = found[-1].last if found else 0
        found += [position for position in result.positions if position.first > reached]
    return found


class _PositionSums:
    """Over windows, sums of their losses in each bucket of positions, and of the squares: all that is kept of them."""

    def __init__(self, ends: Sequence[int], device: torch.device) -> None:
        self.ends = torch.tensor(ends, device=device)
        self.moments = torch.zeros(2, len(ends), dtype=torch.float64, device=device)
        self.windows = 0

    def add(self, sums: Tensor) -> None:
        """`sums` (windows, buckets) fp64, of whole windows."""
        self.moments += torch.stack([sums.sum(0), sums.square().sum(0)])
        self.windows += len(sums)

    def result(self, context: int, targets: int) -> ContextResult:
        ends, nats = self.ends.tolist(), self.moments[0].sum().item()
        found = zip([1, *(end + 1 for end in ends)], ends, *self.moments.tolist(), strict=False)
        positions = tuple(_position_loss(self.windows, *numbers) for numbers in found)
        return ContextResult(context, targets, nats, positions)


def _position_loss(windows: int, first: int, last: int, total: float, squares: float) -> PositionLoss:
    width = last - first + 1
    mean, error = total / windows, math.nan
    if windows > 1:
        error = math.sqrt(max(0.0, squares / windows - mean * mean) / (windows - 1))
    return PositionLoss(first, last, windows * width, mean / width, error / width)


def _walk_windows(
    model: LanguageModel,
    stream: TokenStream,
    starts: Sequence[int],
    context: int,
    chunk: int,
    sums: _PositionSums,
    on_tokens: Callable[[int], None],
) -> None:
    """Add the losses of the windows that begin at `starts`, a chunk of each in a forward pass."""
    device = sums.ends.device
    state = model.new_state(len(starts)) if context > chunk else None
    by_bucket = torch.zeros(len(starts), len(sums.ends), dtype=torch.float64, device=device)
    for done in range(0, context, chunk):
        count = min(chunk, context - done)
        rows = np.stack([stream[start + done : start + done + count + 1] for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64)).to(device)
        losses = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), state=state, reduction="none")
        positions = torch.arange(done + 1, done + count + 1, device=device)
        by_bucket.index_add_(1, torch.bucketize(positions, sums.ends), losses.double())
        on_tokens(losses.numel())
    sums.add(by_bucket)
