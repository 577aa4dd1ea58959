"""The language model: reads top to bottom, knows one device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from longhorn_layers.config import ModelConfig
from longhorn_layers.registry import build_mixer


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, its maths and weight in fp32."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class Block(nn.Module):
    """residual + mixer(norm(residual)); the residual stream stays fp32 whatever the mixer computes in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = build_mixer(config)

    def forward(self, residual: Tensor, cu_seqlens: Tensor | None = None, state: Any = None) -> Tensor:
        return residual + self.mixer(self.norm(residual), cu_seqlens=cu_seqlens, state=state)


class LMHead(nn.Module):
    """Hidden states to logits, or straight to the loss without ever holding all logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        linear = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.weight = linear.weight

    def forward(self, hidden: Tensor, targets: Tensor | None = None, reduction: str = "sum") -> Tensor:
        if targets is None:
            logits = nn.functional.linear(hidden, self.weight)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits[..., self.vocab_size :] = -torch.inf
            return logits
        return linear_cross_entropy(hidden, self.weight, targets, vocab_size=self.vocab_size, reduction=reduction)


@dataclass
class DecodeState:
    """Each layer's state after the tokens seen so far."""

    layers: list[Any]


class LanguageModel(nn.Module):
    """Tokens to logits or loss.

    Parameters: `embedding.weight`, `blocks.{i}.norm.weight`, `blocks.{i}.mixer.*`, `norm.weight`, and `head.weight`
    where it is not tied to the embedding. `activation_checkpointing` recomputes each block in the backward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = LMHead(config)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        state: DecodeState | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Logits, or the loss of `targets`.

        Args:
            input_ids: (batch, seqlen) int64.
            targets: (batch, seqlen) int64; −100 is not counted.
            cu_seqlens: int32 (n_seq + 1,): bounds of documents in a batch of 1; layers start anew at each.
            state: what the tokens before these left; updated in place (no gradient flows into it).
            reduction: "sum" or "none", of the losses.

        Returns:
            fp32 logits (batch, seqlen, padded_vocab_size), the padding's −inf; with targets the summed loss, or
            the loss per token (batch, seqlen) with "none", fp32, in nats.
        """
        hidden = self.embedding(input_ids)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, cu_seqlens, use_reentrant=False)
            else:
                hidden = block(hidden, cu_seqlens, None if state is None else state.layers[i])
        return self.head(self.norm(hidden), targets, reduction)

    def new_state(self, batch_size: int) -> DecodeState:
        """The state before any token."""
        return DecodeState([block.mixer.new_state(batch_size) for block in self.blocks])


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, padded vocabulary included; counted on the meta device, without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config).parameters())
