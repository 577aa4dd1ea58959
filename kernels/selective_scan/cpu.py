"""The CPU backend: a custom backward with checkpointed states, in C++ where a compiler is found, else in torch.

Both engines keep one state in CHUNK steps and rebuild the others in the backward (formulas: README.md).
"""

from functools import partial

from torch import Tensor

from kernels.scan.cpu import checkpointed_scan, computed_dtype, stored_dtype
from kernels.scan.sequences import Sequences
from kernels.selective_scan import cpu_cpp, cpu_torch
from kernels.selective_scan.problem import Inputs


def cpu_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`'s contract after its checks; always returns (out, final state)."""
    dtype, stored = computed_dtype(u), stored_dtype(u, dt, B, C, z)
    D, dt_bias = (u.new_zeros(u.shape[2], dtype=dtype) if p is None else p.to(dtype) for p in (D, dt_bias))
    inputs = Inputs(
        u=u.to(stored),
        dt=dt.to(stored),
        A=A.to(dtype),
        B=B.to(stored),
        C=C.to(stored),
        D=D,
        dt_bias=dt_bias,
        z=None if z is None else z.to(stored),
        initial_state=None if initial_state is None else initial_state.to(dtype),
    )
    engine = cpu_cpp if cpu_cpp.available() else cpu_torch
    sequences = Sequences.of(u, cu_seqlens)
    forward, backward = (partial(f, sequences=sequences) for f in (engine.forward, engine.backward))
    out, state = checkpointed_scan(forward, backward, inputs)
    return out.to(u.dtype), state
