"""The head's matmul and the cross-entropy in one, a chunk of tokens at a time.

All logits of a micro-batch of 16k tokens and 32000 words would be 2 GB in fp32, several times over
with what autograd keeps. As in Liger Kernel (Hsu et al., 2024, arXiv 2410.10989), the gradient of a
summed loss is known up to a factor as soon as a chunk's logits are, so that it is made in the
forward and the backward only scales it.

Liger Kernel 0.8.5 itself doesn't fit: its fused op waits for the GPU to count the targets and knows
neither padding nor a vocabulary cut over ranks. Its vocabulary-parallel ops take all logits at once
and copy them in fp32, or sum the weight's gradient over chunks in the weight's dtype; both call
torch.distributed themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import cpu
from kernels.cross_entropy.reference import check_targets, check_vocab_size

BACKENDS = ("auto", "cpu", "triton")
# Logits in a CPU's chunk, in any case CHUNK_STEP tokens: 4 MiB of fp32 stay in the cache. 2048 tokens of
# d_model 256 take 0.8-0.9 of the time of all logits at once at vocabulary 4096, 0.6-0.7 at 32000.
CPU_CHUNK_LOGITS = 2**20
CHUNK_STEP = 128
# Tokens in any other chunk. Each chunk of C tokens reads and writes weight's gradient, 8 bytes an
# element, for 2C operations: below some 1200 tokens an H100 (989 bf16 TFLOP/s, 3.35 TB/s) would wait
# for that sum. 2048 tokens of 32000 words are 125 MiB of bf16 logits.
CHUNK_TOKENS = 2048
# Rows of the logits start at multiples of this, so that matmuls and kernels may use 16-byte accesses.
ROW_ALIGNMENT = 128


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a head whose rows are cut over ranks.

    Attributes:
        first: the word of weight's first row.
        gather: called once per chunk on every rank with this rank's (3, tokens) tensor; returns
            those of all ranks, (ranks, 3, tokens), in the same order on each.
    """

    first: int
    gather: Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "none"] = "sum",
    chunk_size: int | None = None,
    shard: VocabShard | None = None,
    backend: Literal["auto", "cpu", "triton"] = "auto",
) -> Tensor:
    """Cross-entropy of the logits `hidden @ weight.T`, made for chunk_size tokens at a time.

    The matmuls run in the autocast dtype under autocast, else in hidden's dtype; softmax and losses
    are fp32 (fp64 for fp64 hidden), and so is the sum of weight's gradient over chunks.
    Differentiable in hidden and weight, once. "sum" makes the gradient in the forward, "none"
    computes the logits again in the backward.

    With `shard`, every rank calls this with the same hidden, targets and options and its own rows of
    the head. All get the same losses, bit for bit; hidden's gradient is this rank's part, which the
    caller sums over ranks.

    Args:
        hidden: (..., d_model).
        weight: (padded_vocab, d_model), or this rank's rows of it, as many on every rank.
        targets: hidden.shape[:-1], int64 below vocab_size, or ignore_index: loss and gradient zero.
        vocab_size: rows of the whole head from here on are padding, their logits count as -inf;
            None: all are real (not with a shard).
        reduction: "sum": a scalar; "none": a loss per token, in targets' shape.
        chunk_size: tokens at a time; None: as many as suit the device.
        shard: where weight's rows lie in the head, and how ranks meet; None: weight is all of it.
        backend: of the softmax: "cpu" (torch's operations, on any device), "triton", or "auto":
            triton on a GPU (but for fp64), cpu elsewhere.

    Raises:
        TypeError: fp64 with backend "triton", which computes in fp32.
        ValueError: for shapes, dtypes, devices, options or (on the CPU) targets that don't fit.
    """
    vocab_size = _checked_vocab_size(hidden, weight, targets, vocab_size, ignore_index, shard)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', not {reduction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    rows, first = len(weight), shard.first if shard else 0
    matmul_dtype = _matmul_dtype(hidden, weight)
    plan = _Plan(
        words=min(max(vocab_size - first, 0), rows),
        first=first,
        gather=shard.gather if shard else None,
        ignore_index=ignore_index,
        # Not of the real words, which may be fewer on the last rank: ranks meet in every chunk.
        chunk_size=chunk_size or _default_chunk(hidden.device, rows),
        matmul_dtype=matmul_dtype,
        softmax=_softmax(backend, hidden.device, matmul_dtype),
    )
    if reduction == "none":
        return _Losses.apply(hidden, weight, targets, plan)
    return _SummedLoss.apply(hidden, weight, targets, plan, torch.is_grad_enabled())


def _checked_vocab_size(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None,
    ignore_index: int,
    shard: VocabShard | None,
) -> int:
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden (..., d_model) and weight (padded_vocab, d_model) don't fit: "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden, weight and targets must be on one device, not {hidden.device}, {weight.device}, {targets.device}"
        )
    if shard is None:
        vocab_size = len(weight) if vocab_size is None else vocab_size
        check_vocab_size(vocab_size, len(weight))
    elif vocab_size is None or vocab_size < 1 or shard.first < 0:
        raise ValueError(
            "a shard needs vocab_size, at least 1 and that of the whole head, and a first word of at least 0, "
            f"not {vocab_size} and {shard.first}"
        )
    check_targets(targets, hidden.shape[:-1], vocab_size, ignore_index)
    return vocab_size


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that torch.nn.functional.linear would compute in here."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight need one dtype outside of autocast, not {hidden.dtype} and {weight.dtype}")
    return hidden.dtype


def _default_chunk(device: torch.device, rows: int) -> int:
    if device.type != "cpu":
        return CHUNK_TOKENS
    return max(1, CPU_CHUNK_LOGITS // (rows * CHUNK_STEP)) * CHUNK_STEP


class Softmax(NamedTuple):
    """What a backend does with a chunk's logits: (tokens, at least `words`) in the matmul's dtype.

    Columns from `words` on hold anything, NaN too. `targets` (tokens,) int64 are columns; one that
    is not in 0…words - 1 is none of this rank's. `statistics` and `scale` are fp32 (fp64 for fp64).

    Attributes:
        statistics: (logits, words, targets) -> (3, tokens): the maximum; Σ exp(logit - maximum); the
            target's logit. -inf, 0, 0 where there are no words. A NaN logit makes the sum NaN.
        gradient: (logits, words, targets, statistics, scale) -> (tokens, words) in logits' dtype,
            in their memory where it can be: `scale · (exp(logit - maximum) / sum - onehot(target))`
            from statistics of all ranks; exactly zero where scale (tokens,) is.
    """

    statistics: Callable[[Tensor, int, Tensor], Tensor]
    gradient: Callable[[Tensor, int, Tensor, Tensor, Tensor], Tensor]


def _softmax(backend: str, device: torch.device, dtype: torch.dtype) -> Softmax:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and dtype != torch.float64 else "cpu"
    if backend == "cpu":
        return Softmax(cpu.statistics, cpu.gradient)
    if dtype == torch.float64:
        raise TypeError("backend 'triton' computes in fp32; for float64 use backend 'cpu'")
    from kernels.cross_entropy import triton  # late: a CPU run needs no triton

    return Softmax(triton.statistics, triton.gradient)


@dataclass(frozen=True)
class _Plan:
    words: int  # real ones among weight's rows
    first: int
    gather: Callable[[Tensor], Tensor] | None
    ignore_index: int
    chunk_size: int
    matmul_dtype: torch.dtype
    softmax: Softmax

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.matmul_dtype, torch.float32)

    def statistics(self, logits: Tensor, columns: Tensor) -> Tensor:
        """The backend's, of the whole vocabulary."""
        local = self.softmax.statistics(logits, self.words, columns)
        if self.gather is None:
            return local
        maxima, totals, chosen = self.gather(local).unbind(1)
        maximum = maxima.amax(0)
        # A rank without a finite logit adds 0·exp(-inf); a NaN that a maximum drops is in its total.
        return torch.stack((maximum, (totals * (maxima - maximum).exp()).sum(0), chosen.sum(0)))

    def losses(self, statistics: Tensor, targets: Tensor) -> Tensor:
        """(tokens,) from (3, tokens)."""
        maximum, total, chosen = statistics
        return (total.log() + (maximum - chosen)).masked_fill(targets == self.ignore_index, 0)


class _Chunk(NamedTuple):
    tokens: slice
    hidden: Tensor  # (tokens, d_model), ready for the matmul
    columns: Tensor  # the targets, counted from weight's first row
    logits: Tensor  # (tokens, at least words): overwritten by the next chunk's


class _Chunks:
    """The logits of one chunk after another, all in one buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, plan: _Plan) -> None:
        self.plan = plan
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.columns = targets.flatten() - plan.first
        self.head = weight[: plan.words].to(plan.matmul_dtype)

    def __iter__(self) -> Iterator[_Chunk]:
        plan, count = self.plan, len(self.hidden)
        width = -(-plan.words // ROW_ALIGNMENT) * ROW_ALIGNMENT
        shape = min(plan.chunk_size, count), width
        buffer = torch.empty(shape, dtype=plan.matmul_dtype, device=self.hidden.device)
        for first in range(0, count, plan.chunk_size):
            tokens = slice(first, min(first + plan.chunk_size, count))
            hidden = self.hidden[tokens].to(plan.matmul_dtype)
            logits = buffer[: len(hidden)]
            torch.mm(hidden, self.head.t(), out=logits[:, : plan.words])
            yield _Chunk(tokens, hidden, self.columns[tokens], logits)


class _Gradients:
    """The gradients of hidden and weight (None where not needed), filled chunk by chunk."""

    def __init__(self, chunks: _Chunks, weight: Tensor, needs_hidden: bool, needs_weight: bool) -> None:
        self.chunks = chunks
        self.hidden = torch.empty_like(chunks.hidden) if needs_hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=chunks.plan.sum_dtype) if needs_weight else None

    def add(self, chunk: _Chunk, statistics: Tensor, scale: Tensor) -> None:
        plan = self.chunks.plan
        dlogits = plan.softmax.gradient(chunk.logits, plan.words, chunk.columns, statistics, scale)
        if self.hidden is not None:
            self.hidden[chunk.tokens] = dlogits @ self.chunks.head
        if self.weight is not None:
            _add_product(self.weight[: plan.words], dlogits.t(), chunk.hidden)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:  # one matmul that reads and writes the fp32 total: 8 bytes an element
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        plan: _Plan,
        grad_enabled: bool,
    ) -> Tensor:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        chunks = _Chunks(hidden, weight, targets, plan)
        gradients = _Gradients(chunks, weight, *needs)
        words = targets.flatten()
        statistics = torch.empty((3, len(words)), dtype=plan.sum_dtype, device=hidden.device)
        scale = (words != plan.ignore_index).to(plan.sum_dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # the plan's dtypes hold
            for chunk in chunks:
                ours = plan.statistics(chunk.logits, chunk.columns)
                statistics[:, chunk.tokens] = ours
                if any(needs):
                    gradients.add(chunk, ours, scale[chunk.tokens])
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.shape, ctx.weight_dtype = hidden.shape, weight.dtype
        return plan.losses(statistics, words).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple:
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = (dhidden * dtotal).view(ctx.shape)
        if dweight is not None:
            dweight = (dweight * dtotal).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, plan: _Plan) -> Tensor:
        words = targets.flatten()
        statistics = torch.empty((3, len(words)), dtype=plan.sum_dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _Chunks(hidden, weight, targets, plan):
                statistics[:, chunk.tokens] = plan.statistics(chunk.logits, chunk.columns)
        ctx.save_for_backward(hidden, weight, targets, statistics)
        ctx.plan = plan
        return plan.losses(statistics, words).view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple:
        hidden, weight, targets, statistics = ctx.saved_tensors
        plan = ctx.plan
        chunks = _Chunks(hidden, weight, targets, plan)
        gradients = _Gradients(chunks, weight, *ctx.needs_input_grad[:2])
        scale = dlosses.masked_fill(targets == plan.ignore_index, 0).flatten()
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks:
                gradients.add(chunk, statistics[:, chunk.tokens], scale[chunk.tokens])
        dhidden = None if gradients.hidden is None else gradients.hidden.view(hidden.shape)
        dweight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        return dhidden, dweight, None, None
