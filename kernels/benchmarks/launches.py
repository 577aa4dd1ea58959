"""Small calls of every Triton op, forward and backward: the variants that a 1.3B run uses, and odd ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.causal_conv1d.triton import causal_conv1d_step_triton, causal_conv1d_triton
from kernels.cross_entropy import linear_cross_entropy
from kernels.longhorn_scan.triton import triton_scan as longhorn_scan
from kernels.longhorn_scan.triton import triton_step as longhorn_step
from kernels.rms_norm import rms_norm
from kernels.selective_scan.triton import triton_scan as selective_scan
from kernels.selective_scan.triton import triton_step as selective_step

BF16 = torch.bfloat16


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def _differentiate(results: Tensor | tuple[Tensor, ...]) -> None:
    results = (results,) if isinstance(results, Tensor) else results
    torch.autograd.backward(results, [torch.zeros_like(t) for t in results])


def _longhorn(
    update: str = "diagonal",
    batch: int = 1024,
    seqlen: int = 8,
    d_inner: int = 64,
    d_state: int = 16,
    dtype: torch.dtype = BF16,
    packed: bool = False,
    bare: bool = False,
) -> None:
    """bare: none of the optional inputs."""
    u, dt, z = (_leaf(batch, seqlen, d_inner, dtype=dtype) for _ in range(3))
    q, k = (_leaf(batch, seqlen, d_state, dtype=dtype) for _ in range(2))
    initial, bounds = _packed_inputs(packed, batch, seqlen, d_inner, d_state)
    skip, dt_bias = (None, None) if bare else (_leaf(d_inner), _leaf(d_inner))
    out, final = longhorn_scan(u, dt, q, k, skip, dt_bias, None if bare else z, initial, bounds, update)
    _differentiate((out, final) if packed else out)


def _selective(packed: bool = False, dtype: torch.dtype = BF16, d_state: int = 16) -> None:
    batch, seqlen, d_inner = 1, 8, 64
    u, dt, z = (_leaf(batch, seqlen, d_inner, dtype=dtype) for _ in range(3))
    B, C = (_leaf(batch, seqlen, d_state, dtype=dtype) for _ in range(2))
    A, skip, dt_bias = _leaf(d_inner, d_state), _leaf(d_inner), _leaf(d_inner)
    initial, bounds = _packed_inputs(packed, batch, seqlen, d_inner, d_state)
    out, final = selective_scan(u, dt, A, B, C, skip, dt_bias, z, initial, bounds)
    _differentiate((out, final) if packed else out)


def _packed_inputs(
    packed: bool, batch: int, seqlen: int, d_inner: int, d_state: int
) -> tuple[Tensor | None, Tensor | None]:
    if not packed:
        return None, None
    return _leaf(batch, d_inner, d_state), torch.tensor([0, seqlen], dtype=torch.int32)


def _steps() -> None:
    """Every decode step, as in serving: rows of a larger state."""
    batch, d_inner, d_state, d_conv = 64, 4096, 16, 4
    state, indices = torch.zeros(batch, d_inner, d_state), torch.arange(batch)
    u, dt, z = (torch.zeros(batch, d_inner, dtype=BF16) for _ in range(3))
    q, k = (torch.zeros(batch, d_state, dtype=BF16) for _ in range(2))
    vector, A = torch.zeros(d_inner), torch.zeros(d_inner, d_state)
    for update in ("diagonal", "exact"):
        longhorn_step(state, u, dt, q, k, vector, vector, z, indices, update)
    selective_step(state, u, dt, A, k, q, vector, vector, z, indices)
    window, weight = torch.zeros(batch, d_inner, d_conv - 1), torch.zeros(d_inner, d_conv)
    causal_conv1d_step_triton(window, u, weight, vector, indices, silu=True)


def _conv(dtype: torch.dtype = BF16, packed: bool = False, states: bool = False, d_inner: int = 4096) -> None:
    """x is half of a projection's output."""
    batch, seqlen, d_conv = 1 if packed else 2, 64, 4
    x = torch.zeros(batch, seqlen, 2 * d_inner, dtype=dtype)[..., :d_inner].requires_grad_()
    initial = _leaf(batch, d_inner, d_conv - 1, dtype=dtype) if states else None
    bounds = torch.tensor([0, seqlen], dtype=torch.int32) if packed else None
    weight, bias = _leaf(d_inner, d_conv), _leaf(d_inner)
    _differentiate(causal_conv1d_triton(x, weight, bias, initial, bounds, silu=True, return_final_state=states))


def _norm(dtype: torch.dtype = torch.float32, residual: bool = False, d_model: int = 2048) -> None:
    options: dict[str, Any] = {"residual": _leaf(16, d_model)} if residual else {}
    _differentiate(
        rms_norm(_leaf(16, d_model, dtype=dtype), _leaf(d_model), backend="triton", out_dtype=BF16, **options)
    )


def _loss(vocab_size: int = 32000, padded_vocab: int = 32000) -> None:
    hidden, weight = _leaf(5, 16, dtype=BF16), _leaf(padded_vocab, 16, dtype=BF16)
    targets = torch.zeros(5, dtype=torch.int64)
    _differentiate(linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size, backend="triton"))


LAUNCHES: dict[str, Callable[[], None]] = {
    "scan": _longhorn,
    "scan exact": partial(_longhorn, "exact"),
    "scan packed": partial(_longhorn, packed=True, batch=1),
    "scan exact packed": partial(_longhorn, "exact", packed=True, batch=1),
    "scan long": partial(_longhorn, batch=1, seqlen=512),
    "scan fp32": partial(_longhorn, dtype=torch.float32),
    "scan bare": partial(_longhorn, bare=True),
    "scan odd sizes": partial(_longhorn, d_inner=19, d_state=5, seqlen=7),
    "scan smallest": partial(_longhorn, "exact", batch=1, d_inner=1, d_state=1, seqlen=1),
    "scan 32 states": partial(_longhorn, d_state=32),
    "scan 64 states": partial(_longhorn, d_state=64),
    "scan exact 64 states": partial(_longhorn, "exact", d_state=64),
    "selective scan": _selective,
    "selective scan packed": partial(_selective, packed=True),
    "selective scan fp32": partial(_selective, dtype=torch.float32),
    "selective scan 64 states": partial(_selective, d_state=64),
    "decode steps": _steps,
    "conv": _conv,
    "conv packed": partial(_conv, packed=True, states=True),
    "conv states": partial(_conv, states=True),
    "conv fp32 odd": partial(_conv, torch.float32, d_inner=37),
    "norm": _norm,
    "norm with residual": partial(_norm, BF16, residual=True),
    "norm 4096": partial(_norm, BF16, residual=True, d_model=4096),
    "cross-entropy": _loss,
    "cross-entropy padded": partial(_loss, 50257, 50304),
}
