"""The CPU walk in C++, through ctypes: strides over batch and time are walked in place, channels are contiguous."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.cpp import load_library
from kernels.longhorn_scan.problem import Gradients, Inputs, Sequences
from kernels.scan.native import SIZE_FIELDS, Strided, adjacent, contiguous, groups_of, pointer, sizes

SOURCE = Path(__file__).with_name("cpu.cpp")


def available() -> bool:
    """Whether the C++ walk can be built here (it is, the first time this is asked)."""
    return _library() is not None


def forward(x: Inputs, sequences: Sequences, exact: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state, checkpoints); the checkpoints only where `keep`, for a backward."""
    d_inner, d_state = x.u.shape[2], x.k.shape[2]
    out = torch.empty(x.u.shape, dtype=x.u.dtype)
    final = x.D.new_empty(len(sequences), d_inner, d_state)
    checkpoints = x.D.new_empty(sequences.n_chunks, d_state, d_inner) if keep else None
    pointers = (ctypes.c_void_p(pointer(t)) for t in (out, checkpoints, final))
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
    """README.md's backward: states rebuilt chunk by chunk from the checkpoints, dq and dk summed without atomics."""
    (batch, seqlen, d_inner), d_state = x.u.shape, x.k.shape[2]
    dout = dout.to(x.u.dtype).contiguous()
    dstate = None if dstate is None else dstate.to(x.D.dtype).contiguous()
    du, ddt = (torch.empty(x.u.shape, dtype=x.u.dtype) for _ in range(2))
    dz = None if x.z is None else torch.empty(x.z.shape, dtype=x.z.dtype)
    dinitial = None if x.initial_state is None else x.D.new_empty(x.initial_state.shape)
    dq, dk = (x.D.new_empty(groups_of(d_inner), batch, seqlen, d_state) for _ in range(2))
    dD, ddt_bias = (x.D.new_empty(len(sequences), d_inner) for _ in range(2))
    tensors = (dout, dstate, du, ddt, dz, dinitial, dq, dk, dD, ddt_bias)
    gradients = _CGradients(*map(pointer, tensors))
    _call("backward", x, sequences, ctypes.byref(gradients), ctypes.c_void_p(checkpoints.data_ptr()), exact)
    dq, dk = (t.sum(0).to(x.q.dtype) for t in (dq, dk))
    return Gradients(du, ddt, dq, dk, dD.sum(0), ddt_bias.sum(0), dz, dinitial)


def step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    q: Tensor,
    k: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state_indices: Tensor | None,
    exact: bool,
) -> Tensor:
    """`longhorn_step`'s contract after its checks: every stream in one dtype, parameters in the state's.

    A single token of 512 channels is 10 µs' work; the same in torch is 25 calls.
    """
    # Bound to names, so that copies made here live until the call is over.
    streams = [adjacent(t) for t in (u, dt, q, k, z)]
    whole = [contiguous(t) for t in (D, dt_bias, None if state_indices is None else state_indices.long())]
    out = torch.empty(u.shape, dtype=u.dtype)
    strides = (0 if t is None else t.stride(0) for t in streams)
    pointers = map(pointer, (*streams, *whole, state, out))
    problem = _CStep(*pointers, *strides, *state.stride(), *u.shape, k.shape[1])
    _function("step", u.dtype)(ctypes.byref(problem), exact)
    return out


def _library() -> ctypes.CDLL | None:
    return load_library(SOURCE)


class _CProblem(ctypes.Structure):  # `struct Problem` of cpu.cpp
    _fields_ = [
        *((name, Strided) for name in ("u", "dt", "q", "k", "z")),
        *((name, ctypes.c_void_p) for name in ("D", "dt_bias", "initial_state")),
        *SIZE_FIELDS,
    ]


class _CGradients(ctypes.Structure):  # `struct Gradients` of cpu.cpp
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ["dout", "dfinal_state", "du", "ddt", "dz", "dinitial_state", "dq", "dk", "dD", "ddt_bias"]
    ]


class _CStep(ctypes.Structure):  # `struct Step` of cpu.cpp
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "dt", "q", "k", "z", "D", "dt_bias", "indices", "state", "out")),
        *((f"{name}_row", ctypes.c_int64) for name in ("u", "dt", "q", "k", "z", "state")),
        *((name, ctypes.c_int64) for name in ("state_channel", "state_entry", "rows", "d_inner", "d_state")),
    ]


def _call(direction: str, x: Inputs, sequences: Sequences, *arguments: object) -> None:
    # Bound to names, so that copies made here live until the call is over.
    streams = [adjacent(t) for t in (x.u, x.dt, x.q, x.k, x.z)]
    whole = [contiguous(t) for t in (x.D, x.dt_bias, x.initial_state)]
    problem = _CProblem(*map(Strided.of, streams), *map(pointer, whole), *sizes(sequences, x.u, x.k.shape[2]))
    _function(direction, x.u.dtype)(ctypes.byref(problem), *arguments)


@cache
def _function(name: str, stored: torch.dtype) -> Callable[..., None]:
    function: Any = getattr(_library(), f"longhorn_{name}_{str(stored).removeprefix('torch.')}")
    function.restype = None
    return function
