"""FLOPs by formula against what torch counts, what the kernels' references do, and numbers made by hand."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import longhorn_layers.attention
import longhorn_layers.gla
import longhorn_layers.longhorn
import longhorn_layers.mamba
from kernels.attention import attention
from kernels.gla import gla
from kernels.longhorn_scan import longhorn_scan
from kernels.selective_scan import selective_scan
from longhorn_layers.config import (
    AttentionConfig,
    GLAConfig,
    LonghornConfig,
    MambaConfig,
    MixerConfig,
    ModelConfig,
)
from longhorn_layers.model import LanguageModel
from pretrain.flops import (
    flops_per_token,
    head_parameters,
    layer_mixing,
    matmul_flops_per_token,
    matmul_parameters_per_layer,
    mixing_flops_per_token,
    recomputed_flops_per_token,
)

CONTEXT = 2048
LARGE = ModelConfig(d_model=2048, n_layer=48)
# d_inner 128, dt_rank 4; 4 heads of 8 keys and 16 values; 4 heads of 16.
SMALL = ModelConfig(vocab_size=256, d_model=64, n_layer=2)
MODELS = {
    "longhorn": SMALL,
    "exact-32": replace(SMALL, mixer=LonghornConfig(update="exact", d_state=32)),
    "mamba": replace(SMALL, mixer=MambaConfig()),
    "gla": replace(SMALL, mixer=GLAConfig(), d_ff=96),
    "llama": replace(SMALL, mixer=AttentionConfig(head_dim=16), d_ff=160),
}
WEIGHTS = {
    "longhorn": 3 * 64 * 128 + 128 * (4 + 2 * 16) + 4 * 128,
    "exact-32": 3 * 64 * 128 + 128 * (4 + 2 * 32) + 4 * 128,
    "mamba": 3 * 64 * 128 + 128 * (4 + 2 * 16) + 4 * 128,
    "gla": 2 * 64 * 32 + 3 * 64 * 64 + 64 * 16 + 16 * 32 + 3 * 64 * 96,
    "llama": 4 * 64 * 64 + 3 * 64 * 160,
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_layers_linears(name: str) -> None:
    assert matmul_parameters_per_layer(MODELS[name]) == WEIGHTS[name]


@pytest.fixture
def elementwise_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What mixers do between tokens, without a matmul and with a gradient for every input."""

    def scan(u: Tensor, dt: Tensor, *others: Tensor, z: Tensor, **_: Any) -> Tensor:
        return u * dt * z * sum(x.sum() for x in others)

    def heads(q: Tensor, k: Tensor, v: Tensor, *decay: Tensor, **_: Any) -> Tensor:
        return v * (q.sum() + k.sum() + sum(x.sum() for x in decay))

    monkeypatch.setattr(longhorn_layers.longhorn, "longhorn_scan", scan)
    monkeypatch.setattr(longhorn_layers.mamba, "selective_scan", scan)
    monkeypatch.setattr(longhorn_layers.gla, "gla", heads)
    monkeypatch.setattr(longhorn_layers.attention, "attention", heads)


def counted(config: ModelConfig, tokens: Tensor) -> int:
    """By torch, of a step forward and backward."""
    model = LanguageModel(config)
    # autocast: the counter doesn't know the in-place matmul that sums the head's gradient in fp32.
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("elementwise_mixing")
def test_matmul_flops_are_those_torch_counts(name: str) -> None:
    tokens = torch.randint(0, 256, (2, 24))
    assert counted(MODELS[name], tokens) == matmul_flops_per_token(MODELS[name]) * tokens.numel()


def test_attention_is_the_causal_half_of_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain form has all (24²) scores, a mask throws away those of later keys; 24·25/2 are left."""
    monkeypatch.setattr(longhorn_layers.attention, "attention", partial(attention, backend="reference"))
    config, tokens = MODELS["llama"], torch.randint(0, 256, (2, 24))
    full_squares = counted(config, tokens) - matmul_flops_per_token(config) * tokens.numel()
    causal = mixing_flops_per_token(config, seqlen=24) * tokens.numel()
    assert causal == full_squares * (24 * 25 / 2) / 24**2
    assert mixing_flops_per_token(config, 4 * 24 + 3) == 4 * mixing_flops_per_token(config, 24)


class StateOperations(TorchDispatchMode):
    """Counts operations on tensors of `elements` numbers: one for each that is computed or summed."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in {"mul", "add", "sub", "exp", "addcmul"} and out.numel() == self.elements:
            self.count += self.elements * (2 if name == "addcmul" else 1)
        elif name == "sum" and args[0].numel() == self.elements:
            self.count += self.elements
        elif name in {"mm", "bmm"}:
            self.count += 2 * args[0].numel() * args[1].shape[-1]
        return out


def reference_inputs(name: str, seqlen: int) -> tuple[Any, int]:
    """A reference to call, and the numbers in its state: of a layer of MODELS[name]."""

    def random(*shape: int) -> Tensor:
        return torch.rand(1, seqlen, *shape)

    if name == "gla":
        q, k, decay, v = random(4, 8), random(4, 8), -random(4, 8), random(4, 16)
        return partial(gla, q, k, v, decay, backend="reference"), 4 * 8 * 16
    states = MODELS[name].mixer.d_state  # type: ignore[attr-defined]
    u, dt, left, right = random(128), random(128), random(states), random(states)
    if name == "mamba":
        return partial(selective_scan, u, dt, -torch.rand(128, states), left, right, backend="reference"), 128 * states
    update = MODELS[name].mixer.update  # type: ignore[attr-defined]
    return partial(longhorn_scan, u, dt, left, right, update=update, backend="reference"), 128 * states


@pytest.mark.parametrize("name", ["longhorn", "exact-32", "mamba", "gla"])
def test_recurrences_forward_is_what_the_reference_computes(name: str) -> None:
    run, elements = reference_inputs(name, seqlen=11)
    with StateOperations(elements) as operations:
        run()
    assert operations.count == 11 * layer_mixing(MODELS[name], seqlen=11).forward


@pytest.mark.parametrize(
    ("mixer", "each"),
    [
        (LonghornConfig(), 22),
        (LonghornConfig(update="exact"), 19),
        (MambaConfig(), 21),
    ],
)
def test_flops_of_the_1p3b_scans(mixer: MixerConfig, each: int) -> None:
    model = replace(LARGE, mixer=mixer)
    weights = 48 * (3 * 2048 * 4096 + 4096 * 160 + 128 * 4096) + 32000 * 2048
    assert matmul_flops_per_token(model) == 6 * weights
    assert mixing_flops_per_token(model, CONTEXT) == 48 * 4096 * 16 * each
    assert flops_per_token(model, CONTEXT) == 6 * weights + 48 * 4096 * 16 * each
    assert flops_per_token(model, 16 * CONTEXT) == flops_per_token(model, CONTEXT)
    untied = replace(model, tie_embeddings=False)
    assert flops_per_token(untied, CONTEXT) == flops_per_token(model, CONTEXT)


def test_flops_of_the_1p3b_longhorn() -> None:
    assert flops_per_token(LARGE, CONTEXT) == 8_049_917_952


def test_flops_of_a_1p3b_llama() -> None:
    """24 layers of 2048 with heads of 64: attention does 7% of the work at 2048, and more than half at 32768."""
    model = ModelConfig(mixer=AttentionConfig(), d_model=2048, n_layer=24, d_ff=5504)
    weights = 24 * (4 * 2048**2 + 3 * 2048 * 5504) + head_parameters(model)
    pairs = CONTEXT * (CONTEXT + 1) / 2
    one_pair = 32 * 64 * (2 + 2) * 3  # heads × head_dim × (score, value), once forward and twice backward
    assert flops_per_token(model, CONTEXT) == 6 * weights + 24 * one_pair * pairs / CONTEXT
    assert mixing_flops_per_token(model, CONTEXT) / flops_per_token(model, CONTEXT) == pytest.approx(0.0737, abs=1e-3)
    assert mixing_flops_per_token(model, 32768) > flops_per_token(model, 32768) / 2


def test_flops_of_gla() -> None:
    """4 heads of 256 keys and 512 values: (5 + 9) for each number of their state."""
    model = ModelConfig(mixer=GLAConfig(), d_model=2048, n_layer=24, d_ff=5504)
    assert mixing_flops_per_token(model, CONTEXT) == 24 * 4 * 256 * 512 * 14


def test_recomputation_is_apart_and_has_no_head() -> None:
    model = ModelConfig(vocab_size=256, d_model=64, n_layer=3)
    states, weights = 3 * 128 * 16, 3 * 128 * (3 * 64 + 36 + 4)
    assert recomputed_flops_per_token(model, 128, activation_checkpointing=False) == 14 * states
    assert recomputed_flops_per_token(model, 128, True) == 14 * states + 2 * weights + 7 * states


def test_an_uncounted_mixer_is_an_error() -> None:
    model = ModelConfig(mixer=MixerConfig(name="other"))
    for count in (mixing_flops_per_token, flops_per_token):
        with pytest.raises(ValueError, match=r"model\.mixer\.name.*'other'"):
            count(model, CONTEXT)
