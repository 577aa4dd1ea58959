"""Longhorn scan in Triton: a walk over time with the state in registers, forward and backward.

Legend: B batch, L tokens per row, D channels (d_inner), N state size per channel (d_state).
A "sequence" is a batch row, or one document of a packed row. One program walks one sequence for
BLOCK_D channels, so the grid is (blocks of channels, sequences). Its state is a tile
[BLOCK_N, BLOCK_D] with N padded to a power of two; padding loads as zeros, which every formula
below maps to zeros. README.md derives the maths. Per token, with x = dt + dt_bias held >= -80:

    eps[d] = 1 / (1 + e^-x[d] + sum_n k[n]^2)
    r      = u - <k, S>                     <k, S>: k[n] * S[n, d], or its sum over n if exact
    S     += eps * k * r
    y[d]   = sum_n S[n, d] * q[n] + D[d] * u[d]         out = y * silu(z)

The forward keeps the state of every CHUNK-th token. The backward takes the chunks in reverse:
it rebuilds the states inside one into a scratch buffer, then walks back over them. Gradients that
cross programs (q, k: over channels; D, dt_bias: over sequences) are written as partial sums and
added afterwards, so results are the same from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A state every 64 tokens takes N / 16 bytes per token and channel: for N = 16, half of u in bf16.
CHUNK = 64
# Compiled for sm_90 at N = 16, a token of the backward takes 619 instructions at 128 channels and
# 4 warps, 594 at 64 and 2, 554 at 32 and 1; but half the block is twice the partial dq and dk.
BLOCK_D = 64
NUM_WARPS = 2
# Sequences per backward launch: bounds the scratch however many documents a row packs.
SEQUENCES_PER_LAUNCH = 32
MAX_SEQUENCES = 65535  # the second dimension of a CUDA grid


@triton.jit
def _span(cu_seqlens, sequence, L):
    """Batch row of a sequence, and its first and one-past-last token in that row."""
    if cu_seqlens is not None:
        row = sequence * 0
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    else:
        row = sequence
        start = sequence * 0
        end = start + L
    return row, start, end


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step_size(dt, bias, k):
    """eps, and e^-x as the gradient sees it: 0 below the clamp."""
    x = dt + bias
    below = x < -80.0
    e = tl.exp(-tl.where(below, -80.0, x))  # where, unlike maximum, lets a NaN through
    return 1.0 / (1.0 + e + tl.sum(k * k, 0)), tl.where(below, 0.0, e)


@triton.jit
def _along_k(tile, k, EXACT: tl.constexpr):
    """k * tile [BLOCK_N, BLOCK_D] (diagonal update), or its sum over N [1, BLOCK_D] (exact)."""
    product = k[:, None] * tile
    if EXACT:
        product = tl.sum(product, 0, keep_dims=True)
    return product


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))  # at most 1: no overflow at either end
    return tl.where(z < 0.0, e, 1.0) / (1.0 + e)


@triton.jit(do_not_specialize=["L"])
def forward_kernel(
    u, dt, z, q, k, skip, dt_bias, initial, cu_seqlens,
    out, final, checkpoints,
    u_row, u_step, dt_row, dt_step, z_row, z_step, q_row, q_step, k_row, k_step,
    L, D,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Write out, final and, unless None, checkpoints (slots, N, D): see `_checkpoint_slots`.

    initial, final: (sequences, N, D), so that lanes read neighbouring channels.
    """
    sequence = tl.program_id(1).to(tl.int64)
    row, start, end = _span(cu_seqlens, sequence, L)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = d < D
    in_n = n < N
    in_tile = in_n[:, None] & in_d[None, :]
    tile = n[:, None] * D + d[None, :]

    state = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if initial is not None:
        state += _load(initial + sequence * N * D + tile, in_tile)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if dt_bias is not None:
        bias += _load(dt_bias + d, in_d)
    weight = tl.zeros([BLOCK_D], tl.float32)
    if skip is not None:
        weight += _load(skip + d, in_d)

    slot = (row * L + start) // CHUNK + sequence
    for chunk in range(start, end, CHUNK):
        if checkpoints is not None:
            tl.store(checkpoints + slot * N * D + tile, state, mask=in_tile)
            slot += 1
        for t in range(chunk, tl.minimum(chunk + CHUNK, end)):
            ut = _load(u + row * u_row + t * u_step + d, in_d)
            dtt = _load(dt + row * dt_row + t * dt_step + d, in_d)
            kt = _load(k + row * k_row + t * k_step + n, in_n)
            qt = _load(q + row * q_row + t * q_step + n, in_n)
            eps, _ = _step_size(dtt, bias, kt)
            residual = ut[None, :] - _along_k(state, kt, EXACT)
            state += eps[None, :] * kt[:, None] * residual
            y = tl.sum(state * qt[:, None], 0) + weight * ut
            if z is not None:
                zt = _load(z + row * z_row + t * z_step + d, in_d)
                y *= zt * _sigmoid(zt)
            tl.store(out + (row * L + t) * D + d, y.to(out.dtype.element_ty), mask=in_d)
    tl.store(final + sequence * N * D + tile, state, mask=in_tile)


@triton.jit(do_not_specialize=["L", "first_sequence"])
def backward_kernel(
    u, dt, z, q, k, skip, dt_bias, cu_seqlens, checkpoints, d_out, d_final,
    d_u, d_dt, d_z, d_q, d_k, d_skip, d_bias, d_initial, scratch,
    u_row, u_step, dt_row, dt_step, z_row, z_step, q_row, q_step, k_row, k_step,
    d_out_row, d_out_step,
    L, D, tokens, first_sequence,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Write every gradient; those of q, k, D and dt_bias as partial sums.

    d_q, d_k: (blocks of channels, tokens, N); d_skip, d_bias: (sequences, D); d_final, d_initial:
    (sequences, N, D); scratch: (sequences of this launch, CHUNK, N, D).
    """
    block = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64) + first_sequence
    row, start, end = _span(cu_seqlens, sequence, L)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = d < D
    in_n = n < N
    in_tile = in_n[:, None] & in_d[None, :]
    tile = n[:, None] * D + d[None, :]
    history = scratch + tl.program_id(1).to(tl.int64) * CHUNK * N * D + tile

    bias = tl.zeros([BLOCK_D], tl.float32)
    if dt_bias is not None:
        bias += _load(dt_bias + d, in_d)
    weight = tl.zeros([BLOCK_D], tl.float32)
    if skip is not None:
        weight += _load(skip + d, in_d)
    sum_skip = tl.zeros([BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_D], tl.float32)
    adjoint = _load(d_final + sequence * N * D + tile, in_tile)

    first_slot = (row * L + start) // CHUNK + sequence
    chunks = tl.cdiv(end - start, CHUNK)
    for i in range(chunks):
        chunk = start + (chunks - 1 - i) * CHUNK
        length = tl.minimum(end - chunk, CHUNK)

        state = _load(checkpoints + (first_slot + chunks - 1 - i) * N * D + tile, in_tile)
        for j in range(length):
            t = chunk + j
            ut = _load(u + row * u_row + t * u_step + d, in_d)
            dtt = _load(dt + row * dt_row + t * dt_step + d, in_d)
            kt = _load(k + row * k_row + t * k_step + n, in_n)
            eps, _ = _step_size(dtt, bias, kt)
            tl.store(history + j * N * D, state, mask=in_tile)
            state += eps[None, :] * kt[:, None] * (ut[None, :] - _along_k(state, kt, EXACT))
        tl.debug_barrier()  # a state may come back to another thread than the one that wrote it

        for j in range(length):
            t = chunk + length - 1 - j
            ut = _load(u + row * u_row + t * u_step + d, in_d)
            dtt = _load(dt + row * dt_row + t * dt_step + d, in_d)
            kt = _load(k + row * k_row + t * k_step + n, in_n)
            qt = _load(q + row * q_row + t * q_step + n, in_n)
            before = _load(history + (length - 1 - j) * N * D, in_tile)
            eps, e = _step_size(dtt, bias, kt)
            residual = ut[None, :] - _along_k(before, kt, EXACT)
            gain = eps[None, :] * kt[:, None]
            after = before + gain * residual

            dy = _load(d_out + row * d_out_row + t * d_out_step + d, in_d)
            token = row * L + t
            if z is not None:
                zt = _load(z + row * z_row + t * z_step + d, in_d)
                gate = _sigmoid(zt)
                y = tl.sum(after * qt[:, None], 0) + weight * ut
                dzt = dy * y * gate * (1.0 + zt * (1.0 - gate))
                tl.store(d_z + token * D + d, dzt.to(d_z.dtype.element_ty), mask=in_d)
                dy *= zt * gate

            g = adjoint + dy[None, :] * qt[:, None]
            gk = _along_k(g, kt, EXACT)
            adjoint = g - gain * gk
            d_eps = tl.sum(gk * residual, 0)
            du = eps * tl.sum(gk, 0) + weight * dy
            dx = (d_eps * eps) * (eps * e)  # eps * eps first would underflow
            dq = tl.sum(dy[None, :] * after, 1)
            dk = tl.sum(eps[None, :] * (g * residual - gk * before), 1)
            dk -= 2.0 * kt * tl.sum(d_eps * eps * eps, 0)
            sum_skip += dy * ut
            sum_bias += dx
            tl.store(d_u + token * D + d, du.to(d_u.dtype.element_ty), mask=in_d)
            tl.store(d_dt + token * D + d, dx.to(d_dt.dtype.element_ty), mask=in_d)
            tl.store(d_q + (block * tokens + token) * N + n, dq, mask=in_n)
            tl.store(d_k + (block * tokens + token) * N + n, dk, mask=in_n)
        tl.debug_barrier()  # the next chunk overwrites the history

    if d_initial is not None:
        tl.store(d_initial + sequence * N * D + tile, adjoint, mask=in_tile)
    tl.store(d_skip + sequence * D + d, sum_skip, mask=in_d)
    tl.store(d_bias + sequence * D + d, sum_bias, mask=in_d)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Row and step strides of a (B, L, channels) tensor; channels lie side by side."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _with_adjacent_channels(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _checkpoint_slots(tokens: int, sequences: int) -> int:
    """Number of saved states: sequence s, starting at token f, owns those from f // CHUNK + s on.

    A sequence of length l needs ceil(l / CHUNK) <= (f + l) // CHUNK - f // CHUNK + 1 of them, so
    no two overlap, and their places need neither a prefix sum nor a copy to the host.
    """
    return tokens // CHUNK + sequences


def _meta(N: int, update: str) -> dict[str, Any]:
    return {
        "N": N,
        "BLOCK_N": triton.next_power_of_2(N),
        "BLOCK_D": BLOCK_D,
        "CHUNK": CHUNK,
        "EXACT": update == "exact",
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,  # Triton 3.10 turns it off by default
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
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        (B, L, D), N = u.shape, k.shape[-1]
        sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        out = torch.empty((B, L, D), dtype=u.dtype, device=u.device)
        final = torch.empty((sequences, N, D), dtype=torch.float32, device=u.device)
        checkpoints = None
        if needs_grad:
            slots = _checkpoint_slots(B * L, sequences)
            checkpoints = torch.empty((slots, N, D), dtype=torch.float32, device=u.device)
        if initial is not None:
            initial = initial.mT.contiguous()
        with torch.cuda.device_of(u):
            forward_kernel[triton.cdiv(D, BLOCK_D), sequences](
                u, dt, z, q, k, skip, dt_bias, initial, cu_seqlens, out, final, checkpoints,
                *_strides(u), *_strides(dt), *_strides(z), *_strides(q), *_strides(k),
                L, D, **_meta(N, update),
            )  # fmt: skip
        ctx.save_for_backward(u, dt, q, k, skip, dt_bias, z, cu_seqlens, checkpoints)
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.update = update
        return out, final.mT.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, q, k, skip, dt_bias, z, cu_seqlens, checkpoints = ctx.saved_tensors
        (B, L, D), N = u.shape, k.shape[-1]
        sequences, blocks = len(d_final), triton.cdiv(D, BLOCK_D)
        group = min(sequences, SEQUENCES_PER_LAUNCH)
        d_out, d_final = _with_adjacent_channels(d_out), d_final.mT.contiguous()

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=u.device)

        d_u, d_dt = empty(B, L, D, dtype=u.dtype), empty(B, L, D, dtype=dt.dtype)
        d_z = None if z is None else empty(B, L, D, dtype=z.dtype)
        d_q, d_k = empty(blocks, B, L, N), empty(blocks, B, L, N)
        d_skip, d_bias = empty(sequences, D), empty(sequences, D)
        d_initial = None if ctx.initial_dtype is None else empty(sequences, N, D)
        scratch = empty(group, CHUNK, N, D)
        with torch.cuda.device_of(u):
            for first in range(0, sequences, SEQUENCES_PER_LAUNCH):
                backward_kernel[blocks, min(group, sequences - first)](
                    u, dt, z, q, k, skip, dt_bias, cu_seqlens, checkpoints, d_out, d_final,
                    d_u, d_dt, d_z, d_q, d_k, d_skip, d_bias, d_initial, scratch,
                    *_strides(u), *_strides(dt), *_strides(z), *_strides(q), *_strides(k),
                    *_strides(d_out), L, D, B * L, first, **_meta(N, ctx.update),
                )  # fmt: skip
        return (
            d_u,
            d_dt,
            d_q.sum(0).to(q.dtype),
            d_k.sum(0).to(k.dtype),
            None if skip is None else d_skip.sum(0).to(skip.dtype),
            None if dt_bias is None else d_bias.sum(0).to(dt_bias.dtype),
            d_z,
            None if d_initial is None else d_initial.mT.to(ctx.initial_dtype),
            None,
            None,
            None,
        )


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
        u, dt, z: (B, L, D) bf16, fp16 or fp32, mixed as they come; z may be None. Channels that
            lie side by side are read in place whatever the other strides; others are copied.
        q, k: (B, L, N), likewise.
        D, dt_bias: (D,) or None.
        initial_state: (B or n_seq, D, N) fp32 or None (zeros).
        cu_seqlens: (n_seq + 1,) int32, first 0, last L, on u's device, B = 1; or None. Documents
            may be empty: their final state is their initial one.
        update: "diagonal" or "exact".

    Returns:
        out (B, L, D) in u's dtype, final state (B or n_seq, D, N) fp32; differentiable once in
        every tensor, each gradient in its input's dtype, from both results.

    Raises:
        TypeError: fp64 inputs (the kernels compute in fp32).
        ValueError: tensors that are not on a GPU, unless under Triton's interpreter; more than
            65535 sequences.
    """
    tensors = [t for t in (u, dt, q, k, D, dt_bias, z, initial_state) if t is not None]
    if any(t.dtype == torch.float64 for t in tensors):
        raise TypeError("backend 'triton' computes in fp32; for float64 use backend 'cpu' or 'reference'")
    if not u.is_cuda and isinstance(forward_kernel, triton.JITFunction):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, u is on {u.device}; use backend 'cpu', or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    sequences = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
    if sequences > MAX_SEQUENCES:
        raise ValueError(f"backend 'triton' takes at most {MAX_SEQUENCES} rows or documents, not {sequences}")
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    u, dt, q, k, D, dt_bias, z, cu_seqlens = (
        _with_adjacent_channels(t) for t in (u, dt, q, k, D, dt_bias, z, cu_seqlens)
    )
    return _TritonScan.apply(u, dt, q, k, D, dt_bias, z, initial_state, cu_seqlens, update, needs_grad)
