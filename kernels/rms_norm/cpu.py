"""RMSNorm's forward and backward in C++, one pass over memory each."""

from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpp import load_library

SOURCE = Path(__file__).with_name("rms_norm.cpp")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
# dweight is summed over blocks of this many rows first: that keeps fp32 accurate over millions of
# rows, and the result independent of the number of threads.
BLOCK_ROWS = 128


def supports(x: Tensor, maths: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Whether the C++ here covers these types; also False, after a warning, without a compiler."""
    narrow = {torch.float32, torch.bfloat16}
    types = {x.dtype, out_dtype} if maths == torch.float32 else {x.dtype, out_dtype, maths}
    covered = types <= narrow or types == {torch.float64}
    return x.device.type == "cpu" and covered and load_library(SOURCE) is not None


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`reference.forward`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=out_dtype)
    hidden = None if residual is None else torch.empty(x.shape, dtype=weight.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=weight.dtype)
    residual = None if residual is None else residual.to(weight.dtype).contiguous()
    inputs = x, residual, weight.contiguous(), eps, rstd.numel(), x.shape[-1]
    _call("forward", x.dtype, out_dtype, *inputs, out, hidden, rstd)
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
    hidden, dout = hidden.contiguous(), dout.contiguous()
    carry = None if carry is None else carry.contiguous()
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype)
    blocks = -(-rstd.numel() // BLOCK_ROWS)
    dweight = torch.empty(blocks, hidden.shape[-1], dtype=weight.dtype)
    sizes = rstd.numel(), hidden.shape[-1], BLOCK_ROWS
    inputs = dout, carry, hidden, rstd, weight.contiguous(), *sizes
    _call("backward", hidden.dtype, dout.dtype, *inputs, dhidden, dweight)
    dresidual = None if residual_dtype is None else dhidden.to(residual_dtype)
    return dhidden.to(x_dtype), dresidual, dweight.sum(0)


def _call(name: str, x: torch.dtype, y: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    library = load_library(SOURCE)
    getattr(library, f"{name}_{DTYPES[x]}_{DTYPES[y]}")(*map(_to_c, arguments))


def _to_c(argument: Tensor | int | float | None) -> c_void_p | c_int64 | c_double | None:
    if isinstance(argument, Tensor):
        return c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return c_double(argument)
    return None if argument is None else c_int64(argument)
