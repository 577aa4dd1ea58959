"""The convolution in plain torch: the oracle for fast ones, and what runs where there is none."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` with the final state; `bounds`: cu_seqlens, whose documents run in turn."""
    if bounds is None:
        return _convolve(x, weight, bias, initial_state, silu)
    n_seq = len(bounds) - 1
    states = [None] * n_seq if initial_state is None else initial_state.split(1)
    documents = [
        _convolve(x[:, first:end], weight, bias, state, silu)
        for (first, end), state in zip(pairwise(bounds), states, strict=True)
    ]
    outs, final_states = zip(*documents, strict=True)
    return torch.cat(outs, dim=1), torch.cat(final_states)


@torch.no_grad()
def causal_conv1d_step_reference(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """`causal_conv1d_step`."""
    if state_indices is not None:
        used = state_indices >= 0
        rows = state_indices[used].long()
        out, selected = torch.zeros_like(x), state[rows]
        out[used] = causal_conv1d_step_reference(selected, x[used], weight, bias, None, silu)
        state[rows] = selected
        return out
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    window = torch.cat([state.to(sums), x.to(sums).unsqueeze(-1)], dim=-1)
    state.copy_(window[..., 1:])
    out = (window * weight.to(sums)).sum(-1)
    if bias is not None:
        out += bias.to(sums)
    return (functional.silu(out) if silu else out).to(x.dtype)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    (batch, seqlen, d_inner), d_conv = x.shape, weight.shape[1]
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = x.new_zeros(batch, d_inner, d_conv - 1)
    inputs = torch.cat([initial_state.transpose(1, 2), x], dim=1).to(sums)
    # A multiply-add per tap: F.conv1d would transpose to channels-first and back, and is no faster.
    out = torch.zeros_like(weight[:, 0], dtype=sums) if bias is None else bias.to(sums)
    for tap, column in enumerate(weight.to(sums).unbind(1)):
        out = torch.addcmul(out, inputs[:, tap : tap + seqlen], column)
    out = functional.silu(out) if silu else out
    return out.to(x.dtype), inputs[:, seqlen:].transpose(1, 2).to(x.dtype)
