"""What is compared: shapes, variants, and the bars that a variant has to clear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.cross_entropy import linear_cross_entropy
from kernels.longhorn_scan import cpu_cpp, longhorn_scan
from kernels.rms_norm import rms_norm

Shape = Mapping[str, int]
Op = Callable[..., Any]  # a case's inputs by name → its output, a Tensor
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8}  # relative to each tensor's largest value


@dataclass(frozen=True)
class Variant:
    """One way to compute a case's output; `oracle`, given the same inputs in float64, says what is right."""

    op: Op
    oracle: Op
    dtype: torch.dtype = torch.float32  # of all that has more than one dimension; vectors stay fp32
    threads: int = 1


@dataclass(frozen=True)
class Bar:
    """`faster` has to be at least `ratio` times as fast as `slower`, by their medians."""

    faster: str
    slower: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """`draw(shape, generator)` makes inputs by name: fp32 (int64 targets) on the generator's device."""

    summary: str
    draw: Callable[[Shape, torch.Generator], dict[str, Tensor]]
    shape: Shape
    check_shape: Shape  # small, and no multiple of any vector or chunk
    variants: Mapping[str, Variant]
    baseline: str
    bars: tuple[Bar, ...] = ()


def cases_for(device: torch.device) -> dict[str, Case]:
    """Every case that runs on this device, by name."""
    common = {"causal_conv1d": _conv_case(), "rms_norm": _norm_case(), "cross_entropy": _loss_case()}
    if device.type != "cuda":
        return {"longhorn_scan": _scan_case(), "longhorn_scan_threads": _threads_case(), **common}
    return ({"longhorn_scan": _scan_cuda_case()} if find_spec("triton") else {}) | common


# ---- longhorn_scan ---------------------------------------------------------------------------------------
SCAN_SHAPE = {"batch": 4, "seqlen": 512, "d_inner": 512, "d_state": 16}
SCAN_CHECK_SHAPE = {"batch": 2, "seqlen": 77, "d_inner": 277, "d_state": 16}


def _scan_case() -> Case:
    diagonal, exact = _scan_oracle("diagonal"), _scan_oracle("exact")
    return Case(
        "the recurrence, its skip and gate",
        _draw_scan,
        SCAN_SHAPE,
        SCAN_CHECK_SHAPE,
        {
            "unbind loop": Variant(partial(longhorn_scan, backend="reference"), diagonal),
            "torch": Variant(_scan_torch, diagonal),
            "C++": Variant(_scan_cpp, diagonal),
            "C++ exact": Variant(partial(_scan_cpp, update="exact"), exact),
            "C++ bf16": Variant(_scan_cpp, diagonal, torch.bfloat16),
        },
        baseline="torch",
        bars=(Bar("C++", "torch", 6.0), Bar("torch", "unbind loop", 1.0)),
    )


def _threads_case() -> Case:
    variants = {
        f"C++, {n} thread{'s' * (n > 1)}": Variant(_scan_cpp, _scan_oracle("diagonal"), threads=n) for n in (1, 2)
    }
    return Case(
        "the C++ walk on one core and on two",
        _draw_scan,
        SCAN_SHAPE,
        SCAN_CHECK_SHAPE,
        variants,
        "C++, 1 thread",
    )


def _scan_cuda_case() -> Case:
    variants = {
        name: Variant(partial(longhorn_scan, backend="triton", update=update), _scan_oracle(update), torch.bfloat16)
        for name, update in {"Triton": "diagonal", "Triton exact": "exact"}.items()
    }
    shape = {"batch": 8, "seqlen": 2048, "d_inner": 4096, "d_state": 16}
    return Case("the recurrence, its skip and gate", _draw_scan, shape, SCAN_CHECK_SHAPE, variants, "Triton")


def _scan_oracle(update: str) -> Op:
    return partial(longhorn_scan, backend="reference", update=update)


def _scan_cpp(update: str = "diagonal", **inputs: Any) -> Any:
    if not cpu_cpp.available():
        raise RuntimeError("the C++ variants need a compiler: install g++ or clang++, or set $CXX")
    return longhorn_scan(**inputs, update=update, backend="cpu")


def _scan_torch(**inputs: Any) -> Any:
    with mock.patch.object(cpu_cpp, "available", return_value=False):
        return longhorn_scan(**inputs, backend="cpu")


def _draw_scan(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    batch, seqlen, d_inner, d_state = shape.values()
    streams = dict.fromkeys(("u", "dt", "z"), (batch, seqlen, d_inner))
    rows = dict.fromkeys(("q", "k"), (batch, seqlen, d_state))
    return _normal(streams | rows | {"D": (d_inner,), "dt_bias": (d_inner,)}, generator)


# ---- the small ops ---------------------------------------------------------------------------------------
def _conv_case() -> Case:
    def draw(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        batch, seqlen, d_inner, d_conv = shape.values()
        shapes = {"x": (batch, seqlen, d_inner), "weight": (d_inner, d_conv), "bias": (d_inner,)}
        return _normal(shapes, generator)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width, channels = weight.shape[1], x.shape[2]
        out = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
        return F.silu(out[..., : x.shape[1]]).mT

    return Case(
        "depthwise causal convolution and SiLU, channels last",
        draw,
        {"batch": 4, "seqlen": 512, "d_inner": 512, "d_conv": 4},
        {"batch": 2, "seqlen": 77, "d_inner": 45, "d_conv": 4},
        {
            "F.conv1d": Variant(plain, plain),
            "ours": Variant(partial(causal_conv1d, activation="silu"), plain),
        },
        baseline="F.conv1d",
    )


def _norm_case() -> Case:
    def draw(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        return _normal({"x": tuple(shape.values()), "weight": (shape["d_model"],)}, generator)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def builtin(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps=1e-5)

    return Case(
        "RMSNorm",
        draw,
        {"tokens": 2048, "d_model": 768},
        {"tokens": 133, "d_model": 45},
        {
            "plain torch": Variant(plain, plain),
            "F.rms_norm": Variant(builtin, plain),
            "ours": Variant(rms_norm, plain),
        },
        baseline="plain torch",
    )


def _loss_case() -> Case:
    def draw(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        tokens, d_model, vocab_size = shape.values()
        inputs = _normal({"hidden": (tokens, d_model), "weight": (vocab_size, d_model)}, generator)
        targets = torch.randint(vocab_size, (tokens,), generator=generator, device=generator.device)
        return {"hidden": inputs["hidden"], "weight": 0.02 * inputs["weight"], "targets": targets}

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")

    return Case(
        "the head's matmul and the summed cross-entropy",
        draw,
        {"tokens": 2048, "d_model": 256, "vocab_size": 32000},
        {"tokens": 301, "d_model": 45, "vocab_size": 333},
        {"all logits": Variant(plain, plain), "ours": Variant(linear_cross_entropy, plain)},
        baseline="all logits",
    )


def _normal(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator, device=generator.device) for name, shape in shapes.items()}
