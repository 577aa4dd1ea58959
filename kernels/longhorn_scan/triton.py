"""The Triton backend of the Longhorn scan: what it launches, and its place in autograd.

Gradients that cross programs (q, k: over channels; D, dt_bias: over walks) are written as partial sums and added
afterwards in a fixed order: results are the same from run to run.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.longhorn_scan.triton_kernels import backward_kernel, forward_kernel
from kernels.longhorn_scan.triton_segments import adjoints_entering, states_entering
from kernels.scan.triton_walk import (
    CHUNK,
    Walks,
    empty_tiles,
    from_tiles,
    pack_rows,
    strides,
    to_tiles,
    unpack_gradients,
    warps,
    with_adjacent_channels,
)
from kernels.triton_launch import require_gpu

# Tokens that are walked with their rows read ahead, and in the backward with all their states in registers, by state
# size and stream dtype. Four hide the latency of a read behind some 450 instructions, and the backward's, of 16 numbers
# each beside the adjoint, just fit the 255 registers of a thread (`python -m kernels.benchmarks.compiled`). More warps
# for more states, and fp32 streams on sm_80, leave a few registers less: four would spill.
FORWARD_STEPS = 4


def backward_steps(block_n: int, dtype: torch.dtype) -> int:
    """Tokens in a group of the backward; a divisor of CHUNK."""
    return 4 if block_n <= 16 and dtype.itemsize == 2 else 2


# Programs of a backward launch: bounds the scratch (38 KB each for N = 16) however many rows or documents there are.
PROGRAMS_PER_LAUNCH = 4096


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
        exact: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        walks = Walks.of(u, k.shape[-1], cu_seqlens, cut_time=not exact)
        keys, norms = pack_rows(k, q, walks, with_norms=True)
        ctx.initial_dtype = None if initial is None else initial.dtype
        initial = to_tiles(initial, walks)
        if walks.segments > 1:
            initial = states_entering(u, dt, keys, norms, dt_bias, initial, walks)
        out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        final = empty_tiles(walks, walks.count, u.device)
        checkpoints = empty_tiles(walks, walks.slots, u.device) if needs_grad else None
        with torch.cuda.device_of(u):
            forward_kernel[walks.blocks, walks.segments, walks.sequences](
                u, dt, z, keys, norms, skip, dt_bias, initial, cu_seqlens, out, final, checkpoints,
                *strides(u), *strides(dt), *strides(z), walks.seqlen, walks.d_inner, walks.segment,
                EXACT=exact, STEPS=FORWARD_STEPS, **walks.options(),
            )  # fmt: skip
        ctx.save_for_backward(u, dt, skip, dt_bias, z, cu_seqlens, keys, norms, checkpoints)
        ctx.walks, ctx.exact, ctx.key_dtypes = walks, exact, (k.dtype, q.dtype)
        ctx.set_materialize_grads(False)
        return out, from_tiles(final[walks.segments - 1 :: walks.segments], walks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, skip, dt_bias, z, cu_seqlens, keys, norms, checkpoints = ctx.saved_tensors
        walks: Walks = ctx.walks
        d_out = torch.zeros_like(u) if d_out is None else with_adjacent_channels(d_out)
        d_final = to_tiles(d_final, walks)
        if walks.segments > 1:
            d_final = adjoints_entering(d_out, dt, z, keys, norms, dt_bias, d_final, walks)

        d_u, d_dt = (torch.empty(t.shape, dtype=t.dtype, device=u.device) for t in (u, dt))
        d_z = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=u.device)
        d_keys = _empty(u, walks.blocks, walks.tokens, 2, walks.block_n)
        squares = _empty(u, walks.blocks, walks.tokens)
        d_skip, d_bias = (None if p is None else _empty(u, walks.count, walks.d_inner) for p in (skip, dt_bias))
        d_initial = None if ctx.initial_dtype is None else empty_tiles(walks, walks.count, u.device)
        steps = backward_steps(walks.block_n, u.dtype)
        group = max(1, min(walks.sequences, PROGRAMS_PER_LAUNCH // (walks.blocks * walks.segments)))
        scratch = empty_tiles(walks, group * walks.segments * (CHUNK // steps + steps), u.device)
        with torch.cuda.device_of(u):
            for first in range(0, walks.sequences, group):
                backward_kernel[walks.blocks, walks.segments, min(group, walks.sequences - first)](
                    u, dt, z, keys, norms, skip, dt_bias, cu_seqlens, checkpoints, d_out, d_final,
                    d_u, d_dt, d_z, d_keys, squares, d_skip, d_bias, d_initial, scratch,
                    *strides(u), *strides(dt), *strides(z), *strides(d_out),
                    walks.seqlen, walks.d_inner, walks.segment, walks.tokens, first,
                    EXACT=ctx.exact, STEPS=steps, WARPS=warps(walks.block_n), **walks.options(),
                )  # fmt: skip
        d_k, d_q = unpack_gradients(d_keys, walks, ctx.key_dtypes, squares, keys)
        return (
            *(d_u, d_dt, d_q, d_k),
            None if d_skip is None else d_skip.sum(0).to(skip.dtype),
            None if d_bias is None else d_bias.sum(0).to(dt_bias.dtype),
            d_z,
            None if d_initial is None else from_tiles(d_initial[:: walks.segments], walks).to(ctx.initial_dtype),
            *(None, None, None),
        )


def _empty(u: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=u.device)


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
    tensors = [t for t in (u, dt, q, k, D, dt_bias, z, initial_state) if t is not None]
    if any(t.dtype == torch.float64 for t in tensors):
        raise TypeError("backend 'triton' computes in fp32; for float64 use backend 'cpu' or 'reference'")
    require_gpu("u", u)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    u, dt, q, k, D, dt_bias, z, cu_seqlens = (
        with_adjacent_channels(t) for t in (u, dt, q, k, D, dt_bias, z, cu_seqlens)
    )
    return _TritonScan.apply(u, dt, q, k, D, dt_bias, z, initial_state, cu_seqlens, update == "exact", needs_grad)
