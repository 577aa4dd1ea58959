"""The walk over time as Triton kernels, forward and backward, around a scan's rule; triton_walk.py has the legend.

A rule is two functions, given as constexprs. Both see one token of a program's channels: `first` and `second` [BLOCK_N]
are its rows (k and q, or B and C), `bias` is dt_bias, `norm` is 1 + Σ first² where `norms` are given, `rates`
[BLOCK_N, LANES] is what channels have of their own where that is given. Everything is fp32.

    advance(state, u, dt, bias, norm, first, rates, VARIANT)
        -> the state after the token, and a tuple of what `retreat` needs again
    retreat(adjoint, before, u, dy, first, second, rates, kept, VARIANT)
        -> the adjoint of `before`, then the gradients by first (a tile to be summed over lanes), u, dt, norm, rates

`retreat` is given the adjoint of the state after the token as the tokens after it left it, and the derivative dy by
y = Σ_n state·second. The kernels do the rest: reading ahead, the skip and the gate

    out = (Σ_n state·second + D·u)·silu(z),

checkpoints, and every sum. The forward keeps the state of every CHUNK-th token. The backward takes the chunks in
reverse: it walks each forward, leaving the state of every STEPS-th token in a scratch buffer, then takes those groups
in reverse: it walks each once more, with all its states in registers, and back. The tokens that are left over at a
walk's end are groups of one.

Padding of N loads as zero rows, which leave their states at zero; padding of D loads as zero inputs.
"""

import triton
import triton.language as tl

from kernels.scan.triton_walk import LANES, at, load_row, store_lane_sums, store_row, tile_of, walk_span
from kernels.triton_math import sigmoid


@triton.jit
def channel_constant(pointer, d, in_d, EVEN: tl.constexpr):
    """fp32 numbers of the channels; zeros for None."""
    if pointer is None:
        x = tl.zeros([LANES], tl.float32)
    else:
        x = load_row(pointer + d, in_d, EVEN).to(tl.float32)
    return x


@triton.jit
def _norm(norms, t):
    if norms is None:
        norm = 0.0
    else:
        norm = tl.load(norms + t)
    return norm


@triton.jit
def _forward_group(
    state, t, u, dt, z, rows, norms, out, weight, bias, rates, d, in_d, u_step, dt_step, z_step, D,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr,
    ADVANCE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens from t on, all that they read before the first is walked."""
    t = tl.cast(t, tl.int64)
    n = tl.arange(0, BLOCK_N)
    u, dt, z, out = at(u, t, u_step) + d, at(dt, t, dt_step) + d, at(z, t, z_step) + d, at(out, t, D) + d
    us, dts, zs, ns, firsts, seconds = (), (), (), (), (), ()
    for i in tl.static_range(STEPS):
        us = us + (load_row(u + i * u_step, in_d, EVEN),)
        dts = dts + (load_row(dt + i * dt_step, in_d, EVEN),)
        ns = ns + (_norm(norms, t + i),)
        if GATED:
            zs = zs + (load_row(z + i * z_step, in_d, EVEN),)
        firsts = firsts + (tl.load(at(rows, t + i, 2 * BLOCK_N) + n),)
        seconds = seconds + (tl.load(at(rows, t + i, 2 * BLOCK_N) + BLOCK_N + n),)
    for i in tl.static_range(STEPS):
        ut = us[i].to(tl.float32)
        state, _ = ADVANCE(state, ut, dts[i].to(tl.float32), bias, ns[i], firsts[i], rates, VARIANT)
        y = tl.fma(weight, ut, tl.sum(state * seconds[i][:, None], 0))
        if GATED:
            zt = zs[i].to(tl.float32)
            y *= zt * sigmoid(zt)
        store_row(out + i * D, y, in_d, EVEN)
    return state


@triton.jit(
    do_not_specialize=["L", "segment"],
    do_not_specialize_on_alignment=["initial", "final", "checkpoints", "rates"],  # tiles
)
def forward_kernel(
    u, dt, z, rows, norms, skip, dt_bias, rates, initial, cu_seqlens,
    out, final, checkpoints,
    u_row, u_step, dt_row, dt_step, z_row, z_step,
    L, D, segment,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr,
    ADVANCE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Write out, final and, unless None, checkpoints.

    initial (or None), final: tiles (walks, blocks, BLOCK_N, LANES); checkpoints: (slots, blocks, BLOCK_N, LANES);
    rates: (1, blocks, BLOCK_N, LANES) or None.
    """
    sequence = tl.program_id(2)
    row, start, end = walk_span(cu_seqlens, sequence, tl.program_id(1), L, segment)
    walk = sequence.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    lane = tl.arange(0, LANES)
    d = tl.program_id(0) * LANES + lane
    in_d = d < D
    weight = channel_constant(skip, d, in_d, EVEN)
    bias = channel_constant(dt_bias, d, in_d, EVEN)

    state = tl.zeros([BLOCK_N, LANES], tl.float32)
    own = state if rates is None else tl.load(tile_of(rates, 0, lane, BLOCK_N))
    if initial is not None:
        state += tl.load(tile_of(initial, walk, lane, BLOCK_N))
    u = at(u, row, u_row)
    dt = at(dt, row, dt_row)
    z_start = u if z is None else at(z, row, z_row)
    rows = at(rows, row * L, 2 * BLOCK_N)
    norms_start = None if norms is None else norms + row * L
    out = at(out, row * L, D)
    slot = (row * L + start) // CHUNK + walk
    last_group = end - (end - start) % STEPS
    for chunk in range(start, end, CHUNK):
        if checkpoints is not None:
            tl.store(tile_of(checkpoints, slot, lane, BLOCK_N), state)
            slot += 1
        for t in range(chunk, tl.minimum(chunk + CHUNK, last_group), STEPS):
            state = _forward_group(
                state, t, u, dt, z_start, rows, norms_start, out, weight, bias, own, d, in_d, u_step, dt_step, z_step,
                D, z is not None, BLOCK_N, EVEN, STEPS, ADVANCE, VARIANT,
            )  # fmt: skip
    for t in range(last_group, end):
        state = _forward_group(
            state, t, u, dt, z_start, rows, norms_start, out, weight, bias, own, d, in_d, u_step, dt_step, z_step,
            D, z is not None, BLOCK_N, EVEN, 1, ADVANCE, VARIANT,
        )  # fmt: skip
    tl.store(tile_of(final, walk, lane, BLOCK_N), state)


@triton.jit
def _rebuild_group(
    state, t, u, dt, rows, norms, bias, rates, d, in_d, u_step, dt_step,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, ADVANCE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens from t on, for their states alone."""
    t = tl.cast(t, tl.int64)
    n = tl.arange(0, BLOCK_N)
    u, dt = at(u, t, u_step) + d, at(dt, t, dt_step) + d
    us, dts, ns = (), (), ()
    for i in tl.static_range(STEPS):
        us = us + (load_row(u + i * u_step, in_d, EVEN),)
        dts = dts + (load_row(dt + i * dt_step, in_d, EVEN),)
        ns = ns + (_norm(norms, t + i),)
    for i in tl.static_range(STEPS):
        first = tl.load(at(rows, t + i, 2 * BLOCK_N) + n)
        ut, dtt = us[i].to(tl.float32), dts[i].to(tl.float32)
        state, _ = ADVANCE(state, ut, dtt, bias, ns[i], first, rates, VARIANT)
    return state


@triton.jit
def _backward_group(
    state, adjoint, sum_skip, sum_bias, sum_rates, t, u, dt, z, rows, norms, d_out, d_u, d_dt, d_z, d_rows, d_norms,
    weight, bias, rates, lane, d, in_d, u_step, dt_step, z_step, d_out_step, D,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr,
    ADVANCE: tl.constexpr, RETREAT: tl.constexpr, VARIANT: tl.constexpr, WITH_RATES: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens from t on, whose first finds `state`, and back from `adjoint`; writes their gradients."""
    t = tl.cast(t, tl.int64)
    n = tl.arange(0, BLOCK_N)
    u, dt, z, d_out = at(u, t, u_step) + d, at(dt, t, dt_step) + d, at(z, t, z_step) + d, at(d_out, t, d_out_step) + d
    d_u, d_dt, d_z = at(d_u, t, D) + d, at(d_dt, t, D) + d, at(d_z, t, D) + d
    us, dts, zs, ns, d_outs = (), (), (), (), ()
    for i in tl.static_range(STEPS):
        us = us + (load_row(u + i * u_step, in_d, EVEN),)
        dts = dts + (load_row(dt + i * dt_step, in_d, EVEN),)
        ns = ns + (_norm(norms, t + i),)
        d_outs = d_outs + (load_row(d_out + i * d_out_step, in_d, EVEN),)
        if GATED:
            zs = zs + (load_row(z + i * z_step, in_d, EVEN),)
    states, kept = (state,), ()
    for i in tl.static_range(STEPS):
        first = tl.load(at(rows, t + i, 2 * BLOCK_N) + n)
        ut, dtt = us[i].to(tl.float32), dts[i].to(tl.float32)
        state, token = ADVANCE(state, ut, dtt, bias, ns[i], first, rates, VARIANT)
        states, kept = states + (state,), kept + (token,)

    for i in tl.static_range(STEPS - 1, -1, -1):
        first = tl.load(at(rows, t + i, 2 * BLOCK_N) + n)
        second = tl.load(at(rows, t + i, 2 * BLOCK_N) + BLOCK_N + n)
        d_row = at(d_rows, t + i, 2 * BLOCK_N)
        ut = us[i].to(tl.float32)
        dy = d_outs[i].to(tl.float32)
        if GATED:
            zt = zs[i].to(tl.float32)
            gate = sigmoid(zt)
            y = tl.fma(weight, ut, tl.sum(states[i + 1] * second[:, None], 0))
            store_row(d_z + i * D, dy * y * gate * tl.fma(zt, 1.0 - gate, 1.0), in_d, EVEN)
            dy *= zt * gate
        store_lane_sums(d_row + BLOCK_N, dy[None, :] * states[i + 1], lane, BLOCK_N, WARPS)
        adjoint, d_first, du, dx, d_norm, d_own = RETREAT(
            adjoint, states[i], ut, dy, first, second, rates, kept[i], VARIANT
        )
        sum_skip = tl.fma(dy, ut, sum_skip)
        sum_bias += dx
        store_row(d_u + i * D, tl.fma(weight, dy, du), in_d, EVEN)
        store_row(d_dt + i * D, dx, in_d, EVEN)
        if d_norms is not None:
            tl.store(d_norms + (t + i), tl.sum(d_norm, 0))
        if WITH_RATES:
            sum_rates += d_own
        store_lane_sums(d_row, d_first, lane, BLOCK_N, WARPS)
    return adjoint, sum_skip, sum_bias, sum_rates


@triton.jit(
    do_not_specialize=["L", "segment", "tokens", "first_sequence"],
    do_not_specialize_on_alignment=["checkpoints", "scratch", "d_final", "d_initial", "rates", "d_rates"],  # tiles
)
def backward_kernel(
    u, dt, z, rows, norms, skip, dt_bias, rates, cu_seqlens, checkpoints, d_out, d_final,
    d_u, d_dt, d_z, d_rows, d_norms, d_skip, d_bias, d_rates, d_initial, scratch,
    u_row, u_step, dt_row, dt_step, z_row, z_step, d_out_row, d_out_step,
    L, D, segment, tokens, first_sequence,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr,
    ADVANCE: tl.constexpr, RETREAT: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Write every gradient; those of rows and norms, D, dt_bias and rates as partial sums.

    d_rows: (blocks of channels, tokens, 2, BLOCK_N), d_norms: (blocks, tokens) or None; d_skip, d_bias: (walks, D) or
    None; d_final, d_initial: tiles as in the forward, or None; scratch: tiles, CHUNK // STEPS + STEPS a program;
    d_rates: tiles of this launch's walks, or None.
    """
    block = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(2) + first_sequence
    row, start, end = walk_span(cu_seqlens, sequence, tl.program_id(1), L, segment)
    walk = sequence.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    launched = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)  # of this launch's walks
    lane = tl.arange(0, LANES)
    d = tl.program_id(0) * LANES + lane
    in_d = d < D
    weight = channel_constant(skip, d, in_d, EVEN)
    bias = channel_constant(dt_bias, d, in_d, EVEN)

    adjoint = tl.zeros([BLOCK_N, LANES], tl.float32)
    sum_rates = adjoint
    own = adjoint if rates is None else tl.load(tile_of(rates, 0, lane, BLOCK_N))
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
    rows = at(rows, row * L, 2 * BLOCK_N)
    first_token = block * tokens + row * L
    d_rows += first_token * (2 * BLOCK_N)
    norms_start = None if norms is None else norms + row * L
    d_norms_start = None if norms is None else d_norms + first_token
    groups: tl.constexpr = CHUNK // STEPS
    scratch += (launched * tl.num_programs(0) + block) * (groups + STEPS) * (BLOCK_N * LANES)
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
                    state, t, u, dt, rows, norms_start, bias, own, d, in_d, u_step, dt_step,
                    BLOCK_N, EVEN, STEPS, ADVANCE, VARIANT,
                )  # fmt: skip
        for t in range(group_end, chunk_end):
            tl.store(scratch + (groups + t - group_end) * (BLOCK_N * LANES), state)
            state = _rebuild_group(
                state, t, u, dt, rows, norms_start, bias, own, d, in_d, u_step, dt_step,
                BLOCK_N, EVEN, 1, ADVANCE, VARIANT,
            )  # fmt: skip
        tl.debug_barrier()  # a state may come back to another thread than the one that wrote it

        for j in range(chunk_end - group_end):
            t = chunk_end - 1 - j
            state = tl.load(scratch + (groups + t - group_end) * (BLOCK_N * LANES))
            adjoint, sum_skip, sum_bias, sum_rates = _backward_group(
                state, adjoint, sum_skip, sum_bias, sum_rates, t, u, dt, z_start, rows, norms_start, d_out,
                d_u, d_dt, d_z_start, d_rows, d_norms_start, weight, bias, own, lane, d, in_d,
                u_step, dt_step, z_step, d_out_step, D,
                z is not None, BLOCK_N, EVEN, 1, WARPS, ADVANCE, RETREAT, VARIANT, rates is not None,
            )  # fmt: skip
        for j in range((group_end - chunk) // STEPS):
            t = group_end - (j + 1) * STEPS
            state = tl.load(scratch + (t - chunk) // STEPS * (BLOCK_N * LANES))
            adjoint, sum_skip, sum_bias, sum_rates = _backward_group(
                state, adjoint, sum_skip, sum_bias, sum_rates, t, u, dt, z_start, rows, norms_start, d_out,
                d_u, d_dt, d_z_start, d_rows, d_norms_start, weight, bias, own, lane, d, in_d,
                u_step, dt_step, z_step, d_out_step, D,
                z is not None, BLOCK_N, EVEN, STEPS, WARPS, ADVANCE, RETREAT, VARIANT, rates is not None,
            )  # fmt: skip
        tl.debug_barrier()  # the next chunk overwrites the scratch

    if d_initial is not None:
        tl.store(tile_of(d_initial, walk, lane, BLOCK_N), adjoint)
    if d_rates is not None:
        tl.store(tile_of(d_rates, launched, lane, BLOCK_N), sum_rates)
    if d_skip is not None:
        store_row(d_skip + walk * D + d, sum_skip, in_d, EVEN)
    if d_bias is not None:
        store_row(d_bias + walk * D + d, sum_bias, in_d, EVEN)
