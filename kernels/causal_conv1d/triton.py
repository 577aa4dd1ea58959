"""Causal convolution in Triton: one pass over x each way, nothing kept for the backward but the inputs.

Legend: B batch, L tokens per row, D channels (d_inner), K width of the filter (d_conv).
A "document" is a batch row, or one document of a packed row. A program walks some tokens of a row in order of time for
BLOCK_D channels. The last K - 1 inputs (the window) stay in registers, so a row of x is fetched once, CHUNK rows ahead
of their use; where a document starts, the window becomes its initial state. With c the convolution, g = dL/dc and the
lag counted in tokens:

    c[t]  = bias + sum_lag w[lag] * x[t - lag]        w[lag] = weight[:, K - 1 - lag]
    dx[t] = sum_lag w[lag] * g[t + lag]               dw[lag] = sum_t g[t] * x[t - lag]        dbias = sum_t g[t]

The backward recomputes c. As g[t] becomes known it is added to the gradients of the inputs in the window (`pending`);
the oldest of them is then complete and is written. Programs overlap by K - 1 tokens for that. Sums over tokens end in
one fp32 row per program, added afterwards: the same bits from run to run, whatever the GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_launch import COMPILE_OPTIONS, refuse_fp64, require_gpu, with_adjacent_channels
from kernels.triton_math import sigmoid

# Rows of x that a program of the forward fetches at once: at 16 bytes a lane it has 9.5 KiB in flight. An H100's
# multiprocessor needs about 20 KiB to keep its memory busy, and by their registers holds 11 such programs of one warp.
FORWARD_CHUNK = 16
# Bytes of rows of x, and as many of dout, that a channel of the backward fetches at once: 4 KiB a program in all, of
# which 15 fit a multiprocessor.
BACKWARD_CHUNK_BYTES = 16
# Tokens that a program of the backward walks, in whole chunks. In bf16 its sums are 5% of the bytes at K = 4, and 2% of
# the tokens are walked twice; 256 would halve both, and leave the last programs alone on the GPU for longer.
SPAN = 128
STEP_BLOCK = {"BLOCK_D": 256, "num_warps": 4}  # 2 channels to a lane: a step is too short to need more
MAX_WIDTH = 8  # filters are unrolled into registers


@triton.jit
def documents_kernel(cu_seqlens, documents, BLOCK: tl.constexpr):
    """Write each token's document, one program a document; documents: int32 (L,)."""
    document = tl.program_id(0)
    start = tl.load(cu_seqlens + document)
    end = tl.load(cu_seqlens + document + 1)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        tl.store(documents + t, document, mask=t < end)


@triton.jit
def _bounds(cu_seqlens, document, L):
    """A document's first and one-past-last token in its row."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + document).to(tl.int64)
        end = tl.load(cu_seqlens + document + 1).to(tl.int64)
    else:
        start = document * 0
        end = start + L
    return start, end


@triton.jit
def _document_at(documents, cu_seqlens, row, t, L):
    """The document of token t in a row, and its bounds."""
    document = row
    if documents is not None:
        document = tl.load(documents + t).to(tl.int64)
    start, end = _bounds(cu_seqlens, document, L)
    return document, start, end


@triton.jit
def _place(L, D, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's row, its block of TOKENS counted over all rows, its first token in the row, and its channels.

    Blocks of channels vary fastest, so that programs that share rows of x run at about the same time.
    """
    channel_blocks = tl.cdiv(D, BLOCK_D)
    row_blocks = tl.cdiv(L, TOKENS)
    block = tl.program_id(0) // channel_blocks
    d = tl.program_id(0) % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (block // row_blocks).to(tl.int64)
    first = (block % row_blocks).to(tl.int64) * TOKENS
    return row, block.to(tl.int64), first, d


@triton.jit
def _when(condition, mask):
    """`mask` where a scalar condition holds, else nothing (a scalar & a block fails in the interpreter)."""
    return tl.where(condition, mask, False)


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _filter(weight, bias, d, in_d, D, K: tl.constexpr):
    """The taps, oldest input's first, and the bias; weight: (K, D) fp32."""
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (_load(weight + k * D + d, in_d),)
    offset = tl.zeros_like(d).to(tl.float32)
    if bias is not None:
        offset += _load(bias + d, in_d)
    return taps, offset


@triton.jit
def _fetch(pointers, step, first, end, in_d, COUNT: tl.constexpr):
    """COUNT rows from token `first` on, in their own dtype (half the registers of fp32); zeros from `end` on."""
    rows = ()
    for j in tl.static_range(COUNT):
        t = first + j
        rows = rows + (tl.load(pointers + t * step, mask=_when(t < end, in_d), other=0.0),)
    return rows


@triton.jit
def _window(inputs, step, initial, document, start, t, d, in_d, D, K: tl.constexpr):
    """The K - 1 inputs before token t, oldest first; those before the document's start are its initial state's.

    initial: (documents, K - 1, D) or None (zeros).
    """
    window = ()
    for slot in tl.static_range(K - 1):
        s = t - (K - 1) + slot
        value = _load(inputs + s * step, _when(s >= start, in_d))
        if initial is not None:
            state = initial + (document * (K - 1) + (K - 1) + s - start) * D + d
            value = tl.where(s >= start, value, _load(state, _when(s < start, in_d)))
        window = window + (value,)
    return window


@triton.jit
def _cross_bound(
    documents, cu_seqlens, inputs, step, initial, row, document, start, end, window, t, L,
    d, in_d, D, K: tl.constexpr,
):  # fmt: skip
    """Where a document has ended before token t, the one that t belongs to, its bounds and its window."""
    if (t == end) & (t < L):
        document, start, end = _document_at(documents, cu_seqlens, row, t, L)
        window = _window(inputs, step, initial, document, start, t, d, in_d, D, K)
    return document, start, end, window


@triton.jit
def _convolve(window, taps, offset, K: tl.constexpr):
    total = offset
    for k in tl.static_range(K):
        total += taps[k] * window[k]
    return total


@triton.jit
def _add_multiples(sums, factor, terms, COUNT: tl.constexpr):
    """sums[k] + factor * terms[k] for each k < COUNT."""
    result = ()
    for k in tl.static_range(COUNT):
        result = result + (sums[k] + factor * terms[k],)
    return result


@triton.jit
def _taps_from(taps, age, K: tl.constexpr):
    """The taps that stay inside a document whose token number `age` is convolved; zeros for those that look past it."""
    result = ()
    for k in tl.static_range(K):
        result = result + (tl.where(K - 1 - k <= age, taps[k], 0.0),)
    return result


@triton.jit
def _gradient(window, taps, offset, dout, K: tl.constexpr, SILU: tl.constexpr):
    """g of one token, from its window and dout."""
    g = dout
    if SILU:
        c = _convolve(window, taps, offset, K)
        gate = sigmoid(c)
        g *= gate * (1.0 + c * (1.0 - gate))
    return g


@triton.jit(do_not_specialize=["L"])
def forward_kernel(
    x, weight, bias, initial, documents, cu_seqlens, out,
    x_row, x_step, L, D,
    K: tl.constexpr, SILU: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write CHUNK tokens of out (B, L, D)."""
    row, _, first, d = _place(L, D, CHUNK, BLOCK_D)
    in_d = d < D
    inputs = x + row * x_row + d
    rows = _fetch(inputs, x_step, first, L, in_d, CHUNK)
    taps, offset = _filter(weight, bias, d, in_d, D, K)
    document, start, end = _document_at(documents, cu_seqlens, row, first, L)
    window = _window(inputs, x_step, initial, document, start, first, d, in_d, D, K)
    for j in tl.static_range(CHUNK):
        t = first + j
        if documents is not None:
            document, start, end, window = _cross_bound(
                documents, cu_seqlens, inputs, x_step, initial, row, document, start, end, window, t, L,
                d, in_d, D, K,
            )  # fmt: skip
        window = window + (rows[j].to(tl.float32),)
        c = _convolve(window, taps, offset, K)
        if SILU:
            c *= sigmoid(c)
        tl.store(out + (row * L + t) * D + d, c.to(out.dtype.element_ty), mask=_when(t < L, in_d))
        window = window[1:]


@triton.jit(do_not_specialize=["L"])
def backward_kernel(
    x, weight, bias, initial, documents, cu_seqlens, dout, dfinal,
    dx, sums,
    x_row, x_step, dout_row, dout_step, L, D,
    K: tl.constexpr, SILU: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write SPAN - (K - 1) tokens of dx (B, L, D), and their sums (spans, K + 1, D): dweight transposed, then dbias.

    dfinal: (documents, K - 1, D) or None.
    """
    OWN: tl.constexpr = SPAN - (K - 1)
    row, block, first, d = _place(L, D, OWN, BLOCK_D)
    in_d = d < D
    inputs = x + row * x_row + d
    douts = dout + row * dout_row + d
    taps, offset = _filter(weight, bias, d, in_d, D, K)
    document, start, end = _document_at(documents, cu_seqlens, row, first, L)
    window = _window(inputs, x_step, initial, document, start, first, d, in_d, D, K)
    zero = tl.zeros_like(offset)
    pending = ()
    for _ in tl.static_range(K - 1):
        pending = pending + (zero,)
    dweight = pending + (zero,)
    dbias = zero

    for chunk in range(first, tl.minimum(first + SPAN, L + K - 1), CHUNK):
        rows = _fetch(inputs, x_step, chunk, L, in_d, CHUNK)
        gradients = _fetch(douts, dout_step, chunk, L, in_d, CHUNK)
        for j in tl.static_range(CHUNK):
            t = chunk + j
            if documents is not None:
                document, start, end, window = _cross_bound(
                    documents, cu_seqlens, inputs, x_step, initial, row, document, start, end, window, t, L,
                    d, in_d, D, K,
                )  # fmt: skip
            window = window + (rows[j].to(tl.float32),)
            g = _gradient(window, taps, offset, gradients[j].to(tl.float32), K, SILU)
            g = tl.where(t < L, g, 0.0)  # past the row's end dout is 0, but 0 times infinity is not
            counted = g
            if j + K > CHUNK:  # the last K - 1 tokens of the span are summed by the next program
                counted = tl.where(t < first + OWN, g, 0.0)
            dbias += counted
            dweight = _add_multiples(dweight, counted, window, K)

            known = zero
            if dfinal is not None:
                slot = t - end + K - 1
                known = _load(dfinal + (document * (K - 1) + slot) * D + d, _when((slot >= 0) & (t < end), in_d))
            reaching = taps
            if documents is not None:
                reaching = _taps_from(taps, t - start, K)
            pending = _add_multiples(pending + (known,), g, reaching, K)
            done = t - (K - 1)
            keep = _when((done >= first) & (done < L), in_d)
            tl.store(dx + (row * L + done) * D + d, pending[0].to(dx.dtype.element_ty), mask=keep)
            pending = pending[1:]
            window = window[1:]

    for k in tl.static_range(K):
        tl.store(sums + (block * (K + 1) + k) * D + d, dweight[k], mask=in_d)
    tl.store(sums + (block * (K + 1) + K) * D + d, dbias, mask=in_d)


@triton.jit(do_not_specialize=["L"])
def final_state_kernel(x, initial, cu_seqlens, final, x_row, x_step, L, D, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write final (documents, K - 1, D): the window after a document's last token."""
    document = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    start, end = _bounds(cu_seqlens, document, L)
    inputs = x + d
    if cu_seqlens is None:
        inputs += document * x_row
    window = _window(inputs, x_step, initial, document, start, end, d, in_d, D, K)
    for slot in tl.static_range(K - 1):
        state = final + (document * (K - 1) + slot) * D + d
        tl.store(state, window[slot].to(final.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=["L"])
def initial_state_gradient_kernel(
    x, weight, bias, initial, cu_seqlens, dout, dfinal, dinitial,
    x_row, x_step, dout_row, dout_step, L, D,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dinitial (documents, K - 1, D) by a walk over each document's first K - 1 tokens."""
    document = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    start, end = _bounds(cu_seqlens, document, L)
    inputs = x + d
    douts = dout + d
    if cu_seqlens is None:
        inputs += document * x_row
        douts += document * dout_row
    taps, offset = _filter(weight, bias, d, in_d, D, K)
    window = _window(inputs, x_step, initial, document, start, start, d, in_d, D, K)
    pending = ()
    for slot in tl.static_range(K - 1):
        known = tl.zeros_like(offset)
        if dfinal is not None:  # what a document shorter than the window leaves of its initial state
            left = slot - (end - start)
            known += _load(dfinal + (document * (K - 1) + left) * D + d, _when(left >= 0, in_d))
        pending = pending + (known,)

    for i in tl.static_range(K - 1):
        t = start + i
        inside = _when(t < end, in_d)
        window = window + (_load(inputs + t * x_step, inside),)
        g = _gradient(window, taps, offset, _load(douts + t * dout_step, inside), K, SILU)
        g = tl.where(t < end, g, 0.0)
        pending = _add_multiples(pending, g, taps, K - 1)
        state = dinitial + (document * (K - 1) + i) * D + d
        tl.store(state, pending[0].to(dinitial.dtype.element_ty), mask=in_d)
        pending = pending[1:] + (tl.zeros_like(offset),)
        window = window[1:]


@triton.jit
def step_kernel(
    state, x, weight, bias, state_indices, out,
    state_row, state_channel, state_slot, x_row, x_channel, weight_channel, weight_tap, D,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of one row of x (batch, D) for BLOCK_D channels: write out and the state in place."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    index = row
    if state_indices is not None:
        index = tl.load(state_indices + row).to(tl.int64)
    used = _when(index >= 0, in_d)
    slots = state + index * state_row + d * state_channel
    window = ()
    for slot in tl.static_range(K - 1):
        window = window + (_load(slots + slot * state_slot, used),)
    window = window + (_load(x + row * x_row + d * x_channel, used),)
    tl.debug_barrier()  # a slot may be written by another thread than the one that read it
    for slot in tl.static_range(K - 1):
        tl.store(slots + slot * state_slot, window[slot + 1].to(state.dtype.element_ty), mask=used)

    c = tl.zeros([BLOCK_D], tl.float32)
    if bias is not None:
        c += _load(bias + d, used)
    for k in tl.static_range(K):
        c += _load(weight + d * weight_channel + k * weight_tap, used) * window[k]
    if SILU:
        c *= sigmoid(c)
    tl.store(out + row * D + d, tl.where(index >= 0, c, 0.0).to(out.dtype.element_ty), mask=in_d)


def _forward_block(dtype: torch.dtype, K: int) -> dict[str, int]:
    """One warp's channels: 16 bytes to a lane; 8 where a wide filter needs the registers."""
    return {"BLOCK_D": 32 * (16 if K <= 4 else 8) // dtype.itemsize, "num_warps": 1}


def _backward_block(K: int) -> dict[str, int]:
    """One warp's channels: 4 to a lane (8 bytes in bf16) take 135 registers at K = 4, 8 to a lane more than 255."""
    return {"BLOCK_D": 128 if K <= 4 else 64, "num_warps": 1}


def _slots_first(state: Tensor | None) -> Tensor | None:
    """(n_seq, D, K - 1) -> contiguous (n_seq, K - 1, D), rows like x's."""
    return None if state is None else state.transpose(1, 2).contiguous()


def _documents(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """int32 (tokens,): the document of each token, found without a look at the values from the host."""
    if cu_seqlens is None:
        return None
    documents = torch.empty(tokens, dtype=torch.int32, device=cu_seqlens.device)
    documents_kernel[len(cu_seqlens) - 1,](cu_seqlens, documents, BLOCK=1024, **COMPILE_OPTIONS)
    return documents


class _TritonConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        with_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        (B, L, D), K = x.shape, weight.shape[1]
        n_seq = B if cu_seqlens is None else len(cu_seqlens) - 1
        meta = {"K": K, **_forward_block(x.dtype, K), **COMPILE_OPTIONS}
        blocks = triton.cdiv(D, meta["BLOCK_D"])
        taps, initial = weight.t().to(torch.float32).contiguous(), _slots_first(initial_state)
        out = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
        final = torch.empty((n_seq, K - 1, D), dtype=x.dtype, device=x.device) if with_final_state else None
        sizes = x.stride(0), x.stride(1), L, D
        with torch.cuda.device_of(x):
            documents = _documents(cu_seqlens, L)
            forward_kernel[B * triton.cdiv(L, FORWARD_CHUNK) * blocks,](
                x, taps, bias, initial, documents, cu_seqlens, out, *sizes, SILU=silu, CHUNK=FORWARD_CHUNK, **meta
            )  # fmt: skip
            if final is not None:
                final_state_kernel[n_seq, blocks](x, initial, cu_seqlens, final, *sizes, **meta)
        ctx.save_for_backward(x, taps, bias, initial, documents, cu_seqlens)
        ctx.silu, ctx.weight_dtype = silu, weight.dtype
        ctx.set_materialize_grads(False)
        return out, None if final is None else final.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, taps, bias, initial, documents, cu_seqlens = ctx.saved_tensors
        (B, L, D), K = x.shape, len(taps)
        dout = torch.zeros_like(x) if dout is None else with_adjacent_channels(dout)
        dfinal = _slots_first(dfinal)
        meta = {"K": K, "SILU": ctx.silu, **_backward_block(K), **COMPILE_OPTIONS}
        blocks = triton.cdiv(D, meta["BLOCK_D"])
        spans = B * triton.cdiv(L, SPAN - (K - 1))
        dx = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
        sums = torch.empty((spans, K + 1, D), dtype=torch.float32, device=x.device)
        dinitial = torch.empty_like(initial) if ctx.needs_input_grad[3] else None
        sizes = x.stride(0), x.stride(1), dout.stride(0), dout.stride(1), L, D
        with torch.cuda.device_of(x):
            backward_kernel[spans * blocks,](
                x, taps, bias, initial, documents, cu_seqlens, dout, dfinal, dx, sums, *sizes,
                SPAN=SPAN, CHUNK=BACKWARD_CHUNK_BYTES // x.dtype.itemsize, **meta,
            )  # fmt: skip
            if dinitial is not None:
                initial_state_gradient_kernel[len(initial), blocks](
                    x, taps, bias, initial, cu_seqlens, dout, dfinal, dinitial, *sizes, **meta
                )
        total = sums.sum(0)
        return (
            dx,
            total[:K].t().to(ctx.weight_dtype),
            None if bias is None else total[K].to(bias.dtype),
            None if dinitial is None else dinitial.transpose(1, 2),
            *(None,) * 3,
        )


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kernels.causal_conv1d.causal_conv1d` on a GPU, its arguments checked there.

    Nothing waits for the GPU; cu_seqlens is only read there.

    Raises:
        TypeError: fp64 x (the kernels compute in fp32).
        ValueError: tensors that are not on a GPU, unless under Triton's interpreter; a filter wider than 8.
    """
    _require(x, weight, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    bias = None if bias is None else bias.contiguous()
    x = with_adjacent_channels(x)
    out, final_state = _TritonConv.apply(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state)
    return (out, final_state) if return_final_state else out


def causal_conv1d_step_triton(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """`kernels.causal_conv1d.causal_conv1d_step` in one kernel that a CUDA graph can hold, arguments checked there.

    Every tensor is read, and `state` written, in place whatever its strides.
    """
    _require(x, weight, state=state, state_indices=state_indices)
    (batch, D), K = x.shape, weight.shape[1]
    out = torch.empty((batch, D), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    state_indices = None if state_indices is None else state_indices.contiguous()
    meta = {"K": K, "SILU": silu, **STEP_BLOCK, **COMPILE_OPTIONS}
    with torch.cuda.device_of(x):
        step_kernel[batch, triton.cdiv(D, meta["BLOCK_D"])](
            state, x, weight, bias, state_indices, out, *state.stride(), *x.stride(), *weight.stride(), D, **meta
        )
    return out


def _require(x: Tensor, weight: Tensor, **on_device: Tensor | None) -> None:
    require_gpu("x", x)
    for name, tensor in on_device.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, not on {tensor.device}")
    refuse_fp64(x.dtype)
    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(f"backend 'triton' takes a d_conv of at most {MAX_WIDTH}, weight has {weight.shape[1]}")
