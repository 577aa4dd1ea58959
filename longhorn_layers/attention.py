"""Causal softmax attention with rotary positions (arXiv 2104.09864), as in LLaMA."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.attention import attention
from longhorn_layers.config import AttentionConfig


@dataclass
class AttentionState:
    """Keys and values of all tokens so far: (batch, room, n_head, head_dim), of which the first `length` are."""

    length: int = 0
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new tokens, rotated; returns all of them. Room is doubled: a token costs no copy of the rest."""
        start, self.length = self.length, self.length + keys.shape[1]
        if self.length > (self.keys.shape[1] if start else 0):
            self.keys, self.values = (
                self._grown(old, new, start) for old, new in ((self.keys, keys), (self.values, values))
            )
        self.keys[:, start : self.length] = keys
        self.values[:, start : self.length] = values
        return self.keys[:, : self.length], self.values[:, : self.length]

    def _grown(self, old: Tensor, new: Tensor, used: int) -> Tensor:
        batch, _, heads, head_dim = new.shape
        grown = new.new_empty(batch, max(self.length, 2 * used), heads, head_dim)
        if used:
            grown[:, :used] = old[:, :used]
        return grown


class AttentionMixer(nn.Module):
    """(batch, seqlen, d_model) → (batch, seqlen, d_model).

    The number of heads is read off the activations, so that a tensor-parallel plan may keep some on each rank. Raises
    ValueError where head_dim does not divide d_model, or is odd.
    """

    def __init__(self, config: AttentionConfig, d_model: int, residual_writes: int) -> None:
        super().__init__()
        if d_model % config.head_dim or config.head_dim % 2:
            raise ValueError(f"model.mixer.head_dim={config.head_dim} must be even and divide model.d_model={d_model}")
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.div_(residual_writes**0.5)

    def forward(
        self, hidden: Tensor, *, cu_seqlens: Tensor | None = None, state: AttentionState | None = None
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden).unflatten(-1, (-1, self.head_dim)) for project in projections)
        start = 0 if state is None else state.length
        cos, sin = self._rotation(start, hidden.shape[1], hidden.device, cu_seqlens)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if state is not None:
            k, v = state.append(k, v)
        return self.out_proj(attention(q, k, v, cu_seqlens=cu_seqlens).flatten(-2))

    def _rotation(
        self, start: int, seqlen: int, device: torch.device, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin (seqlen, 1, head_dim) of each token's place in its document times each frequency, fp32."""
        places = torch.arange(start, start + seqlen, device=device)
        if cu_seqlens is not None:
            document = torch.bucketize(places, cu_seqlens[1:], right=True)
            places = places - cu_seqlens[document]
        exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angles = places[:, None].float() * self.rope_theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def new_state(self, batch_size: int) -> AttentionState:
        """Nothing yet: room for keys and values comes with the first tokens, of `batch_size` texts."""
        return AttentionState()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim/2}) by its angle; x (batch, seqlen, n_head, head_dim), computed in fp32."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
