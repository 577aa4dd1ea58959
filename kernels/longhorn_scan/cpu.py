"""The CPU backend: a custom backward with checkpointed states, in C++ where a compiler is found, else in torch.

autograd's own record of the loop over time would keep every state (B·L·D·N numbers). Both engines keep one
state in CHUNK steps and rebuild the others in the backward (formulas: DESIGN §2).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.longhorn_scan import cpu_cpp, cpu_torch
from kernels.longhorn_scan.problem import Inputs, Sequences


def cpu_scan(
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
    """`longhorn_scan`'s contract after its checks; always returns (out, final state)."""
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    stream_dtype = u.dtype if u.dtype in cpu_cpp.DTYPES else torch.float32
    streams = [t.to(stream_dtype) for t in (u, dt, q, k)]
    z = None if z is None else z.to(stream_dtype)
    D, dt_bias = (u.new_zeros(u.shape[2], dtype=state_dtype) if p is None else p for p in (D, dt_bias))
    D, dt_bias = D.to(state_dtype), dt_bias.to(state_dtype)
    initial_state = None if initial_state is None else initial_state.to(state_dtype)
    inputs = (*streams, D, dt_bias, z, initial_state)
    out, state = _Scan.apply(Sequences.of(u, cu_seqlens), update == "exact", torch.is_grad_enabled(), *inputs)
    return out.to(u.dtype), state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sequences: Sequences, exact: bool, grad_enabled: bool, *inputs: Any):  # type: ignore[no-untyped-def]
        ctx.engine = cpu_cpp if cpu_cpp.available() else cpu_torch
        keep = grad_enabled and any(ctx.needs_input_grad)  # true of parameters under no_grad too
        out, state, checkpoints = ctx.engine.forward(Inputs(*inputs), sequences, exact, keep)
        ctx.save_for_backward(checkpoints, *inputs)
        ctx.sequences, ctx.exact = sequences, exact
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dstate: Tensor | None):  # type: ignore[no-untyped-def]
        checkpoints, *inputs = ctx.saved_tensors
        x = Inputs(*inputs)
        dout = torch.zeros_like(x.u) if dout is None else dout
        gradients = ctx.engine.backward(x, ctx.sequences, ctx.exact, checkpoints, dout, dstate)
        return None, None, None, *gradients
