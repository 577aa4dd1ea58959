"""Longhorn's walk over time as Triton kernels, forward and backward; `kernels/scan/triton_walk.py` has the legend.

README.md derives the maths. Per token, with x = dt + dt_bias held >= -80 and <k, S> standing for k[n] * S[n, d]
(diagonal update) or its sum over n (exact):

    eps[d] = 1 / (1 + e^-x[d] + sum_n k[n]^2)          r  = u - <k, S>          S += eps * k * r
    y[d]   = sum_n S[n, d] * q[n] + D[d] * u[d]        out = y * silu(z)

Back in time, with the adjoint G of the state a token leaves: g = G + dy * q, h = eps * g and

    <h> = <k, h>       G = g - k * <h>       du = sum_n <h>, exact: <h>       deps * eps = sum_n <h> * r, exact: <h> * r
    dq = sum_d dy * S  dk = sum_d h * r - <h> * S_before                      dx = (deps * eps) * (eps * e^-x)

The forward keeps the state of every CHUNK-th token. The backward takes the chunks in reverse: it walks each forward,
leaving the state of every STEPS-th token in a scratch buffer, then takes those groups in reverse: it walks each once
more, with all its states in registers, and back. The tokens that are left over at a walk's end are groups of one.

Padding of N loads as zero keys, which leave their states at zero; padding of D loads as zero inputs.
"""

import triton
import triton.language as tl

from kernels.scan.triton_walk import LANES, at, load_row, store_lane_sums, store_row, tile_of, walk_span
from kernels.triton_math import power_of_two, reciprocal, sigmoid

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_EXPONENT = tl.constexpr(80 * 1.4426950408889634)  # log2 e^-x where the clamp holds x


@triton.jit
def channel_constants(skip, dt_bias, d, in_d, EVEN: tl.constexpr):
    """D, and dt_bias as `step_size` takes it; zeros where they are None."""
    weight = tl.zeros([LANES], tl.float32)
    if skip is not None:
        weight += load_row(skip + d, in_d, EVEN).to(tl.float32)
    bias = tl.zeros([LANES], tl.float32)
    if dt_bias is not None:
        bias += load_row(dt_bias + d, in_d, EVEN).to(tl.float32) * -LOG2_E
    return weight, bias


@triton.jit
def step_size(dt, bias, norm):
    """eps, and e^-x as the gradient sees it: 0 below the clamp. bias: -log2(e) * dt_bias; norm: 1 + sum_n k^2."""
    exponent = tl.fma(dt.to(tl.float32), -LOG2_E, bias)
    e = power_of_two(tl.minimum(exponent, MAX_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
    return reciprocal(norm + e), tl.where(exponent > MAX_EXPONENT, 0.0, e)


@triton.jit
def _residual(state, u, k, EXACT: tl.constexpr):
    """u - <k, S>: a tile, or [1, LANES] if exact."""
    if EXACT:
        r = (u - tl.sum(state * k[:, None], 0))[None, :]
    else:
        r = u[None, :] - k[:, None] * state
    return r


@triton.jit
def advance(state, u, eps, k, EXACT: tl.constexpr):
    """The state after a token."""
    return tl.fma(eps[None, :] * k[:, None], _residual(state, u, k, EXACT), state)


@triton.jit
def _forward_group(
    state, t, u, dt, z, keys, norms, out, weight, bias, d, in_d, u_step, dt_step, z_step, D,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens from t on; what differs by channel is read for all of them before the first is used."""
    t = tl.cast(t, tl.int64)
    n = tl.arange(0, BLOCK_N)
    u, dt, z, out = at(u, t, u_step) + d, at(dt, t, dt_step) + d, at(z, t, z_step) + d, at(out, t, D) + d
    us, dts, zs, sums = (), (), (), ()
    for i in tl.static_range(STEPS):
        us = us + (load_row(u + i * u_step, in_d, EVEN),)
        dts = dts + (load_row(dt + i * dt_step, in_d, EVEN),)
        sums = sums + (tl.load(norms + (t + i)),)
        if GATED:
            zs = zs + (load_row(z + i * z_step, in_d, EVEN),)
    for i in tl.static_range(STEPS):
        k = tl.load(at(keys, t + i, 2 * BLOCK_N) + n)
        q = tl.load(at(keys, t + i, 2 * BLOCK_N) + BLOCK_N + n)
        ut = us[i].to(tl.float32)
        eps, _ = step_size(dts[i], bias, sums[i])
        state = advance(state, ut, eps, k, EXACT)
        y = tl.fma(weight, ut, tl.sum(state * q[:, None], 0))
        if GATED:
            zt = zs[i].to(tl.float32)
            y *= zt * sigmoid(zt)
        store_row(out + i * D, y, in_d, EVEN)
    return state


@triton.jit(
    do_not_specialize=["L", "segment"],
    do_not_specialize_on_alignment=["initial", "final", "checkpoints"],  # tiles
)
def forward_kernel(
    u, dt, z, keys, norms, skip, dt_bias, initial, cu_seqlens,
    out, final, checkpoints,
    u_row, u_step, dt_row, dt_step, z_row, z_step,
    L, D, segment,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write out, final and, unless None, checkpoints.

    initial (or None), final: tiles (walks, blocks, BLOCK_N, LANES); checkpoints: (slots, blocks, BLOCK_N, LANES).
    """
    sequence = tl.program_id(2)
    row, start, end = walk_span(cu_seqlens, sequence, tl.program_id(1), L, segment)
    walk = sequence.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    lane = tl.arange(0, LANES)
    d = tl.program_id(0) * LANES + lane
    in_d = d < D
    weight, bias = channel_constants(skip, dt_bias, d, in_d, EVEN)

    state = tl.zeros([BLOCK_N, LANES], tl.float32)
    if initial is not None:
        state += tl.load(tile_of(initial, walk, lane, BLOCK_N))
    u = at(u, row, u_row)
    dt = at(dt, row, dt_row)
    z_start = u if z is None else at(z, row, z_row)
    keys = at(keys, row * L, 2 * BLOCK_N)
    norms += row * L
    out = at(out, row * L, D)
    slot = (row * L + start) // CHUNK + walk
    last_group = end - (end - start) % STEPS
    for chunk in range(start, end, CHUNK):
        if checkpoints is not None:
            tl.store(tile_of(checkpoints, slot, lane, BLOCK_N), state)
            slot += 1
        for t in range(chunk, tl.minimum(chunk + CHUNK, last_group), STEPS):
            state = _forward_group(
                state, t, u, dt, z_start, keys, norms, out, weight, bias, d, in_d, u_step, dt_step, z_step, D,
                z is not None, BLOCK_N, EVEN, EXACT, STEPS,
            )  # fmt: skip
    for t in range(last_group, end):
        state = _forward_group(
            state, t, u, dt, z_start, keys, norms, out, weight, bias, d, in_d, u_step, dt_step, z_step, D,
            z is not None, BLOCK_N, EVEN, EXACT, 1,
        )  # fmt: skip
    tl.store(tile_of(final, walk, lane, BLOCK_N), state)


@triton.jit
def _rebuild_group(
    state, t, u, dt, keys, norms, bias, d, in_d, u_step, dt_step,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens from t on, for their states alone."""
    t = tl.cast(t, tl.int64)
    n = tl.arange(0, BLOCK_N)
    u, dt = at(u, t, u_step) + d, at(dt, t, dt_step) + d
    us, dts, sums = (), (), ()
    for i in tl.static_range(STEPS):
        us = us + (load_row(u + i * u_step, in_d, EVEN),)
        dts = dts + (load_row(dt + i * dt_step, in_d, EVEN),)
        sums = sums + (tl.load(norms + (t + i)),)
    for i in tl.static_range(STEPS):
        k = tl.load(at(keys, t + i, 2 * BLOCK_N) + n)
        eps, _ = step_size(dts[i], bias, sums[i])
        state = advance(state, us[i].to(tl.float32), eps, k, EXACT)
    return state


@triton.jit
def _backward_group(
    state, adjoint, sum_skip, sum_bias, t, u, dt, z, keys, norms, d_out, d_u, d_dt, d_z, d_keys, squares,
    weight, bias, lane, d, in_d, u_step, dt_step, z_step, d_out_step, D,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, STEPS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens from t on, whose first finds `state`, and back from `adjoint`; writes their gradients."""
    t = tl.cast(t, tl.int64)
    n = tl.arange(0, BLOCK_N)
    u, dt, z, d_out = at(u, t, u_step) + d, at(dt, t, dt_step) + d, at(z, t, z_step) + d, at(d_out, t, d_out_step) + d
    d_u, d_dt, d_z = at(d_u, t, D) + d, at(d_dt, t, D) + d, at(d_z, t, D) + d
    us, dts, zs, sums, d_outs = (), (), (), (), ()
    for i in tl.static_range(STEPS):
        us = us + (load_row(u + i * u_step, in_d, EVEN),)
        dts = dts + (load_row(dt + i * dt_step, in_d, EVEN),)
        sums = sums + (tl.load(norms + (t + i)),)
        d_outs = d_outs + (load_row(d_out + i * d_out_step, in_d, EVEN),)
        if GATED:
            zs = zs + (load_row(z + i * z_step, in_d, EVEN),)
    states, steps, slopes = (state,), (), ()
    for i in tl.static_range(STEPS):
        k = tl.load(at(keys, t + i, 2 * BLOCK_N) + n)
        eps, e = step_size(dts[i], bias, sums[i])
        states = states + (advance(states[i], us[i].to(tl.float32), eps, k, EXACT),)
        steps, slopes = steps + (eps,), slopes + (eps * e,)

    for i in tl.static_range(STEPS - 1, -1, -1):
        k = tl.load(at(keys, t + i, 2 * BLOCK_N) + n)
        q = tl.load(at(keys, t + i, 2 * BLOCK_N) + BLOCK_N + n)
        ut = us[i].to(tl.float32)
        dy = d_outs[i].to(tl.float32)
        if GATED:
            zt = zs[i].to(tl.float32)
            gate = sigmoid(zt)
            y = tl.fma(weight, ut, tl.sum(states[i + 1] * q[:, None], 0))
            store_row(d_z + i * D, dy * y * gate * tl.fma(zt, 1.0 - gate, 1.0), in_d, EVEN)
            dy *= zt * gate
        row = at(d_keys, t + i, 2 * BLOCK_N)
        store_lane_sums(row + BLOCK_N, dy[None, :] * states[i + 1], lane, BLOCK_N, WARPS)

        g = tl.fma(dy[None, :], q[:, None], adjoint)
        residual = _residual(states[i], ut, k, EXACT)
        if EXACT:
            h = steps[i] * tl.sum(g * k[:, None], 0)
            r = tl.sum(residual, 0)  # of its one row
            d_eps = h * r
            dk = (steps[i] * r)[None, :] * g - h[None, :] * states[i]
            du = h
            adjoint = g - k[:, None] * h[None, :]
        else:
            scaled = steps[i][None, :] * g
            # h * r - <h> * S_before, where k * S_before = u - r
            dk = scaled * (2.0 * residual - ut[None, :])
            h = scaled * k[:, None]
            d_eps = tl.sum(h * residual, 0)
            du = tl.sum(h, 0)
            adjoint = g - k[:, None] * h
        dx = d_eps * slopes[i]  # in this order: eps * eps would underflow
        sum_skip = tl.fma(dy, ut, sum_skip)
        sum_bias += dx
        store_row(d_u + i * D, tl.fma(weight, dy, du), in_d, EVEN)
        store_row(d_dt + i * D, dx, in_d, EVEN)
        tl.store(squares + (t + i), tl.sum(d_eps * steps[i], 0))
        store_lane_sums(row, dk, lane, BLOCK_N, WARPS)
    return adjoint, sum_skip, sum_bias


@triton.jit(
    do_not_specialize=["L", "segment", "tokens", "first_sequence"],
    do_not_specialize_on_alignment=["checkpoints", "scratch", "d_final", "d_initial"],  # tiles
)
def backward_kernel(
    u, dt, z, keys, norms, skip, dt_bias, cu_seqlens, checkpoints, d_out, d_final,
    d_u, d_dt, d_z, d_keys, squares, d_skip, d_bias, d_initial, scratch,
    u_row, u_step, dt_row, dt_step, z_row, z_step, d_out_row, d_out_step,
    L, D, segment, tokens, first_sequence,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write every gradient; those of k and q, of Σ k², D and dt_bias as partial sums.

    d_keys: (blocks of channels, tokens, 2, BLOCK_N), squares: (blocks, tokens); d_skip, d_bias: (walks, D);
    d_final, d_initial: tiles as in the forward, or None; scratch: (programs, CHUNK // STEPS + STEPS, BLOCK_N, LANES).
    """
    block = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(2) + first_sequence
    row, start, end = walk_span(cu_seqlens, sequence, tl.program_id(1), L, segment)
    walk = sequence.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    lane = tl.arange(0, LANES)
    d = tl.program_id(0) * LANES + lane
    in_d = d < D
    weight, bias = channel_constants(skip, dt_bias, d, in_d, EVEN)

    adjoint = tl.zeros([BLOCK_N, LANES], tl.float32)
    if d_final is not None:
        adjoint += tl.load(tile_of(d_final, walk, lane, BLOCK_N))
    sum_skip = tl.zeros([LANES], tl.float32)
    sum_bias = tl.zeros([LANES], tl.float32)
    u = at(u, row, u_row)
    dt = at(dt, row, dt_row)
    d_out = at(d_out, row, d_out_row)
    d_u = at(d_u, row * L, D)
    d_dt = at(d_dt, row * L, D)
    z_start, d_z_start = u, d_u
    if z is not None:
        z_start = at(z, row, z_row)
        d_z_start = at(d_z, row * L, D)
    keys = at(keys, row * L, 2 * BLOCK_N)
    norms += row * L
    first_token = block * tokens + row * L
    squares += first_token
    d_keys += first_token * (2 * BLOCK_N)
    groups: tl.constexpr = CHUNK // STEPS
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    scratch += (program * tl.num_programs(0) + block) * (groups + STEPS) * (BLOCK_N * LANES)
    scratch += tl.arange(0, BLOCK_N)[:, None] * LANES + lane[None, :]

    first_slot = (row * L + start) // CHUNK + walk
    chunks = tl.cdiv(end - start, CHUNK)
    last_group = end - (end - start) % STEPS
    for i in range(chunks):
        chunk = start + (chunks - 1 - i) * CHUNK
        chunk_end = tl.minimum(chunk + CHUNK, end)
        group_end = tl.minimum(chunk_end, last_group)

        state = tl.load(tile_of(checkpoints, first_slot + chunks - 1 - i, lane, BLOCK_N))
        for t in range(chunk, group_end, STEPS):
            tl.store(scratch + (t - chunk) // STEPS * (BLOCK_N * LANES), state)
            if t + STEPS < chunk_end:  # else nothing needs the state after it
                state = _rebuild_group(
                    state, t, u, dt, keys, norms, bias, d, in_d, u_step, dt_step, BLOCK_N, EVEN, EXACT, STEPS
                )
        for t in range(group_end, chunk_end):
            tl.store(scratch + (groups + t - group_end) * (BLOCK_N * LANES), state)
            state = _rebuild_group(state, t, u, dt, keys, norms, bias, d, in_d, u_step, dt_step, BLOCK_N, EVEN, EXACT, 1)
        tl.debug_barrier()  # a state may come back to another thread than the one that wrote it

        for j in range(chunk_end - group_end):
            t = chunk_end - 1 - j
            state = tl.load(scratch + (groups + t - group_end) * (BLOCK_N * LANES))
            adjoint, sum_skip, sum_bias = _backward_group(
                state, adjoint, sum_skip, sum_bias, t, u, dt, z_start, keys, norms, d_out, d_u, d_dt, d_z_start,
                d_keys, squares, weight, bias, lane, d, in_d, u_step, dt_step, z_step, d_out_step, D,
                z is not None, BLOCK_N, EVEN, EXACT, 1, WARPS,
            )  # fmt: skip
        for j in range((group_end - chunk) // STEPS):
            t = group_end - (j + 1) * STEPS
            state = tl.load(scratch + (t - chunk) // STEPS * (BLOCK_N * LANES))
            adjoint, sum_skip, sum_bias = _backward_group(
                state, adjoint, sum_skip, sum_bias, t, u, dt, z_start, keys, norms, d_out, d_u, d_dt, d_z_start,
                d_keys, squares, weight, bias, lane, d, in_d, u_step, dt_step, z_step, d_out_step, D,
                z is not None, BLOCK_N, EVEN, EXACT, STEPS, WARPS,
            )  # fmt: skip
        tl.debug_barrier()  # the next chunk overwrites the scratch

    if d_initial is not None:
        tl.store(tile_of(d_initial, walk, lane, BLOCK_N), adjoint)
    if d_skip is not None:
        store_row(d_skip + walk * D + d, sum_skip, in_d, EVEN)
    if d_bias is not None:
        store_row(d_bias + walk * D + d, sum_bias, in_d, EVEN)
