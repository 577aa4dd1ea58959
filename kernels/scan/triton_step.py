"""A scan's decode step as one Triton kernel, around its rule: one token per row of a batch, the state in place.

A program takes BLOCK_D channels of one row: 32 to a warp, so that 4096 channels of one sequence already occupy 128 of
an H100's 132 multiprocessors. The state is read as it lies in memory, 16 bytes a thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scan.triton_scan import Rule
from kernels.triton_launch import COMPILE_OPTIONS, require_gpu, with_adjacent_channels
from kernels.triton_math import sigmoid

BLOCK_D = 32
NUM_WARPS = 1


@triton.jit
def _channels(pointer, d, in_d):
    """fp32 numbers of the channels; zeros for None."""
    if pointer is None:
        x = tl.zeros(d.shape, tl.float32)
    else:
        x = tl.load(pointer + d, mask=in_d, other=0.0).to(tl.float32)
    return x


@triton.jit
def step_kernel(
    state, u, dt, first, second, rates, skip, dt_bias, z, state_indices, out,
    state_stride, channel_stride, entry_stride, u_stride, dt_stride, first_stride, second_stride, rate_stride, z_stride,
    D, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RATE_SCALE: tl.constexpr,
    ADVANCE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Advance one row by one token for BLOCK_D channels; a row without a state (index below 0) gets zeros."""
    row = tl.program_id(0).to(tl.int64)  # of the two the axis without a limit that a batch might meet
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d, in_n = d < D, n < N
    index = row
    if state_indices is not None:
        index = tl.load(state_indices + row).to(tl.int64)
        if index < 0:
            tl.store(out + row * D + d, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=in_d)
            return
    place = state + index * state_stride + d[None, :] * channel_stride + n[:, None] * entry_stride
    in_tile = in_n[:, None] & in_d[None, :]
    s = tl.load(place, mask=in_tile, other=0.0)
    a = tl.load(first + row * first_stride + n, mask=in_n, other=0.0).to(tl.float32)
    b = tl.load(second + row * second_stride + n, mask=in_n, other=0.0).to(tl.float32)
    own = s
    if rates is not None:
        own = tl.load(rates + d[None, :] * rate_stride + n[:, None], mask=in_tile, other=0.0) * RATE_SCALE
    ut = _channels(u + row * u_stride, d, in_d)
    dtt = _channels(dt + row * dt_stride, d, in_d)
    s, _ = ADVANCE(s, ut, dtt, _channels(dt_bias, d, in_d), 1.0 + tl.sum(a * a, 0), a, own, VARIANT)
    tl.store(place, s, mask=in_tile)
    y = tl.fma(_channels(skip, d, in_d), ut, tl.sum(s * b[:, None], 0))
    if z is not None:
        zt = _channels(z + row * z_stride, d, in_d)
        y *= zt * sigmoid(zt)
    tl.store(out + row * D + d, y.to(out.dtype.element_ty), mask=in_d)


def triton_step(
    rule: Rule,
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    first: Tensor,
    second: Tensor,
    rates: Tensor | None,
    skip: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state_indices: Tensor | None,
) -> Tensor:
    """Advance `state` (rows, D, N) fp32, of any strides, and return out (batch, D) in u's dtype.

    u, dt, z: (batch, D); first, second: (batch, N), the rule's rows; rates: (D, N) or None; skip, dt_bias: (D,).
    Nothing waits for the host, so that a CUDA graph may hold it.

    Raises:
        TypeError: a state that is not fp32.
        ValueError: tensors that are not on a GPU, unless under Triton's interpreter.
    """
    if state.dtype != torch.float32:
        raise TypeError(f"the Triton step keeps its state in fp32, not {state.dtype}")
    require_gpu("state", state)
    rows = [with_adjacent_channels(t) for t in (u, dt, first, second, rates, z)]
    skip, dt_bias, state_indices = (with_adjacent_channels(t) for t in (skip, dt_bias, state_indices))
    (batch, d_inner), d_state = u.shape, state.shape[2]
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    with torch.cuda.device_of(u):
        step_kernel[batch, triton.cdiv(d_inner, BLOCK_D)](
            state, *rows[:5], skip, dt_bias, rows[5], state_indices, out,
            *state.stride(), *(0 if t is None else t.stride(0) for t in rows), d_inner,
            N=d_state, BLOCK_N=triton.next_power_of_2(d_state), BLOCK_D=BLOCK_D, RATE_SCALE=rule.rate_scale,
            ADVANCE=rule.advance, VARIANT=rule.variant, num_warps=NUM_WARPS, **COMPILE_OPTIONS,
        )  # fmt: skip
    return out
