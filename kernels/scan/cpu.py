"""The frame of the CPU backends: dtypes, and a custom backward that keeps one state in CHUNK steps.

autograd's own record of the loop over time would keep every state (batch·seqlen·d_inner·d_state numbers).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# (inputs, keep=) -> (out, final state, checkpoints); checkpoints only where `keep`, for a backward.
Forward = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
# (inputs, checkpoints=, dout=, dstate=) -> a gradient for each input; dstate may be None.
Backward = Callable[..., tuple[Tensor | None, ...]]


def computed_dtype(u: Tensor) -> torch.dtype:
    """Of states, sums and parameters."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def stored_dtype(u: Tensor, *streams: Tensor | None) -> torch.dtype:
    """Of the streams that an engine reads and the gradients it writes: bf16 where all are, else as computed."""
    all_bf16 = all(t is None or t.dtype == torch.bfloat16 for t in (u, *streams))
    return torch.bfloat16 if all_bf16 else computed_dtype(u)


def checkpointed_scan(forward: Forward, backward: Backward, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """(out, final state) by `forward`, differentiated by `backward`.

    inputs: a NamedTuple that starts with u; both functions are given it as it is.
    """
    out, state = _Scan.apply(forward, backward, type(inputs), torch.is_grad_enabled(), *inputs)
    return out, state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, forward: Forward, backward: Backward, pack: Callable[..., Any], grad_enabled: bool, *inputs: Tensor | None
    ):
        keep = grad_enabled and any(ctx.needs_input_grad)  # true of parameters under no_grad too
        with torch.autocast("cpu", enabled=False):  # it would round the torch engine's matmuls
            out, state, checkpoints = forward(pack(*inputs), keep=keep)
        ctx.save_for_backward(checkpoints, *inputs)
        ctx.backward_of_scan, ctx.pack = backward, pack
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dstate: Tensor | None):  # type: ignore[no-untyped-def]
        checkpoints, *inputs = ctx.saved_tensors
        dout = torch.zeros_like(inputs[0]) if dout is None else dout
        with torch.autocast("cpu", enabled=False):
            gradients = ctx.backward_of_scan(ctx.pack(*inputs), checkpoints=checkpoints, dout=dout, dstate=dstate)
        return None, None, None, None, *gradients
