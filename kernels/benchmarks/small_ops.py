"""The ops around the scan against torch's: short convolution, norm, loss."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmarks.case import Case, Shape, Variant, normal
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm


def conv(shape: Shape, dtype: torch.dtype) -> Case:
    """causal_conv1d with SiLU against F.conv1d."""

    def draw(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        batch, seqlen, d_inner, d_conv = shape.values()
        shapes = {"x": (batch, seqlen, d_inner), "weight": (d_inner, d_conv), "bias": (d_inner,)}
        return normal(shapes, generator)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width, channels = weight.shape[1], x.shape[2]
        out = F.conv1d(x.mT, weight.unsqueeze(1), bias.to(x.dtype), padding=width - 1, groups=channels)
        return F.silu(out[..., : x.shape[1]]).mT

    return Case(
        "depthwise causal convolution and SiLU, channels last",
        draw,
        shape,
        {"batch": 2, "seqlen": 77, "d_inner": 45, "d_conv": 4},
        {
            "F.conv1d": Variant(plain, plain, dtype),
            "ours": Variant(partial(causal_conv1d, activation="silu"), plain, dtype),
        },
        baseline="F.conv1d",
    )


def norm(shape: Shape, dtype: torch.dtype, *, with_residual: bool) -> Case:
    """rms_norm against torch's, where asked with a residual stream in fp32 that x is added to."""

    def draw(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        names = ("x", "residual") if with_residual else ("x",)
        return normal(dict.fromkeys(names, tuple(shape.values())) | {"weight": (shape["d_model"],)}, generator)

    def plain(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        h = x if residual is None else x + residual
        out = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)
        return out if residual is None else (out, h)

    def builtin(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        h = x if residual is None else x + residual
        out = F.rms_norm(h, weight.shape, weight, eps=1e-5).to(x.dtype)
        return out if residual is None else (out, h)

    return Case(
        "RMSNorm after the residual's addition in fp32" if with_residual else "RMSNorm",
        draw,
        shape,
        {"tokens": 133, "d_model": 45},
        {
            "plain torch": Variant(plain, plain, dtype),
            "F.rms_norm": Variant(builtin, plain, dtype),
            "ours": Variant(rms_norm, plain, dtype),
        },
        baseline="plain torch",
        wide=("residual",),
    )


def loss(shape: Shape, dtype: torch.dtype) -> Case:
    """linear_cross_entropy against a head that makes all logits."""

    def draw(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        tokens, d_model, vocab_size = shape.values()
        inputs = normal({"hidden": (tokens, d_model), "weight": (vocab_size, d_model)}, generator)
        targets = torch.randint(vocab_size, (tokens,), generator=generator, device=generator.device)
        return {"hidden": inputs["hidden"], "weight": 0.02 * inputs["weight"], "targets": targets}

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")

    return Case(
        "the head's matmul and the summed cross-entropy",
        draw,
        shape,
        {"tokens": 301, "d_model": 45, "vocab_size": 333},
        {
            "all logits": Variant(plain, plain, dtype),
            "ours": Variant(linear_cross_entropy, plain, dtype),
        },
        baseline="all logits",
    )
