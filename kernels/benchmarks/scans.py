"""The recurrences: against loops, other engines, a scan that is parallel in time, and other projects' kernels."""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels.benchmarks.case import Bar, Case, Limit, Op, Shape, Variant, normal
from kernels.longhorn_scan import cpu_cpp as longhorn_cpp
from kernels.longhorn_scan import longhorn_scan, longhorn_step
from kernels.longhorn_scan.reference import step_size, update_state
from kernels.scan.reference import skip_and_gate
from kernels.selective_scan import cpu_cpp as selective_cpp
from kernels.selective_scan import selective_scan

CPU_SHAPE = {"batch": 4, "seqlen": 512, "d_inner": 512, "d_state": 16}
CHECK_SHAPE = {"batch": 2, "seqlen": 77, "d_inner": 277, "d_state": 16}
TRAINING_SHAPE = {"batch": 8, "seqlen": 2048, "d_inner": 4096, "d_state": 16}  # a layer of the 1.3B model
SUMMARY = "the recurrence, its skip and gate"
SELECTIVE_SUMMARY = "Mamba-1's recurrence, its skip and gate"


# ---- longhorn_scan ---------------------------------------------------------------------------------------
def longhorn_cpu() -> Case:
    """The compiled walk against the torch walk and the loop."""
    diagonal, exact = _oracle("diagonal"), _oracle("exact")
    cpp = partial(_on_cpp, longhorn_scan, longhorn_cpp)
    return Case(
        SUMMARY,
        _draw_longhorn,
        CPU_SHAPE,
        CHECK_SHAPE,
        {
            "unbind loop": Variant(diagonal, diagonal),
            "torch": Variant(partial(_on_torch, longhorn_scan, longhorn_cpp), diagonal),
            "C++": Variant(cpp, diagonal),
            "C++ exact": Variant(partial(cpp, update="exact"), exact),
            "C++ bf16": Variant(cpp, diagonal, torch.bfloat16),
        },
        baseline="torch",
        bars=(Bar("C++", "torch", 6.0), Bar("torch", "unbind loop", 1.0)),
    )


def longhorn_threads() -> Case:
    """One core against two."""
    cpp = partial(_on_cpp, longhorn_scan, longhorn_cpp)
    variants = {f"C++, {n} thread{'s' * (n > 1)}": Variant(cpp, _oracle("diagonal"), threads=n) for n in (1, 2)}
    summary = "the C++ walk on one core and on two"
    return Case(summary, _draw_longhorn, CPU_SHAPE, CHECK_SHAPE, variants, "C++, 1 thread")


def longhorn_cuda() -> Case:
    """The Triton walk at the training shape; the loop there too, tens of thousands of launches."""
    diagonal, exact = _oracle("diagonal"), _oracle("exact")
    return Case(
        SUMMARY,
        _draw_longhorn,
        TRAINING_SHAPE,
        CHECK_SHAPE,
        {
            "unbind loop": Variant(diagonal, diagonal, torch.bfloat16),
            "tl.associative_scan": Variant(_associative, diagonal, torch.bfloat16, backward=False),
            "Triton": Variant(_triton("diagonal"), diagonal, torch.bfloat16),
            "Triton exact": Variant(_triton("exact"), exact, torch.bfloat16),
        },
        baseline="unbind loop",
        bars=(
            Limit("Triton", "forward", 0.55, "H100"),
            Limit("Triton", "backward", 2.2, "H100"),
            Bar("Triton exact", "Triton", 1 / 1.3),
            Bar("Triton", "tl.associative_scan", 1.0),
        ),
    )


def longhorn_long() -> Case:
    """The same tokens as a batch of 8 and as one sequence, whose time the diagonal update may cut."""
    diagonal, exact = _oracle("diagonal"), _oracle("exact")
    one = {**TRAINING_SHAPE, "batch": 1, "seqlen": 32768}
    return Case(
        "long sequences: the same work in few and in many rows",
        _draw_longhorn,
        {**TRAINING_SHAPE, "seqlen": 4096},
        {"batch": 1, "seqlen": 1031, "d_inner": 277, "d_state": 16},  # long enough to be cut
        {
            "8 × 4096": Variant(_triton("diagonal"), diagonal, torch.bfloat16),
            "1 × 32768": Variant(_triton("diagonal"), diagonal, torch.bfloat16, shape=one),
            "1 × 32768 exact": Variant(_triton("exact"), exact, torch.bfloat16, shape=one),
        },
        baseline="8 × 4096",
        bars=(Bar("1 × 32768", "8 × 4096", 0.5),),
    )


def longhorn_decode() -> Case:
    """A token of 64 sequences through the scans of all 48 layers: no state is still in the cache from its last step."""
    oracle = partial(_every_layer, _plain_step)
    return Case(
        "one decode step of every layer, states in place",
        _draw_decode,
        {"layers": 48, "batch": 64, "d_inner": 4096, "d_state": 16},
        {"layers": 2, "batch": 3, "d_inner": 277, "d_state": 16},
        {
            "plain torch": Variant(oracle, oracle, torch.bfloat16, backward=False),
            "longhorn_step": Variant(partial(_every_layer, longhorn_step), oracle, torch.bfloat16, backward=False),
        },
        baseline="plain torch",
        wide=("state",),
        in_place=("state",),
    )


def _oracle(update: str) -> Op:
    return partial(longhorn_scan, backend="reference", update=update)


def _triton(update: str) -> Op:
    return partial(longhorn_scan, backend="triton", update=update)


def _associative(**inputs: Any) -> Tensor:
    from kernels.benchmarks.associative import associative_scan  # late: other devices need no triton

    return associative_scan(**inputs)


def _on_cpp(scan: Op, engine: ModuleType, **inputs: Any) -> Any:
    if not engine.available():
        raise RuntimeError("the C++ variants need a compiler: install g++ or clang++, or set $CXX")
    return scan(**inputs, backend="cpu")


def _on_torch(scan: Op, engine: ModuleType, **inputs: Any) -> Any:
    with mock.patch.object(engine, "available", return_value=False):
        return scan(**inputs, backend="cpu")


def _every_layer(step: Callable[..., Tensor], D: Tensor, dt_bias: Tensor, **layers: Tensor) -> tuple[Tensor, ...]:
    rows = (dict(zip(layers, tensors, strict=True)) for tensors in zip(*layers.values(), strict=True))
    return tuple(step(**row, D=D, dt_bias=dt_bias) for row in rows)


def _plain_step(
    state: Tensor, u: Tensor, dt: Tensor, z: Tensor, q: Tensor, k: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    wide_u, x, wide_q, wide_k = (t.to(state.dtype) for t in (u, dt, q, k))
    state.copy_(update_state(state, wide_u, step_size(x + dt_bias, wide_k), wide_k, "diagonal"))
    return skip_and_gate((state * wide_q.unsqueeze(-2)).sum(-1), wide_u, D, z).to(u.dtype)


def _draw_longhorn(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    batch, seqlen, d_inner, d_state = shape.values()
    streams = dict.fromkeys(("u", "dt", "z"), (batch, seqlen, d_inner))
    rows = dict.fromkeys(("q", "k"), (batch, seqlen, d_state))
    return normal(streams | rows | {"D": (d_inner,), "dt_bias": (d_inner,)}, generator)


def _draw_decode(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    layers, batch, d_inner, d_state = shape.values()
    token = _draw_longhorn({"layers": layers, "batch": batch, "d_inner": d_inner, "d_state": d_state}, generator)
    return token | normal({"state": (layers, batch, d_inner, d_state)}, generator)


# ---- selective_scan --------------------------------------------------------------------------------------
def selective_cpu() -> Case:
    """The compiled walk against the torch walk and the loop."""
    oracle = partial(selective_scan, backend="reference")
    cpp = partial(_on_cpp, selective_scan, selective_cpp)
    return Case(
        SELECTIVE_SUMMARY,
        _draw_selective,
        CPU_SHAPE,
        CHECK_SHAPE,
        {
            "unbind loop": Variant(oracle, oracle),
            "torch": Variant(partial(_on_torch, selective_scan, selective_cpp), oracle),
            "C++": Variant(cpp, oracle),
            "C++ bf16": Variant(cpp, oracle, torch.bfloat16),
        },
        baseline="torch",
        bars=(Bar("C++", "torch", 4.0), Bar("torch", "unbind loop", 1.0)),
        wide=("A",),
    )


def selective_cuda() -> Case:
    """The Triton walk against mamba_ssm's CUDA kernel, which flash-linear-attention's Mamba layer calls too."""
    oracle = partial(selective_scan, backend="reference")
    walk = partial(selective_scan, backend="triton")
    return Case(
        SELECTIVE_SUMMARY,
        _draw_selective,
        TRAINING_SHAPE,
        CHECK_SHAPE,
        {
            "unbind loop": Variant(oracle, oracle, torch.bfloat16),
            "mamba_ssm": Variant(_mamba_ssm, oracle, torch.bfloat16, time_adjacent=True, needs="mamba_ssm"),
            "Triton": Variant(walk, oracle, torch.bfloat16),
        },
        baseline="unbind loop",
        bars=(Bar("Triton", "mamba_ssm", 1.0),),
        wide=("A",),
    )


def _mamba_ssm(u: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return scan(u.mT, dt.mT, A, B.mT, C.mT, D, z.mT, delta_bias=dt_bias, delta_softplus=True).mT


def _draw_selective(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    batch, seqlen, d_inner, d_state = shape.values()
    streams = dict.fromkeys(("u", "dt", "z"), (batch, seqlen, d_inner))
    rows = dict.fromkeys(("B", "C"), (batch, seqlen, d_state))
    drawn = normal(streams | rows | {"A": (d_inner, d_state), "D": (d_inner,), "dt_bias": (d_inner,)}, generator)
    return drawn | {"A": -drawn["A"].exp()}
