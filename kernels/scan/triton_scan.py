"""What a Triton scan launches: its rule's walk forward, and back with every partial sum added in a fixed order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.scan.triton_kernels import backward_kernel, forward_kernel
from kernels.scan.triton_walk import (
    CHUNK,
    Walks,
    empty_tiles,
    from_tiles,
    strides,
    unpack_gradients,
    warps,
)
from kernels.triton_launch import refuse_fp64, require_gpu, with_adjacent_channels

# Tokens of a forward group, whose rows are all read before the first is walked: 32 numbers each of keys alone.
FORWARD_STEPS = 4
# Of a backward launch: bounds the scratch however many rows or documents there are, and leaves room for 4096 programs
# of 16 states in bf16, four times what an H100 runs at once.
SCRATCH_BYTES = 160 * 2**20


@dataclass(frozen=True)
class Rule:
    """What a token does to the state (`triton_kernels` says what the functions are given), and its adjoint's way back.

    backward_steps: (BLOCK_N, stream dtype) -> tokens of a backward group, a divisor of CHUNK: as many as a thread has
    registers for all their states, spilling none on sm_80 and sm_90 (`python -m kernels.benchmarks.compiled`).
    rate_scale: what the channels' own numbers are multiplied by.
    """

    advance: Any
    retreat: Any
    variant: int
    backward_steps: Callable[[int, torch.dtype], int]
    rate_scale: float = 1.0


class Inputs(NamedTuple):
    """A scan's tensors as kernels take them: streams with adjacent channels, `rows` packed, `rates` as tiles."""

    u: Tensor
    dt: Tensor
    z: Tensor | None
    rows: Tensor
    norms: Tensor | None
    skip: Tensor | None
    dt_bias: Tensor | None
    rates: Tensor | None
    cu_seqlens: Tensor | None


class Gradients(NamedTuple):
    """Each in its input's dtype; initial as tiles, rates as (D, N) fp32."""

    u: Tensor
    dt: Tensor
    z: Tensor | None
    first: Tensor
    second: Tensor
    skip: Tensor | None
    dt_bias: Tensor | None
    rates: Tensor | None
    initial: Tensor | None


def check_triton(u: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """u and the others with adjacent channels.

    Raises TypeError for fp64, ValueError for tensors that are not on a GPU (unless under Triton's interpreter).
    """
    given = (u, *tensors)
    refuse_fp64(*(t.dtype for t in given if t is not None))
    require_gpu("u", u)
    return [with_adjacent_channels(t) for t in given]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may come: then the forward keeps states for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forward(
    rule: Rule, x: Inputs, walks: Walks, initial: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, the state after each walk as tiles, and where `keep` the states that `backward` starts from."""
    u = x.u
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = empty_tiles(walks, walks.count, u.device)
    checkpoints = empty_tiles(walks, walks.slots, u.device) if keep else None
    with torch.cuda.device_of(u):
        forward_kernel[walks.blocks, walks.segments, walks.sequences](
            u, x.dt, x.z, x.rows, x.norms, x.skip, x.dt_bias, x.rates, initial, x.cu_seqlens, out, final, checkpoints,
            *strides(u), *strides(x.dt), *strides(x.z), walks.seqlen, walks.d_inner, walks.segment,
            STEPS=FORWARD_STEPS, ADVANCE=rule.advance, VARIANT=rule.variant, **walks.options(),
        )  # fmt: skip
    return out, final, checkpoints


def backward(
    rule: Rule,
    x: Inputs,
    walks: Walks,
    checkpoints: Tensor,
    d_out: Tensor,
    d_final: Tensor | None,
    row_dtypes: tuple[torch.dtype, torch.dtype],
    with_initial: bool,
) -> Gradients:
    """From the derivatives by out (adjacent channels) and by the state after each walk (tiles) to all others."""
    u = x.u
    d_u, d_dt = (_empty(u, *t.shape, dtype=t.dtype) for t in (u, x.dt))
    d_z = None if x.z is None else _empty(u, *x.z.shape, dtype=x.z.dtype)
    d_rows = _empty(u, walks.blocks, walks.tokens, 2, walks.block_n)
    d_norms = None if x.norms is None else _empty(u, walks.blocks, walks.tokens)
    d_skip, d_bias = (None if p is None else _empty(u, walks.count, walks.d_inner) for p in (x.skip, x.dt_bias))
    d_initial = empty_tiles(walks, walks.count, u.device) if with_initial else None
    sum_rates = None if x.rates is None else torch.zeros_like(x.rates)
    steps = rule.backward_steps(walks.block_n, u.dtype)
    slots = walks.segments * (CHUNK // steps + steps)  # of a sequence, in each block of channels
    group = max(1, min(walks.sequences, SCRATCH_BYTES // max(1, slots * walks.blocks * walks.tile_bytes)))
    scratch = empty_tiles(walks, group * slots, u.device)
    d_rates = None if x.rates is None else empty_tiles(walks, group * walks.segments, u.device)
    with torch.cuda.device_of(u):
        for first in range(0, walks.sequences, group):
            count = min(group, walks.sequences - first)
            backward_kernel[walks.blocks, walks.segments, count](
                u, x.dt, x.z, x.rows, x.norms, x.skip, x.dt_bias, x.rates, x.cu_seqlens, checkpoints, d_out, d_final,
                d_u, d_dt, d_z, d_rows, d_norms, d_skip, d_bias, d_rates, d_initial, scratch,
                *strides(u), *strides(x.dt), *strides(x.z), *strides(d_out),
                walks.seqlen, walks.d_inner, walks.segment, walks.tokens, first,
                STEPS=steps, WARPS=warps(walks.block_n),
                ADVANCE=rule.advance, RETREAT=rule.retreat, VARIANT=rule.variant, **walks.options(),
            )  # fmt: skip
            if sum_rates is not None and d_rates is not None:
                sum_rates += d_rates[: count * walks.segments].sum(0, keepdim=True)
    d_first, d_second = unpack_gradients(d_rows, walks, row_dtypes, d_norms, x.rows)
    return Gradients(
        *(d_u, d_dt),
        z=d_z,
        first=d_first,
        second=d_second,
        skip=None if x.skip is None or d_skip is None else d_skip.sum(0).to(x.skip.dtype),
        dt_bias=None if x.dt_bias is None or d_bias is None else d_bias.sum(0).to(x.dt_bias.dtype),
        rates=None if sum_rates is None else from_tiles(sum_rates, walks)[0],
        initial=None if d_initial is None else d_initial[:: walks.segments],
    )


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
