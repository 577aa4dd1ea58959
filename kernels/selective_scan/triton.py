"""The Triton backend of the selective scan, in autograd's terms."""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.scan import triton_scan as walk
from kernels.scan import triton_step as decode
from kernels.scan.triton_walk import Walks, from_tiles, pack_rows, to_tiles
from kernels.selective_scan import triton_rule
from kernels.triton_launch import with_adjacent_channels


def _backward_steps(block_n: int, dtype: torch.dtype) -> int:
    return 2 if block_n <= 16 else 1  # a group's decays lie beside its states, and A beside its gradient


RULE = walk.Rule(triton_rule.advance, triton_rule.retreat, 0, _backward_steps, rate_scale=math.log2(math.e))


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        skip: Tensor | None,
        dt_bias: Tensor | None,
        z: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        walks = Walks.of(u, B.shape[-1], cu_seqlens)
        rates = to_tiles(A.float().unsqueeze(0) * RULE.rate_scale, walks)
        x = walk.Inputs(u, dt, z, *pack_rows(B, C, walks, with_norms=False), skip, dt_bias, rates, cu_seqlens)
        out, final, checkpoints = walk.forward(RULE, x, walks, to_tiles(initial, walks), keep)
        ctx.save_for_backward(checkpoints, *x)
        ctx.walks, ctx.row_dtypes, ctx.rate_dtype = walks, (B.dtype, C.dtype), A.dtype
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return out, from_tiles(final, walks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        checkpoints, *inputs = ctx.saved_tensors
        x, walks = walk.Inputs(*inputs), ctx.walks
        d_out = torch.zeros_like(x.u) if d_out is None else with_adjacent_channels(d_out)
        with_initial = ctx.initial_dtype is not None
        d_final = to_tiles(d_final, walks)
        d = walk.backward(RULE, x, walks, checkpoints, d_out, d_final, ctx.row_dtypes, with_initial)
        d_initial = None if d.initial is None else from_tiles(d.initial, walks).to(ctx.initial_dtype)
        d_rates = None if d.rates is None else d.rates.to(ctx.rate_dtype)
        return d.u, d.dt, d_rates, d.first, d.second, d.skip, d.dt_bias, d.z, d_initial, None, None


def triton_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`kernels.selective_scan.selective_scan` on a GPU, its arguments checked there.

    Args:
        u, dt, z: (B, L, D) bf16, fp16 or fp32, mixed as they come; z may be None. Channels that lie side by side are
            read in place whatever the other strides; others are copied.
        A: (D, N); B, C: (B, L, N); N at most 64.
        D, dt_bias: (D,) or None.
        initial_state: (B or n_seq, D, N) fp32 or None (zeros).
        cu_seqlens: (n_seq + 1,) int32, first 0, last L, on u's device, B = 1; or None.

    Returns:
        out (B, L, D) in u's dtype, final state (B or n_seq, D, N) fp32; differentiable once in every tensor, each
        gradient in its input's dtype, from both results.

    Raises:
        TypeError: fp64 inputs (the kernels compute in fp32).
        ValueError: tensors that are not on a GPU, unless under Triton's interpreter; more than 65535 sequences; a
            d_state above 64.
    """
    tensors = walk.check_triton(u, dt, A, B, C, D, dt_bias, z)
    keep = walk.wants_gradient(*tensors, initial_state)
    return _TritonScan.apply(*tensors, initial_state, with_adjacent_channels(cu_seqlens), keep)


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
    """`kernels.selective_scan.selective_step` on a GPU, as one kernel."""
    return decode.triton_step(RULE, state, u, dt, B, C, A, D, dt_bias, z, state_indices)
