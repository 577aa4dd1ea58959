"""The softmax part of a chunk in Triton: one read of the logits, then one read and write in place.

Legend: V real words of this rank, WIDTH columns of the logits' buffer, T distance of the statistics'
rows. The contract of both functions is that of kernels.cross_entropy.chunked.Softmax. Per logit of b
bytes the statistics move b and the gradient 2b, and nothing else of the logits' size is made. Loads
and stores cover the buffer's padding, whose contents are replaced: a mask that may end anywhere in a
row would break accesses of 16 bytes into single elements.

Compiled for sm_90, a column of bf16 takes 11 instructions in the statistics and 17 in the gradient.
An H100 has time for about 17 while its memory moves 2 bytes, 34 for 4: memory should be the limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import COMPILE_OPTIONS, require_gpu
from kernels.triton_math import exponential

# Columns at a time: 16 per thread, so that two 16-byte loads of bf16 (four of fp32) are in flight.
BLOCK = 4096
NUM_WARPS = 8
ACCESS_BYTES = 16  # of one thread's widest load


@triton.jit
def _target(targets, token, V):
    """The token's target as a column, -1 where it is not one of this rank's."""
    target = tl.load(targets + token)
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit(do_not_specialize=["V", "T"])
def statistics_kernel(
    logits, targets, statistics,
    V, WIDTH, T,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One token: write its maximum, sum of exponentials, and target's logit.

    A row of the tile is one thread's load of VECTOR neighbours, with a running maximum and sum of
    its own: no thread waits for another inside the loop, and rescaling costs one exponential a row.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * WIDTH
    lane = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + lane
        x = tl.load(row + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        x = tl.where(column < V, x, float("-inf"))
        # The maximum may drop a NaN; x - shift keeps it.
        larger = tl.maximum(maximum, tl.max(x, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * exponential(maximum - shift) + tl.sum(exponential(x - shift[:, None]), 1)
        maximum = larger
    whole = tl.max(maximum, 0)
    shift = tl.where(whole == float("-inf"), 0.0, whole)
    tl.store(statistics + token, whole)
    tl.store(statistics + T + token, tl.sum(total * exponential(maximum - shift), 0))
    target = _target(targets, token, V)
    tl.store(statistics + 2 * T + token, tl.load(row + target, mask=target >= 0, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["V", "T"])
def gradient_kernel(
    logits, targets, statistics, scale,
    V, WIDTH, T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token and BLOCK columns: `scale * (softmax - onehot)` in the logits' place, zero in the padding."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits + token * WIDTH + column
    maximum, total = tl.load(statistics + token), tl.load(statistics + T + token)
    factor = tl.load(scale + token)
    x = tl.load(here, mask=column < WIDTH, other=0.0).to(tl.float32)
    gradient = exponential(x - maximum) * (factor / total)
    gradient = tl.where(column == _target(targets, token, V), gradient - factor, gradient)
    # Not left to the product with factor: an ignored token's gradient is zero even where its logits are NaN.
    end = tl.where(factor == 0.0, 0, V)
    tl.store(here, tl.where(column < end, gradient, 0.0).to(logits.dtype.element_ty), mask=column < WIDTH)


def statistics(logits: Tensor, words: int, targets: Tensor) -> Tensor:
    """Maximum, Σ exp(logit − maximum), the target's logit, by one program per token.

    Raises:
        ValueError: logits that are not on a GPU, unless under Triton's interpreter.
    """
    require_gpu("hidden", logits)
    out = torch.empty((3, len(logits)), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        statistics_kernel[(len(logits),)](
            logits, targets, out,
            words, logits.stride(0), len(logits),
            BLOCK=BLOCK, VECTOR=ACCESS_BYTES // logits.element_size(), num_warps=NUM_WARPS, **COMPILE_OPTIONS,
        )  # fmt: skip
    return out


def gradient(logits: Tensor, words: int, targets: Tensor, statistics: Tensor, scale: Tensor) -> Tensor:
    """scale·(softmax − onehot), in logits' memory."""
    with torch.cuda.device_of(logits):
        gradient_kernel[len(logits), triton.cdiv(words, BLOCK)](
            logits, targets, statistics, scale,
            words, logits.stride(0), statistics.stride(0),
            BLOCK=BLOCK, num_warps=NUM_WARPS, **COMPILE_OPTIONS,
        )  # fmt: skip
    return logits[:, :words]
