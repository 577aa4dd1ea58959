"""What every launch of a Triton kernel checks and sets."""

from typing import Any

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
