"""The diagonal update's forward as a scan that is parallel in time, with Triton's associative_scan: what a walk is for.

A step is S <- a·S + b with a = 1 - eps·k^2 and b = eps·k·u, and two steps in a row are one of the same form. BLOCK_L
tokens of BLOCK_D channels are scanned at once, the state after them goes into the next. Timed at its fastest of several
block sizes, so that the comparison is with the method and not with one choice.

Legend: L tokens per row, D channels (d_inner), N state size per channel, a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import COMPILE_OPTIONS, require_gpu
from kernels.triton_math import INTERPRETED, exponential, reciprocal, sigmoid

CONFIGS = [
    triton.Config({"BLOCK_L": tokens, "BLOCK_D": channels}, num_warps=warps)
    for tokens, channels, warps in ((32, 8, 4), (32, 16, 4), (64, 8, 4), (64, 8, 8), (64, 16, 8), (128, 8, 8))
]


@triton.jit
def _then(decay, added, next_decay, next_added):
    return next_decay * decay, next_decay * added + next_added


# The interpreter has no clock to choose by.
@triton.autotune(CONFIGS[:1] if INTERPRETED else CONFIGS, key=[])
@triton.jit
def _kernel(u, dt, z, q, k, skip, dt_bias, out, L, D, N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    step = tl.arange(0, BLOCK_L)
    n = tl.arange(0, N)
    weight = tl.load(skip + d, mask=d < D, other=0.0)[None, :]
    bias = tl.load(dt_bias + d, mask=d < D, other=0.0)[None, :]
    state = tl.zeros([BLOCK_D, N], tl.float32)
    for start in range(0, L, BLOCK_L):
        t = start + step
        in_row = (t < L)[:, None]
        inside = in_row & (d < D)[None, :]
        stream = (row * L + t)[:, None] * D + d[None, :]
        keys = (row * L + t)[:, None] * N + n[None, :]
        ut = tl.load(u + stream, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(dt + stream, mask=inside, other=0.0).to(tl.float32) + bias
        kt = tl.load(k + keys, mask=in_row, other=0.0).to(tl.float32)
        qt = tl.load(q + keys, mask=in_row, other=0.0).to(tl.float32)

        eps = reciprocal(1.0 + exponential(-tl.maximum(x, -80.0)) + tl.sum(kt * kt, 1)[:, None])
        gain = eps[:, :, None] * kt[:, None, :]
        decay, added = tl.associative_scan((1.0 - gain * kt[:, None, :], gain * ut[:, :, None]), 0, _then)
        states = decay * state[None, :, :] + added
        y = weight * ut + tl.sum(states * qt[:, None, :], 2)
        state = tl.sum(tl.where((step == BLOCK_L - 1)[:, None, None], states, 0.0), 0)

        gate = tl.load(z + stream, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + stream, (y * gate * sigmoid(gate)).to(out.dtype.element_ty), mask=inside)


def associative_scan(u: Tensor, dt: Tensor, z: Tensor, q: Tensor, k: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """`longhorn_scan`'s output for contiguous tensors on a GPU, d_state a power of two; not differentiable."""
    require_gpu("u", u)
    batch, seqlen, d_inner = u.shape
    out = torch.empty_like(u)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(d_inner, meta["BLOCK_D"]), batch

    _kernel[grid](u, dt, z, q, k, D, dt_bias, out, seqlen, d_inner, N=k.shape[2], **COMPILE_OPTIONS)
    return out
