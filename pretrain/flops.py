"""Floating-point operations of training, counted from the model's shapes: what MFU is measured in.

Per token, forward and backward, with N_matmul the weights that a token is multiplied with:

    flops = 6·N_matmul + n_layer·mixing

N_matmul: every linear of each layer, and the head, tied or not. Looking up an embedding is no matmul. A multiply-add
is two operations; the backward has two matmuls for the forward's one. Mixing is what a mixer does between tokens:

    Longhorn    d_inner·d_state·(7 + 15), exact update 7 + 12          (DESIGN §2)
      forward     k·S and its difference to u (exact: its sum over n) 2, eps·k 1, S += 2, Σ S·q 2
      backward    g = G + dy·q 2, g·k 1, deps 2, du 1, dk = Σ_d eps·(g·r − gk·S₋) 5,
                  G = g − eps·k·gk 2, dq 2
        exact     g 2, gk = Σ_n g·k 2, dk 4, G 2, dq 2 (r and gk, and so deps and du, have no n)
    Mamba       d_inner·d_state·(7 + 14)                               (kernels/selective_scan/README.md)
      forward     Δ·A 1, its exponential 1, a·S + (Δ·u)·B 3, Σ S·C 2
      backward    g = G + dy·C 2, G = g·a 1, h = G·S₋ 1, Σ h·A 2, Σ g·B 2, dB 2, dC 2, dA 2
    GLA         key_dim·value_dim / n_head·(5 + 9)                     (arXiv 2312.06635)
      forward     a·S + k·v 3, Σ S·q 2
      backward    dq = Σ S·do 2, G = a·G + q·do 3, dk = Σ G·v 2, dv = Σ G·k 2
                  (the decay's gradient needs no state: a sum over time of q·dq − k·dk)
    attention   d_model·(seqlen + 1) / 2·(4 + 8)
      A query sees (seqlen + 1) / 2 keys on average, itself among them. Scores and values are two operations each;
      the backward has four matmuls for these two. Half of the square that a mask throws away is not counted.

Not counted: operations per channel alone (eps, D·u, gates, the decay's logarithm), norms, the short convolution,
activations, rotations, softmax. Windows are counted whole: with data.reset_at_eos attention does less. What a kernel
or activation checkpointing computes twice, and what GLA's chunked form does instead of its recurrence, is work done,
not work that the model needs: `recomputed_flops_per_token` has what is done twice, apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longhorn_layers.config import ModelConfig
from longhorn_layers.model import Block


@dataclass(frozen=True)
class Mixing:
    """Operations between tokens, of one layer for one token.

    `rebuilt`: those of the forward that a kernel's backward does again. `names`: of all, and of what is rebuilt.
    """

    forward: float
    backward: float
    rebuilt: float
    names: tuple[str, str]

    @classmethod
    def each(cls, elements: float, forward: int, backward: int, rebuilt: int, names: tuple[str, str]) -> "Mixing":
        """So many operations for each of `elements`."""
        return cls(elements * forward, elements * backward, elements * rebuilt, names)


SCAN = ("scan", "scan states")


def _longhorn(mixer: Any, d_model: int, seqlen: int) -> Mixing:
    # Rebuilt by the Triton backward: the states of each stretch between kept ones (5: no output), and once more group
    # by group (5), each step's residual (2), and Σ S·q for the gate's gradient (2).
    backward = 12 if mixer.update == "exact" else 15
    return Mixing.each(mixer.expand * d_model * mixer.d_state, 7, backward, 14, SCAN)


def _mamba(mixer: Any, d_model: int, seqlen: int) -> Mixing:
    # Rebuilt: as for Longhorn, without a residual.
    return Mixing.each(mixer.expand * d_model * mixer.d_state, 7, 14, 12, SCAN)


def _gla(mixer: Any, d_model: int, seqlen: int) -> Mixing:
    # Rebuilt by flash-linear-attention: the states, by the recurrence's count.
    states = mixer.expand_k * d_model * mixer.expand_v * d_model / mixer.n_head
    return Mixing.each(states, 5, 9, 3, ("recurrence", "states between chunks"))


def _attention(mixer: Any, d_model: int, seqlen: int) -> Mixing:
    # Rebuilt: the scores, which no fused attention keeps.
    return Mixing.each(d_model * (seqlen + 1) / 2, 4, 8, 2, ("attention, causal", "attention scores"))


MIXING: dict[str, Callable[[Any, int, int], Mixing]] = {
    "longhorn": _longhorn,
    "mamba": _mamba,
    "gla": _gla,
    "attention": _attention,
}


def layer_mixing(model: ModelConfig, seqlen: int) -> Mixing:
    """Of one layer, at windows of `seqlen` tokens.

    Raises ValueError for a mixer whose operations are not counted here.
    """
    name = model.mixer.name
    if name not in MIXING:
        raise ValueError(f"model.mixer.name: the FLOPs of {name!r} are not counted; those of {sorted(MIXING)} are")
    return MIXING[name](model.mixer, model.d_model, seqlen)


def matmul_parameters_per_layer(model: ModelConfig) -> int:
    """Weights of one layer's linears, of the mixer and of the MLP beside it where there is one."""
    with torch.device("meta"):
        block = Block(model)
    return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))


def head_parameters(model: ModelConfig) -> int:
    """Weights of the head's matmul, without the vocabulary's padding."""
    return model.vocab_size * model.d_model


def flops_per_token(model: ModelConfig, seqlen: int) -> float:
    """FLOPs to train on one token in windows of `seqlen`, forward and backward, nothing recomputed (formula above).

    Raises ValueError for a mixer whose operations are not counted here.
    """
    return matmul_flops_per_token(model) + mixing_flops_per_token(model, seqlen)


def matmul_flops_per_token(model: ModelConfig) -> float:
    """6·N_matmul, head included."""
    return 6.0 * (model.n_layer * matmul_parameters_per_layer(model) + head_parameters(model))


def mixing_flops_per_token(model: ModelConfig, seqlen: int) -> float:
    """The recurrence of all layers, or their attention's scores and values, forward and backward."""
    mixing = layer_mixing(model, seqlen)
    return float(model.n_layer * (mixing.forward + mixing.backward))


def recomputed_flops_per_token(model: ModelConfig, seqlen: int, activation_checkpointing: bool) -> float:
    """FLOPs done twice: what the mixer's backward rebuilds; with checkpointing, each block's forward."""
    mixing = layer_mixing(model, seqlen)
    rebuilt = float(model.n_layer * mixing.rebuilt)
    if not activation_checkpointing:
        return rebuilt
    return rebuilt + model.n_layer * (2.0 * matmul_parameters_per_layer(model) + mixing.forward)
