"""The head's matmul and the cross-entropy in one, a chunk of tokens at a time.

All logits of a micro-batch of 16k tokens and 32000 words would be 2 GB in fp32, several times over
with what autograd keeps. As in Liger Kernel (Hsu et al., 2024, arXiv 2410.10989), the gradient of a
summed loss is known up to a factor as soon as a chunk's logits are, so that it is made in the
forward and the backward only scales it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy.reference import check_targets

# Logits in a chunk, in any case MIN_CHUNK tokens. On a CPU 4 MiB of fp32 stay in the cache: 2048
# tokens of d_model 256 take 0.8-0.9 of the time of all logits at once at vocabulary 4096, 0.6-0.7
# at 32000. Elsewhere 256 MiB, some 2000 tokens at 32000: an estimate of what a matmul needs.
CHUNK_LOGITS = {"cpu": 2**20}
CHUNK_LOGITS_ELSEWHERE = 2**26
MIN_CHUNK = 128


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "none"] = "sum",
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits `hidden @ weight.T`, made for chunk_size tokens at a time.

    The matmuls run in the autocast dtype under autocast, else in hidden's dtype; softmax and losses
    are fp32 (fp64 for fp64 hidden), and so is the sum of weight's gradient over chunks.
    Differentiable in hidden and weight, once. "sum" makes the gradient in the forward, "none"
    computes the logits again in the backward.

    Args:
        hidden: (..., d_model).
        weight: (padded_vocab, d_model).
        targets: hidden.shape[:-1], int64 below vocab_size, or ignore_index: loss and gradient zero.
        vocab_size: rows of weight from here on are padding, their logits count as -inf; None: all
            are real.
        reduction: "sum": a scalar; "none": a loss per token, in targets' shape.
        chunk_size: tokens at a time; None: as many as suit the device.

    Raises:
        ValueError: for shapes, dtypes, options or (on the CPU) targets that don't fit.
    """
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden (..., d_model) and weight (padded_vocab, d_model) don't fit: "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', not {reduction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    check_targets(targets, hidden.shape[:-1], vocab_size, weight.shape[0], ignore_index)
    if chunk_size is None:
        budget = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS_ELSEWHERE)
        chunk_size = max(MIN_CHUNK, budget // vocab_size)
    plan = _Plan(vocab_size, ignore_index, chunk_size, _matmul_dtype(hidden, weight))
    if reduction == "none":
        return _Losses.apply(hidden, weight, targets, plan)
    return _SummedLoss.apply(hidden, weight, targets, plan, torch.is_grad_enabled())


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that torch.nn.functional.linear would compute in here."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight need one dtype outside of autocast, not {hidden.dtype} and {weight.dtype}")
    return hidden.dtype


@dataclass(frozen=True)
class _Plan:
    vocab_size: int
    ignore_index: int
    chunk_size: int
    matmul_dtype: torch.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.matmul_dtype, torch.float32)

    def chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(tokens, their hidden states ready for the matmul, their targets) of each chunk."""
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.flatten()
        for first in range(0, len(targets), self.chunk_size):
            tokens = slice(first, first + self.chunk_size)
            yield tokens, hidden[tokens].to(self.matmul_dtype), targets[tokens]

    def head(self, weight: Tensor) -> Tensor:
        """The real words' rows, ready for the matmul."""
        return weight[: self.vocab_size].to(self.matmul_dtype)

    def log_softmax(self, hidden: Tensor, head: Tensor) -> Tensor:
        return torch.log_softmax((hidden @ head.t()).to(self.sum_dtype), dim=-1)

    def losses(self, log_softmax: Tensor, targets: Tensor) -> Tensor:
        ignored = targets == self.ignore_index
        index = targets.masked_fill(ignored, 0).unsqueeze(1)
        return -log_softmax.gather(1, index).squeeze(1).masked_fill(ignored, 0)

    def dlogits(self, log_softmax: Tensor, targets: Tensor, dlosses: Tensor | None) -> Tensor:
        """`dlosses·(softmax - onehot(target))`, zero where ignored, in log_softmax's memory."""
        ignored = targets == self.ignore_index
        index = targets.masked_fill(ignored, 0).unsqueeze(1)
        gradient = log_softmax.exp_().scatter_add_(1, index, log_softmax.new_full(index.shape, -1.0))
        if dlosses is not None:
            gradient *= dlosses.unsqueeze(1)
        # A pass over all logits that a CPU can skip by looking; a GPU would have to wait for the answer.
        if not ignored.is_cpu or ignored.any():
            gradient.masked_fill_(ignored.unsqueeze(1), 0)
        return gradient.to(self.matmul_dtype)


class _Gradients:
    """The gradients of hidden and weight (None where not needed), filled chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, plan: _Plan, needs_hidden: bool, needs_weight: bool) -> None:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        self.hidden = torch.empty_like(tokens) if needs_hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=plan.sum_dtype) if needs_weight else None
        self.vocab_size = plan.vocab_size

    def add(self, tokens: slice, dlogits: Tensor, hidden: Tensor, head: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[tokens] = dlogits @ head
        if self.weight is not None:
            real = self.weight[: self.vocab_size]
            if real.dtype == dlogits.dtype:
                real.addmm_(dlogits.t(), hidden)
            else:
                real += dlogits.t() @ hidden


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
        gradients = _Gradients(hidden, weight, plan, *needs)
        total = hidden.new_zeros((), dtype=plan.sum_dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # the plan's dtypes hold
            head = plan.head(weight)
            for tokens, states, words in plan.chunks(hidden, targets):
                log_softmax = plan.log_softmax(states, head)
                total += plan.losses(log_softmax, words).sum()
                if any(needs):
                    dlogits = plan.dlogits(log_softmax, words, None)
                    gradients.add(tokens, dlogits, states, head)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.shape, ctx.weight_dtype = hidden.shape, weight.dtype
        return total

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
        ctx.save_for_backward(hidden, weight, targets)
        ctx.plan = plan
        losses = torch.empty(targets.shape, dtype=plan.sum_dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = plan.head(weight)
            for tokens, states, words in plan.chunks(hidden, targets):
                losses.view(-1)[tokens] = plan.losses(plan.log_softmax(states, head), words)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple:
        hidden, weight, targets = ctx.saved_tensors
        plan, dlosses = ctx.plan, dlosses.flatten()
        gradients = _Gradients(hidden, weight, plan, *ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            head = plan.head(weight)
            for tokens, states, words in plan.chunks(hidden, targets):
                log_softmax = plan.log_softmax(states, head)
                dlogits = plan.dlogits(log_softmax, words, dlosses[tokens])
                gradients.add(tokens, dlogits, states, head)
        dhidden = None if gradients.hidden is None else gradients.hidden.view(hidden.shape)
        dweight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        return dhidden, dweight, None, None
