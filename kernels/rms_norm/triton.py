"""RMSNorm in Triton: one pass over memory each way, the rows in registers.

Legend: rows all dimensions but the last as one, D channels of a row (d_model).

    hidden = x + residual    rstd = 1 / sqrt(mean(hidden²) + eps)    out = hidden · rstd · weight

With n = hidden·rstd and g = dout·weight:

    dhidden = rstd·(g − n·mean(g·n)) + carry      dweight = Σ_rows dout·n

A program of the forward has one row. One of the backward has some, and the fp32 sums of its part of dweight in
registers; the parts are added afterwards. Which rows it has depends on their number alone: the same bits on any GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import COMPILE_OPTIONS, refuse_fp64, require_gpu

# A lane's share of a row: 2 accesses of 16 bytes in bf16, 4 in fp32. Up to 8192 channels, what the backward keeps of
# them (the row, its gradient, its part of dweight) stays within 128 registers; wider rows run, and spill a little.
CHANNELS_PER_LANE = 16
MAX_CHANNELS = 32768
# Parts of dweight: as many programs as an H100 runs at once at d_model = 2048, if there are the rows for it. A part
# costs 8·D bytes beside 6·D a row in bf16 (16·D with residual and carry), so it has at least 8 rows; and at most 256,
# which keeps fp32 accurate over millions.
PARTS = 512
MIN_ROWS, MAX_ROWS = 8, 256


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(x, residual, weight, out, hidden, rstd, x_row, residual_row, D, eps, BLOCK_D: tl.constexpr):
    """Write a row of out and of rstd and, with a residual, of hidden."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    h = _load(x + row * x_row + d, in_d)
    if residual is not None:
        h += _load(residual + row * residual_row + d, in_d)
        tl.store(hidden + row * D + d, h, mask=in_d)
    scale = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / D + eps)
    tl.store(rstd + row, scale)
    normed = h * scale * _load(weight + d, in_d)
    tl.store(out + row * D + d, normed.to(out.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=["rows", "part_rows"])
def backward_kernel(
    dout, carry, hidden, rstd, weight, dx, dresidual, dweight,
    dout_row, carry_row, hidden_row, rows, part_rows, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write part_rows rows of dhidden to dx and, unless None, to dresidual; and their part of dweight (parts, D)."""
    part = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    w = _load(weight + d, in_d)
    dw = tl.zeros([BLOCK_D], tl.float32)
    first = part * part_rows
    for row in range(first, tl.minimum(first + part_rows, rows)):
        gradient = _load(dout + row * dout_row + d, in_d)
        h = _load(hidden + row * hidden_row + d, in_d)
        past = tl.zeros([BLOCK_D], tl.float32)
        if carry is not None:
            past += _load(carry + row * carry_row + d, in_d)
        scale = tl.load(rstd + row)
        normed = h * scale
        g = gradient * w
        dw += gradient * normed
        dh = scale * (g - normed * (tl.sum(g * normed, 0) / D)) + past
        tl.store(dx + row * D + d, dh.to(dx.dtype.element_ty), mask=in_d)
        if dresidual is not None:
            tl.store(dresidual + row * D + d, dh.to(dresidual.dtype.element_ty), mask=in_d)
    tl.store(dweight + part * D + d, dw, mask=in_d)


def require(x: Tensor, maths: torch.dtype) -> None:
    """Raise unless the kernels can take x: TypeError for fp64 maths, ValueError off a GPU or for too wide a row."""
    require_gpu("x", x)
    refuse_fp64(maths)
    if not 0 < x.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"backend 'triton' takes a d_model from 1 to {MAX_CHANNELS}, not {x.shape[-1]}")


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`reference.forward`. Rows that lie apart are read in place."""
    rows, addend = _rows(x), None if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    hidden = None if residual is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        forward_kernel[len(rows),](
            rows, addend, weight.contiguous(), out, hidden, rstd,
            rows.stride(0), _stride(addend), rows.shape[1], eps, **_meta(rows.shape[1]),
        )  # fmt: skip
    return out, hidden, rstd


def backward(
    dout: Tensor,
    carry: Tensor | None,
    hidden: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`reference.backward`."""
    rows, gradients, past = _rows(hidden), _rows(dout), None if carry is None else _rows(carry)
    n_rows, D = rows.shape
    part_rows = min(max(triton.cdiv(n_rows, PARTS), MIN_ROWS), MAX_ROWS)
    parts = triton.cdiv(n_rows, part_rows)
    dx = torch.empty(hidden.shape, dtype=x_dtype, device=hidden.device)
    dresidual = dx if residual_dtype == x_dtype else None
    if residual_dtype not in (x_dtype, None):
        dresidual = torch.empty(hidden.shape, dtype=residual_dtype, device=hidden.device)
    dweight = torch.empty(parts, D, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        backward_kernel[parts,](
            gradients, past, rows, rstd, weight.contiguous(), dx, None if dresidual is dx else dresidual, dweight,
            gradients.stride(0), _stride(past), rows.stride(0), n_rows, part_rows, D, **_meta(D),
        )  # fmt: skip
    return dx, dresidual, dweight.sum(0)


def _rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D) with adjacent channels: a view where the strides allow."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _meta(D: int) -> dict[str, Any]:
    block = triton.next_power_of_2(D)
    warps = min(max(block // (32 * CHANNELS_PER_LANE), 1), 32)
    return {"BLOCK_D": block, "num_warps": warps, **COMPILE_OPTIONS}
