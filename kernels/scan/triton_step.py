"""What the Triton decode steps share: one token per row of a batch, its state read and written once, in place.

A program takes BLOCK_D channels of one row: a tile [BLOCK_D, BLOCK_N] of the state as it lies in memory, so that a
thread moves 16 bytes at a time. 32 channels to a warp: 4096 channels of one sequence already occupy 128 of an H100's
132 multiprocessors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scan.triton_walk import with_adjacent_channels
from kernels.triton_launch import require_gpu
from kernels.triton_math import sigmoid

BLOCK_D = 32
NUM_WARPS = 1


@triton.jit
def state_row(state_indices, row):
    """The row of the state that a row of the batch belongs to; negative: none."""
    if state_indices is None:
        index = row
    else:
        index = tl.load(state_indices + row).to(tl.int64)
    return index


@triton.jit
def load_channels(pointer, d, in_d):
    """fp32 numbers of the channels, 0 for None."""
    if pointer is None:
        x = tl.zeros(d.shape, tl.float32)
    else:
        x = tl.load(pointer + d, mask=in_d, other=0.0).to(tl.float32)
    return x


@triton.jit
def read_out(state, read, u, z, skip, d, in_d):
    """(S·read + skip·u)·silu(z) of each channel; state [BLOCK_D, BLOCK_N], z its row's start or None."""
    y = tl.fma(load_channels(skip, d, in_d), u, tl.sum(state * read[None, :], 1))
    if z is not None:
        zt = load_channels(z, d, in_d)
        y *= zt * sigmoid(zt)
    return y


def row_stride(tensor: Tensor | None) -> int:
    """Distance of the rows of a (batch, channels) tensor whose channels lie side by side."""
    return 0 if tensor is None else tensor.stride(0)


def prepare(state: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with adjacent channels; TypeError or ValueError where the kernels can't take the state."""
    if state.dtype != torch.float32:
        raise TypeError(f"the Triton step keeps its state in fp32, not {state.dtype}")
    require_gpu("state", state)
    return [with_adjacent_channels(t) for t in tensors]
