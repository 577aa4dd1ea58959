"""The convolution in C++: one pass over the rows each way, nothing saved but the inputs."""

from collections.abc import Callable
from ctypes import CDLL, c_bool, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.causal_conv1d.reference import causal_conv1d_reference, causal_conv1d_step_reference
from kernels.cpp import load_library

SOURCE = Path(__file__).with_name("causal_conv1d.cpp")
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
WIDTHS = (2, 3, 4)


def causal_conv1d_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_reference` in C++, or the reference itself where that can't run.

    Without a compiler (`load_library` warns), for fp16, or for a d_conv outside 2…4. Forward and
    backward with SiLU at (4, 512, 512) fp32 take one thread of a 2.8 GHz Xeon 4 ms, the reference
    23 ms (medians, other work on the machine).
    """
    supported = x.dtype in DTYPES and weight.shape[1] in WIDTHS
    library = load_library(SOURCE) if supported else None
    if library is None:
        return causal_conv1d_reference(x, weight, bias, initial_state, bounds, silu)
    if bounds is None:
        batch, seqlen, _ = x.shape
        bounds = [row * seqlen for row in range(batch + 1)]
    return _CausalConv1d.apply(x, weight, bias, initial_state, torch.tensor(bounds), silu, library)


def causal_conv1d_step_cpu(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """`causal_conv1d_step_reference` in C++, or the reference itself where that can't run: as above, and for a state
    of another dtype than x's."""
    supported = x.dtype in DTYPES and weight.shape[1] in WIDTHS and state.dtype == x.dtype
    library = load_library(SOURCE) if supported else None
    if library is None:
        return causal_conv1d_step_reference(state, x, weight, bias, state_indices, silu)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x if x.stride(1) == 1 else x.contiguous()
    weight, bias = weight.to(sums).contiguous(), None if bias is None else bias.to(sums).contiguous()
    indices = None if state_indices is None else state_indices.long().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    _step_function(library, DTYPES[x.dtype])(
        *(weight.shape[1], state.data_ptr(), *state.stride(), None if indices is None else indices.data_ptr()),
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), None if bias is None else bias.data_ptr()),
        *(*x.shape, silu, out.data_ptr()),
    )
    return out


@cache
def _step_function(library: CDLL, dtype: str) -> Callable[..., None]:
    """With its argument types declared: converting them one by one takes longer than a token's work."""
    function = getattr(library, f"step_{dtype}")
    state, stream = [c_void_p, c_int64, c_int64, c_int64, c_void_p], [c_void_p, c_int64, c_void_p, c_void_p]
    function.argtypes, function.restype = [c_int64, *state, *stream, c_int64, c_int64, c_bool, c_void_p], None
    return function


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        bounds: Tensor,
        silu: bool,
        library: CDLL,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, initial_state, bounds)
        ctx.silu, ctx.library = silu, library
        ctx.set_materialize_grads(False)
        d_inner, d_conv = weight.shape
        out = torch.empty(x.shape, dtype=x.dtype)
        final_state = torch.empty(len(bounds) - 1, d_conv - 1, d_inner, dtype=x.dtype)
        inputs = _inputs(x, weight, bias, initial_state, bounds, silu)
        _call(library, "forward", x.dtype, *inputs, out, final_state)
        return out, final_state.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple:
        x, weight, bias, initial_state, bounds = ctx.saved_tensors
        inputs = _inputs(x, weight, bias, initial_state, bounds, ctx.silu)
        dout = torch.zeros(x.shape, dtype=x.dtype) if dout is None else dout.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype)
        dweight = torch.empty(weight.shape[::-1], dtype=inputs[3].dtype)
        dbias = torch.empty(weight.shape[:1], dtype=dweight.dtype)
        dinitial = _slots_first(torch.empty_like(initial_state)) if ctx.needs_input_grad[3] else None
        gradients = dout, _slots_first(dfinal), dx, dweight, dbias, dinitial
        _call(ctx.library, "backward", x.dtype, *inputs, *gradients)
        return (
            dx,
            dweight.t().to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if dinitial is None else dinitial.transpose(1, 2),
            *(None,) * 3,
        )


def _inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    bounds: Tensor,
    silu: bool,
) -> tuple:
    """What both C++ functions start with, in their order."""
    d_inner, d_conv = weight.shape
    rows = (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, d_inner)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    filters = weight.detach().t().to(sums).contiguous()
    biases = torch.zeros(d_inner, dtype=sums) if bias is None else bias.to(sums).contiguous()
    state = _slots_first(initial_state)
    return (
        d_conv,
        rows,
        rows.stride(0),
        filters,
        biases,
        state,
        bounds,
        len(bounds) - 1,
        d_inner,
        silu,
    )


def _slots_first(state: Tensor | None) -> Tensor | None:
    """(n_seq, d_inner, d_conv - 1) -> contiguous (n_seq, d_conv - 1, d_inner), rows like x's."""
    return None if state is None else state.transpose(1, 2).contiguous()


def _call(library: CDLL, name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    getattr(library, f"{name}_{DTYPES[dtype]}")(*map(_to_c, arguments))


def _to_c(argument: Tensor | int | None) -> c_void_p | c_bool | c_int64 | None:
    if isinstance(argument, Tensor):
        return c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return c_bool(argument)
    return None if argument is None else c_int64(argument)
