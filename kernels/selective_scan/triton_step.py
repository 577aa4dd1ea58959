"""The decode step as one Triton kernel: dt bias, update, read-out, D and gate, the state in place."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scan.triton_step import BLOCK_D, NUM_WARPS, load_channels, prepare, read_out, row_stride, state_row
from kernels.selective_scan.triton_rule import softplus
from kernels.triton_launch import COMPILE_OPTIONS
from kernels.triton_math import power_of_two


@triton.jit
def step_kernel(
    state, u, dt, A, B, C, skip, dt_bias, z, state_indices, out,
    state_stride, channel_stride, entry_stride, u_stride, dt_stride, A_stride, B_stride, C_stride, z_stride,
    D, log2_e, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Advance one row by one token for BLOCK_D channels; a row without a state gets zeros."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = d < D
    index = state_row(state_indices, row)
    if index < 0:
        tl.store(out + row * D + d, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=in_d)
        return
    place = state + index * state_stride + d[:, None] * channel_stride + n[None, :] * entry_stride
    in_tile = in_d[:, None] & (n < N)[None, :]
    s = tl.load(place, mask=in_tile, other=0.0)
    rates = tl.load(A + d[:, None] * A_stride + n[None, :], mask=in_tile, other=0.0).to(tl.float32) * log2_e
    Bt = tl.load(B + row * B_stride + n, mask=n < N, other=0.0).to(tl.float32)
    Ct = tl.load(C + row * C_stride + n, mask=n < N, other=0.0).to(tl.float32)
    ut = load_channels(u + row * u_stride, d, in_d)
    delta = softplus(load_channels(dt + row * dt_stride, d, in_d) + load_channels(dt_bias, d, in_d))
    s = tl.fma(power_of_two(delta[:, None] * rates), s, (delta * ut)[:, None] * Bt[None, :])
    tl.store(place, s, mask=in_tile)
    z_row = None if z is None else z + row * z_stride
    y = read_out(s, Ct, ut, z_row, skip, d, in_d)
    tl.store(out + row * D + d, y.to(out.dtype.element_ty), mask=in_d)


def triton_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state_indices: Tensor | None,
) -> Tensor:
    """`selective_step` on a GPU: nothing waits for the host, so that a CUDA graph may hold it."""
    u, dt, A, B, C, D, dt_bias, z = prepare(state, u, dt, A, B, C, D, dt_bias, z)
    batch, d_inner = u.shape
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(u):
        step_kernel[triton.cdiv(d_inner, BLOCK_D), batch](
            state, u, dt, A, B, C, D, dt_bias, z, state_indices, out,
            *state.stride(), *map(row_stride, (u, dt, A, B, C, z)), d_inner, math.log2(math.e),
            N=state.shape[2], BLOCK_N=triton.next_power_of_2(state.shape[2]), BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS, **COMPILE_OPTIONS,
        )  # fmt: skip
    return out
