"""The CPU walk in C++, through ctypes: strides over batch and time are walked in place, channels are contiguous."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpp import load_library
from kernels.longhorn_scan.problem import Gradients, Inputs, Sequences

GROUP = 256  # channels that a thread walks together; cpu.cpp knows it too
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def available() -> bool:
    """Whether the C++ walk can be built here (it is, the first time this is asked)."""
    return _library() is not None


def forward(x: Inputs, sequences: Sequences, exact: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state, checkpoints); the checkpoints only where `keep`, for a backward."""
    d_inner, d_state = x.u.shape[2], x.k.shape[2]
    out = torch.empty(x.u.shape, dtype=x.u.dtype)
    final = x.D.new_empty(len(sequences), d_inner, d_state)
    checkpoints = x.D.new_empty(sequences.n_chunks, d_state, d_inner) if keep else None
    pointers = (ctypes.c_void_p(_pointer(t)) for t in (out, checkpoints, final))
    _call("forward", x, sequences, *pointers, exact)
    return out, final, checkpoints


def backward(
    x: Inputs,
    sequences: Sequences,
    exact: bool,
    checkpoints: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
) -> Gradients:
    """DESIGN §2's backward: states rebuilt chunk by chunk from the checkpoints, dq and dk summed without atomics."""
    (batch, seqlen, d_inner), d_state = x.u.shape, x.k.shape[2]
    dout = dout.to(x.u.dtype).contiguous()
    dstate = None if dstate is None else dstate.to(x.D.dtype).contiguous()
    du, ddt = (torch.empty(x.u.shape, dtype=x.u.dtype) for _ in range(2))
    dz = None if x.z is None else torch.empty(x.z.shape, dtype=x.z.dtype)
    dinitial = None if x.initial_state is None else x.D.new_empty(x.initial_state.shape)
    groups = (d_inner + GROUP - 1) // GROUP
    dq, dk = (x.D.new_empty(groups, batch, seqlen, d_state) for _ in range(2))
    dD, ddt_bias = (x.D.new_empty(len(sequences), d_inner) for _ in range(2))
    tensors = (dout, dstate, du, ddt, dz, dinitial, dq, dk, dD, ddt_bias)
    gradients = _CGradients(*map(_pointer, tensors))
    _call("backward", x, sequences, ctypes.byref(gradients), ctypes.c_void_p(checkpoints.data_ptr()), exact)
    dq, dk = (t.sum(0).to(x.q.dtype) for t in (dq, dk))
    return Gradients(du, ddt, dq, dk, dD.sum(0), ddt_bias.sum(0), dz, dinitial)


def _library() -> ctypes.CDLL | None:
    return load_library(Path(__file__).with_name("cpu.cpp"))


class _CStrided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("time", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "_CStrided":
        if tensor is None:
            return cls(None, 0, 0)
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class _CProblem(ctypes.Structure):  # `struct Problem` of cpu.cpp
    _fields_ = [
        *((name, _CStrided) for name in ("u", "dt", "q", "k", "z")),
        *((name, ctypes.c_void_p) for name in ("D", "dt_bias", "initial_state", "sequences")),
        *((name, ctypes.c_int64) for name in ("n_seq", "n_tokens", "seqlen")),
        *((name, ctypes.c_int64) for name in ("d_inner", "d_state", "threads")),
    ]


class _CGradients(ctypes.Structure):  # `struct Gradients` of cpu.cpp
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ["dout", "dfinal_state", "du", "ddt", "dz", "dinitial_state", "dq", "dk", "dD", "ddt_bias"]
    ]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(direction: str, x: Inputs, sequences: Sequences, *arguments: object) -> None:
    # Bound to names, so that copies made here live until the call is over.
    streams = [t if t is None or t.stride(2) == 1 else t.contiguous() for t in (x.u, x.dt, x.q, x.k, x.z)]
    whole = [None if t is None else t.contiguous() for t in (x.D, x.dt_bias, x.initial_state)]
    (batch, seqlen, d_inner), d_state = x.u.shape, x.k.shape[2]
    problem = _CProblem(
        *map(_CStrided.of, streams),
        *map(_pointer, whole),
        sequences.table.data_ptr(),
        *(len(sequences), batch * seqlen, seqlen, d_inner, d_state, torch.get_num_threads()),
    )
    function = getattr(_library(), f"longhorn_{direction}_{str(x.u.dtype).removeprefix('torch.')}")
    function.restype = None
    function(ctypes.byref(problem), *arguments)
