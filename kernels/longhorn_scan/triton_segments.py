"""Long rows of a small batch: time is cut into segments that walk side by side (diagonal update).

A row of 32768 tokens at batch 1 is 128 programs for 4096 channels, an eighth of what an H100 holds. The diagonal
update is linear in the state, entry by entry, so a segment maps the state that enters it to

    S_after = S_before - lost * S_before + local

with `local` the state it ends in when it starts from zero, and `lost` = 1 - Π (1 - eps k²). A first pass walks every
segment for these two, they are joined one after another, and the scan itself walks the segments from the states that
enter them. The adjoint goes back through a segment the same way, with the same `lost`. Keeping `lost`, not the product
itself, keeps the delta form's accuracy: a product of factors that round to 1 would lose what is forgotten slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.longhorn_scan.triton_rule import step_size
from kernels.scan.triton_kernels import channel_constant
from kernels.scan.triton_scan import FORWARD_STEPS, Inputs
from kernels.scan.triton_walk import LANES, Walks, at, empty_tiles, load_row, strides, tile_of, walk_span
from kernels.triton_launch import COMPILE_OPTIONS
from kernels.triton_math import sigmoid


@triton.jit
def _summarise_token(
    local, lost, value, dt, z, norm, row, bias, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BACK: tl.constexpr
):
    """Take one token, whose keys lie at `row`, into (local, lost); value: u, or if BACK d_out."""
    n = tl.arange(0, BLOCK_N)
    k = tl.load(row + n)[:, None]
    eps, _ = step_size(dt.to(tl.float32), bias, norm)
    gain = eps[None, :] * k
    value = value.to(tl.float32)
    if BACK:
        if GATED:
            z = z.to(tl.float32)
            value *= z * sigmoid(z)
        g = tl.fma(value[None, :], tl.load(row + BLOCK_N + n)[:, None], local)
        local = g - k * (gain * g)
    else:
        local = tl.fma(gain, value[None, :] - k * local, local)
    return local, tl.fma(gain, k - k * lost, lost)


@triton.jit
def _summarise_group(
    local, lost, t, source, dt, z, keys, norms, bias, d, in_d, source_step, dt_step, z_step,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, BACK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Take STEPS tokens from t on into (local, lost), back in time if BACK."""
    t = tl.cast(t, tl.int64)
    source, dt, z = at(source, t, source_step) + d, at(dt, t, dt_step) + d, at(z, t, z_step) + d
    values, dts, zs, sums = (), (), (), ()
    for i in tl.static_range(STEPS):
        values = values + (load_row(source + i * source_step, in_d, EVEN),)
        dts = dts + (load_row(dt + i * dt_step, in_d, EVEN),)
        sums = sums + (tl.load(norms + (t + i)),)
        zs = zs + ((load_row(z + i * z_step, in_d, EVEN) if GATED else values[i]),)
    for j in tl.static_range(STEPS):
        if BACK:
            local, lost = _summarise_token(
                local, lost, values[STEPS - 1 - j], dts[STEPS - 1 - j], zs[STEPS - 1 - j], sums[STEPS - 1 - j],
                at(keys, t + STEPS - 1 - j, 2 * BLOCK_N), bias, GATED, BLOCK_N, BACK,
            )  # fmt: skip
        else:
            local, lost = _summarise_token(
                local, lost, values[j], dts[j], zs[j], sums[j],
                at(keys, t + j, 2 * BLOCK_N), bias, GATED, BLOCK_N, BACK,
            )  # fmt: skip
    return local, lost


@triton.jit(do_not_specialize=["L", "segment"], do_not_specialize_on_alignment=["locals", "losses"])
def summary_kernel(
    source, dt, z, keys, norms, dt_bias, locals, losses,
    source_row, source_step, dt_row, dt_step, z_row, z_step,
    L, D, segment,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    BACK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write locals and losses (walks, blocks, BLOCK_N, LANES) of all segments but each row's last, or first if BACK.

    source: u, or if BACK d_out.
    """
    sequence, part = tl.program_id(2), tl.program_id(1)
    if BACK:
        part += 1
    row, start, end = walk_span(None, sequence, part, L, segment)
    walk = sequence.to(tl.int64) * (tl.num_programs(1) + 1) + part
    lane = tl.arange(0, LANES)
    d = tl.program_id(0) * LANES + lane
    in_d = d < D
    bias = channel_constant(dt_bias, d, in_d, EVEN)
    source = at(source, row, source_row)
    dt = at(dt, row, dt_row)
    z_start = source if z is None else at(z, row, z_row)
    keys = at(keys, row * L, 2 * BLOCK_N)
    norms += row * L

    local = tl.zeros([BLOCK_N, LANES], tl.float32)
    lost = tl.zeros([BLOCK_N, LANES], tl.float32)
    groups = (end - start) // STEPS
    if BACK:
        for j in range(end - start - groups * STEPS):
            local, lost = _summarise_group(
                local, lost, end - 1 - j, source, dt, z_start, keys, norms, bias, d, in_d, source_step, dt_step, z_step,
                z is not None, BLOCK_N, EVEN, BACK, 1,
            )  # fmt: skip
    for j in range(groups):
        group = groups - 1 - j if BACK else j
        local, lost = _summarise_group(
            local, lost, start + group * STEPS, source, dt, z_start, keys, norms, bias, d, in_d,
            source_step, dt_step, z_step, z is not None, BLOCK_N, EVEN, BACK, STEPS,
        )  # fmt: skip
    tl.store(tile_of(locals, walk, lane, BLOCK_N), local)
    tl.store(tile_of(losses, walk, lane, BLOCK_N), lost)


@triton.jit(do_not_specialize=["segments"])
def join_kernel(locals, losses, boundary, entering, segments, size, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """From a row's boundary (rows, size), or zero, to what enters each of its segments (rows, segments, size)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = i < size
    state = tl.zeros([BLOCK], tl.float32)
    if boundary is not None:
        state += tl.load(boundary + row * size + i, mask=mask)
    for j in range(segments):
        segment = segments - 1 - j if BACK else j
        place = (row * segments + segment) * size + i
        tl.store(entering + place, state, mask=mask)
        if j + 1 < segments:
            lost = tl.load(losses + place, mask=mask)
            state += tl.load(locals + place, mask=mask) - lost * state


def _enter(source: Tensor, x: Inputs, z: Tensor | None, boundary: Tensor | None, walks: Walks, back: bool) -> Tensor:
    local, lost, entering = (empty_tiles(walks, walks.count, source.device) for _ in range(3))
    size, block = entering[0].numel(), 1024
    with torch.cuda.device_of(source):
        summary_kernel[walks.blocks, walks.segments - 1, walks.sequences](
            source, x.dt, z, x.rows, x.norms, x.dt_bias, local, lost,
            *strides(source), *strides(x.dt), *strides(z), walks.seqlen, walks.d_inner, walks.segment,
            BACK=back, STEPS=FORWARD_STEPS, **walks.options(),
        )  # fmt: skip
        join_kernel[triton.cdiv(size, block), walks.sequences](
            local, lost, boundary, entering, walks.segments, size, BLOCK=block, BACK=back, **COMPILE_OPTIONS
        )
    return entering


def states_entering(x: Inputs, initial: Tensor | None, walks: Walks) -> Tensor:
    """The state before each segment, as tiles; initial: tiles of the rows' own, or None for zeros."""
    return _enter(x.u, x, None, initial, walks, back=False)


def adjoints_entering(x: Inputs, d_out: Tensor, d_final: Tensor | None, walks: Walks) -> Tensor:
    """The derivative by the state after each segment, as tiles; d_final: tiles of the rows' own, or None for zeros."""
    return _enter(d_out, x, x.z, d_final, walks, back=True)
