"""The exports' code with this repository's kernels against the same in plain PyTorch (test_hf.py, test_hf_gla.py)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longhorn_layers.hf import modeling_gla, modeling_longhorn, recurrent_lm
from longhorn_layers.hf.recurrence import SCAN_CHUNK

KINDS = ("diagonal", "exact", "gla")
TOLERANCE = 1e-5
ModelMaker = Callable[..., PreTrainedModel]


def make_ids(batch: int, seqlen: int) -> Tensor:
    return torch.randint(67, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def assert_near(got: Tensor, expected: Tensor, name: str = "") -> None:
    assert (got - expected).norm() <= TOLERANCE * expected.norm(), name


def states(model: PreTrainedModel, **inputs: object) -> tuple[list[Tensor], object]:
    """The logits and every layer's states, and the cache."""
    outputs = model(use_cache=True, **inputs)
    layers = outputs.cache_params.layers
    held = [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]
    return [outputs.logits, *(state.clone() for state in held if state is not None)], outputs.cache_params


@pytest.fixture
def step_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU plain PyTorch takes most steps of one token: let the kernels, which do so on a GPU."""
    for module in (modeling_longhorn, modeling_gla, recurrent_lm):
        monkeypatch.setattr(module, "kernels_run", lambda x, one_token=False: True)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel is called."""
    counts: dict[str, int] = {}

    def count(module: object, name: str) -> None:
        kernel = getattr(module, name)
        counts[name] = 0

        def counted(*arguments: object, **options: object) -> object:
            counts[name] += 1
            return kernel(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(recurrent_lm, "fused_rms_norm")
    count(modeling_gla, "fused_gla")
    for name in ("causal_conv1d", "causal_conv1d_step"):
        count(modeling_longhorn.conv_kernels, name)
    for name in ("longhorn_scan", "longhorn_step"):
        count(modeling_longhorn.scan_kernels, name)
    return counts


def in_plain_pytorch(request: pytest.FixtureRequest, compute: Callable[[], object]) -> object:
    request.getfixturevalue("plain_pytorch")
    return compute()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_padding_and_steps(
    kind: str,
    make_model: ModelMaker,
    left_padded: Callable[..., tuple[Tensor, Tensor]],
    step_by_kernel: None,
    request: pytest.FixtureRequest,
) -> None:
    model = make_model(kind)
    ids, mask = left_padded([make_ids(1, seqlen)[0] for seqlen in (3, SCAN_CHUNK + 9, 40)])
    pieces = [ids.shape[1] - 8, 5, 1, 1, 1]  # a prompt, a chunk, steps

    def run() -> list[Tensor]:
        cache, computed, seen = None, [], 0
        for piece in ids.split(pieces, 1):
            seen += piece.shape[1]
            tensors, cache = states(model, input_ids=piece, attention_mask=mask[:, :seen], cache_params=cache)
            computed += tensors
        return computed

    fast, plain = run(), in_plain_pytorch(request, run)
    assert len(fast) == len(pieces) * (1 + 3 * (1 if kind == "gla" else 2))
    for got, expected in zip(fast, plain, strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_cache", [False, True])
def test_gradients(kind: str, from_cache: bool, make_model: ModelMaker, request: pytest.FixtureRequest) -> None:
    model, ids = make_model(kind, num_hidden_layers=2), make_ids(2, SCAN_CHUNK + 20)
    direction = torch.randn(2, 20 if from_cache else ids.shape[1], 67, generator=torch.Generator().manual_seed(1))

    def run() -> list[Tensor]:
        cache, inputs = None, ids
        if from_cache:
            with torch.no_grad():
                cache = model(ids[:, :SCAN_CHUNK], use_cache=True).cache_params
            inputs = ids[:, SCAN_CHUNK:]
        logits = model(inputs, cache_params=cache, use_cache=from_cache).logits
        return list(torch.autograd.grad((logits * direction).sum(), list(model.parameters())))

    fast, plain = run(), in_plain_pytorch(request, run)
    for (name, _), got, expected in zip(model.named_parameters(), fast, plain, strict=True):
        assert expected.norm() > 0, name
        assert (got - expected).norm() <= 2 * TOLERANCE * expected.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind: str, make_model: ModelMaker, request: pytest.FixtureRequest) -> None:
    model, ids = make_model(kind), make_ids(2, 9)

    def run() -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)

    fast, plain = run(), in_plain_pytorch(request, run)
    assert torch.equal(fast, plain)
    assert len(fast[0, 9:].unique()) > 3


@torch.no_grad()
def test_which_kernels_a_prompt_and_a_token_on_a_cpu_go_through(
    make_model: ModelMaker, kernel_calls: dict[str, int]
) -> None:
    cache = make_model()(make_ids(1, 9), use_cache=True).cache_params
    expected = {"fused_rms_norm": 4, "causal_conv1d": 3, "longhorn_scan": 3}  # 3 layers and a last norm
    assert {name: calls for name, calls in kernel_calls.items() if calls} == expected
    make_model()(make_ids(1, 1), cache_params=cache, use_cache=True)
    expected |= {"causal_conv1d_step": 3, "longhorn_step": 3}  # and no norm: PyTorch's is as fast for one token
    assert {name: calls for name, calls in kernel_calls.items() if calls} == expected
    make_model("gla")(make_ids(1, 9))
    assert kernel_calls["fused_gla"] == 3
    assert kernel_calls["fused_rms_norm"] == 4 + 3 * 3 + 1  # before mixer and MLP, and of the heads


def test_tracing_sees_plain_pytorch(make_model: ModelMaker, kernel_calls: dict[str, int]) -> None:
    model = make_model().requires_grad_(False)
    exported = torch.export.export(model, (make_ids(1, 5),), {"use_cache": False, "return_dict": False}, strict=False)
    assert not any(kernel_calls.values())
    assert_near(exported.module()(make_ids(1, 5), use_cache=False, return_dict=False)[0], model(make_ids(1, 5)).logits)
