"""The Python half of walk.h: how tensors are handed to a C++ scan through ctypes."""

import ctypes

import torch
from torch import Tensor

from kernels.scan.sequences import Sequences

GROUP = 256  # channels that a thread walks together; walk.h knows it too


class Strided(ctypes.Structure):
    """A stream with any strides over batch and time; its channels must be contiguous (`adjacent`)."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("time", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Strided":
        """A null pointer for None."""
        return cls(None, 0, 0) if tensor is None else cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


SIZE_FIELDS: list[tuple[str, type[ctypes.c_void_p] | type[ctypes.c_int64]]] = [
    ("sequences", ctypes.c_void_p),
    *((name, ctypes.c_int64) for name in ("n_seq", "n_tokens", "seqlen", "d_inner", "d_state", "threads")),
]


def sizes(sequences: Sequences, u: Tensor, d_state: int) -> tuple[int, ...]:
    """Values of SIZE_FIELDS."""
    batch, seqlen, d_inner = u.shape
    table = sequences.table.data_ptr()
    return table, len(sequences), batch * seqlen, seqlen, d_inner, d_state, torch.get_num_threads()


def adjacent(tensor: Tensor | None) -> Tensor | None:
    """`tensor` with contiguous channels: itself where they are, else a copy."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def groups_of(d_inner: int) -> int:
    """How many groups of channels the walks are split into: one row of partial sums each."""
    return -(-d_inner // GROUP)
