"""Random inputs for each op, and each op by backend.

What flows through a layer has the dtype asked for; parameters and states are fp32, as in training. Backend "reference"
is the oracle, in plain torch. Decode steps have no argument for their backend: a GPU's is reached by its module, so
that the interpreter can run it too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kernels import causal_conv1d as conv
from kernels import cross_entropy as head
from kernels import longhorn_scan as longhorn
from kernels import rms_norm as norm
from kernels import selective_scan as selective

Tensors = dict[str, Tensor]
Op = Callable[..., Any]  # what it returns depends on its arguments
# What a scan calls its rows over d_state.
LONGHORN_ROWS, SELECTIVE_ROWS = ("q", "k"), ("B", "C")
PER_TOKEN = ("u", "dt", "z", "x", *LONGHORN_ROWS, *SELECTIVE_ROWS)
IGNORED, PADDING = -100, 119  # a target that counts for nothing; a head's rows that are no words


def _normal(generator: Generator, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _as_slice(tensor: Tensor) -> Tensor:
    """The same numbers in a view of a tensor twice as wide: so lie the halves of a projection's output."""
    return torch.cat([tensor, tensor], -1)[..., tensor.shape[-1] :]


def _bounds(seqlen: int) -> Tensor:
    """cu_seqlens of four documents: one token, about a third, none, the rest."""
    return torch.tensor([0, 1, seqlen // 3, seqlen // 3, seqlen], dtype=torch.int32)


# ---- scans -----------------------------------------------------------------------------------------------
def draw_scan(
    rows: tuple[str, str], generator: Generator, dtype: torch.dtype, batch: int, seqlen: int, d_inner: int, d_state: int
) -> Tensors:
    """As a layer calls it: z and the rows are slices, and there is no state."""
    streams = _normal(generator, dtype, dict.fromkeys(("u", "dt", "z"), (batch, seqlen, d_inner)))
    keys = _normal(generator, dtype, dict.fromkeys(rows, (batch, seqlen, d_state)))
    streams["z"] = _as_slice(streams["z"])
    keys = {name: _as_slice(key) for name, key in keys.items()}
    return streams | keys | _scan_parameters(rows, generator, d_inner, d_state)


def draw_scan_states(
    rows: tuple[str, str], generator: Generator, dtype: torch.dtype, batch: int, seqlen: int, d_inner: int, d_state: int
) -> Tensors:
    """With an initial state, all contiguous."""
    inputs = draw_scan(rows, generator, dtype, batch, seqlen, d_inner, d_state)
    inputs |= {name: t.contiguous() for name, t in inputs.items()}
    return inputs | _normal(generator, torch.float32, {"initial_state": (batch, d_inner, d_state)})


def draw_scan_documents(
    rows: tuple[str, str], generator: Generator, dtype: torch.dtype, batch: int, seqlen: int, d_inner: int, d_state: int
) -> Tensors:
    """With an initial state for each document."""
    bounds = _bounds(seqlen)
    inputs = draw_scan(rows, generator, dtype, batch, seqlen, d_inner, d_state)
    states = _normal(generator, torch.float32, {"initial_state": (len(bounds) - 1, d_inner, d_state)})
    return inputs | states | {"cu_seqlens": bounds}


def _scan_parameters(rows: tuple[str, str], generator: Generator, d_inner: int, d_state: int) -> Tensors:
    parameters = _normal(generator, torch.float32, {"D": (d_inner,), "dt_bias": (d_inner,)})
    if rows == SELECTIVE_ROWS:
        parameters["A"] = -torch.randn(d_inner, d_state, generator=generator).exp()
    return parameters


def longhorn_scan(backend: str, *, update: str, **inputs: Tensor) -> Tensors:
    return _with_states(longhorn.longhorn_scan, inputs, update=update, backend=backend)


def selective_scan(backend: str, **inputs: Tensor) -> Tensors:
    return _with_states(selective.selective_scan, inputs, backend=backend)


def _with_states(op: Op, inputs: Tensors, **options: str | None) -> Tensors:
    """The final state too where an initial one is given."""
    if "initial_state" not in inputs:
        return {"out": op(**inputs, **options)}
    out, state = op(**inputs, **options, return_final_state=True)
    return {"out": out, "final_state": state}


# ---- causal_conv1d ---------------------------------------------------------------------------------------
def draw_conv(generator: Generator, dtype: torch.dtype, batch: int, seqlen: int, d_inner: int, d_conv: int) -> Tensors:
    """As a layer calls it: x is a slice, and there is no state."""
    inputs = _normal(generator, dtype, {"x": (batch, seqlen, d_inner)})
    parameters = _normal(generator, torch.float32, {"weight": (d_inner, d_conv), "bias": (d_inner,)})
    return {"x": _as_slice(inputs["x"])} | parameters


def draw_conv_states(
    generator: Generator, dtype: torch.dtype, batch: int, seqlen: int, d_inner: int, d_conv: int
) -> Tensors:
    inputs = draw_conv(generator, dtype, batch, seqlen, d_inner, d_conv)
    state = _normal(generator, dtype, {"initial_state": (batch, d_inner, d_conv - 1)})
    return inputs | {"x": inputs["x"].contiguous()} | state


def draw_conv_documents(
    generator: Generator, dtype: torch.dtype, batch: int, seqlen: int, d_inner: int, d_conv: int
) -> Tensors:
    bounds = _bounds(seqlen)
    inputs = draw_conv(generator, dtype, batch, seqlen, d_inner, d_conv)
    states = _normal(generator, dtype, {"initial_state": (len(bounds) - 1, d_inner, d_conv - 1)})
    return inputs | states | {"cu_seqlens": bounds}


def causal_conv1d(backend: str, *, activation: str | None, **inputs: Tensor) -> Tensors:
    return _with_states(conv.causal_conv1d, inputs, activation=activation, backend=backend)


# ---- rms_norm --------------------------------------------------------------------------------------------
def draw_norm(generator: Generator, dtype: torch.dtype, tokens: int, d_model: int) -> Tensors:
    """x is small enough for eps to show."""
    x = 0.1 * torch.randn(tokens, d_model, generator=generator)
    return {"x": x.to(dtype)} | _normal(generator, torch.float32, {"weight": (d_model,)})


def draw_norm_residual(generator: Generator, dtype: torch.dtype, tokens: int, d_model: int) -> Tensors:
    residual = _normal(generator, torch.float32, {"residual": (tokens, d_model)})
    return draw_norm(generator, dtype, tokens, d_model) | residual


def rms_norm(backend: str, **inputs: Tensor) -> Tensors:
    op: Op = norm.rms_norm
    if "residual" not in inputs:
        return {"out": op(**inputs, backend=backend)}
    out, hidden = op(**inputs, backend=backend)
    return {"out": out, "hidden": hidden}


# ---- linear_cross_entropy --------------------------------------------------------------------------------
def draw_loss(generator: Generator, dtype: torch.dtype, tokens: int, d_model: int, padded_vocab: int) -> Tensors:
    """A third of the targets is ignored."""
    inputs = _normal(generator, torch.float32, {"hidden": (tokens, d_model), "weight": (padded_vocab, d_model)})
    inputs["weight"] *= d_model**-0.5
    targets = torch.randint(padded_vocab - PADDING, (tokens,), generator=generator)
    targets[::3] = IGNORED
    return {name: t.to(dtype) for name, t in inputs.items()} | {"targets": targets}


def linear_cross_entropy(backend: str, *, hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensors:
    """By thirds of the tokens."""
    words = len(weight) - PADDING
    if backend == "reference":
        losses = head.cross_entropy(F.linear(hidden, weight), targets, vocab_size=words)
        return {"loss": losses.sum() if reduction == "sum" else losses}
    op: Op = head.linear_cross_entropy
    options = {"vocab_size": words, "chunk_size": -(-len(hidden) // 3), "reduction": reduction, "backend": backend}
    return {"loss": op(hidden, weight, targets, **options)}


def sharded_cross_entropy(backend: str, *, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensors:
    """The head's rows as two ranks hold them, one after the other: each needs both's statistics."""
    if backend == "reference":
        return linear_cross_entropy(backend, hidden=hidden, weight=weight, targets=targets, reduction="sum")
    parts, words = weight.chunk(2), len(weight) - PADDING
    op: Op = head.linear_cross_entropy

    def loss_of(rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        shard = head.VocabShard(rank * len(parts[0]), gather)
        return op(hidden, parts[rank], targets, vocab_size=words, shard=shard, backend=backend)

    sent: list[Tensor] = []

    def send(statistics: Tensor) -> Tensor:
        sent.append(statistics.clone())
        return statistics.unsqueeze(0)

    with torch.no_grad():
        for rank in range(2):
            loss_of(rank, send)
    first, second = (loss_of(rank, lambda _: torch.stack(sent)) for rank in range(2))
    # Both are the whole loss, each with its part of the gradients.
    return {"loss": first + (second - second.detach())}


# ---- decode steps ----------------------------------------------------------------------------------------
def draw_scan_step(
    rows: tuple[str, str], generator: Generator, dtype: torch.dtype, batch: int, d_inner: int, d_state: int
) -> Tensors:
    inputs = draw_scan(rows, generator, dtype, batch, 1, d_inner, d_state)
    tokens = {name: t.squeeze(1) if name in PER_TOKEN else t for name, t in inputs.items()}
    return tokens | _draw_states(generator, batch, d_inner, d_state)


def draw_conv_step(generator: Generator, dtype: torch.dtype, batch: int, d_inner: int, d_conv: int) -> Tensors:
    inputs = draw_conv(generator, dtype, batch, 1, d_inner, d_conv)
    return inputs | {"x": inputs["x"].squeeze(1)} | _draw_states(generator, batch, d_inner, d_conv - 1)


def _draw_states(generator: Generator, batch: int, d_inner: int, width: int) -> Tensors:
    """States of two sequences more than there are tokens, whose second is none of theirs."""
    indices = torch.randperm(batch + 2, generator=generator)[:batch].int()
    indices[1] = -1
    return _normal(generator, torch.float32, {"state": (batch + 2, d_inner, width)}) | {"state_indices": indices}


def longhorn_step(backend: str, *, update: str, **inputs: Tensor) -> Tensors:
    if backend == "reference":
        return _step_by_scan(longhorn_scan, inputs, update=update)
    step: Op = longhorn.longhorn_step
    if backend == "triton":
        from kernels.longhorn_scan.triton import triton_step as step
    return {"out": step(**inputs, update=update), "state": inputs["state"]}


def selective_step(backend: str, **inputs: Tensor) -> Tensors:
    if backend == "reference":
        return _step_by_scan(selective_scan, inputs)
    step: Op = selective.selective_step
    if backend == "triton":
        from kernels.selective_scan.triton import triton_step as step
    return {"out": step(**inputs), "state": inputs["state"]}


def causal_conv1d_step(backend: str, **inputs: Tensor) -> Tensors:
    if backend == "reference":
        return _step_by_scan(causal_conv1d, inputs, activation="silu")
    if backend == "triton":
        from kernels.causal_conv1d.triton import causal_conv1d_step_triton

        out = causal_conv1d_step_triton(**inputs, silu=True)
    else:
        out = conv.causal_conv1d_step(**inputs, activation="silu")
    return {"out": out, "state": inputs["state"]}


def _step_by_scan(scan: Callable[..., Tensors], inputs: Tensors, **options: str) -> Tensors:
    """What a step should give: the scan of one token, from the states that it advances."""
    state, indices = inputs["state"], inputs["state_indices"].long()
    used = indices >= 0
    given = {name: t[used].unsqueeze(1) if name in PER_TOKEN else t for name, t in inputs.items()}
    del given["state"], given["state_indices"]
    found = scan("reference", **given, initial_state=state[indices[used]], **options)
    out = state.new_zeros(len(indices), state.shape[1])
    out[used] = found["out"].squeeze(1)
    return {"out": out, "state": state.index_copy(0, indices[used], found["final_state"])}
