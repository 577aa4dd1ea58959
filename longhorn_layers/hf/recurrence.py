"""How a recurrence goes over time and where its states are kept, for the models of this folder.

Shapes: B batch, L tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

# Tokens between the states that a recurrence keeps for its backward pass; the others are recomputed.
SCAN_CHUNK = 64


def widen(x: Tensor) -> Tensor:
    """x in at least fp32: what the residual stream, the norms and the state are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def kernels_run(x: Tensor, one_token: bool = False) -> bool:
    """Whether the training repository's kernels, where they are imported, are the fast way for x (B, L, ...).

    one_token: whether the one in question is made for L = 1; a CPU does one token faster in PyTorch than by others.
    Compilers and exporters trace plain PyTorch.
    """
    on_gpu = x.is_cuda and x.dtype != torch.float64
    on_cpu = x.device.type == "cpu" and (one_token or x.shape[1] > 1)
    return (on_gpu or on_cpu) and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def walk_in_chunks(
    walk: Callable[..., tuple[Tensor, Tensor]], streams: Sequence[Tensor], state: Tensor
) -> tuple[Tensor, Tensor]:
    """`walk(*streams, state) -> (y, state)` over any length; a backward pass finds a state per chunk, not per token.

    streams, y: (B, L, ...).
    """
    if torch.is_grad_enabled() and streams[0].shape[1] > SCAN_CHUNK:
        walk = partial(checkpoint, walk, use_reentrant=False, preserve_rng_state=False)
    outputs = []
    for chunk in zip(*(stream.split(SCAN_CHUNK, 1) for stream in streams), strict=True):
        y, state = walk(*chunk, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def read_states(cache: Cache | None, layer_index: int) -> tuple[Tensor | None, Tensor | None]:
    """A layer's last convolution inputs and its recurrent state; None before the first token.

    They are the cache's own tensors, to be updated in place, unless a gradient will need what they hold now.
    """
    if cache is None:
        return None, None
    layer: Any = cache.layers[layer_index]
    conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
    if torch.is_grad_enabled():
        conv, recurrent = (state if state is None else state.clone() for state in (conv, recurrent))
    return conv, recurrent


def write_states(cache: Cache | None, layer_index: int, conv: Tensor | None, recurrent: Tensor) -> None:
    """Puts a layer's states, which may be the cache's own, into the cache; no gradient goes with them."""
    if cache is None:
        return
    layer: Any = cache.layers[layer_index]
    if layer.recurrent_states[0] is None:
        layer.lazy_initialization(conv_states=conv, recurrent_states=recurrent)
        layer.has_previous_state[0] = True
    for held, new in ((layer.conv_states[0], conv), (layer.recurrent_states[0], recurrent)):
        if new is not None and new is not held:
            held.copy_(new.detach())
