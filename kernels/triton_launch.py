"""What every launch of a Triton kernel checks and sets."""

from typing import Any, overload

import torch
from torch import Tensor

from kernels.triton_math import INTERPRETED

# Multiply-adds are fused whatever Triton's default (from 3.10 on it is not to).
COMPILE_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def require_gpu(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` (an argument called `name`) is on a GPU, or Triton interprets kernels."""
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, {name} is on {tensor.device}; use backend 'cpu', or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )


def refuse_fp64(*dtypes: torch.dtype) -> None:
    """Raise TypeError where one is fp64: the kernels compute in fp32."""
    if torch.float64 in dtypes:
        raise TypeError("backend 'triton' computes in fp32; for float64 use backend 'cpu' or 'reference'")


@overload
def with_adjacent_channels(tensor: Tensor) -> Tensor: ...


@overload
def with_adjacent_channels(tensor: None) -> None: ...


def with_adjacent_channels(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself, or a copy where its last dimension is strided."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
