"""The language model: reads top to bottom, knows one device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import linear_cross_entropy
from longhorn_layers.config import ModelConfig
from longhorn_layers.mlp import SwiGLU
from longhorn_layers.norm import RMSNorm
from longhorn_layers.registry import build_mixer


class Block(nn.Module):
    """A norm and a mixer, and where the model has one a norm and a SwiGLU; the residual stream stays fp32.

    What is added to the stream is added where the next norm reads the sum anyway: (residual, update) → (residual +
    update, mixer(norm(residual + update))). There is no update before the first block.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = build_mixer(config)
        self.mlp: SwiGLU | None = None
        if config.d_ff:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = SwiGLU(config.d_model, config.d_ff, config.residual_writes)

    def forward(
        self, residual: Tensor, update: Tensor | None, cu_seqlens: Tensor | None = None, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        dtype = _matmul_dtype(residual)
        normed, residual = self.norm(residual, update, dtype)
        update = self.mixer(normed, cu_seqlens=cu_seqlens, state=state)
        if self.mlp is not None:
            normed, residual = self.mlp_norm(residual, update, dtype)
            update = self.mlp(normed)
        return residual, update


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """What a linear would cast x to: norms write that dtype themselves."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


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

    Parameters: `embedding.weight`, `blocks.{i}.{norm.weight, mixer.*, mlp_norm.weight, mlp.*}`, `norm.weight`, and
    `head.weight` where it is not tied to the embedding. `activation_checkpointing` recomputes each block in the
    backward.
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
        embedded = self.embedding(input_ids)
        residual, update = embedded.to(torch.promote_types(embedded.dtype, torch.float32)), None
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and state is None and torch.is_grad_enabled():
                residual, update = checkpoint(block, residual, update, cu_seqlens, use_reentrant=False)
            else:
                residual, update = block(residual, update, cu_seqlens, None if state is None else state.layers[i])
        hidden, _ = self.norm(residual, update)
        return self.head(hidden, targets, reduction)

    def new_state(self, batch_size: int) -> DecodeState:
        """The state before any token."""
        return DecodeState([block.mixer.new_state(batch_size) for block in self.blocks])


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, padded vocabulary included; counted on the meta device, without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config).parameters())
