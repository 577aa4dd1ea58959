"""Small calls of every Triton op, forward and backward, in the variants that a 1.3B run uses and the odd ones beside."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.longhorn_scan.triton import triton_scan
from kernels.longhorn_scan.triton_step import triton_step
from kernels.selective_scan import triton as selective


def scan(
    update: str = "diagonal",
    batch: int = 1024,
    seqlen: int = 8,
    d_inner: int = 64,
    d_state: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = False,
    bare: bool = False,
) -> None:
    """The Longhorn scan and its backward; bare: none of the optional inputs."""
    u, dt, z, q, k = _streams(batch, seqlen, dtype, d_inner, d_inner, d_inner, d_state, d_state)
    skip, dt_bias = _leaf(d_inner), _leaf(d_inner)
    initial = _leaf(batch, d_inner, d_state) if packed else None
    bounds = torch.tensor([0, seqlen], dtype=torch.int32) if packed else None
    optional = (None, None, None, None) if bare else (skip, dt_bias, z, initial)
    out, final = triton_scan(u, dt, q, k, *optional, bounds, update)
    (out.sum() + final.sum() if packed else out.sum()).backward()


def selective_scan(packed: bool = False, dtype: torch.dtype = torch.bfloat16, d_state: int = 16) -> None:
    """The selective scan and its backward."""
    batch, seqlen, d_inner = 1, 8, 64
    u, dt, z, B, C = _streams(batch, seqlen, dtype, d_inner, d_inner, d_inner, d_state, d_state)
    A, skip, dt_bias = _leaf(d_inner, d_state), _leaf(d_inner), _leaf(d_inner)
    initial = _leaf(batch, d_inner, d_state) if packed else None
    bounds = torch.tensor([0, seqlen], dtype=torch.int32) if packed else None
    out, final = selective.triton_scan(u, dt, A, B, C, skip, dt_bias, z, initial, bounds)
    (out.sum() + final.sum() if packed else out.sum()).backward()


def step(update: str = "diagonal", indexed: bool = False) -> None:
    """The Longhorn decode step."""
    batch, d_inner, d_state, half = 64, 4096, 16, torch.bfloat16
    state = torch.zeros(batch, d_inner, d_state)
    u, dt, z = (torch.zeros(batch, d_inner, dtype=half) for _ in range(3))
    q, k = (torch.zeros(batch, d_state, dtype=half) for _ in range(2))
    indices = torch.arange(batch) if indexed else None
    triton_step(state, u, dt, q, k, torch.zeros(d_inner), torch.zeros(d_inner), z, indices, update)


def _streams(batch: int, seqlen: int, dtype: torch.dtype, *channels: int) -> list[Tensor]:
    return [_leaf(batch, seqlen, c, dtype=dtype) for c in channels]


def _leaf(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options).requires_grad_()


LAUNCHES: dict[str, Callable[[], None]] = {
    "scan": scan,
    "scan exact": partial(scan, "exact"),
    "scan packed": partial(scan, packed=True, batch=1),
    "scan exact packed": partial(scan, "exact", packed=True, batch=1),
    "scan long": partial(scan, batch=1, seqlen=512),
    "scan fp32": partial(scan, dtype=torch.float32),
    "scan bare": partial(scan, bare=True),
    "scan odd sizes": partial(scan, d_inner=19, d_state=5, seqlen=7),
    "scan smallest": partial(scan, "exact", batch=1, d_inner=1, d_state=1, seqlen=1),
    "scan 32 states": partial(scan, d_state=32),
    "scan 64 states": partial(scan, d_state=64),
    "scan exact 64 states": partial(scan, "exact", d_state=64),
    "step": step,
    "step exact indexed": partial(step, "exact", indexed=True),
    "selective scan": selective_scan,
    "selective scan packed": partial(selective_scan, packed=True),
    "selective scan fp32": partial(selective_scan, dtype=torch.float32),
    "selective scan 64 states": partial(selective_scan, d_state=64),
}
