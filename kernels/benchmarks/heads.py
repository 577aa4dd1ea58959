"""The baselines' ops over heads: softmax attention and gated linear attention."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from kernels.benchmarks.case import Bar, Case, Op, Shape, Variant, normal
from kernels.gla import gla

CPU_ATTENTION = {"batch": 4, "seqlen": 512, "n_head": 4, "head_dim": 64}
CPU_GLA = {"batch": 4, "seqlen": 512, "n_head": 4, "d_k": 32, "d_v": 64}
# Layers of the 1.3B LLaMA and of the 350M GLA.
CUDA_ATTENTION = {"batch": 8, "seqlen": 2048, "n_head": 32, "head_dim": 64}
CUDA_GLA = {"batch": 8, "seqlen": 2048, "n_head": 4, "d_k": 128, "d_v": 256}


def softmax_attention(device: str) -> Case:
    """All scores at once against torch's kernels and flash-attn's."""
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    oracle: Op = partial(attention, backend="reference")
    variants = {
        "all scores": Variant(oracle, oracle, dtype),
        "sdpa": Variant(partial(attention, backend="sdpa"), oracle, dtype),
    }
    if on_gpu:
        variants["flash-attn"] = Variant(partial(attention, backend="flash"), oracle, dtype, needs="flash_attn")
    shape = CUDA_ATTENTION if on_gpu else CPU_ATTENTION
    check_shape = {"batch": 2, "seqlen": 77, "n_head": 3, "head_dim": 40}
    return Case("causal softmax attention", _draw_attention, shape, check_shape, variants, "all scores")


def gated_linear_attention(device: str) -> Case:
    """The loop against the chunked form and flash-linear-attention's kernels."""
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    oracle: Op = partial(gla, backend="reference")
    variants = {
        "unbind loop": Variant(oracle, oracle, dtype),
        "chunked": Variant(partial(gla, backend="chunked"), oracle, dtype),
    }
    if on_gpu:
        variants["flash-linear-attention"] = Variant(partial(gla, backend="fla"), oracle, dtype, needs="fla")
    return Case(
        "gated linear attention",
        _draw_gla,
        CUDA_GLA if on_gpu else CPU_GLA,
        {"batch": 2, "seqlen": 77, "n_head": 3, "d_k": 16, "d_v": 24},
        variants,
        "unbind loop",
        bars=(Bar("chunked", "unbind loop", 3.0),),
        wide=("log_decay",),
    )


def _draw_attention(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    return normal(dict.fromkeys("qkv", tuple(shape.values())), generator)


def _draw_gla(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Decays as the layer starts with: logsigmoid / 16."""
    *rest, d_k, d_v = shape.values()
    drawn = normal({"q": (*rest, d_k), "k": (*rest, d_k), "v": (*rest, d_v), "log_decay": (*rest, d_k)}, generator)
    return drawn | {"log_decay": F.logsigmoid(drawn["log_decay"]) / 16}
