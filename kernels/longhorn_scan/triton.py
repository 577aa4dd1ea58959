"""The Triton backend of the Longhorn scan, in autograd's terms."""

from typing import Any

import torch
from torch import Tensor

from kernels.longhorn_scan import triton_rule
from kernels.longhorn_scan.triton_segments import adjoints_entering, states_entering
from kernels.scan import triton_scan as walk
from kernels.scan import triton_step as decode
from kernels.scan.triton_walk import Walks, from_tiles, pack_rows, to_tiles
from kernels.triton_launch import with_adjacent_channels


def _backward_steps(block_n: int, dtype: torch.dtype) -> int:
    return 4 if block_n <= 16 and dtype.itemsize == 2 else 2  # more warps, and fp32 on sm_80, leave a few less


RULES = {
    "diagonal": walk.Rule(triton_rule.advance, triton_rule.retreat, triton_rule.DIAGONAL, _backward_steps),
    "exact": walk.Rule(triton_rule.advance, triton_rule.retreat, triton_rule.EXACT, _backward_steps),
}


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        q: Tensor,
        k: Tensor,
        skip: Tensor | None,
        dt_bias: Tensor | None,
        z: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        update: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        walks = Walks.of(u, k.shape[-1], cu_seqlens, cut_time=update == "diagonal")
        x = walk.Inputs(u, dt, z, *pack_rows(k, q, walks, with_norms=True), skip, dt_bias, None, cu_seqlens)
        entering = to_tiles(initial, walks)
        if walks.segments > 1:
            entering = states_entering(x, entering, walks)
        out, final, checkpoints = walk.forward(RULES[update], x, walks, entering, keep)
        ctx.save_for_backward(checkpoints, *x)
        ctx.walks, ctx.update, ctx.row_dtypes = walks, update, (k.dtype, q.dtype)
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return out, from_tiles(final[walks.segments - 1 :: walks.segments], walks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        checkpoints, *inputs = ctx.saved_tensors
        x, walks = walk.Inputs(*inputs), ctx.walks
        d_out = torch.zeros_like(x.u) if d_out is None else with_adjacent_channels(d_out)
        entering = to_tiles(d_final, walks)
        if walks.segments > 1:
            entering = adjoints_entering(x, d_out, entering, walks)
        with_initial = ctx.initial_dtype is not None
        d = walk.backward(RULES[ctx.update], x, walks, checkpoints, d_out, entering, ctx.row_dtypes, with_initial)
        d_initial = None if d.initial is None else from_tiles(d.initial, walks).to(ctx.initial_dtype)
        return d.u, d.dt, d.second, d.first, d.skip, d.dt_bias, d.z, d_initial, None, None, None


def triton_scan(
    u: Tensor,
    dt: Tensor,
    q: Tensor,
    k: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    update: str,
) -> tuple[Tensor, Tensor]:
    """`kernels.longhorn_scan.longhorn_scan` on a GPU, its arguments checked there.

    Args:
        u, dt, z: (B, L, D) bf16, fp16 or fp32, mixed as they come; z may be None. Channels that lie side by side are
            read in place whatever the other strides; others are copied.
        q, k: (B, L, N), likewise; N at most 64.
        D, dt_bias: (D,) or None.
        initial_state: (B or n_seq, D, N) fp32 or None (zeros).
        cu_seqlens: (n_seq + 1,) int32, first 0, last L, on u's device, B = 1; or None. Documents may be empty: their
            final state is their initial one.
        update: "diagonal" or "exact". A diagonal update over long rows of a small batch is cut in time.

    Returns:
        out (B, L, D) in u's dtype, final state (B or n_seq, D, N) fp32; differentiable once in every tensor, each
        gradient in its input's dtype, from both results.

    Raises:
        TypeError: fp64 inputs (the kernels compute in fp32).
        ValueError: tensors that are not on a GPU, unless under Triton's interpreter; more than 65535 sequences; a
            d_state above 64.
    """
    tensors = walk.check_triton(u, dt, q, k, D, dt_bias, z)
    keep = walk.wants_gradient(*tensors, initial_state)
    return _TritonScan.apply(*tensors, initial_state, with_adjacent_channels(cu_seqlens), update, keep)


def triton_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    q: Tensor,
    k: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state_indices: Tensor | None,
    update: str,
) -> Tensor:
    """`kernels.longhorn_scan.longhorn_step` on a GPU, as one kernel."""
    return decode.triton_step(RULES[update], state, u, dt, k, q, None, D, dt_bias, z, state_indices)
